"""Training of the speech encoder: regression of jaw and lip movements from the waveform.

The released wav2vec2 is trained for speech recognition. The small one is trained to predict mouth movements
instead, so that its features represent speech independently of speaker and room.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.config import PositiveInt
from fantasy_jax.data.records import Record
from fantasy_jax.miniature.stage import EncoderStageConfig
from fantasy_jax.models.wav2vec2 import Wav2Vec2Model
from fantasy_jax.preprocessing.audio import normalise_waveform
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float
from fantasy_jax.video import FEATURE_HOP, FEATURE_WINDOW

_MOVEMENTS = ("opening", "rounding")


@dataclass(frozen=True)
class SpeechStageConfig(EncoderStageConfig):
    """Training of the speech encoder.

    Attributes:
        num_steps: Training steps. More of them fit the synthetic voices better and real voices worse.
        batch_size: Clips per step.
        optimizer: The optimizer.
    """

    num_steps: PositiveInt = 1200
    batch_size: PositiveInt = 32
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-3)


class MouthRegressor(nnx.Module):
    """wav2vec2 with a linear head for opening and rounding of the mouth; only used in training."""

    def __init__(self, encoder: Wav2Vec2Model, *, rngs: nnx.Rngs):
        """Adds the head to an encoder."""
        self.encoder = encoder
        self.head = nnx.Linear(encoder.config.hidden_size, len(_MOVEMENTS), rngs=rngs)

    def __call__(self, waveform: Float[Array, "B samples"], num_frames: int) -> Float[Array, "B T 2"]:
        """Opening and rounding in the middle of each of the video frames that the waveform spans."""
        predicted = self.head(self.encoder(waveform))
        times = FEATURE_HOP * np.arange(predicted.shape[1]) + FEATURE_WINDOW / 2
        middles = (np.arange(num_frames) + 0.5) * waveform.shape[1] / num_frames
        weights = np.stack([np.interp(middles, times, one) for one in np.eye(len(times))])
        return jnp.einsum("at,bac->btc", weights, predicted)


def speech_example(record: Record, rng: np.random.Generator) -> Record:
    """Waveform and movements of a clip's record; `rng` is not used."""
    waveform = record["waveform"].astype(np.float32) / 32767
    movements = np.stack([record[name] for name in _MOVEMENTS], axis=1)
    return {"waveform": normalise_waveform(waveform), "movements": movements}


def speech_loss(regressor: MouthRegressor, batch: Batch, keys: Array) -> tuple[Float[Array, ""], Metrics]:
    """Mean squared error of opening and rounding."""
    target = jnp.asarray(batch["movements"])
    predicted = regressor(jnp.asarray(batch["waveform"]), target.shape[1])
    error = jnp.square(predicted - target).mean(axis=(0, 1))
    return error.mean(), dict(zip(_MOVEMENTS, error, strict=True))
