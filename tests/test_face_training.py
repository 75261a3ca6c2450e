"""The small face encoder learns to tell people apart, whatever they do and wherever the box is said to be."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fantasy_jax.config import ConfigError
from fantasy_jax.data.synthetic import SyntheticConfig, records
from fantasy_jax.models.face_encoder import FaceEncoder, FaceEncoderConfig
from fantasy_jax.training.face import FaceStageConfig, TwoFrames, face_loss, start_from_faces

SIZE = 16
ENCODER = FaceEncoderConfig(depths=(1, 1), widths=(8, 12), embedding=10, image_size=SIZE)


@pytest.fixture(scope="module")
def clips():
    return list(records(SyntheticConfig(num_frames=5), "train", 8))


@pytest.fixture
def encoder():
    return FaceEncoder(ENCODER, rngs=nnx.Rngs(0))


def cut(clips, *, jitter=0.04, light=0.15, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([TwoFrames(SIZE, jitter, light)(clip, rng)["faces"] for clip in clips])


def test_two_faces_are_cut_from_each_clip(clips):
    faces = cut(clips)
    assert faces.shape == (8, 2, SIZE, SIZE, 3)
    assert faces.dtype == np.uint8
    assert np.array_equal(faces, cut(clips))
    assert not np.array_equal(faces, cut(clips, seed=1))
    steady = cut(clips, jitter=0.0, light=0.0).astype(int)
    own, other = steady[:, 0] - steady[:, 1], steady[:, 0] - np.roll(steady[:, 1], 1, axis=0)
    assert np.abs(own).mean() < np.abs(other).mean() / 2


def test_norms_start_from_what_faces_give(encoder, clips):
    faces = cut(clips).reshape(-1, SIZE, SIZE, 3)
    start_from_faces(encoder, faces)
    pixels = jnp.asarray(faces, jnp.float32) / 127.5 - 1
    normed = np.asarray(encoder.norm_in(encoder.conv_in(pixels)))
    np.testing.assert_allclose(normed.mean(axis=(0, 1, 2)), 0, atol=0.05)
    np.testing.assert_allclose(normed.std(axis=(0, 1, 2)), 1, atol=0.1)
    before = np.asarray(encoder.norm_in.mean[...])
    encoder(pixels[:2])
    assert np.array_equal(before, encoder.norm_in.mean[...]), "training leaves them as they are"


def test_the_loss_is_low_where_each_finds_its_own(encoder, clips):
    faces = cut(clips)
    start_from_faces(encoder, faces.reshape(-1, SIZE, SIZE, 3))
    same = np.stack([faces[:, 0], faces[:, 0]], axis=1)
    swapped = np.stack([faces[:, 0], np.roll(faces[:, 0], 1, axis=0)], axis=1)
    low, metrics = face_loss(encoder, {"faces": same}, jnp.zeros(()), temperature=0.05)
    high, others = face_loss(encoder, {"faces": swapped}, jnp.zeros(()), temperature=0.05)
    np.testing.assert_allclose(metrics["cosine"], 1, rtol=1e-5)
    assert (float(metrics["found"]), float(others["found"])) == (1.0, 0.0)
    assert low < np.log(8) < high


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="batch_size at least 2"):
        FaceStageConfig(batch_size=1)
