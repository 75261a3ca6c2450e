"""Output files and folders: checked before work begins, written whole or not at all, locked while in use."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fantasy_jax.errors import ConfigError, MediaError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def check_writable(path: str | Path) -> None:
    """Creates the folder of an output file and checks that it is writable, before any work is done.

    Raises:
        MediaError: The folder cannot be created or written to, the name is too long, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def check_separate(inputs: Iterable[str | Path], outputs: Iterable[str | Path]) -> None:
    """Checks that no output would replace an input or another output, under whatever name.

    Raises:
        ConfigError: An output is a file that is read, or that another output is written to.
    """
    used = {_identity(path): f"the input {path}" for path in inputs}
    for path in outputs:
        if other := used.get(_identity(path)):
            raise ConfigError(f"{path}: would overwrite {other}; choose another name")
        used[_identity(path)] = f"the output {path}"


def _identity(path: str | Path) -> tuple[int, int] | str:
    """The same for every name of a file: other spellings, links, and other case where it does not matter."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file beside `path` that replaces it on success and is removed on failure.

    Raises:
        MediaError: The file cannot be written.
    """
    path = Path(path)
    check_writable(path)
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


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
