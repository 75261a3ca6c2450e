"""The tokenizer of a text encoder that is imported: a folder, files beside the weights, or a part of them."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from fantasy_jax.convert.files import WeightsFile
from fantasy_jax.errors import WeightsError
from fantasy_jax.preprocessing.text import load_tokenizer
from fantasy_jax.weights.detect import Detected

WriteTokenizer = Callable[[Path], object]
"""Writes a tokenizer into a folder, which it creates."""

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
_BESIDE = (".", "tokenizer", "../tokenizer", "google/umt5-xxl")
"""Where published folders have it, relative to the weights."""


def find_tokenizer(found: Detected, path: Path, *, given: Path | None) -> WriteTokenizer | None:
    """Returns what writes the tokenizer of a network; None if it needs none.

    Args:
        found: The network.
        path: Its file or folder.
        given: Folder of the tokenizer; None: it is in the file, or beside it.

    Raises:
        WeightsError: There is none, or it cannot be read.
    """
    source = found.component.download
    if not source.wan_tokenizer:
        return None
    if given is not None:
        load_tokenizer(given)
        return partial(_copy, given)
    specs = found.weights.specs
    if key := next((key for key in specs if key.endswith(source.tokenizer_key)), None):
        write = partial(_write_sentencepiece, found.weights, key)
        with TemporaryDirectory() as folder:
            write(Path(folder) / "tokenizer")
            try:
                load_tokenizer(Path(folder) / "tokenizer")
            except WeightsError as error:
                reason = str(error).rpartition("readable tokenizer ")[2]
                raise WeightsError(
                    f"{path}: its tokenizer cannot be read {reason}; give --tokenizer"
                ) from error
        return write
    folder = path if path.is_dir() else path.parent
    for place in (folder / name for name in _BESIDE):
        if any((place / name).is_file() for name in _FILES):
            load_tokenizer(place)
            return partial(_copy, place)
    raise WeightsError(
        f"{path}: has no tokenizer in it or beside it; give --tokenizer, such as google/umt5-xxl"
    )


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (source / name).is_file():
            shutil.copy(source / name, target)


def _write_sentencepiece(weights: WeightsFile, key: str, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    (target / "spiece.model").write_bytes(weights.read(key).tobytes())
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
