"""Every test checks the shapes and types of all signatures at run time."""

import atexit
import inspect
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

from xla_flags import quick_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests of sharding use eight virtual devices; all other tests run on the first of them.
os.environ.setdefault("XLA_FLAGS", quick_flags(8))
# The devices start collectives that do not depend on each other in any order, and block a thread for each:
# with a thread per device, which is XLA's default, they can wait for each other forever.
os.environ.setdefault("NPROC", "32")
# Workers of pytest-xdist and commands that tests start share compiled programs, but not with earlier runs.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fantasy_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest
from jaxtyping import install_import_hook

# The flags are read now; libtpu, which some tests load, and other programs read them from here later.
if os.environ["XLA_FLAGS"] == quick_flags(len(jax.devices())):
    os.environ["XLA_FLAGS"] = quick_flags(len(jax.devices()), libtpu=True)

install_import_hook("fantasy_jax", "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_freed():
    """Frees the programs that a file of tests compiled; those of all files together take several GiB."""
    yield
    jax.clear_caches()


@pytest.fixture
def highest_precision():
    """Matrix products in full float32, on TPUs and GPUs too."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def optimized_sampling(monkeypatch):
    """Samples with programs that LLVM optimizes: hundreds of steps take longer than compiling them."""
    from fantasy_jax.diffusion import sampler
    from fantasy_jax.miniature import held_out

    optimized = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    step = inspect.unwrap(sampler.guided_step)
    monkeypatch.setattr(sampler, "guided_step", optimized(step, static_argnums=(0, 1), donate_argnums=3))
    monkeypatch.setattr(held_out, "_decode", optimized(lambda vae, latents: vae.decode(latents)))


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """A config of the preparation with small sizes, whose paths are relative to the repository."""
    from prepare_fakes import CONFIG

    monkeypatch.chdir(Path(__file__).parent.parent)
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path
