"""From noise to latents: a velocity function, guidance and a solver, compiled as one program for every step.

A velocity function takes latents, a noise level and conditions. What changes it is a wrapper: a function from
velocity function to velocity function. Guidance combines the velocities of its branches; windows over time
(`diffusion/windows.py`) wrap the guided velocity. A solver takes it from one noise level to the next.

Approximations, which are off by default, take over from one step to the next what a step does not compute
(`diffusion/caching.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from fantasy_jax.config import PositiveFloat, PositiveInt, Range, Settings
from fantasy_jax.diffusion.caching import EvaluationPlan, StepCache
from fantasy_jax.diffusion.flow import predicted_latents, sampling_sigmas
from fantasy_jax.diffusion.guidance import (
    GatingConfig,
    GuidanceBranch,
    add_differences,
    combine,
    difference_scales,
    needed_branches,
)
from fantasy_jax.diffusion.held import HeldLatents, first_step, hold, noised
from fantasy_jax.diffusion.magcache import MagCacheConfig, curve_of, skipped_steps
from fantasy_jax.diffusion.windows import Residuals, Windows, WindowSchedule, windowed
from fantasy_jax.models.condition import KeysValues
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.sharding import axis_size, constrain
from fantasy_jax.system.conditioning import (
    AdapterOptions,
    Conditions,
    cached_velocity,
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
        gating: Approximates guidance in later steps by its last differences.
        magcache: Approximates the blocks in some steps by what they added in the step before.
    """

    num_inference_steps: Annotated[int, Range(1, 10_000)] = 30
    shift: PositiveFloat = 5.0
    batch_branches: bool = True
    windows_per_device: PositiveInt = 1
    gating: GatingConfig = GatingConfig()
    magcache: MagCacheConfig = MagCacheConfig()

    def evaluation_plan(self, guidance: Sequence[GuidanceBranch], first: int = 0) -> EvaluationPlan:
        """What each step computes, where sampling starts from step `first`.

        Raises:
            ConfigError: The curve of `magcache` is of other settings.
        """
        steps = self.num_inference_steps
        skipped = np.zeros(steps, bool)
        if self.magcache.curve is not None:
            curve = curve_of(self.magcache, guidance, self.shift)
            skipped = skipped_steps(np.array(curve.ratios), self.magcache, first)
        return EvaluationPlan(needed_branches(guidance, self.gating, steps, first), skipped)

    def first_step(self, held: HeldLatents | None, strength: float) -> int:
        """The step that sampling starts from; without held latents the first one."""
        if held is None:
            return 0
        return first_step(sampling_sigmas(self.num_inference_steps, self.shift), strength)

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
        keeps_differences: Whether the step returns the differences of its branches.
        keeps_residuals: Whether the step returns the residuals of its blocks, or adds earlier ones.
    """

    batch_branches: bool = True
    solver: Solver = euler
    wrappers: tuple[Wrapper, ...] = ()
    window_group: int = 1
    keeps_differences: bool = False
    keeps_residuals: bool = False


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
        cache: What the step uses of earlier ones.
    """

    sigmas: Leaf
    scales: Leaf
    windows: Windows | None = None
    held: HeldLatents | None = None
    noise: Leaf = None
    cache: StepCache = StepCache()


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

    def last(self, count: int) -> "BranchConditions":
        """The conditions of the last branches."""
        return replace(self, each=jax.tree.map(lambda x: x if len(x) == count else x[-count:], self.each))


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
    callback: Callable[[int, Array, Array], None] | None = None,
    residual_callback: Callable[[int, Residuals], None] | None = None,
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
        callback: Called with the step's number, from 0, the latents after it, and those without noise that
            it predicts.
        residual_callback: Called with the step's number and the residuals of its branches
            (`magcache.Calibration`).

    Returns:
        Latents, float32, normalised as the VAE gives them.

    Raises:
        ConfigError: The curve of MagCache does not fit the settings.
        ValueError: There are wrappers, and residuals, which are those of the transformer alone; or there is a
            `residual_callback`, but not every step computes all branches.
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
    first = config.first_step(held, strength)
    plan = config.evaluation_plan(guidance, first)
    kept = plan.gates, plan.skips or residual_callback is not None
    if residual_callback is not None and (plan.gates or plan.skips):
        raise ValueError("residual_callback takes exact steps; turn gating and magcache off")
    if wrappers and kept[1]:
        raise ValueError("wrappers do not go with residuals, which are those of the transformer alone")
    program, cache = StepProgram(config.batch_branches, solver, tuple(wrappers), group, *kept), StepCache()
    latents = noised(held.latents, noise, sigmas[first]) if first else noise
    latents = jnp.array(latents, jnp.float32)  # a copy: the step donates its argument
    steps = range(first, config.num_inference_steps)
    for i in tqdm(steps, desc="Sampling", unit="step", disable=not progress):
        needed, skipped = plan.at(i)
        conditions, cache = conditions.last(needed), cache.given(needed, skipped)
        data = StepData(sigmas[i : i + 2], scales[i], None, held, None if held is None else noise, cache)
        if windows is not None:
            data = replace(data, windows=replace(windows.at(i, multiple=group), noise=noise[:, :1]))
        before = None if callback is None else latents.copy()
        latents, computed = guided_step(graphdef, program, state, latents, conditions, data)
        cache = cache.updated(computed)
        del computed  # the next step may make other residuals, for which these make room
        if progress:
            latents.block_until_ready()  # otherwise the bar counts steps that are only dispatched
        if callback is not None:
            callback(i, latents, predicted_latents(before, latents, data.sigmas))
        if residual_callback is not None:
            residual_callback(i, cache.residuals)
    return latents


