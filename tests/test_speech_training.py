"""Regression of mouth movements by the miniature's speech encoder."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature.train_speech_encoder import (
    MouthRegressor,
    SpeechStageConfig,
    speech_example,
    speech_loss,
)
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fantasy_jax.training.optim import OptimizerConfig

SAMPLES, FRAMES = 10_880, 17


class Clock(Wav2Vec2Model):
    """Replaces an encoder: its only feature is the time of the feature, in samples."""

    def __init__(self):
        self.config = Wav2Vec2Config(hidden_size=1)

    def __call__(self, waveform):
        count = (waveform.shape[1] - 400) // 320 + 1
        return jnp.broadcast_to(320.0 * jnp.arange(count)[:, None] + 200, (len(waveform), count, 1))


@pytest.fixture
def regressor():
    regressor = MouthRegressor(Clock(), rngs=nnx.Rngs(0))
    regressor.head.kernel[...] = jnp.array([[1.0, 2.0]])
    regressor.head.bias[...] = jnp.array([0.0, 1.0])
    return regressor


def test_movements_are_predicted_in_the_middle_of_each_frame(regressor):
    predicted = np.asarray(regressor(jnp.zeros((2, SAMPLES)), FRAMES))
    assert predicted.shape == (2, FRAMES, 2)
    middles = (np.arange(FRAMES) + 0.5) * SAMPLES / FRAMES
    middles = np.minimum(middles, 320 * 32 + 200)  # the last frame takes the last feature
    np.testing.assert_allclose(predicted[0, :, 0], middles, rtol=1e-5)
    np.testing.assert_allclose(predicted[1, :, 1], 2 * middles + 1, rtol=1e-5)


def test_speech_loss_is_the_mean_of_both_errors(regressor):
    target = np.asarray(regressor(jnp.zeros((2, SAMPLES)), FRAMES))
    batch = {"waveform": np.zeros((2, SAMPLES), np.float32), "movements": target + np.float32([1.0, 2.0])}
    value, errors = speech_loss(regressor, batch, jnp.zeros(()))
    np.testing.assert_allclose(value, 2.5, rtol=1e-3)
    np.testing.assert_allclose([errors["opening"], errors["rounding"]], [1.0, 4.0], rtol=1e-3)


def test_speech_example_has_normalised_waveform_and_movements():
    rng = np.random.default_rng(0)
    record = {
        "waveform": rng.integers(-3000, 3000, SAMPLES).astype(np.int16),
        "opening": rng.uniform(size=FRAMES).astype(np.float32),
        "rounding": rng.uniform(size=FRAMES).astype(np.float32),
        "video": np.zeros((FRAMES, 4, 4, 3), np.uint8),
    }
    example = speech_example(record, rng)
    assert set(example) == {"waveform", "movements"}
    assert abs(example["waveform"].mean()) < 1e-4
    assert abs(example["waveform"].std() - 1) < 1e-3
    np.testing.assert_array_equal(example["movements"][:, 1], record["rounding"])


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("num_steps", {"num_steps": 0}),
        ("batch_size", {"batch_size": 0}),
        ("batch_size", {"batch_size": 3, "optimizer": OptimizerConfig(grad_accum_steps=2)}),
    ],
)
def test_config_errors(field, settings):
    with pytest.raises(ConfigError, match=field):
        SpeechStageConfig(**settings)
