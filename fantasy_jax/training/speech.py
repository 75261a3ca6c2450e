"""Training the speech encoder: the waveform to what jaw and lips do while it is spoken.

The real wav2vec2 was trained to tell which letters are said. A small one that learns how the mouth moves
comes out likewise: with features in which speech is easy to read, whoever speaks, in whatever room.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.config import ConfigError
from fantasy_jax.data.preprocessing import FEATURE_HOP, FEATURE_WINDOW, normalise_waveform
from fantasy_jax.data.records import Record
from fantasy_jax.models.wav2vec2 import Wav2Vec2Model
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float

_MOVEMENTS = ("opening", "rounding")


@dataclass(frozen=True)
class SpeechStageConfig:
    """How the speech encoder is trained.

    Attributes:
        steps: How long. More of them fit the synthetic voices better and real ones worse.
        batch_size: Clips in a batch.
        optimizer: How parameters follow.
    """

    steps: int = 1200
    batch_size: int = 32
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3)

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1:
            raise ConfigError("steps and batch_size must be at least 1")


class LipReader(nnx.Module):
    """wav2vec2 with one more layer, that tells opening and rounding; only training needs it."""

    def __init__(self, encoder: Wav2Vec2Model, *, rngs: nnx.Rngs):
        """Puts the layer on top of an encoder."""
        self.encoder = encoder
        self.head = nnx.Linear(encoder.config.hidden_size, len(_MOVEMENTS), rngs=rngs)

    def __call__(self, waveform: Float[Array, "B samples"], frames: int) -> Float[Array, "B T 2"]:
        """Opening and rounding in the middle of each of the video frames that the sound spans."""
        read = self.head(self.encoder(waveform))
        heard = FEATURE_HOP * np.arange(read.shape[1]) + FEATURE_WINDOW / 2
        middles = (np.arange(frames) + 0.5) * waveform.shape[1] / frames
        shares = np.stack([np.interp(middles, heard, one) for one in np.eye(len(heard))])
        return jnp.einsum("at,bac->btc", shares, read)


def hear(record: Record, rng: np.random.Generator) -> Record:
    """Of a clip's record what the ear needs; chance has no part in it."""
    waveform = record["sound"].astype(np.float32) / 32767
    movements = np.stack([record[name] for name in _MOVEMENTS], axis=1)
    return {"waveform": normalise_waveform(waveform), "movements": movements}


def speech_loss(reader: LipReader, batch: Batch, keys: Array) -> tuple[Float[Array, ""], Metrics]:
    """Mean square error of opening and rounding."""
    true = jnp.asarray(batch["movements"])
    error = jnp.square(reader(jnp.asarray(batch["waveform"]), true.shape[1]) - true).mean(axis=(0, 1))
    return error.mean(), dict(zip(_MOVEMENTS, error, strict=True))
