"""The small speech encoder learns what the mouth does, at the right moment."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fantasy_jax.config import ConfigError
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fantasy_jax.training.speech import LipReader, SpeechStageConfig, hear, speech_loss

SAMPLES, FRAMES = 10_880, 17


class Clock(Wav2Vec2Model):
    """In place of an encoder: its only feature is when it heard what it heard, in samples."""

    def __init__(self):
        self.config = Wav2Vec2Config(hidden_size=1)

    def __call__(self, waveform):
        count = (waveform.shape[1] - 400) // 320 + 1
        return jnp.broadcast_to(320.0 * jnp.arange(count)[:, None] + 200, (len(waveform), count, 1))


@pytest.fixture
def reader():
    reader = LipReader(Clock(), rngs=nnx.Rngs(0))
    reader.head.kernel[...] = jnp.array([[1.0, 2.0]])
    reader.head.bias[...] = jnp.array([0.0, 1.0])
    return reader


def test_movements_are_read_in_the_middle_of_each_frame(reader):
    read = np.asarray(reader(jnp.zeros((2, SAMPLES)), FRAMES))
    assert read.shape == (2, FRAMES, 2)
    middles = (np.arange(FRAMES) + 0.5) * SAMPLES / FRAMES
    middles = np.minimum(middles, 320 * 32 + 200)  # of the last frame, what was heard last
    np.testing.assert_allclose(read[0, :, 0], middles, rtol=1e-5)
    np.testing.assert_allclose(read[1, :, 1], 2 * middles + 1, rtol=1e-5)


def test_the_loss_is_the_error_of_both(reader):
    true = np.asarray(reader(jnp.zeros((2, SAMPLES)), FRAMES))
    batch = {"waveform": np.zeros((2, SAMPLES), np.float32), "movements": true + np.float32([1.0, 2.0])}
    value, errors = speech_loss(reader, batch, jnp.zeros(()))
    np.testing.assert_allclose(value, 2.5, rtol=1e-3)
    np.testing.assert_allclose([errors["opening"], errors["rounding"]], [1.0, 4.0], rtol=1e-3)


def test_what_the_ear_needs_of_a_record():
    rng = np.random.default_rng(0)
    record = {
        "sound": rng.integers(-3000, 3000, SAMPLES).astype(np.int16),
        "opening": rng.uniform(size=FRAMES).astype(np.float32),
        "rounding": rng.uniform(size=FRAMES).astype(np.float32),
        "video": np.zeros((FRAMES, 4, 4, 3), np.uint8),
    }
    heard = hear(record, rng)
    assert set(heard) == {"waveform", "movements"}
    assert abs(heard["waveform"].mean()) < 1e-4
    assert abs(heard["waveform"].std() - 1) < 1e-3
    np.testing.assert_array_equal(heard["movements"][:, 1], record["rounding"])


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="steps and batch_size must be at least 1"):
        SpeechStageConfig(steps=0)
