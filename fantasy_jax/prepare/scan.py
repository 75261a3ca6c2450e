"""Search for videos, and captions from a side file."""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tqdm import tqdm

from fantasy_jax.errors import ConfigError
from fantasy_jax.files import parse_json

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


def read_captions(path: str | Path) -> dict[str, str]:
    """Reads prompts by file name from a CSV file with the columns `file_name` and `prompt`, or JSON lines.

    Raises:
        ConfigError: The file is missing or of another kind, lacks a column, or has two prompts for a video.
    """
    captions: dict[str, str] = {}
    for line, row in _rows(Path(path)):
        cells = [row.get(key) for key in ("file_name", "prompt")] if isinstance(row, dict) else [None]
        if not all(isinstance(cell, str) for cell in cells):
            raise ConfigError(f"{path}: line {line} lacks file_name or prompt")
        if captions.setdefault(row["file_name"], row["prompt"]) != row["prompt"]:
            raise ConfigError(f"{path}: line {line} has a second prompt for {row['file_name']}")
    return captions


def _rows(path: Path) -> Iterator[tuple[int, object]]:
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise ConfigError(f"--captions={path}: must be a .csv or .jsonl file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file)
                yield from ((reader.line_num, row) for row in reader)
            else:
                yield from ((i, parse_json(line)) for i, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise ConfigError(f"--captions={path}: cannot be read ({error.strerror})") from error
    except (csv.Error, ValueError) as error:  # UnicodeDecodeError, too
        raise ConfigError(f"--captions={path}: not a valid .csv or .jsonl file ({error})") from error


def unmatched(captions: dict[str, str], names: set[str]) -> dict[str, str]:
    """Returns a message for each row of a side file that matches no video, with the nearest name."""
    messages = {}
    for name in sorted(captions.keys() - names):
        near = get_close_matches(name, names, n=1)
        messages[name] = "has a caption, but there is no such video" + (
            f"; did you mean {near[0]}?" if near else ""
        )
    return messages
