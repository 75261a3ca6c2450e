"""Output files and folders: checked before work begins, written whole or not at all, locked while in use."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fantasy_jax.errors import ConfigError, MediaError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")
"""Names of what a process has open. Where that is a file, it is not replaced, because it stays open."""


def parse_json(text: str | bytes) -> Any:
    """`json.loads` whose only error is ValueError, also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_outputs(outputs: Iterable[str | Path | None], inputs: Iterable[str | Path | None] = ()) -> None:
    """Checks the output files of a command before any work is done; paths that are None or empty are skipped.

    Raises:
        ConfigError: An output is a file that is read, or that another output is written to.
        MediaError: An output cannot be written.
    """
    written = [path for path in outputs if path]
    check_separate([path for path in inputs if path], written)
    for path in written:
        check_writable(path)


def check_writable(path: str | Path) -> None:
    """Creates the folder of an output file and checks that it is writable, before any work is done.

    Raises:
        MediaError: The folder cannot be created or written to, the name is too long, `path` is a folder, or
            it is a file that is write-protected.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise MediaError(f"{path}: is a folder; give the name of a file")
        if _exists(path) and not os.access(path, os.W_OK):
            raise MediaError(f"{path}: is write-protected; choose another name")
        if not is_stream(path):
            partial = _partial(path)
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            partial.unlink()
    except (OSError, ValueError) as error:
        if isinstance(error, MediaError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: cannot be written ({reason}); choose another place") from error


def check_separate(inputs: Iterable[str | Path], outputs: Iterable[str | Path]) -> None:
    """Checks that no output would replace an input or another output, under whatever name.

    An input that is a folder stands for all files in it. Devices and pipes are not replaced, and may be named
    several times.

    Raises:
        ConfigError: An output is a file that is read, or that another output is written to.
    """
    inputs = list(inputs)
    used = {_identity(path): f"the input {path}" for path in inputs}
    folders = [os.path.realpath(path) for path in inputs if os.path.isdir(path)]
    for path in outputs:
        if is_stream(path):
            continue
        inside = [
            x for x in folders if os.path.exists(path) and Path(os.path.realpath(path)).is_relative_to(x)
        ]
        other = used.get(_identity(path)) or (inside and f"a file of the input {inside[0]}")
        if other:
            raise ConfigError(f"{path}: would overwrite {other}; choose another name")
        used[_identity(path)] = f"the output {path}"


def _identity(path: str | Path) -> tuple[int, int] | str:
    """The same for every name of a file: other spellings, links, and other case where it does not matter."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return os.path.realpath(path) if "\0" not in str(path) else str(path)
    return status.st_dev, status.st_ino


def _exists(path: str | Path) -> bool:
    """Whether there is a file; OSError if that cannot be found out, as for a name that is too long."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_stream(path: str | Path) -> bool:
    """Whether a path is a device or a pipe, or a file that this process has open."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    opened = os.path.abspath(path).startswith(_STREAMS)
    return opened or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file that replaces `path` on success, and is removed on failure.

    It lies beside the file, so that the file is there whole or not at all. Where `path` is a link, the file
    that it points to is replaced. What is written to a device or a pipe is copied there at the end.

    The temporary path is absolute, and its name is ASCII: libraries take names such as `10:15.mp4` for
    addresses.

    Raises:
        MediaError: The file cannot be written.
    """
    path = Path(path)
    check_writable(path)
    try:
        if is_stream(path):
            with tempfile.TemporaryDirectory() as folder:
                partial = Path(folder) / "output"
                yield partial
                with partial.open("rb") as source, path.open("ab") as target:
                    shutil.copyfileobj(source, target)
            return
        partial = _partial(path)
        try:
            yield partial
            partial.replace(os.path.realpath(path))
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror or error})") from error


def _partial(path: Path) -> Path:
    """The temporary file of an output: beside the file that a link points to."""
    target = Path(os.path.realpath(path))
    name = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    return target.with_name(f".{name}.{os.getpid()}.partial")


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Locks a folder, which is created if needed, for one run at a time.

    The operating system holds the lock (`flock` on a file `.lock`) and releases it when the process ends,
    however it ends. The file is removed with the lock; that of a process that was killed is taken over. On a
    file system without locks a warning is logged instead.

    Raises:
        ConfigError: Another run has locked the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read() or "another process"
            raise ConfigError(f"{folder}: is in use by {owner}; stop it, or choose another folder") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logging.getLogger(__name__).warning("%s: cannot be locked (%s); run it once only", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            # The run before has just removed the file that was opened here.
            raise ConfigError(f"{folder}: was in use until this moment; start again")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
