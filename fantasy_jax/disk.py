"""Free space of a disk, and a disk that is full, whichever library meets it and whatever it raises then."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fantasy_jax.errors import WeightsError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class FullDiskError(OSError):
    """A disk is full, or a quota is used up; the message is one line and says where."""


def free_bytes(folder: Path) -> int:
    """Returns the free space for a folder, which need not exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def check_space(folder: Path, needed: int, free: int) -> None:
    """Raises a WeightsError if `needed` bytes exceed the `free` bytes for a folder."""
    if needed > free:
        gib = f"needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        raise WeightsError(f"{folder}: not enough disk space; {gib}")


@contextmanager
def full_disk_reported(folder: str | Path) -> Iterator[None]:
    """Raises whatever a full disk makes libraries raise as a `FullDiskError`.

    Args:
        folder: Folder of the run, whose complete files are kept and used again.
    """
    try:
        yield
    except FullDiskError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        raise FullDiskError(
            f"{folder}: {reason}; what is complete is kept: make room, and run the same command to resume"
        ) from error


def _reason(error: BaseException | None) -> str | None:
    """The system's message if this error, or one that it came from, is of a full disk.

    Libraries in C++ quote the message in errors of their own.
    """
    while error is not None:
        for number in _FULL:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return os.strerror(number).lower()
        error = error.__cause__ or error.__context__
    return None
