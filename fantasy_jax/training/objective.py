"""The training objective of the transformer: flow matching with condition dropout and lip masks.

Source: arXiv 2504.04842, sections 3.2 and 4.1; for portraits, which need no lip masks, arXiv 2507.12956,
section 3.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.config import Factor, Fraction, PositiveFloat, PositiveInt, Settings
from fantasy_jax.data.records import Record
from fantasy_jax.diffusion.flow import add_noise, draw_sigmas, velocity_target
from fantasy_jax.diffusion.losses import velocity_loss
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.adapters.audio import AudioAttention
from fantasy_jax.models.layers import Saved
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.system.conditioning import condition, velocity
from fantasy_jax.system.inputs import ClipInputs, as_float32
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.parameters import ALL_TRAINED, ParameterRules
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float, Leaf
from fantasy_jax.video import VideoConfig, latent_frames

VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels of the validation loss: few, evenly spaced, always the same."""


@dataclass(frozen=True)
class StageConfig(Settings):
    """One stage of the transformer's training.

    Attributes:
        audio_attention: Whether every video token attends to the audio of the whole clip (`clip`, the paper's
            first stage) or each latent frame to its own window (`frame`, the second). It has no effect
            without an audio adapter.
        num_steps: Training steps.
        batch_size: Global batch size.
        lip_mask_probability: Probability that a sample's loss is masked to the lips: 1 - eta, where the
            paper's eta is 0.2; 0 in the first stage, and for portraits, whose records need no lip masks.
        outside_lips: Weight outside the lips in the masked loss; the paper's is 0.
        lips_by_area: Whether the masked loss is divided by the area of the lips (`diffusion.losses`). The
            paper does not say; undivided it is a hundredth of the unmasked loss, which then dominates.
        dropout: Condition dropout probability, drawn independently for each group: image (with the face),
            text, and those of the model's adapters, such as audio or expression. FantasyTalking's paper has
            0.1, FantasyPortrait's 0.2.
        timesteps: Distribution of the noise levels (`diffusion.flow.draw_sigmas`), before the shift.
            FantasyPortrait's paper says logit-normal, FantasyTalking's does not say; uniform and then shifted
            is what sampling visits.
        timestep_mean: Mean of the normal distribution of `logit_normal`; below 0 there is less noise.
        timestep_std: Its standard deviation; 1 is Stable Diffusion 3's best (arXiv 2403.03206, table 1).
        shift: Shift of the noise levels, as in sampling; 1 leaves them as they are drawn.
        optimizer: Settings of the optimizer.
        parameters: Ordered rules that select the trained, frozen and LoRA parameters (`training.parameters`).
        remat_save_names: Activations that blocks save for the backward pass (`models.layers.Saved`); the
            others are recomputed. None saves all.
    """

    audio_attention: AudioAttention = "clip"
    num_steps: PositiveInt = 1000
    batch_size: PositiveInt = 16
    lip_mask_probability: Fraction = 0.0
    outside_lips: Fraction = 0.0
    lips_by_area: bool = True
    dropout: Fraction = 0.1
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    timestep_mean: Factor = 0.0
    timestep_std: PositiveFloat = 1.0
    shift: PositiveFloat = 3.0
    optimizer: OptimizerConfig = OptimizerConfig()
    parameters: ParameterRules = ALL_TRAINED
    remat_save_names: Saved = None

    def __post_init__(self):
        super().__post_init__()
        self.optimizer.check_batch_size(self.batch_size)
        for pattern, _ in self.parameters:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"parameters: {pattern!r} is no regular expression ({error})") from None

    @property
    def adapter_options(self) -> dict[str, dict[str, str]]:
        """Keyword arguments of the adapters (`system.conditioning.condition`)."""
        return {"audio": {"attention": self.audio_attention}}


@dataclass(frozen=True)
class PadText:
    """Pads prompts with zeros to one length, and removes the waveform, which training does not need."""

    length: int

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Record:
        """Pads a record; deterministic."""
        text = record["text"]
        kept = {name: value for name, value in record.items() if name != "waveform"}
        return kept | {"text": np.pad(text, ((0, self.length - len(text)), (0, 0)))}


def velocity_objective(
    transformer: WanTransformer,
    batch: Batch,
    keys: Array,
    *,
    config: StageConfig,
    empty_text: Float[Array | np.ndarray, "1 L D"],
) -> tuple[Float[Array, ""], Metrics]:
    """Error of the velocity at random noise levels, with random condition dropout.

    Adapters without a dropout group (motion) are never dropped; the face is dropped together with the image.

    Args:
        transformer: With its adapters.
        batch: Encoded clips of one size; without `lips` no loss is masked.
        keys: A key for each clip, for its noise, noise level, dropout and lip mask.
        config: Settings of the stage.
        empty_text: The encoded empty prompt, which takes the place of a dropped one.

    Raises:
        ConfigError: The clips lack something, or do not fit the model (`check_inputs`).
    """
    batch = as_float32(batch)
    check_inputs(transformer, batch, config)
    level_keys, noise_keys, drop_keys, lip_keys = jax.vmap(partial(jax.random.split, num=4), out_axes=1)(keys)
    sigma = draw_sigmas(
        level_keys,
        timesteps=config.timesteps,
        shift=config.shift,
        mean=config.timestep_mean,
        std=config.timestep_std,
    )
    keep = draw_kept(drop_keys, dropout_groups(transformer), config.dropout)
    noise = _noise(noise_keys, batch)
    predicted = _predict(transformer, batch, noise, sigma, keep, config, empty_text)
    masked = jax.vmap(partial(jax.random.bernoulli, p=config.lip_mask_probability))(lip_keys)
    target = velocity_target(batch["latents"], noise)
    value = velocity_loss(
        predicted, target, _lips(batch), masked, outside=config.outside_lips, by_area=config.lips_by_area
    ).mean()
    return value, _loss_metrics(predicted, target, batch)


