"""The state of a training run and its train step."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from fantasy_jax.sharding import batch_sharding, parameter_shardings, place
from fantasy_jax.training.optim import OptimizerConfig, make_optimizer
from fantasy_jax.training.parameters import ALL_TRAINED, ParameterRules, parameter_modes, trainable
from fantasy_jax.typing import Array, DType, Leaf

Batch = dict[str, Leaf]
"""Arrays by name, each with a leading axis of examples."""
Metrics = dict[str, Array]
Loss = Callable[[nnx.Module, Batch, Array], tuple[Array, Metrics]]
"""`(model, batch, keys) -> (loss, metrics)` with a key for each example; means over the examples."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
        step: Number of steps taken; data order and randomness depend on it.
        params: The trained parameters.
        ema_params: Exponential moving average of `params`; None if none is kept.
        opt_state: State of the optimizer.
    """

    step: Leaf
    params: Leaf
    ema_params: Leaf
    opt_state: Leaf

    @property
    def eval_params(self) -> Leaf:
        """Parameters for sampling and storing: the moving average, or the parameters if there is none."""
        return self.params if self.ema_params is None else self.ema_params


class Trainer:
    """Jitted train step. Graphdef and frozen state stay outside `TrainState`, whose buffers are donated."""

    def __init__(
        self,
        model: nnx.Module,
        loss: Loss,
        config: OptimizerConfig,
        num_steps: int,
        *,
        seed: int,
        mesh: Mesh,
        rules: ParameterRules = ALL_TRAINED,
    ):
        """Shards the model over the mesh.

        Args:
            model: Initial model. If its leaves are `jax.ShapeDtypeStruct`s, the step can only be compiled.
            loss: Loss to minimise.
            config: Settings of the optimizer.
            num_steps: Length of the run, for the learning rate schedule.
            seed: Seed of noise and dropout: step n splits `fold_in(key(seed), n)` into a key for each
                example.
            mesh: Mesh of all devices; `sharding.PARAMETERS` decides how the state is sharded.
            rules: Which parameters are trained and which are frozen.

        Raises:
            ConfigError: The rules do not fit the parameters.
        """
        parameter_modes(model, rules)
        self.graphdef, params, frozen_state = nnx.split(model, trainable(rules), ...)
        # Whatever the type of frozen weights: small updates would be lost in bfloat16.
        params = jax.tree.map(_as_float32, params)
        self.loss, self.seed, self.mesh = loss, seed, mesh
        self.ema_decay, self.grad_accum_steps = config.ema_decay, config.grad_accum_steps
        self.optimizer = make_optimizer(config, num_steps)
        self._params, self.frozen_state = (
            place(tree, parameter_shardings(tree, mesh)) for tree in (params, frozen_state)
        )
        self.shardings = parameter_shardings(jax.eval_shape(self._init, params), mesh)
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, None))

    def _init(self, params: nnx.State) -> TrainState:
        ema_params = params if self.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, ema_params, self.optimizer.init(params))

    def init_state(self) -> TrainState:
        """Returns the state before the first step; abstract if the model is."""
        if _is_abstract(self._params):
            return place(jax.eval_shape(self._init, self._params), self.shardings)
        return jax.jit(self._init, out_shardings=self.shardings)(self._params)

    def model(self, params: nnx.State) -> nnx.Module:
        """Returns the model with the given trained parameters."""
        return nnx.merge(self.graphdef, params, self.frozen_state)

    def _step(
        self, state: TrainState, frozen_state: nnx.State, batch: Batch, step: Leaf
    ) -> tuple[TrainState, Metrics]:
        """Takes the step with number `step`, counted from 0.

        A step with a non-finite loss or gradient leaves the state unchanged. Later steps are rejected too
        (step mismatch), so the host may check `finite` asynchronously and still find the last good state.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        keys = jax.random.split(key, len(jax.tree.leaves(batch)[0]))
        (value, metrics), gradients = self._gradients(state.params, frozen_state, batch, keys)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # Early averages are over few steps; otherwise the initial parameters would dominate them.
        decay = jnp.minimum(self.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, ema_params, params)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & (state.step == step)
        new_state = TrainState(state.step + 1, params, ema_params, opt_state)
        new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, state)
        return new_state, {"loss": value, "gradient_norm": norm, "finite": finite, **metrics}

    def _gradients(
        self, params: nnx.State, frozen_state: nnx.State, batch: Batch, keys: Array
    ) -> tuple[tuple[Array, Metrics], nnx.State]:
        """Returns loss, metrics and gradients of a batch, accumulated over `grad_accum_steps` parts."""

        def loss(params: nnx.State, batch: Batch, keys: Array) -> tuple[Array, Metrics]:
            return self.loss(nnx.merge(self.graphdef, params, frozen_state), batch, keys)

        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        if self.grad_accum_steps == 1:
            return value_and_grad(params, batch, keys)

        def add(total: nnx.State, part: tuple[Batch, Array]) -> tuple[nnx.State, tuple[Array, Metrics]]:
            batch, keys = part
            batch = jax.lax.with_sharding_constraint(batch, batch_sharding(self.mesh))
            values, gradients = value_and_grad(params, batch, keys)
            total = jax.tree.map(lambda x, new: x + new / self.grad_accum_steps, total, gradients)
            return jax.lax.with_sharding_constraint(total, self.shardings.params), values

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, values = jax.lax.scan(add, zeros, jax.tree.map(self._split, (batch, keys)))
        return jax.tree.map(lambda x: x.mean(axis=0), values), total

    def _split(self, x: Array) -> Array:
        """Splits examples into parts; each takes every n-th, so that examples stay on their devices."""
        parts = self.grad_accum_steps
        return x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def cast_parameters(model: nnx.Module, dtype: DType) -> nnx.Module:
    """Returns the same model with parameters of another type."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), params), rest)


def _as_float32(leaf: Leaf) -> Leaf:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
    return leaf.astype(jnp.float32)


def _is_abstract(tree: Leaf) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))
