"""Prompts to token ids, as the official code does it. Source: Wan2.1, `wan/modules/tokenizers.py`."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from fantasy_jax.convert.files import WeightsError
from fantasy_jax.typing import Int

Tokenizer = PreTrainedTokenizerBase


def clean(text: str) -> str:
    """Mends broken characters, undoes HTML escapes (twice, as the official code), collapses white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def tokenize(
    prompts: Sequence[str], tokenizer: Tokenizer, *, max_length: int = 512
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
    """Token ids padded on the right to the longest of the prompts, and how many of each are real.

    Args:
        prompts: What to tokenize; cleaned here.
        tokenizer: The text encoder's own.
        max_length: Longer prompts are cut.
    """
    encoded = tokenizer(
        [clean(prompt) for prompt in prompts],
        max_length=max_length,
        truncation=True,
        padding=True,
        padding_side="right",
        return_tensors="np",
    )
    lengths = encoded["attention_mask"].sum(axis=1)
    return encoded["input_ids"].astype(np.int32), lengths.astype(np.int32)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a local folder, such as `google/umt5-xxl` in the official one; nothing is fetched.

    Raises:
        WeightsError: The folder is missing or damaged, or holds no tokenizer.
    """
    if not Path(folder).is_dir():
        raise WeightsError(f"{folder}: no such folder; give one that holds a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise WeightsError(f"{folder}: holds no tokenizer that can be read ({reason})") from error


def byte_tokenizer() -> Tokenizer:
    """Bytes as tokens, 384 of them: needs no files, for models trained from nothing."""
    return ByT5Tokenizer()
