"""The state of a training run, and one step of it."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from fantasy_jax.training.optim import OptimizerConfig, make_optimizer
from fantasy_jax.typing import Array, Leaf

Batch = dict[str, Leaf]
"""Arrays by name, each with a leading axis of examples."""
Metrics = dict[str, Array]
Loss = Callable[[nnx.Module, Batch, Array], tuple[Array, Metrics]]
"""Of a model, a batch and a key: the loss, and further numbers to be logged."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
        step: How many steps were taken; data order and randomness follow from it.
        params: What is trained.
        average: Its running mean.
        optimizer: The optimizer's own state.
    """

    step: Leaf
    params: Leaf
    average: Leaf
    optimizer: Leaf


class Trainer:
    """Steps a model; its graph and what is not trained are kept apart from the state, which is given away."""

    def __init__(self, model: nnx.Module, loss: Loss, config: OptimizerConfig, steps: int, *, seed: int):
        """Prepares to train all parameters.

        Args:
            model: Where to start from.
            loss: What to lower.
            config: How.
            steps: Length of the run, for the learning rate's course.
            seed: Of noise and dropout: step n uses `fold_in(key(seed), n)`.
        """
        self.graphdef, self._params, self.rest = nnx.split(model, nnx.Param, ...)
        self.loss, self.seed, self.decay = loss, seed, config.average
        self.optimizer = make_optimizer(config, steps)
        self.step = jax.jit(self._step, donate_argnums=0)

    def initial(self) -> TrainState:
        """The state before the first step."""
        params, average = (jax.tree.map(jnp.copy, self._params) for _ in range(2))
        return TrainState(jnp.zeros((), jnp.int32), params, average, self.optimizer.init(params))

    def model(self, params: nnx.State) -> nnx.Module:
        """The model with given parameters."""
        return nnx.merge(self.graphdef, params, self.rest)

    def _step(self, state: TrainState, rest: nnx.State, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)

        def loss(params: nnx.State) -> tuple[Array, Metrics]:
            return self.loss(nnx.merge(self.graphdef, params, rest), batch, key)

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the mean is over few steps, or it would hold on to where it started.
        decay = jnp.minimum(self.decay, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, state.average, params)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients), **metrics}
        return TrainState(state.step + 1, params, average, optimizer), metrics
