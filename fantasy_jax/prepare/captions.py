"""Captions from a side file or from text files, and the videos that they belong to.

Published datasets spell both differently. HQ-OpenHumanVid's `OpenHumanVid_part_*.csv` has `path`, such as
`clips/part_001/f6/05/NAME` for the file `part_001/f6/05/NAME.mp4`, and `caption`; OpenVid-1M's CSV file has
`video`, a file name without its folder, and `caption`; the Hugging Face hub's convention is `file_name`.
"""

import csv
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from fantasy_jax.errors import ConfigError
from fantasy_jax.files import parse_json
from fantasy_jax.prepare.scan import SUFFIXES

VIDEO_COLUMNS = ("file_name", "path", "video", "video_path", "video_name")
"""Columns that name the video; a side file has one of them, or the first of these counts."""
CAPTION_COLUMNS = ("prompt", "caption", "text")
"""Columns that hold the caption; a side file has exactly one of them."""
_KINDS = "a .csv, .jsonl or .json file, or a folder of .txt files"
_SUGGESTIONS = 20
"""Rows without a video for which a similar name is searched, which takes long among many."""


def read_captions(path: str | Path) -> dict[str, str]:
    """Reads captions by the name of their video, as the side file spells it; blank ones are left out.

    Args:
        path: A CSV file, JSON lines, or a JSON list of objects, with one of `VIDEO_COLUMNS` and one of
            `CAPTION_COLUMNS`; a JSON object of captions by name; or a folder of .txt files, each of which
            holds the caption of the video of its name.

    Raises:
        ConfigError: The file is missing or of another kind, lacks a column, has two captions for a video, or
            holds none.
    """
    captions: dict[str, str] = {}
    for where, name, caption in _named(Path(path)):
        if caption and captions.setdefault(name, caption) != caption:
            raise ConfigError(f"{path}: {where} has a second caption for {name}")
    if not captions:
        raise ConfigError(f"--captions={path}: holds no caption; it must be {_KINDS}")
    return captions


def _named(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields where a caption is found, the name of its video, and the caption."""
    columns: tuple[str, str] | None = None
    for where, row in _rows(path):
        if not isinstance(row, Mapping):
            raise ConfigError(f"{path}: {where} is not an object with named values")
        columns = columns or _columns(path, [name for name in row if name])
        name, caption = (row.get(column) for column in columns)
        if not name or not isinstance(name, str) or not isinstance(caption, str | None):
            raise ConfigError(f"{path}: {where} has no text as {' or '.join(columns)}")
        yield where, name, (caption or "").strip()


def _columns(path: Path, found: Collection[str]) -> tuple[str, str]:
    """The columns of video and caption among those of the first row."""
    videos = [name for name in VIDEO_COLUMNS if name in found]
    captions = [name for name in CAPTION_COLUMNS if name in found]
    listed = ", ".join(found) or "none"
    if not videos:
        raise ConfigError(f"{path}: no column names the video ({', '.join(VIDEO_COLUMNS)}); found {listed}")
    if len(captions) != 1:
        raise ConfigError(
            f"{path}: must have one column of captions ({', '.join(CAPTION_COLUMNS)}); found {listed}"
        )
    return videos[0], captions[0]


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields where a row is found, and the row."""
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*.txt")):
                name = file.relative_to(path).with_suffix("").as_posix()
                yield str(file), {"file_name": name, "caption": file.read_text(encoding="utf-8-sig")}
        elif suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                yield from ((f"line {reader.line_num}", row) for row in reader)
        elif suffix == ".jsonl":
            with path.open(encoding="utf-8-sig") as file:
                lines = ((i, line) for i, line in enumerate(file, 1) if line.strip())
                yield from ((f"line {i}", parse_json(line)) for i, line in lines)
        elif suffix == ".json":
            content = parse_json(path.read_text(encoding="utf-8-sig"))
            if isinstance(content, dict):
                content = [{"file_name": name, "caption": caption} for name, caption in content.items()]
            if not isinstance(content, list):
                raise ConfigError(f"{path}: must hold a list of objects, or captions by name of the video")
            yield from ((f"entry {i}", row) for i, row in enumerate(content, 1))
        else:
            raise ConfigError(f"--captions={path}: must be {_KINDS}")
    except OSError as error:
        raise ConfigError(f"--captions={path}: cannot be read ({error.strerror})") from error
    except (csv.Error, ValueError) as error:  # UnicodeDecodeError, too
        raise ConfigError(f"--captions={path}: is damaged; it must be {_KINDS} ({error})") from error


def match_captions(
    captions: Mapping[str, str], names: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Assigns captions to videos.

    A caption belongs to the video of exactly its name. Where there is none, suffixes do not count, and the
    shorter of the two paths must be the end of the longer one, for one video only.

    Args:
        captions: By the name that the side file gives.
        names: Names of the videos.

    Returns:
        Captions by video, and a message for each name of the side file that matches no video.
    """
    matched = {name: captions[name] for name in names if name in captions}
    others = defaultdict(list)
    for name in sorted(set(names) - matched.keys()):
        others[_parts(name)[-1:]].append(name)
    messages: dict[str, str] = {}
    for spelled in sorted(captions.keys() - matched.keys()):
        parts = _parts(spelled)
        fitting = [name for name in others[parts[-1:]] if _same_end(parts, _parts(name))]
        if len(fitting) > 1:
            messages[spelled] = f"may belong to {fitting[0]} or {fitting[1]}; give the path below --input"
        elif fitting and matched.setdefault(fitting[0], captions[spelled]) != captions[spelled]:
            messages[spelled] = f"has another caption for {fitting[0]}; give the path below --input"
        elif not fitting:
            near = get_close_matches(spelled, names, n=1) if len(messages) < _SUGGESTIONS else []
            messages[spelled] = "has a caption, but there is no such video" + (
                f"; did you mean {near[0]}?" if near else ""
            )
    return matched, messages


def _parts(name: str) -> tuple[str, ...]:
    """Folders and name of a video, without its suffix."""
    path = PurePosixPath(name.replace("\\", "/"))
    return (path.with_suffix("") if path.suffix.lower() in SUFFIXES else path).parts


def _same_end(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]
