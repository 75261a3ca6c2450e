"""The state of a training run, and one step of it."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from fantasy_jax.sharding import batch_sharding, parameter_shardings, place
from fantasy_jax.training.optim import OptimizerConfig, make_optimizer
from fantasy_jax.training.parameters import EVERYTHING, Rules, trained, treatments
from fantasy_jax.typing import Array, DType, Leaf

Batch = dict[str, Leaf]
"""Arrays by name, each with a leading axis of examples."""
Metrics = dict[str, Array]
Loss = Callable[[nnx.Module, Batch, Array], tuple[Array, Metrics]]
"""Of a model, a batch and a key for each example: their mean loss, and further means to be logged."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
        step: How many steps were taken; data order and randomness follow from it.
        params: What is trained.
        average: Its running mean; None where none is kept.
        optimizer: The optimizer's own state.
    """

    step: Leaf
    params: Leaf
    average: Leaf
    optimizer: Leaf

    @property
    def result(self) -> Leaf:
        """What is sampled from and stored: the running mean, or the parameters themselves."""
        return self.params if self.average is None else self.average


class Trainer:
    """Steps a model; its graph and what is not trained are kept apart from the state, which is given away."""

    def __init__(
        self,
        model: nnx.Module,
        loss: Loss,
        config: OptimizerConfig,
        steps: int,
        *,
        seed: int,
        mesh: Mesh,
        rules: Rules = EVERYTHING,
    ):
        """Cuts the model for a mesh.

        Args:
            model: Where to start from; of `jax.ShapeDtypeStruct`s, the step can be compiled but not run.
            loss: What to lower.
            config: How.
            steps: Length of the run, for the learning rate's course.
            seed: Of noise and dropout: step n splits `fold_in(key(seed), n)` into a key for each example.
            mesh: Of all devices; `sharding.PARAMETERS` says what of the state lies where.
            rules: What is trained, and what is frozen.

        Raises:
            ConfigError: The rules do not cover all parameters.
        """
        treatments(model, rules)
        self.graphdef, params, rest = nnx.split(model, trained(rules), ...)
        # Whatever the type of frozen weights: small steps would be lost in bfloat16.
        params = jax.tree.map(_as_float32, params)
        self.loss, self.seed, self.mesh = loss, seed, mesh
        self.decay, self.parts = config.average, config.accumulate
        self.optimizer = make_optimizer(config, steps)
        self._params, self.rest = (place(tree, parameter_shardings(tree, mesh)) for tree in (params, rest))
        self.shardings = parameter_shardings(jax.eval_shape(self._initial, params), mesh)
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, None))

    def _initial(self, params: nnx.State) -> TrainState:
        average = params if self.decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, average, self.optimizer.init(params))

    def initial(self) -> TrainState:
        """The state before the first step; abstract if the model is."""
        if _is_abstract(self._params):
            return place(jax.eval_shape(self._initial, self._params), self.shardings)
        return jax.jit(self._initial, out_shardings=self.shardings)(self._params)

    def model(self, params: nnx.State) -> nnx.Module:
        """The model with given parameters."""
        return nnx.merge(self.graphdef, params, self.rest)

    def _step(
        self, state: TrainState, rest: nnx.State, batch: Batch, number: Leaf
    ) -> tuple[TrainState, Metrics]:
        """Takes step `number`, counted from 0.

        One that is not finite changes nothing. Those after it are out of turn then, and change nothing
        either: whoever looks later finds what was good.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        keys = jax.random.split(key, len(jax.tree.leaves(batch)[0]))
        (value, metrics), gradients = self._gradients(state.params, rest, batch, keys)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early on the mean is over few steps, or it would hold on to where it started.
        decay = jnp.minimum(self.decay, (1.0 + state.step) / (10.0 + state.step))
        average = state.average
        if average is not None:
            average = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, average, params)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & (state.step == number)
        following = TrainState(state.step + 1, params, average, optimizer)
        following = jax.tree.map(lambda new, old: jnp.where(finite, new, old), following, state)
        return following, {"loss": value, "gradient_norm": norm, "finite": finite, **metrics}

    def _gradients(
        self, params: nnx.State, rest: nnx.State, batch: Batch, keys: Array
    ) -> tuple[tuple[Array, Metrics], nnx.State]:
        """Loss, metrics and gradients of a batch; part by part, if so it is to be taken."""

        def loss(params: nnx.State, batch: Batch, keys: Array) -> tuple[Array, Metrics]:
            return self.loss(nnx.merge(self.graphdef, params, rest), batch, keys)

        gradients_of = jax.value_and_grad(loss, has_aux=True)
        if self.parts == 1:
            return gradients_of(params, batch, keys)

        def add(total: nnx.State, part: tuple[Batch, Array]) -> tuple[nnx.State, tuple[Array, Metrics]]:
            batch, keys = part
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding(self.mesh))
            results, gradients = gradients_of(params, batch, keys)
            total = jax.tree.map(lambda x, new: x + new / self.parts, total, gradients)
            return jax.lax.with_sharding_constraint(total, self.shardings.params), results

        nothing = jax.tree.map(jnp.zeros_like, params)
        total, results = jax.lax.scan(add, nothing, jax.tree.map(self._in_parts, (batch, keys)))
        return jax.tree.map(lambda x: x.mean(axis=0), results), total

    def _in_parts(self, x: Array) -> Array:
        """Every n-th example to the same part, so that examples stay on the devices where they are."""
        return x.reshape(len(x) // self.parts, self.parts, *x.shape[1:]).swapaxes(0, 1)


def _as_float32(leaf: Leaf) -> Leaf:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    return leaf.astype(jnp.float32)


def cast_parameters(model: nnx.Module, dtype: DType) -> nnx.Module:
    """The same model with parameters of another type, as it is stored or kept."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), params), rest)


def _is_abstract(tree: Leaf) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
