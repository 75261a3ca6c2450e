"""Search for videos."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fantasy_jax.errors import ConfigError

SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
"""Suffixes of video files."""


@dataclass(frozen=True)
class SourceVideo:
    """A video file.

    Attributes:
        path: Path of the file.
        name: Path relative to the input folder, with slashes.
        digest: SHA-256 of the file's bytes.
    """

    path: str
    name: str
    digest: str


def scan(folder: str | Path) -> tuple[list[SourceVideo], dict[str, str]]:
    """Finds all videos below a folder, each content once, ordered by name.

    Returns:
        The videos, and for each file left out, by name, which video it duplicates or why it is unreadable.

    Raises:
        ConfigError: There is no such folder, or it contains no video.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"--input={folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ConfigError(f"--input={folder}: contains no video; known suffixes are {', '.join(SUFFIXES)}")
    first: dict[str, SourceVideo] = {}
    left_out: dict[str, str] = {}
    for path in tqdm(paths, desc="Scanning videos", unit="file", disable=len(paths) < 256):
        name = path.relative_to(folder).as_posix()
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            left_out[name] = f"cannot be read ({error.strerror})"
            continue
        if digest in first:
            left_out[name] = f"is the same file as {first[digest].name}"
        else:
            first[digest] = SourceVideo(str(path), name, digest)
    return list(first.values()), left_out
