"""Contrastive training of the miniature's face encoder."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature.stage import initialise_norms
from fantasy_jax.miniature.synthetic import SyntheticConfig, records
from fantasy_jax.miniature.train_face_encoder import FacePairs, FaceStageConfig, face_loss
from fantasy_jax.models.face_encoder import FaceEncoder, FaceEncoderConfig
from fantasy_jax.video import VideoConfig

SIZE = 16
ENCODER = FaceEncoderConfig(depths=(1, 1), widths=(8, 12), embedding=10, image_size=SIZE)


@pytest.fixture(scope="module")
def clips():
    video = VideoConfig(height=64, width=64, num_frames=5, fps=25)
    return list(records(SyntheticConfig(), video, "train", 8))


@pytest.fixture
def encoder():
    return FaceEncoder(ENCODER, rngs=nnx.Rngs(0))


def crop_pairs(clips, *, jitter=0.04, light=0.15, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([FacePairs(SIZE, jitter, light)(clip, rng)["faces"] for clip in clips])


def test_face_pairs_are_random_crops_of_one_person(clips):
    faces = crop_pairs(clips)
    assert faces.shape == (8, 2, SIZE, SIZE, 3)
    assert faces.dtype == np.uint8
    assert np.array_equal(faces, crop_pairs(clips))
    assert not np.array_equal(faces, crop_pairs(clips, seed=1))
    exact = crop_pairs(clips, jitter=0.0, light=0.0).astype(int)
    own, other = exact[:, 0] - exact[:, 1], exact[:, 0] - np.roll(exact[:, 1], 1, axis=0)
    assert np.abs(own).mean() < np.abs(other).mean() / 2


def test_norm_statistics_are_those_of_faces_and_stay_fixed(encoder, clips):
    faces = crop_pairs(clips).reshape(-1, SIZE, SIZE, 3)
    initialise_norms(encoder, faces)
    pixels = jnp.asarray(faces, jnp.float32) / 127.5 - 1
    normed = np.asarray(encoder.norm_in(encoder.conv_in(pixels)))
    np.testing.assert_allclose(normed.mean(axis=(0, 1, 2)), 0, atol=0.05)
    np.testing.assert_allclose(normed.std(axis=(0, 1, 2)), 1, atol=0.1)
    before = np.asarray(encoder.norm_in.mean[...])
    encoder(pixels[:2])
    assert np.array_equal(before, encoder.norm_in.mean[...])


def test_face_loss_is_low_for_equal_pairs_and_high_for_swapped_ones(encoder, clips):
    faces = crop_pairs(clips)
    initialise_norms(encoder, faces.reshape(-1, SIZE, SIZE, 3))
    same = np.stack([faces[:, 0], faces[:, 0]], axis=1)
    swapped = np.stack([faces[:, 0], np.roll(faces[:, 0], 1, axis=0)], axis=1)
    low, metrics = face_loss(encoder, {"faces": same}, jnp.zeros(()), temperature=0.05)
    high, swapped_metrics = face_loss(encoder, {"faces": swapped}, jnp.zeros(()), temperature=0.05)
    np.testing.assert_allclose(metrics["cosine"], 1, rtol=1e-5)
    assert (float(metrics["accuracy"]), float(swapped_metrics["accuracy"])) == (1.0, 0.0)
    assert low < np.log(8) < high


@pytest.mark.parametrize(("field", "value"), [("num_steps", 0), ("batch_size", 1)])
def test_config_errors(field, value):
    with pytest.raises(ConfigError, match=field):
        FaceStageConfig(**{field: value})
