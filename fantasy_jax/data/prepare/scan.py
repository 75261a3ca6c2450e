"""Which videos there are, and what the side file says of them."""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from tqdm import tqdm

from fantasy_jax.config import ConfigError

SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm", ".wmv")
"""Of the files that are taken for videos."""


@dataclass(frozen=True)
class Source:
    """A video file.

    Attributes:
        path: Where it lies.
        name: Its path below the input folder, with slashes.
        digest: SHA-256 of its bytes.
    """

    path: str
    name: str
    digest: str


def scan(folder: str | Path) -> tuple[list[Source], dict[str, str]]:
    """All videos below a folder, each content once, ordered by name.

    Returns:
        The videos; and those left out, each with what it is the same as, or why it cannot be read.

    Raises:
        ConfigError: There is no such folder, or no video in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"--input={folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ConfigError(f"--input={folder}: holds no video; its name may end in {', '.join(SUFFIXES)}")
    first: dict[str, Source] = {}
    left_out: dict[str, str] = {}
    for path in tqdm(paths, desc="Looking for videos", unit="file", disable=len(paths) < 256):
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
            first[digest] = Source(str(path), name, digest)
    return list(first.values()), left_out


def read_captions(path: str | Path) -> dict[str, str]:
    """Prompts by file name: a CSV file's columns `file_name` and `prompt`, or these keys of JSON lines.

    Raises:
        ConfigError: The file is missing, is neither, or lacks a column; or names a file twice.
    """
    captions: dict[str, str] = {}
    for line, row in _rows(Path(path)):
        cells = [row.get(key) for key in ("file_name", "prompt")] if isinstance(row, dict) else [None]
        if not all(isinstance(cell, str) for cell in cells):
            raise ConfigError(f"{path}: line {line} has no file_name and prompt")
        if captions.setdefault(row["file_name"], row["prompt"]) != row["prompt"]:
            raise ConfigError(f"{path}: line {line} names {row['file_name']} again, with another prompt")
    return captions


def _rows(path: Path) -> Iterator[tuple[int, object]]:
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise ConfigError(f"--captions={path}: give a .csv or .jsonl file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file)
                yield from ((reader.line_num, row) for row in reader)
            else:
                yield from ((i, json.loads(line)) for i, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise ConfigError(f"--captions={path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ConfigError(f"--captions={path}: not a text file of captions ({error})") from error


def unmatched(captions: dict[str, str], names: set[str]) -> dict[str, str]:
    """Rows of a side file that name no video, each with what to do."""
    lines = {}
    for name in sorted(captions.keys() - names):
        near = get_close_matches(name, names, n=1)
        lines[name] = "the side file names it, but there is no such video" + (
            f"; is it {near[0]}?" if near else ""
        )
    return lines
