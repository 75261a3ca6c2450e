"""A disk that is full, whichever library meets it and whatever it raises then."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


class FullDiskError(OSError):
    """A disk is full, or a quota is used up; the message is one line and says where."""


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
            f"{folder}: {reason}; what is complete is kept: make room, and run the same command to go on"
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
