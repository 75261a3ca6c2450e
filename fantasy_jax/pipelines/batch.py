"""Several clips in one run, from the rows of a CSV file."""

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fantasy_jax.errors import ConfigError, FantasyError

_COLUMNS = ("image", "audio", "output")
"""Columns that a batch file must have; `prompt` may be missing or empty."""


@dataclass(frozen=True)
class ClipRequest:
    """A clip to generate.

    Attributes:
        image: Path of the portrait, or of the video that is dubbed.
        audio: Paths of the sounds; a row of a batch file has one.
        prompt: What the video shows; empty: the default.
        output: The mp4 to write.
        row: Line of the batch file, for messages; 0 for a clip of the command line.
    """

    image: str
    audio: tuple[str, ...]
    prompt: str
    output: Path
    row: int = 0

    @property
    def outputs(self) -> tuple[Path, Path]:
        """The mp4, and the contact sheet beside it."""
        return self.output, self.output.with_suffix(".png")


def read_batch(path: str | Path) -> list[ClipRequest]:
    """The rows of a CSV file with the columns image, audio, prompt and output.

    Paths are relative to the working directory.

    Raises:
        ConfigError: The file is missing or not CSV, a column or an output is missing, or two rows have one
            output.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"--batch={path}: no such file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader]
            columns = reader.fieldnames or []
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no CSV file in UTF-8 ({error})") from error
    if missing := [name for name in _COLUMNS if name not in columns]:
        raise ConfigError(f"{path}: has no column {missing[0]}; the columns are image, audio, prompt, output")
    if not rows:
        raise ConfigError(f"{path}: has no rows")
    requests: list[ClipRequest] = []
    outputs: dict[Path, int] = {}
    for line, row in rows:
        output = Path((row["output"] or "").strip())
        if not output.name:
            raise ConfigError(f"{path}, line {line}: output is empty")
        key = output.absolute().with_suffix("")
        if key in outputs:
            raise ConfigError(f"{path}, line {line}: {output} is written by line {outputs[key]}, too")
        outputs[key] = line
        image, audio, prompt = ((row.get(name) or "").strip() for name in ("image", "audio", "prompt"))
        requests.append(ClipRequest(image, (audio,) if audio else (), prompt, output, line))
    return requests


def run_batch(requests: Sequence[ClipRequest], run: Callable[[ClipRequest], None]) -> int:
    """Generates clips one after another; a row that fails is named, and the others are generated.

    Args:
        requests: The clips. The error of a single one of the command line is raised.
        run: Generates one.

    Returns:
        The exit code: 2 if any row failed.
    """
    failed = []
    for number, request in enumerate(requests, 1):
        if not request.row:
            run(request)
            continue
        print(f"Clip {number} of {len(requests)}: {request.output}", flush=True)
        try:
            for name in _COLUMNS:
                if not getattr(request, name):
                    raise ConfigError(f"{name} is empty")
            run(request)
        except (FantasyError, OSError) as error:
            failed.append(request.row)
            print(f"line {request.row}: {error}", file=sys.stderr)
    if failed:
        print(f"{len(requests) - len(failed)} of {len(requests)} clips were made", file=sys.stderr)
    return 2 if failed else 0
