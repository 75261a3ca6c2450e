"""Speech features: what the audio adapter is fed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from fantasy_jax.convert.components import recognise
from fantasy_jax.convert.files import WeightsError, open_weights
from fantasy_jax.data.preprocessing import normalise_waveform
from fantasy_jax.models.layers import run
from fantasy_jax.models.wav2vec2 import Wav2Vec2Model
from fantasy_jax.typing import Array, DType, Float

SAMPLE_RATE = 16_000
"""Of every waveform here, in Hz."""


@runtime_checkable
class SpeechEncoder(Protocol):
    """Turns a waveform of 16 kHz into features at 50 Hz."""

    @property
    def width(self) -> int:
        """Width C of the features."""
        ...

    def __call__(self, waveform: Float[np.ndarray, " samples"]) -> Float[Array, "1 A C"]:
        """Encodes one clip."""
        ...


@dataclass(frozen=True)
class Wav2Vec2Features:
    """wav2vec2's last hidden state, as the released adapter was trained on (fantasy-talking, `utils.py`)."""

    model: Wav2Vec2Model

    @property
    def width(self) -> int:
        """Of the hidden state."""
        return self.model.config.hidden_size

    def __call__(self, waveform: Float[np.ndarray, " samples"]) -> Float[Array, "1 A C"]:
        """Encodes one clip, after the processor's normalisation to zero mean and unit variance."""
        normalised = jnp.asarray(normalise_waveform(waveform))[None]
        return run(self.model, normalised)


def load_wav2vec2(folder: str | Path, *, dtype: DType = jnp.float32) -> Wav2Vec2Features:
    """wav2vec2 from a folder as it is downloaded: config.json and the weights.

    Raises:
        WeightsError: The folder is missing or damaged, or holds another network.
        ConversionError: The weights do not fit their config.json.
    """
    (found, *more) = recognise(open_weights(folder))
    if more or found.component.network is not Wav2Vec2Model:
        raise WeightsError(f"{folder}: holds {found.component.name}, where wav2vec2 is meant")
    return Wav2Vec2Features(found.load(dtype))
