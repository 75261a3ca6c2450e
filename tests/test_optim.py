"""A step: batches in parts, the learning rate's course, weight decay, the running mean, noise levels."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fantasy_jax.config import ConfigError
from fantasy_jax.diffusion.flow import draw_sigmas, shift_sigma
from fantasy_jax.sharding import assemble_batch, make_mesh
from fantasy_jax.training.loop import LoopConfig, Task, train
from fantasy_jax.training.optim import OptimizerConfig, make_optimizer
from fantasy_jax.training.state import Trainer
from fantasy_jax.training.talking import TalkingStageConfig

OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup=2)


class Layer(nnx.Module):
    def __init__(self):
        self.mlp_in = nnx.Linear(3, 4, rngs=nnx.Rngs(0))


def noisy_loss(model, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    error = jnp.square(model.mlp_in(batch["x"] + noise) - 1)
    return error.mean(), {"error": error.mean(), "noise": noise.mean()}


def stepped(optimizer, mesh, steps=3):
    """Parameters and metrics after some steps with batches of eight."""
    with jax.set_mesh(mesh):
        trainer = Trainer(Layer(), noisy_loss, optimizer, 10, seed=0, mesh=mesh)
        state = trainer.initial()
        for step in range(steps):
            x = np.random.default_rng(step).normal(size=(8, 3)).astype(np.float32)
            batch = assemble_batch({"x": x}, np.arange(8), 8, mesh)
            state, metrics = trainer.step(state, trainer.rest, batch, np.int32(step))
        return jax.device_get((state, metrics))


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_takes_the_same_step(parts):
    whole, metrics = stepped(OPTIMIZER, make_mesh())
    state, found = stepped(replace(OPTIMIZER, accumulate=parts), make_mesh(fsdp=2))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5)


def test_parts_must_be_equal():
    with pytest.raises(ConfigError, match="batch_size is 16; it has no 3 equal parts"):
        TalkingStageConfig(optimizer=OptimizerConfig(accumulate=3))


def test_without_a_running_mean_none_is_kept_and_runs_go_on(tmp_path):
    optimizer = replace(OPTIMIZER, average=0.0)
    state, _ = stepped(optimizer, make_mesh())
    assert state.average is None
    assert state.result is state.params
    averaged, _ = stepped(OPTIMIZER, make_mesh())
    assert len(jax.tree.leaves(averaged)) == len(jax.tree.leaves(state)) + 2

    def batches(*, start, rows, **_):
        for step in range(start, 6):
            yield {"x": np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)[rows]}

    def run(folder, steps):
        task = Task("layer", Layer(), noisy_loss, batches, 4, steps, replace(optimizer, final=1.0))
        config = LoopConfig(show_every=0, validate_every=0, workers=0)
        return np.asarray(train(task, config, tmp_path / folder, make_mesh()).mlp_in.kernel[...])

    whole = run("whole", 6)
    run("parts", 3)
    assert np.array_equal(run("parts", 6), whole)


def test_held_out_examples_are_looked_at_when_it_is_time(tmp_path):
    seen = []

    def batches(*, start, rows, **_):
        for step in range(start, 5):
            yield {"x": np.full((4, 3), step, np.float32)[rows]}

    def validate(model):
        seen.append(model.mlp_in.kernel[...].shape)
        return {"loss": 1.0}

    task = Task("layer", Layer(), noisy_loss, batches, 4, 5, OPTIMIZER, validate=validate)
    train(task, LoopConfig(show_every=0, validate_every=2, workers=0), tmp_path, make_mesh())
    assert seen == [(3, 4)] * 3  # after steps 2, 4 and 5


def sizes(config, steps=100):
    optimizer, params = make_optimizer(config, steps), {"x": jnp.ones((2, 2))}
    state, found = optimizer.init(params), []
    for _ in range(steps):
        updates, state = optimizer.update({"x": jnp.ones((2, 2))}, state, params)
        found.append(float(-updates["x"][0, 0]))
    return found


def test_a_constant_learning_rate_rises_and_stays():
    found = sizes(replace(OPTIMIZER, final=1.0, warmup=10))
    assert found[0] == 0
    np.testing.assert_allclose(found[10:], 0.05, rtol=1e-3)
    assert found[5] == pytest.approx(0.025, rel=1e-3)


def test_matrices_decay_and_nothing_else_even_if_it_is_stacked():
    optimizer = make_optimizer(replace(OPTIMIZER, weight_decay=0.5, warmup=0, final=1.0), 10)
    shapes = {"kernel": (2, 3, 3), "bias": (2, 3), "scale": (2, 3), "lora_a": (2, 3, 1)}
    params = {name: nnx.State({"x": {name: nnx.Param(jnp.ones(shape))}}) for name, shape in shapes.items()}
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    moved = {name for name, update in updates.items() if any(np.any(x) for x in jax.tree.leaves(update))}
    assert moved == {"kernel", "lora_a"}


def test_noise_levels_are_even_or_a_normal_distributions_sigmoid_and_then_shifted():
    keys = jax.random.split(jax.random.key(0), 20_000)
    even = np.sort(draw_sigmas(keys, timesteps="uniform", shift=1.0))
    np.testing.assert_allclose(np.quantile(even, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)
    shifted = np.sort(draw_sigmas(keys, timesteps="uniform", shift=5.0))
    np.testing.assert_allclose(shifted, shift_sigma(even, 5.0), rtol=1e-5)
    drawn = draw_sigmas(keys, timesteps="logit_normal", shift=1.0, mean=-0.5, deviation=0.7)
    logits = np.log(drawn / (1 - drawn))
    assert logits.mean() == pytest.approx(-0.5, abs=0.02)
    assert logits.std() == pytest.approx(0.7, abs=0.02)
