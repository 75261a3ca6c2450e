"""Runners of references of the transformer with an adapter: tokens, windows, velocities, guided samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.diffusion.flow import sampling_sigmas
from fantasy_jax.diffusion.guidance import guidance_branches
from fantasy_jax.diffusion.sampler import HashableOptions, SamplerConfig, hashable, sample
from fantasy_jax.models.adapters.base import Adapter
from fantasy_jax.models.wan import NUM_TIMESTEPS, WanTransformer
from fantasy_jax.models.windows import split_windows, window_ranges
from fantasy_jax.parity.reference import Outputs, Reference, channels_first
from fantasy_jax.preprocessing.people import paint_labels, token_labels
from fantasy_jax.system.conditioning import Conditions, condition
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.typing import Array, Float, Int
from fantasy_jax.video import PIXELS_PER_LATENT, latent_frames


@dataclass(frozen=True)
class _Run:
    """A transformer with one adapter, and how it runs on the inputs of a reference.

    Attributes:
        reference: The reference.
        transformer: With the adapter.
        name: Name of the adapter's condition.
        settings: Keyword arguments of the adapter.
    """

    reference: Reference
    transformer: WanTransformer
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        """The adapter."""
        return self.transformer.adapters[self.name]

    def inputs(self, adapter_input: Array, labels: Array | None = None) -> ClipInputs:
        """The reference's inputs with one of the adapter's."""
        text = self.reference.array("input.text")
        negative = self.reference.activations.get("input.negative_text", text)
        return ClipInputs(
            first_frame=self.reference.images("input.condition_latents"),
            text=text,
            negative_text=jnp.asarray(negative),
            image=self.reference.array("input.clip_features"),
            adapters={self.adapter.input: adapter_input},
            labels=labels,
        )

    def velocity(
        self, inputs: ClipInputs, *, timestep: float | None = None, **settings: Any
    ) -> Float[np.ndarray, "B C F h w"]:
        """The velocity of the reference's latents."""
        time = self.reference.array("input.timestep") if timestep is None else jnp.array([timestep])
        options = hashable({self.name: {**self.settings, **settings}})
        given = _conditions(*nnx.split(self.transformer), inputs, options)
        latents = self.reference.images("input.latents")
        arguments = (latents, given.first_frame, time.astype(jnp.float32), given.attended)
        return channels_first(_forward(self.transformer, *arguments))

    def sample(self, inputs: ClipInputs, text_scale: float, scale: float) -> list[np.ndarray]:
        """The latents after each step of a guided sample."""
        settings = self.reference.config["sampler"]
        each: list[np.ndarray] = []
        sample(
            self.transformer,
            self.reference.images("input.latents"),
            inputs,
            SamplerConfig(settings["steps"], settings["shift"]),
            guidance=guidance_branches(settings["steps"], text_scale, scale, self.adapter.dropout_group),
            options={self.name: self.settings},
            callback=lambda _, latents, predicted: each.append(channels_first(latents)),
        )
        return each


@partial(jax.jit, static_argnums=(0, 3))
def _conditions(
    graphdef: nnx.GraphDef, state: nnx.State, inputs: ClipInputs, options: HashableOptions
) -> Conditions:
    settings = {name: dict(values) for name, values in options}
    return condition(nnx.merge(graphdef, state), inputs, options=settings)


_forward = nnx.jit(lambda transformer, *arguments: transformer(*arguments))


def run_fantasytalking(reference: Reference) -> Outputs:
    """The transformer with the audio adapter."""
    transformer, adapter = (reference.modules[x] for x in ("wan2.1_i2v_dit", "fantasytalking"))
    transformer.adapters["audio"] = adapter
    expand, num_frames = reference.config["expand_length"], reference.config["num_frames"]
    run = _Run(reference, transformer, "audio", {"expand": expand})
    inputs = run.inputs(reference.array("input.audio_features"))
    tokens = adapter.tokens(inputs.adapters["audio"])
    yield "audio_tokens", tokens
    yield "velocity_audio_scale_1", run.velocity(inputs)
    if "output.sample_sigmas" not in reference.activations:
        return
    windows, lengths = split_windows(tokens, window_ranges(tokens.shape[1], num_frames, expand=expand))
    yield "audio_window_ranges", window_ranges(tokens.shape[1], num_frames)
    yield "audio_window_lengths", lengths
    yield "audio_windows", windows
    yield "velocity_audio_scale_0", run.velocity(inputs, scale=0.0)
    yield "velocity_audio_scale_0.5", run.velocity(inputs, scale=0.5)
    yield "velocity_clip_level", run.velocity(inputs, attention="clip")
    negative = replace(inputs, text=inputs.negative_text)
    yield "velocity_negative_text_audio_scale_0", run.velocity(negative, scale=0.0)
    yield "velocity_timestep_12.5", run.velocity(inputs, timestep=12.5)
    yield "velocity_timestep_999.75", run.velocity(inputs, timestep=999.75)
    yield from _schedules(reference)
    settings = reference.config["sampler"]
    run = replace(run, settings={"expand": expand, "scale": settings["audio_scale"]})
    steps = run.sample(inputs, settings["prompt_cfg_scale"], settings["audio_cfg_scale"])
    for step, latents in enumerate(steps, 1):
        yield f"sample_latents_step{step}", latents


