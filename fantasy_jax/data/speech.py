"""Speech features: what the audio adapter is fed. One small interface, two makers."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.data.preprocessing import log_mel, normalise_waveform
from fantasy_jax.models.wav2vec2 import Wav2Vec2Model
from fantasy_jax.typing import Array, Float

SAMPLE_RATE = 16_000
"""Of every waveform here, in Hz."""


@runtime_checkable
class SpeechEncoder(Protocol):
    """Turns a waveform of 16 kHz into features at 50 Hz."""

    def __call__(self, waveform: Float[np.ndarray, " samples"]) -> Float[Array, "1 A C"]:
        """Encodes one clip."""
        ...


@dataclass(frozen=True)
class LogMel:
    """Log-mel bands: no weights needed, enough for the miniature."""

    bands: int

    def __call__(self, waveform: Float[np.ndarray, " samples"]) -> Float[Array, "1 A C"]:
        """Encodes one clip; C is the number of bands."""
        return jnp.asarray(log_mel(waveform, bands=self.bands))[None]


@dataclass(frozen=True)
class Wav2Vec2Features:
    """wav2vec2's last hidden state, as the released adapter was trained on (fantasy-talking, `utils.py`)."""

    model: Wav2Vec2Model

    def __call__(self, waveform: Float[np.ndarray, " samples"]) -> Float[Array, "1 A C"]:
        """Encodes one clip, after the processor's normalisation to zero mean and unit variance."""
        normalised = jnp.asarray(normalise_waveform(waveform))[None]
        return _run(self.model, normalised)


@nnx.jit
def _run(model: Wav2Vec2Model, waveform: Float[Array, "1 samples"]) -> Float[Array, "1 A C"]:
    return model(waveform)
