"""From noise to latents: a velocity function, guidance, and a solver, compiled as one program for every step.

A velocity function takes latents, a noise level and conditions. What changes it (windows over time, caches)
is a wrapper: a function from velocity function to velocity function. A solver takes the guided velocity from
one noise level to the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from fantasy_jax.diffusion.flow import sampling_sigmas
from fantasy_jax.diffusion.guidance import GuidanceBranch, combine, difference_scales
from fantasy_jax.diffusion.held import HeldLatents, first_step, hold, noised
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.system.conditioning import AdapterOptions, Conditions, condition, velocity
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.typing import Array, Float

Velocity = Callable[[Array, Array, Conditions], Array]
"""Of latents `[B, F, h, w, C]`, sigma, and conditions."""
Wrapper = Callable[[Velocity], Velocity]


@runtime_checkable
class Solver(Protocol):
    """Takes latents from one noise level to the next."""

    def __call__(
        self,
        velocity: Callable[[Array, Array], Array],
        latents: Float[Array, "B F h w C"],
        sigmas: Float[Array, "2"],
    ) -> Float[Array, "B F h w C"]:
        """Advances the latents.

        Args:
            velocity: The guided velocity, of latents and sigma.
            latents: Latents at the first noise level.
            sigmas: Noise levels before and after.
        """
        ...


def euler(
    velocity: Callable[[Array, Array], Array],
    latents: Float[Array, "B F h w C"],
    sigmas: Float[Array, "2"],
) -> Float[Array, "B F h w C"]:
    """Euler's method (a `Solver`)."""
    return latents + velocity(latents, sigmas[0]) * (sigmas[1] - sigmas[0])


@dataclass(frozen=True)
class SamplerConfig:
    """How latents are sampled; the defaults are the official script's.

    Attributes:
        num_inference_steps: Steps.
        shift: Shift of the noise schedule.
        batch_branches: Whether the branches of guidance are evaluated as one batch, which is faster where
            memory allows, or one after another.
    """

    num_inference_steps: int = 30
    shift: float = 5.0
    batch_branches: bool = True

    def __post_init__(self):
        if self.num_inference_steps < 1:
            raise ConfigError(f"num_inference_steps is {self.num_inference_steps}; it must be at least 1")
        if self.shift <= 0:
            raise ConfigError(f"shift is {self.shift}; it must be positive")


@dataclass(frozen=True)
class StepProgram:
    """What a compiled step consists of; hashable, so that it is part of the program's key.

    Attributes:
        batch_branches: As of `SamplerConfig`.
        solver: Takes latents from one noise level to the next.
        wrappers: Applied to the transformer's velocity, the first one innermost.
    """

    batch_branches: bool = True
    solver: Solver = euler
    wrappers: tuple[Wrapper, ...] = ()


def sample(
    transformer: WanTransformer,
    noise: Float[Array, "B F h w C"],
    inputs: ClipInputs,
    config: SamplerConfig,
    *,
    guidance: Sequence[GuidanceBranch],
    options: AdapterOptions | None = None,
    solver: Solver = euler,
    wrappers: Sequence[Wrapper] = (),
    held: HeldLatents | None = None,
    strength: float = 1.0,
    progress: bool = False,
    callback: Callable[[int, Array], None] | None = None,
) -> Float[Array, "B F h w C"]:
    """Integrates the guided velocity from noise to latents.

    Args:
        transformer: With its adapters.
        noise: Latents at sigma 1.
        inputs: What the clips are conditioned on.
        config: Steps and schedule.
        guidance: Branches, with a weight for each step.
        options: Keyword arguments of adapters (`system.conditioning.condition`).
        solver: Takes latents from one noise level to the next.
        wrappers: Change the velocity function, the first one innermost.
        held: Latents of a source that are kept outside a mask.
        strength: Noise level at which sampling starts from the held latents, in [0, 1]; 1 starts from noise,
            and 0 returns the held latents. Needs `held` unless it is 1.
        progress: Whether to show a progress bar.
        callback: Called with the step's number, from 0, and the latents after it.

    Returns:
        Latents, float32, normalised as the VAE gives them.
    """
    sigmas = sampling_sigmas(config.num_inference_steps, config.shift)
    scales = difference_scales(guidance)
    graphdef, state = nnx.split(transformer)
    dropped = tuple(branch.dropped for branch in guidance)
    conditions = branch_conditions(graphdef, dropped, hashable(options), state, inputs)
    program = StepProgram(config.batch_branches, solver, tuple(wrappers))
    begin = 0 if held is None else first_step(sigmas, strength)
    # A copy: the step donates its argument.
    latents = jnp.array(
        noise if begin == 0 else noised(held.latents, noise, float(sigmas[begin])), jnp.float32
    )
    steps = range(begin, config.num_inference_steps)
    for i in tqdm(steps, desc="Sampling", unit="step", disable=not progress):
        latents = guided_step(graphdef, program, state, latents, conditions, sigmas[i : i + 2], scales[i])
        if held is not None:
            latents = hold(latents, held, noise, sigmas[i + 1])
        if progress:
            latents.block_until_ready()  # otherwise the bar counts steps that are only dispatched
        if callback is not None:
            callback(i, latents)
    return latents


HashableOptions = tuple[tuple[str, tuple[tuple[str, object], ...]], ...]
"""`AdapterOptions` as nested tuples, as they are part of a program's key."""


def hashable(options: AdapterOptions | None) -> HashableOptions:
    """Adapter options as nested tuples."""
    return tuple((name, tuple(sorted(values.items()))) for name, values in sorted((options or {}).items()))


@partial(jax.jit, static_argnums=(0, 1, 2))
def branch_conditions(
    graphdef: nnx.GraphDef,
    dropped: tuple[tuple[str, ...], ...],
    options: HashableOptions,
    state: nnx.State,
    inputs: ClipInputs,
) -> Conditions:
    """The conditions of each guidance branch.

    Args:
        graphdef: Graphdef of the transformer.
        dropped: Dropout groups that each branch leaves out.
        options: From `hashable`.
        state: State of the transformer.
        inputs: What the clips are conditioned on.

    Returns:
        Conditions whose arrays have a leading axis of branches.
    """
    transformer = nnx.merge(graphdef, state)
    settings = {name: dict(values) for name, values in options}
    each = [
        condition(transformer, inputs, keep=dict.fromkeys(groups, False), options=settings)
        for groups in dropped
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def guided_step(
    graphdef: nnx.GraphDef,
    program: StepProgram,
    state: nnx.State,
    latents: Float[Array, "B F h w C"],
    conditions: Conditions,
    sigmas: Float[Array, "2"],
    scales: Float[Array, " differences"],
) -> Float[Array, "B F h w C"]:
    """One guided step.

    Args:
        graphdef: Graphdef of the transformer.
        program: Solver and wrappers.
        state: State of the transformer.
        latents: Latents at the first noise level; donated.
        conditions: From `branch_conditions`.
        sigmas: Noise levels before and after.
        scales: From `difference_scales`.
    """
    function: Velocity = partial(velocity, nnx.merge(graphdef, state))
    for wrap in program.wrappers:
        function = wrap(function)
    branches = len(scales) + 1

    def guided(latents: Array, sigma: Array) -> Array:
        if program.batch_branches:
            merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), conditions)
            repeated = jnp.concatenate([latents] * branches)
            velocities = function(repeated, sigma, merged).reshape(branches, *latents.shape)
        else:
            velocities = jax.lax.map(lambda branch: function(latents, sigma, branch), conditions)
        return combine(list(velocities), scales)

    return program.solver(guided, latents, sigmas)
