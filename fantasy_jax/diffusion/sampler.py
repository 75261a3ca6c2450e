"""Euler's method from noise to latents, one compiled program for every step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from fantasy_jax.config import ConfigError
from fantasy_jax.diffusion.flow import TRAIN_TIMESTEPS, sampling_sigmas
from fantasy_jax.diffusion.guidance import Branch, ScaleSchedule, branches, combine, scale_values
from fantasy_jax.models.adapters.identity import IDENTITY_SCALE
from fantasy_jax.models.condition import Condition
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.typing import Array, Float, Leaf


@dataclass(frozen=True)
class SamplerConfig:
    """How latents are drawn; the defaults are the official script's.

    Attributes:
        steps: Euler steps.
        shift: Of the noise schedule.
        prompt_scale: Guidance by the prompt, a number or a schedule over the steps.
        audio_scale: Guidance by the audio, likewise.
        loudness: Weight of the attended audio where it is heard.
        identity_scale: Weight of the attended face, for a model with an identity adapter.
        motion_scale: How far intensities of motion pull from neutral, for a model with a motion adapter: 1 as
            in training; more where training was short and they pull too little. Neutral stays as it is.
        audio: Whether each frame hears its own window of the sound (second training stage, and the released
            weights) or the whole clip (first stage).
        batch_branches: Evaluate guidance's branches as one batch (faster where memory allows), or one after
            another.
    """

    steps: int = 30
    shift: float = 5.0
    prompt_scale: float | ScaleSchedule = 5.0
    audio_scale: float | ScaleSchedule = 5.0
    loudness: float = 1.0
    identity_scale: float = IDENTITY_SCALE
    motion_scale: float = 1.0
    audio: Literal["frame", "clip"] = "frame"
    batch_branches: bool = True

    def __post_init__(self):
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; at least 1 is needed")
        if self.shift <= 0:
            raise ConfigError(f"shift is {self.shift}; a positive number is needed")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerInputs:
    """What a clip is sampled from.

    Attributes:
        first_frame: The first frame's condition, `[B, F, h, w, 4 + C]`.
        text: The prompt, encoded, without padding, `[B, L, D]`.
        negative_text: The negative prompt likewise; its length may differ.
        image: The picture encoder's tokens, `[B, L, D]`.
        audio: Speech features of the clip's video frames, `[B, A, D]`.
        motion: Intensities of face and body in [0, 1], `[B, 2]`; None for a transformer without the adapter.
        face: The face encoder's features of places, `[B, P, C]`; None likewise.
    """

    first_frame: Leaf
    text: Leaf
    negative_text: Leaf
    image: Leaf
    audio: Leaf
    motion: Leaf = None
    face: Leaf = None


def sample(
    transformer: WanTransformer,
    noise: Float[Array, "B F h w C"],
    inputs: SamplerInputs,
    config: SamplerConfig,
    *,
    progress: bool = False,
    each_step: Callable[[int, Array], None] | None = None,
) -> Float[Array, "B F h w C"]:
    """Integrates the guided velocity from noise to latents.

    Args:
        transformer: With an adapter named `audio`; `motion` and `identity`, too, if the inputs have `motion`
            and `face`.
        noise: Where to start.
        inputs: What to listen to.
        config: Steps and guidance.
        progress: Show a bar with the time left.
        each_step: Called with the step's number, from 0, and the latents after it.

    Returns:
        Latents, float32, normalised as the VAE gives them.
    """
    sigmas = sampling_sigmas(config.steps, config.shift)
    prompt_scales = scale_values(config.prompt_scale, config.steps)
    audio_scales = scale_values(config.audio_scale, config.steps)
    needed = branches(config.prompt_scale, config.audio_scale, loudness=config.loudness)
    graphdef, state = nnx.split(transformer)
    conditions = branch_conditions(graphdef, needed, config.audio, state, inputs, config.identity_scale)
    latents = jnp.array(noise, jnp.float32)  # a copy, for the step gives its argument's memory away
    for i in tqdm(range(config.steps), desc="Sampling", unit="step", disable=not progress):
        scales = np.array([prompt_scales[i], audio_scales[i]])
        latents = euler_step(
            graphdef,
            config.batch_branches,
            state,
            latents,
            inputs.first_frame,
            conditions,
            sigmas[i : i + 2],
            scales,
            inputs.motion,
            config.motion_scale,
        )
        if progress:
            latents.block_until_ready()  # or the bar would count steps that are only queued
        if each_step is not None:
            each_step(i, latents)
    return latents


@jax.jit(static_argnums=(0, 1, 2))
def branch_conditions(
    graphdef: nnx.GraphDef,
    needed: tuple[Branch, ...],
    level: Literal["frame", "clip"],
    state: nnx.State,
    inputs: SamplerInputs,
    identity_scale: float | Float[Array, ""] = IDENTITY_SCALE,
) -> dict[str, Condition]:
    """What the transformer listens to in each branch; the face, like the picture, in all of them.

    Args:
        graphdef: Of the transformer.
        needed: The branches.
        level: How the sound is heard.
        state: The transformer's.
        inputs: What to listen to.
        identity_scale: Weight of the face.

    Returns:
        By name; every array has a leading axis of branches.
    """
    model = nnx.merge(graphdef, state)
    batch, frames = inputs.first_frame.shape[:2]
    prompt = model.conditions(inputs.text, inputs.image)
    negative = model.conditions(inputs.negative_text, inputs.image)
    adapter = model.adapters["audio"]
    hear = adapter.frame_level if level == "frame" else adapter.clip_level
    audio = hear(inputs.audio, 4 * (frames - 1) + 1)
    shared = {}
    if inputs.face is not None:
        scale = jnp.full(batch, identity_scale, jnp.float32)
        shared["identity"] = model.adapters["identity"](inputs.face, scale=scale)
    each = []
    for branch in needed:
        text = negative if branch.negative_text else prompt
        base = {name: Condition(c.tokens, scale=jnp.ones(batch)) for name, c in text.items()}
        heard = replace(audio, scale=jnp.full(batch, branch.audio_scale, jnp.float32))
        each.append(base | {"audio": heard} | shared)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@jax.jit(static_argnums=(0, 1), donate_argnums=3)
def euler_step(
    graphdef: nnx.GraphDef,
    batch_branches: bool,
    state: nnx.State,
    latents: Float[Array, "B F h w C"],
    first_frame: Float[Array, "B F h w E"],
    conditions: dict[str, Condition],
    sigmas: Float[Array, "2"],
    scales: Float[Array, "2"],
    motion: Float[Array, "B 2"] | None = None,
    motion_scale: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B F h w C"]:
    """A guided step.

    Args:
        graphdef: Of the transformer.
        batch_branches: Whether branches are one batch.
        state: The transformer's.
        latents: Where it stands; their memory is given away.
        first_frame: The first frame's condition.
        conditions: From `branch_conditions`.
        sigmas: Noise levels before and after.
        scales: Of prompt and audio.
        motion: Intensities of face and body, the same in every branch: the paper does not guide by them.
        motion_scale: How far they pull from neutral.
    """
    model = nnx.merge(graphdef, state)
    offset = None if motion is None else model.adapters["motion"].exaggerated(motion, motion_scale)

    def velocity(conditions: dict[str, Condition], copies: int = 1) -> Array:
        copied = [jnp.concatenate([x] * copies) for x in (latents, first_frame)]
        timestep = jnp.full(copied[0].shape[0], TRAIN_TIMESTEPS * sigmas[0], jnp.float32)
        offsets = None if offset is None else jnp.concatenate([offset] * copies)
        return model(*copied, timestep, conditions, offsets)

    count = jax.tree.leaves(conditions)[0].shape[0]
    if batch_branches:
        merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), conditions)
        velocities = velocity(merged, count).reshape(count, *latents.shape)
    else:
        velocities = jax.lax.map(velocity, conditions)
    return latents + combine(list(velocities), scales[0], scales[1]) * (sigmas[1] - sigmas[0])
