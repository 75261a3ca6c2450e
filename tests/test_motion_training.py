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
    correlations,
    draw_stills,
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
    loss = partial(motion_loss, person_weight=CONFIG.person_weight)
    task = TrainingTask("motion", regressor, loss, examples, 64, 8, CONFIG.optimizer)
    loop = LoopConfig(num_workers=0, log_every=4, save_every=100)
    trained = train(task, loop, tmp_path, make_mesh(devices=jax.devices()[:1]))
    measure = nnx.jit(lambda model, batch: loss(model, batch, jnp.zeros(())))
    before, after = (measure(model, second) for model in (regressor, trained))
    assert float(after[0]) < 0.9 * float(before[0])
    person = after[1]["person"]
    unweighted = nnx.jit(partial(motion_loss, person_weight=0.0))(trained, second, jnp.zeros(()))
    assert float(after[0] - unweighted[0]) == pytest.approx(CONFIG.person_weight * float(person), rel=1e-3)
    assert set(after[1]) == {f"{head}/{name}" for head, names in HEADS.items() for name in names} | {"person"}

    finish_norms(trained.encoder, SIZE, seed=0)
    pixels = jnp.asarray(second["faces"], jnp.float32) / 127.5 - 1
    normed = trained.encoder.norm_in(trained.encoder.conv_in(pixels))
    np.testing.assert_allclose(normed.mean(axis=(0, 1, 2)), trained.encoder.norm_in.bias[...], atol=0.2)
    results = probe(trained.encoder, SIZE, fitted=128, measured=64)
    assert set(results) == {*READ, "person"}
    assert report(results).count("\n") == len(results)


def test_linear_r2_tells_what_is_in_features_from_what_is_not():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(600, 3))
    features = np.concatenate([values[:, :2] @ rng.normal(size=(2, 5)), np.ones((600, 1))], axis=1)
    values[:, 1] += rng.normal(size=600)  # half of its variance
    shares = linear_r2(features[:400], values[:400], features[400:], values[400:])
    np.testing.assert_allclose(shares, (1, 0.5, 0), atol=0.12)


def test_colors_vary_from_face_to_face():
    generators = [[np.random.default_rng([i]) for i in range(4)] for _ in range(2)]
    plain, colored = (
        draw_stills(given, size=SIZE, crop_size=SIZE, color=color).crops.mean(axis=(1, 2))
        for given, color in zip(generators, (0.0, 0.1), strict=True)
    )
    gains = colored / plain
    assert 0.03 < np.std(gains, axis=1).mean() < 0.3
    assert 0.03 < np.std(gains, axis=0).mean() < 0.3


def test_correlations_of_a_batch():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(500, 2)).astype(np.float32)
    found = correlations(jnp.asarray(values[:, :1] + values[:, 1:]), jnp.asarray(3 * values + 1))
    np.testing.assert_allclose(found, np.corrcoef(values.sum(axis=1), values.T)[:1, 1:], atol=2e-3)
