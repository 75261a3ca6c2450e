"""Training of the miniature's motion encoder, and the probe of its features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fantasy_jax.miniature.acting import FACTORS
from fantasy_jax.miniature.motion_probe import linear_r2, probe, report
from fantasy_jax.miniature.train_motion_encoder import (
    HEADS,
    READ,
    MotionRegressor,
    MotionStageConfig,
    draw_stills,
    erase_person,
    finish_norms,
    motion_batches,
    motion_loss,
)
from fantasy_jax.models.motion_encoder import MotionEncoder, MotionEncoderConfig
from fantasy_jax.sharding import make_mesh
from fantasy_jax.training.loop import LoopConfig, TrainingTask, train
from fantasy_jax.training.optim import OptimizerConfig

SIZE = 32
ENCODER = MotionEncoderConfig(
    width=16, feature_dim=24, pose_dim=3, eye_dim=4, emotion_dim=8, landmarks=8, depth=1, image_size=SIZE
)
CONFIG = MotionStageConfig(
    num_steps=8, batch_size=64, optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, ema_decay=0.0)
)


@pytest.mark.slow
def test_examples_follow_from_the_step_training_lowers_the_loss_and_norms_are_those_of_faces(tmp_path):
    assert {"shift_x", "shift_y", "roll", "body"} == set(FACTORS) - set(READ)
    examples = partial(motion_batches, SIZE, SIZE, CONFIG)
    arguments = {"batch_size": 64, "num_workers": 0, "seed": 0}
    batches = examples(start=0, **arguments)
    first, second = next(batches), next(batches)
    assert not np.array_equal(first["faces"], second["faces"])
    again = next(examples(start=1, rows=[3, 62], **arguments))
    assert np.array_equal(again["factors"], second["factors"][[3, 62]])
    factors = np.concatenate([first["factors"], second["factors"]])
    np.testing.assert_allclose(factors.std(axis=0), 1, atol=0.3)

    encoder = MotionEncoder(ENCODER, rngs=nnx.Rngs(0))
    regressor = MotionRegressor(encoder, rngs=nnx.Rngs(1))
    task = TrainingTask("motion", regressor, motion_loss, examples, 64, 8, CONFIG.optimizer)
    loop = LoopConfig(num_workers=0, log_every=4, save_every=100)
    trained = train(task, loop, tmp_path, make_mesh(devices=jax.devices()[:1]))
    measure = nnx.jit(lambda model, batch: motion_loss(model, batch, jnp.zeros(())))
    before, after = (measure(model, second) for model in (regressor, trained))
    assert float(after[0]) < 0.9 * float(before[0])
    assert set(after[1]) == {f"{head}/{name}" for head, names in HEADS.items() for name in names}

    finish_norms(trained.encoder, SIZE, seed=0)
    pixels = jnp.asarray(second["faces"], jnp.float32) / 127.5 - 1
    normed = trained.encoder.norm_in(trained.encoder.conv_in(pixels))
    np.testing.assert_allclose(normed.mean(axis=(0, 1, 2)), trained.encoder.norm_in.bias[...], atol=0.2)
    results = probe(trained.encoder, SIZE, fitted=128, measured=64)
    assert set(results) == {*READ, "person"}
    assert report(results).count("\n") == len(results)


@pytest.mark.slow
def test_mouths_hardly_tell_who_it_is_after_erasure():
    encoder = MotionRegressor(MotionEncoder(ENCODER, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)).encoder
    finish_norms(encoder, SIZE, seed=0)
    people = draw_stills([np.random.default_rng([9, i]) for i in range(384)], size=SIZE, crop_size=SIZE)
    numbers = people.numbers()
    numbers = numbers[:, numbers.std(axis=0) > 0]

    def told():
        features = encoder.parts(encoder.face_feature(jnp.asarray(people.crops, jnp.float32) / 127.5 - 1))
        mouth = np.asarray(features.mouth)
        return linear_r2(mouth[:256], numbers[:256], mouth[256:], numbers[256:]).clip(0).mean()

    before = told()
    erase_person(encoder, SIZE, seed=0)
    assert told() < 0.6 * before


def test_linear_r2_tells_what_is_in_features_from_what_is_not():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(600, 3))
    features = np.concatenate([values[:, :2] @ rng.normal(size=(2, 5)), np.ones((600, 1))], axis=1)
    values[:, 1] += rng.normal(size=600)  # half of its variance
    shares = linear_r2(features[:400], values[:400], features[400:], values[400:])
    np.testing.assert_allclose(shares, (1, 0.5, 0), atol=0.12)
