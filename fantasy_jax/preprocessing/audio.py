"""Preprocessing of waveforms for wav2vec2."""

import numpy as np

from fantasy_jax.typing import Float


def normalise_waveform(waveform: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """Normalises to zero mean and unit variance, in float32.

    Source: transformers, `Wav2Vec2FeatureExtractor`.
    """
    waveform = waveform.astype(np.float32)
    return (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)