HashableOptions = tuple[tuple[str, tuple[tuple[str, object], ...]], ...]
"""`AdapterOptions` as nested tuples, as they are part of a program's key."""


def hashable(options: AdapterOptions | None) -> HashableOptions:
    """Adapter options as nested tuples."""
    return tuple((name, tuple(sorted(values.items()))) for name, values in sorted((options or {}).items()))


# Weights that a program does not use are in memory all the same; with `keep_unused` they are counted.
@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), keep_unused=True)
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


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3, keep_unused=True)
def guided_step(
    graphdef: nnx.GraphDef,
    program: StepProgram,
    state: nnx.State,
    latents: Float[Array, "B F h w C"],
    conditions: BranchConditions,
    data: StepData,
) -> tuple[Float[Array, "B F h w C"], StepCache]:
    """One guided step.

    Args:
        graphdef: Graphdef of the transformer.
        program: Solver and wrappers.
        state: State of the transformer.
        latents: Latents at the first noise level; donated.
        conditions: From `branch_conditions`, of the branches that are evaluated.
        data: What differs from step to step.

    Returns:
        The latents at the second noise level, and what is kept of the step.
    """
    function = _step_velocity(nnx.merge(graphdef, state), program, conditions.kept)
    used, scales = data.cache, data.scales
    gated = len(used.differences)

    def guided(
        latents: Array, sigma: Array, conditions: Conditions, residuals: Residuals
    ) -> tuple[tuple[Array, ...], Residuals]:
        velocities, kept = _each_branch(function, program, latents, sigma, conditions, residuals)
        fields = [combine(velocities, scales[gated:])]
        if program.keeps_differences:
            fields += [other - one for one, other in pairwise(velocities)]
        return tuple(fields), kept

    if data.windows is not None:
        fields = 1 + (len(scales) - gated if program.keeps_differences else 0)
        guided = windowed(guided, data.windows, program.window_group, fields)
    computed = StepCache()

    def advance(latents: Array, sigma: Array) -> Array:
        nonlocal computed  # a solver may call it several times, of which the last counts
        (guided_velocity, *differences), residuals = guided(latents, sigma, conditions.each, used.residuals)
        computed = StepCache(tuple(differences), residuals)
        return add_differences(guided_velocity, scales[:gated], used.differences)

    latents = program.solver(advance, latents, data.sigmas)
    latents = latents if data.held is None else hold(latents, data.held, data.noise, data.sigmas[1])
    return latents, computed


BranchVelocity = Callable[[Array, Array, Conditions, Array | None], tuple[Array, Array | None]]
"""A velocity function that also takes a residual, or gives one (`conditioning.cached_velocity`)."""


def _step_velocity(
    transformer: WanTransformer, program: StepProgram, kept: dict[str, KeysValues]
) -> BranchVelocity:
    """The velocity with residuals, or the wrapped one without."""
    if program.keeps_residuals:
        return partial(cached_velocity, transformer, kept=kept)
    function: Velocity = partial(velocity, transformer, kept=kept)
    for wrap in program.wrappers:
        function = wrap(function)
    return lambda latents, sigma, conditions, _: (function(latents, sigma, conditions), None)


def _each_branch(
    function: BranchVelocity,
    program: StepProgram,
    latents: Array,
    sigma: Array,
    conditions: Conditions,
    residuals: Residuals,
) -> tuple[list[Array], Residuals]:
    """The velocities of all branches, and the residuals that are kept."""
    added = jnp.stack(residuals) if residuals else None
    if program.batch_branches:
        branches = len(conditions.first_frame)
        merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (conditions, added))
        found = function(jnp.concatenate([latents] * branches), sigma, *merged)
        velocities, kept = jax.tree.map(lambda x: x.reshape(branches, -1, *x.shape[1:]), found)
    else:
        velocities, kept = jax.lax.map(lambda x: function(latents, sigma, *x), (conditions, added))
    kept = () if kept is None else tuple(constrain(x, "batch", "space", None, None) for x in kept)
    return list(velocities), kept
