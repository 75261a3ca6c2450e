"""The folder in which JAX keeps compiled programs from one run to the next."""

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax


def keep_compiled_programs() -> None:
    """Makes JAX keep compiled programs, and prints the folder unless the environment names it.

    The folder is that of JAX_COMPILATION_CACHE_DIR, otherwise one in the user's cache folder (XDG_CACHE_HOME,
    or ~/.cache). JAX_ENABLE_COMPILATION_CACHE=false turns it off. A folder that cannot be used costs the time
    of compiling, and nothing else.
    """
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = _default_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is write-protected")
    except (OSError, RuntimeError) as error:  # a RuntimeError where there is no home
        print(f"Compiled programs are not kept ({error}); set JAX_COMPILATION_CACHE_DIR", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    print(f"Compiled programs are kept in {folder} (JAX_COMPILATION_CACHE_DIR)", flush=True)


def _default_folder() -> Path:
    """A folder for each kind of processor: JAX gives a CPU's programs to others, which they crash."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "fantasy_jax", "xla", f"{platform.machine()}-{_processor()}")


def _processor() -> str:
    """A digest of the processor's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # "flags" on x86, "Features" on ARM; elsewhere than on Linux the processor's name
    features = next((x for x in lines if x.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(features.encode()).hexdigest()[:8]
