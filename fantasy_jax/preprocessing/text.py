"""Tokenization of prompts. Source: Wan2.1, `wan/modules/tokenizers.py`."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from fantasy_jax.errors import WeightsError
from fantasy_jax.typing import Int

Tokenizer = PreTrainedTokenizerBase


def clean(text: str) -> str:
    """Repairs broken characters, unescapes HTML (twice, as in the official code) and collapses whitespace."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def tokenize(
    prompts: Sequence[str], tokenizer: Tokenizer, *, max_length: int = 512
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
    """Cleans and tokenizes prompts.

    Args:
        prompts: Prompts, not yet cleaned.
        tokenizer: The text encoder's tokenizer.
        max_length: Longer prompts are truncated to this number of tokens.

    Returns:
        Token ids, padded on the right to the longest prompt, and the number of tokens of each prompt.
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
    """Loads the tokenizer in a local folder, such as the official `google/umt5-xxl`; nothing is downloaded.

    Raises:
        WeightsError: The folder is missing or contains no readable tokenizer.
    """
    if not Path(folder).is_dir():
        raise WeightsError(f"{folder}: no such folder; use one that contains a tokenizer")
    # Imports PyTorch where it is installed, which would take a third of the start of every command.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise WeightsError(f"{folder}: contains no readable tokenizer ({reason})") from error


def byte_tokenizer() -> Tokenizer:
    """Returns a tokenizer of bytes with 384 ids, which needs no files; for models trained from scratch."""
    return ByT5Tokenizer()
