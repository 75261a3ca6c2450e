"""From noise to latents: a velocity function, guidance and a solver, compiled as one program for every step.

A velocity function takes latents, a noise level and conditions. What changes it, such as a cache, is a
wrapper: a function from velocity function to velocity function. Guidance combines the velocities of its
branches; windows over time (`diffusion/windows.py`) wrap the guided velocity. A solver takes it from one
noise level to the next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from fantasy_jax.config import PositiveFloat, PositiveInt, Range, Settings
from fantasy_jax.diffusion.flow import sampling_sigmas
from fantasy_jax.diffusion.guidance import GuidanceBranch, combine, difference_scales
from fantasy_jax.diffusion.held import HeldLatents, first_step, hold, noised
from fantasy_jax.diffusion.windows import Windows, WindowSchedule, windowed
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.sharding import axis_size
from fantasy_jax.system.conditioning import (
    AdapterOptions,
    Conditions,
    condition,
    share_keys_and_values,
    velocity,
)
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.typing import Array, Float, Leaf
from fantasy_jax.video import video_frames

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
class SamplerConfig(Settings):
    """How latents are sampled; the defaults are the official script's.

    Attributes:
        num_inference_steps: Steps.
        shift: Shift of the noise schedule.
        batch_branches: Whether the branches of guidance are evaluated as one batch, which is faster where
            memory allows, or one after another.
        windows_per_device: Windows of a long clip that a device evaluates as one batch.
    """

    num_inference_steps: Annotated[int, Range(1, 10_000)] = 30
    shift: PositiveFloat = 5.0
    batch_branches: bool = True
    windows_per_device: PositiveInt = 1

    def window_group(self, count: int) -> int:
        """How many of `count` windows are evaluated as one batch on the current mesh."""
        devices = axis_size("data") * axis_size("fsdp")
        return devices * min(self.windows_per_device, -(-count // devices))


@dataclass(frozen=True)
class StepProgram:
    """What a compiled step consists of; hashable, so that it is part of the program's key.

    Attributes:
        batch_branches: As of `SamplerConfig`.
        solver: Takes latents from one noise level to the next.
        wrappers: Applied to the transformer's velocity, the first one innermost.
        window_group: Windows that are evaluated as one batch, on all devices together.
    """

    batch_branches: bool = True
    solver: Solver = euler
    wrappers: tuple[Wrapper, ...] = ()
    window_group: int = 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepData:
    """What differs from step to step.

    Attributes:
        sigmas: Noise levels before and after, `[2]`.
        scales: From `difference_scales`, `[differences]`.
        windows: Windows of a single clip; None for a batch of clips.
        held: Latents that are held; with it, `noise` is their noise `[1, F, h, w, C]`.
        noise: Initial noise.
    """

    sigmas: Leaf
    scales: Leaf
    windows: Windows | None = None
    held: HeldLatents | None = None
    noise: Leaf = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BranchConditions:
    """The conditions of all guidance branches, the same in every step.

    Attributes:
        each: Conditions whose arrays have a leading axis of branches.
        kept: Keys and values that the branches share, by condition (`share_keys_and_values`).
    """

    each: Conditions
    kept: dict[str, Leaf]


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
    windows: WindowSchedule | None = None,
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
        windows: Windows of one clip that is longer than the model's; the first-frame condition of `inputs` is
            that of a window, all else spans the whole clip. None: each clip is a single window.
        held: Latents that are held outside a mask.
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
    num_frames = video_frames(noise.shape[1])
    if windows is None and len(noise) == 1:  # the program of longer clips, which takes less memory
        windows = WindowSchedule.single(noise.shape[1])
    count = 1 if windows is None else windows.count
    static = (graphdef, dropped, hashable(options), num_frames, count == 1)
    conditions = branch_conditions(*static, state, inputs)
    group = 1 if windows is None else config.window_group(count)
    program = StepProgram(config.batch_branches, solver, tuple(wrappers), group)
    first = 0 if held is None else first_step(sigmas, strength)
    latents = noised(held.latents, noise, sigmas[first]) if first else noise
    latents = jnp.array(latents, jnp.float32)  # a copy: the step donates its argument
    steps = range(first, config.num_inference_steps)
    for i in tqdm(steps, desc="Sampling", unit="step", disable=not progress):
        data = StepData(sigmas[i : i + 2], scales[i], None, held, None if held is None else noise)
        if windows is not None:
            data = replace(data, windows=replace(windows.at(i, multiple=group), noise=noise[:, :1]))
        latents = guided_step(graphdef, program, state, latents, conditions, data)
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


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def branch_conditions(
    graphdef: nnx.GraphDef,
    dropped: tuple[tuple[str, ...], ...],
    options: HashableOptions,
    num_frames: int,
    single: bool,
    state: nnx.State,
    inputs: ClipInputs,
) -> BranchConditions:
    """The conditions of each guidance branch.

    Args:
        graphdef: Graphdef of the transformer.
        dropped: Dropout groups that each branch leaves out.
        options: From `hashable`.
        num_frames: Video frames T that the inputs of adapters span.
        single: Whether a clip is a single window. In one of several, keys and values of tokens per latent
            frame are projected in every step: for ten minutes they would take 40 GiB.
        state: State of the transformer.
        inputs: What the clips are conditioned on.

    Returns:
        Conditions whose tokens are replaced by keys and values.
    """
    transformer = nnx.merge(graphdef, state)
    settings = {name: dict(values) for name, values in options}
    each = [
        condition(
            transformer, inputs, keep=dict.fromkeys(groups, False), options=settings, num_frames=num_frames
        )
        for groups in dropped
    ]
    texts = [int("text" in groups) for groups in dropped]
    each, kept = share_keys_and_values(transformer, each, texts, per_frame=single)
    return BranchConditions(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), kept)


# Projections that a step does not use are in memory all the same; with `keep_unused` they are counted.
@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3, keep_unused=True)
def guided_step(
    graphdef: nnx.GraphDef,
    program: StepProgram,
    state: nnx.State,
    latents: Float[Array, "B F h w C"],
    conditions: BranchConditions,
    data: StepData,
) -> Float[Array, "B F h w C"]:
    """One guided step.

    Args:
        graphdef: Graphdef of the transformer.
        program: Solver and wrappers.
        state: State of the transformer.
        latents: Latents at the first noise level; donated.
        conditions: From `branch_conditions`.
        data: What differs from step to step.
    """
    function: Velocity = partial(velocity, nnx.merge(graphdef, state), kept=conditions.kept)
    for wrap in program.wrappers:
        function = wrap(function)
    branches = len(data.scales) + 1

    def guided(latents: Array, sigma: Array, conditions: Conditions) -> Array:
        if program.batch_branches:
            merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), conditions)
            repeated = jnp.concatenate([latents] * branches)
            velocities = function(repeated, sigma, merged).reshape(branches, *latents.shape)
        else:
            velocities = jax.lax.map(lambda branch: function(latents, sigma, branch), conditions)
        return combine(list(velocities), data.scales)

    if data.windows is not None:
        guided = windowed(guided, data.windows, program.window_group)
    latents = program.solver(partial(guided, conditions=conditions.each), latents, data.sigmas)
    return latents if data.held is None else hold(latents, data.held, data.noise, data.sigmas[1])
