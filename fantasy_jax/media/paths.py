"""Paths of files that are read and written."""

import os
from pathlib import Path

from fantasy_jax.errors import MediaError

VIDEO_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov"}
"""Formats of videos that are written."""


def check_exists(path: str | Path, kind: str) -> None:
    """Raises a MediaError unless the path is that of a file."""
    if not Path(path).is_file():
        raise MediaError(f"{path}: no such {kind}")


def file_url(path: str | Path) -> str:
    """The path in a form that FFmpeg takes for a file and no address, as it does `10:15.mp4` and `pipe:1`."""
    return os.path.abspath(path)


def video_format(path: str | Path) -> str:
    """FFmpeg's name of the format of a video that is written, by the suffix of its name.

    Raises:
        MediaError: The suffix is not one of `VIDEO_FORMATS`.
    """
    try:
        return VIDEO_FORMATS[Path(path).suffix.lower()]
    except KeyError:
        raise MediaError(f"{path}: the name of a video must end in {', '.join(VIDEO_FORMATS)}") from None
