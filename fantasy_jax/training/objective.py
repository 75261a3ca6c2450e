"""The training objective of the transformer: flow matching with condition dropout and lip masks.

Source: arXiv 2504.04842, sections 3.2 and 4.1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
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
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.parameters import ALL_TRAINED, ParameterRules
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float

VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels of the validation loss: few, evenly spaced, always the same."""

_GROUPS = ("image", "audio", "text")
"""Dropout groups in the order in which they are drawn; those of further adapters come after them."""


@dataclass(frozen=True)
class StageConfig(Settings):
    """One stage of the transformer's training.

    Attributes:
        audio_attention: Whether every video token attends to the audio of the whole clip (`clip`, the paper's
            first stage) or each latent frame to its own window (`frame`, the second).
        num_steps: Training steps.
        batch_size: Global batch size.
        lip_mask_probability: Probability that a sample's loss is masked to the lips: 1 - eta, where the
            paper's eta is 0.2; 0 in the first stage.
        outside_lips: Weight outside the lips in the masked loss; the paper's is 0.
        lips_by_area: Whether the masked loss is divided by the area of the lips (`diffusion.losses`). The
            paper does not say; undivided it is a hundredth of the unmasked loss, which then dominates.
        dropout: Condition dropout probability, drawn independently for each group: image (with the face),
            audio, text.
        timesteps: Distribution of the noise levels (`diffusion.flow.draw_sigmas`). The paper does not say;
            uniform and then shifted is what sampling visits.
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
        batch: Encoded clips.
        keys: A key for each clip, for its noise, noise level, dropout and lip mask.
        config: Settings of the stage.
        empty_text: The encoded empty prompt, which takes the place of a dropped one.

    Raises:
        ConfigError: The clips lack the input of an adapter.
    """
    batch = _as_float32(batch)
    check_inputs(transformer, batch)
    level_keys, noise_keys, drop_keys, lip_keys = jax.vmap(partial(jax.random.split, num=4), out_axes=1)(keys)
    sigma = draw_sigmas(
        level_keys,
        timesteps=config.timesteps,
        shift=config.shift,
        mean=config.timestep_mean,
        std=config.timestep_std,
    )
    groups = dropout_groups(transformer)
    drop = partial(jax.random.bernoulli, p=config.dropout, shape=(len(groups),))
    keep = dict(zip(groups, 1.0 - jax.vmap(drop, out_axes=1)(drop_keys), strict=True))
    noise = _noise(noise_keys, batch)
    predicted = _predict(transformer, batch, noise, sigma, keep, config, empty_text)
    masked = jax.vmap(partial(jax.random.bernoulli, p=config.lip_mask_probability))(lip_keys)
    target, lips = velocity_target(batch["latents"], noise), batch["lips"]
    value = velocity_loss(
        predicted, target, lips, masked, outside=config.outside_lips, by_area=config.lips_by_area
    ).mean()
    return value, _loss_metrics(predicted, target, lips)


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
    batch = _as_float32(batch)
    count = len(batch["latents"])
    noise = _noise(jax.random.split(jax.random.key(0), count), batch)
    keep = dict.fromkeys(dropout_groups(transformer), jnp.ones(count))
    predicted = _predict(transformer, batch, noise, jnp.full(count, sigma), keep, config, empty_text)
    return _loss_metrics(predicted, velocity_target(batch["latents"], noise), batch["lips"])


def dropout_groups(transformer: WanTransformer) -> tuple[str, ...]:
    """The groups of conditions that are dropped together, in the order in which they are drawn."""
    groups = {adapter.dropout_group for adapter in transformer.adapters.values()}
    return *_GROUPS, *sorted(groups - {None, *_GROUPS})


def check_inputs(transformer: WanTransformer, batch: Mapping[str, object]) -> None:
    """Raises a ConfigError if encoded clips lack the input of one of the transformer's adapters."""
    for name, adapter in transformer.adapters.items():
        if adapter.input not in batch:
            raise ConfigError(
                f"records: have no {adapter.input}, which the model's {name} adapter takes; encode the clips "
                "with this model, or remove the adapter"
            )


def _as_float32(batch: Batch) -> Batch:
    """Records are stored as float16."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)


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
    predicted: Float[Array, "B F h w C"], target: Float[Array, "B F h w C"], lips: Float[Array, "B F h w"]
) -> Metrics:
    everywhere, at_lips = (
        velocity_loss(predicted, target, lips, jnp.full(len(lips), masked)).mean() for masked in (False, True)
    )
    return {"loss_everywhere": everywhere, "loss_at_lips": at_lips}