def validation_losses(
    transformer: WanTransformer,
    batch: Batch,
    sigma: Float[Array, ""],
    *,
    config: StageConfig,
    empty_text: Float[Array | np.ndarray, "1 L D"],
) -> Metrics:
    """Errors of the velocity at one noise level, with fixed noise and all conditions.

    Args:
        transformer: With its adapters.
        batch: Encoded clips.
        sigma: The noise level.
        config: Settings of the stage.
        empty_text: As for `velocity_objective`.
    """
    batch = as_float32(batch)
    count = len(batch["latents"])
    noise = _noise(jax.random.split(jax.random.key(0), count), batch)
    keep = dict.fromkeys(dropout_groups(transformer), jnp.ones(count))
    predicted = _predict(transformer, batch, noise, jnp.full(count, sigma), keep, config, empty_text)
    return _loss_metrics(predicted, velocity_target(batch["latents"], noise), batch)


def dropout_groups(transformer: WanTransformer) -> tuple[str, ...]:
    """The groups of conditions that are dropped together, in the order in which they are drawn."""
    groups = {adapter.dropout_group for adapter in transformer.adapters.values()}
    return tuple(sorted({"image", "text", *groups} - {None}))


def draw_kept(keys: Array, groups: Sequence[str], dropout: float) -> dict[str, Float[Array, " B"]]:
    """Draws for each group and clip whether the condition is kept (1) or dropped (0).

    Args:
        keys: A key for each clip.
        groups: Names of the groups.
        dropout: Probability with which each is dropped, independently of the others.
    """
    drop = partial(jax.random.bernoulli, p=dropout, shape=(len(groups),))
    return dict(zip(groups, 1.0 - jax.vmap(drop, out_axes=1)(keys), strict=True))


def check_inputs(
    transformer: WanTransformer,
    batch: Mapping[str, Leaf],
    config: StageConfig,
    *,
    name: str | Path = "records",
) -> None:
    """Checks that encoded clips have what the transformer's adapters and a stage's loss take.

    Args:
        transformer: With its adapters.
        batch: A batch of encoded clips, or one record.
        config: Settings of the stage.
        name: Name of the records in messages.

    Raises:
        ConfigError: A field is missing, or has another size.
    """
    for adapter_name, adapter in transformer.adapters.items():
        takes = f"which the {adapter_name} adapter takes; encode the clips with this model, or remove it"
        per_person = adapter.per_person == "always"
        for field in (adapter.input, *(("labels", "owners") if per_person else ())):
            if field not in batch:
                raise ConfigError(f"{name}: have no {field}, {takes}")
        # The last dimension, the width of features, is the same for all clips.
        found, width = batch[adapter.input].shape[-1], adapter.input_shape(adapter.config, VideoConfig())[-1]
        if found != width:
            raise ConfigError(f"{name}: {adapter.input} has width {found}, not {width}, {takes}")
        if per_person:
            _check_people(transformer, batch, adapter.input, name)
    if config.lip_mask_probability and "lips" not in batch:
        raise ConfigError(
            f"{name}: have no lips, but lip_mask_probability is {config.lip_mask_probability:g}; set it to "
            "0, or encode clips that have lip masks"
        )


def _check_people(
    transformer: WanTransformer,
    batch: Mapping[str, Leaf],
    field: str,
    name: str | Path,
) -> None:
    """Raises a ConfigError if labels or owners belong to other clips, or to another number of people."""
    people, frames, *_ = batch[field].shape[-3:]
    tokens = math.prod(transformer.grid(*batch["latents"].shape[-3:-1]))
    clip = f"clips of {frames} frames, {tokens} tokens and {people} people"
    for other, wanted in (("labels", (latent_frames(frames), tokens)), ("owners", (people,))):
        found = batch[other].shape[-len(wanted) :]
        if found != wanted:
            raise ConfigError(
                f"{name}: {other} has size {found}, not {wanted}, for {clip}; encode them again"
            )


def _lips(batch: Batch) -> Float[Array, "B F h w"]:
    """The lip masks; empty ones, which mask no loss, where the clips have none."""
    return batch.get("lips", jnp.zeros(batch["latents"].shape[:-1]))


def _noise(keys: Array, batch: Batch) -> Float[Array, "B F h w C"]:
    shape = batch["latents"].shape[1:]
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _predict(
    transformer: WanTransformer,
    batch: Batch,
    noise: Float[Array, "B F h w C"],
    sigma: Float[Array, " B"],
    keep: Mapping[str, Float[Array, " B"]],
    config: StageConfig,
    empty_text: Float[Array | np.ndarray, "1 L D"],
) -> Float[Array, "B F h w C"]:
    inputs = ClipInputs.from_batch(batch, jnp.asarray(empty_text))
    conditions = condition(transformer, inputs, keep=keep, options=config.adapter_options)
    return velocity(transformer, add_noise(batch["latents"], noise, sigma), sigma, conditions)


def _loss_metrics(
    predicted: Float[Array, "B F h w C"], target: Float[Array, "B F h w C"], batch: Batch
) -> Metrics:
    lips = _lips(batch)
    everywhere, at_lips = (
        velocity_loss(predicted, target, lips, jnp.full(len(lips), masked)).mean() for masked in (False, True)
    )
    return {"loss_everywhere": everywhere} | ({"loss_at_lips": at_lips} if "lips" in batch else {})