def run_expression_adapter(reference: Reference) -> Outputs:
    """The expression adapter's tokens and windows."""
    adapter = reference.modules["fantasyportrait_adapter"]
    motions = reference.array("input.motions")
    for name in ("raw_tokens", "mouth_tokens", "emotion_tokens"):
        yield name, nnx.jit(lambda adapter, x, name=name: getattr(adapter, name)(x))(adapter, motions)
    yield from _motion_tokens(reference)
    for frames in (5, 9, 17, 21, 81, 201):
        yield (
            f"window_ranges_{frames}_frames",
            window_ranges(frames * adapter.config.tokens_per_frame, frames),
        )


def run_fantasyportrait(reference: Reference) -> Outputs:
    """The transformer with the expression adapter: one, two and three people."""
    transformer, adapter = (reference.modules[x] for x in ("wan2.1_i2v_dit", "fantasyportrait_adapter"))
    transformer.adapters["expression"] = adapter
    run = _Run(reference, transformer, "expression")
    motions = reference.array("input.motions")
    labels, labels_three = (
        _box_labels(reference, key) for key in ("boxes_xyxy_left_to_right", "boxes_three_xyxy_left_to_right")
    )
    yield from _motion_tokens(reference)
    yield "token_labels", labels.astype(np.float32)
    yield "token_labels_three", labels_three.astype(np.float32)
    single = run.inputs(motions[None, :1])
    two = run.inputs(motions[None], labels=jnp.asarray(labels[None]))
    three = run.inputs(reference.array("input.motions_three")[None], labels=jnp.asarray(labels_three[None]))
    yield "velocity_single", run.velocity(single)
    yield "velocity_single_scale_0", run.velocity(single, scale=0.0)
    yield "velocity_single_scale_0.5", run.velocity(single, scale=0.5)
    yield "velocity_two_characters", run.velocity(two)
    yield "velocity_three_characters", run.velocity(three)
    negative = replace(single, text=single.negative_text)
    yield "velocity_negative_text_scale_0", run.velocity(negative, scale=0.0)
    yield from _schedules(reference)
    scales = {
        name: [reference.config["sampler"][name][f"{x}cfg_scale"] for x in ("", "portrait_")]
        for name in ("two_passes", "three_passes")
    }
    steps = run.sample(single, *scales["two_passes"])
    yield "sample_latents_two_passes_step1", steps[0]
    yield "sample_latents_two_passes_step4", steps[3]
    yield "sample_latents_three_passes_step4", run.sample(single, *scales["three_passes"])[3]
    yield "sample_latents_two_characters_step4", run.sample(two, *scales["two_passes"])[3]


def _motion_tokens(reference: Reference) -> Outputs:
    """Tokens and windows of each person."""
    adapter = reference.modules["fantasyportrait_adapter"]
    num_frames = reference.config["num_frames"]
    tokens = nnx.jit(lambda adapter, x: adapter.tokens(x))(adapter, reference.array("input.motions"))
    ranges = window_ranges(tokens.shape[1], num_frames)
    windows, lengths = split_windows(tokens, ranges)
    yield "motion_tokens", tokens
    yield "motion_window_ranges", ranges
    yield "motion_windows", windows
    yield "motion_window_lengths", lengths


def _box_labels(reference: Reference, key: str) -> Int[np.ndarray, "F S"]:
    height, width = (side * PIXELS_PER_LATENT for side in reference.activations["input.latents"].shape[-2:])
    boxes = np.array(reference.config[key])
    return token_labels(paint_labels(boxes, height, width), latent_frames(reference.config["num_frames"]))


def _schedules(reference: Reference) -> Outputs:
    """Noise levels of sampling, and those of training with the official loss weights."""
    settings = reference.config["sampler"]
    sigmas = sampling_sigmas(settings["steps"], settings["shift"])[:-1]
    yield "sample_sigmas", sigmas
    yield "sample_timesteps", NUM_TIMESTEPS * sigmas
    train = NUM_TIMESTEPS * sampling_sigmas(NUM_TIMESTEPS, settings["shift"])[:-1]
    yield "train_timesteps_1000", train
    yield "train_weights_1000", training_weight(jnp.asarray(train), shift=settings["shift"])


def training_weight(timestep: Float[Array, " B"], *, shift: float = 5.0) -> Float[Array, " B"]:
    """The official loss weight at a timestep, which training here does not use.

    A bell around the middle, with mean 1 over the shifted schedule. Source: fantasy-talking,
    `diffsynth/schedulers/flow_match.py`, `training_weight`.

    Args:
        timestep: Timesteps in [0, 1000].
        shift: Shift of the schedule over which the mean is taken.
    """
    levels = NUM_TIMESTEPS * sampling_sigmas(NUM_TIMESTEPS, shift)[:-1].astype(np.float64)
    bell = np.exp(-2 * (levels / NUM_TIMESTEPS - 0.5) ** 2)
    lowest, mean = bell.min(), bell.mean()
    return (jnp.exp(-2 * (timestep / NUM_TIMESTEPS - 0.5) ** 2) - lowest) / (mean - lowest)
