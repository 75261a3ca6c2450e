"""The optimizer and one train step: accumulation, schedule, weight decay, moving average, noise levels."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fantasy_jax.diffusion.flow import draw_sigmas, shift_sigma
from fantasy_jax.errors import ConfigError
from fantasy_jax.sharding import make_global_batch, make_mesh
from fantasy_jax.training.loop import LoopConfig, TrainingTask, train
from fantasy_jax.training.optim import OptimizerConfig, make_optimizer
from fantasy_jax.training.state import Trainer

OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup_steps=2)
LOOP = LoopConfig(sample_every=0, validate_every=0, num_workers=0)


class Layer(nnx.Module):
    def __init__(self):
        self.mlp_in = nnx.Linear(3, 4, rngs=nnx.Rngs(0))


def noisy_loss(model, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    error = jnp.square(model.mlp_in(batch["x"] + noise) - 1)
    return error.mean(), {"error": error.mean(), "noise": noise.mean()}


def take_steps(optimizer, mesh, num_steps=3):
    """State and metrics after some steps with batches of eight."""
    with jax.set_mesh(mesh):
        trainer = Trainer(Layer(), noisy_loss, optimizer, 10, seed=0, mesh=mesh)
        state = trainer.init_state()
        for step in range(num_steps):
            x = np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)
            batch = make_global_batch({"x": x}, np.arange(8), 8, mesh)
            state, metrics = trainer.step(state, trainer.frozen_state, batch, np.int32(step))
        return jax.device_get((state, metrics))


@pytest.mark.parametrize("parts", [2, 4])
def test_gradient_accumulation_equals_one_large_batch(parts):
    expected_state, expected_metrics = take_steps(OPTIMIZER, make_mesh())
    state, metrics = take_steps(replace(OPTIMIZER, grad_accum_steps=parts), make_mesh(fsdp=2))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)


@pytest.mark.parametrize(("batch_size", "parts"), [(16, 3), (0, 1)])
def test_config_error_for_batch_size(batch_size, parts):
    with pytest.raises(ConfigError, match="batch_size"):
        OptimizerConfig(grad_accum_steps=parts).check_batch_size(batch_size)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.0), ("grad_accum_steps", 0), ("ema_decay", 1.0), ("beta1", -0.1), ("beta2", 2.0)],
)
def test_config_error_for_optimizer(name, value):
    with pytest.raises(ConfigError, match=name):
        OptimizerConfig(**{name: value})


def make_batches(num_steps):
    def batches(*, start, rows, **_):
        for step in range(start, num_steps):
            yield {"x": np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)[rows]}

    return batches


def test_without_moving_average_runs_resume_too(tmp_path):
    optimizer = replace(OPTIMIZER, ema_decay=0.0)
    state, _ = take_steps(optimizer, make_mesh())
    assert state.ema_params is None
    assert state.eval_params is state.params
    averaged, _ = take_steps(OPTIMIZER, make_mesh())
    assert len(jax.tree.leaves(averaged)) == len(jax.tree.leaves(state)) + 2

    def run(folder, num_steps):
        constant = replace(optimizer, final_fraction=1.0)
        task = TrainingTask("layer", Layer(), noisy_loss, make_batches(6), 4, num_steps, constant)
        return np.asarray(train(task, LOOP, tmp_path / folder, make_mesh()).mlp_in.kernel[...])

    expected = run("at once", 6)
    run("resumed", 3)
    assert np.array_equal(run("resumed", 6), expected)


def test_validation_is_run_when_due(tmp_path):
    shapes = []

    def validate(model):
        shapes.append(model.mlp_in.kernel[...].shape)
        return {"loss": 1.0}

    task = TrainingTask("layer", Layer(), noisy_loss, make_batches(5), 4, 5, OPTIMIZER, validate=validate)
    train(task, replace(LOOP, validate_every=2), tmp_path, make_mesh())
    assert shapes == [(3, 4)] * 3  # after steps 2, 4 and 5


def update_sizes(config, num_steps=100):
    optimizer, params = make_optimizer(config, num_steps), {"x": jnp.ones((2, 2))}
    state, sizes = optimizer.init(params), []
    for _ in range(num_steps):
        updates, state = optimizer.update({"x": jnp.ones((2, 2))}, state, params)
        sizes.append(float(-updates["x"][0, 0]))
    return sizes


def test_learning_rate_with_cosine_decay():
    sizes = update_sizes(replace(OPTIMIZER, weight_decay=0.0, warmup_steps=10))
    assert sizes[0] == 0
    assert np.argmax(sizes) == 10
    assert sizes[10] == pytest.approx(0.05, rel=1e-3)
    assert sizes[-1] == pytest.approx(0.005, rel=0.05)


def test_constant_learning_rate():
    sizes = update_sizes(replace(OPTIMIZER, final_fraction=1.0, warmup_steps=10))
    assert sizes[0] == 0
    np.testing.assert_allclose(sizes[10:], 0.05, rtol=1e-3)
    assert sizes[5] == pytest.approx(0.025, rel=1e-3)


def test_weight_decay_applies_to_matrices_only():
    optimizer = make_optimizer(replace(OPTIMIZER, weight_decay=0.5, warmup_steps=0, final_fraction=1.0), 10)
    # As stacked layers have them: the number of dimensions does not tell matrices apart.
    shapes = {"kernel": (2, 3, 3), "bias": (2, 3), "scale": (2, 3), "lora_a": (2, 3, 1)}
    params = {name: nnx.State({"x": {name: nnx.Param(jnp.ones(shape))}}) for name, shape in shapes.items()}
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    decayed = {name for name, update in updates.items() if any(np.any(x) for x in jax.tree.leaves(update))}
    assert decayed == {"kernel", "lora_a"}


def test_noise_levels_are_drawn_and_shifted():
    keys = jax.random.split(jax.random.key(0), 20_000)
    uniform = np.sort(draw_sigmas(keys, timesteps="uniform", shift=1.0))
    np.testing.assert_allclose(np.quantile(uniform, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)
    shifted = np.sort(draw_sigmas(keys, timesteps="uniform", shift=5.0))
    np.testing.assert_allclose(shifted, shift_sigma(uniform, 5.0), rtol=1e-5)
    sigmas = draw_sigmas(keys, timesteps="logit_normal", shift=1.0, mean=-0.5, std=0.7)
    logits = np.log(sigmas / (1 - sigmas))
    assert logits.mean() == pytest.approx(-0.5, abs=0.02)
    assert logits.std() == pytest.approx(0.7, abs=0.02)
