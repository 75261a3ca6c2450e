"""Training the transformer to talk: first the whole clip's sound for every token, then each frame its own.

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

from fantasy_jax.config import ConfigError
from fantasy_jax.data.records import Record
from fantasy_jax.diffusion.flow import TRAIN_TIMESTEPS, add_noise, draw_sigmas, velocity_target
from fantasy_jax.diffusion.losses import velocity_loss
from fantasy_jax.diffusion.sampler import SamplerInputs
from fantasy_jax.models.adapters.identity import IDENTITY_SCALE
from fantasy_jax.models.condition import Condition
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipeline import first_frame_condition
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.parameters import EVERYTHING, Rules
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float

VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels at which held-out clips are looked at: few, even, and always the same."""


@dataclass(frozen=True)
class TalkingStageConfig:
    """A stage of the transformer's training.

    Attributes:
        audio: Whether every video token hears the whole clip (stage 1) or its own frames (stage 2).
        steps: How long.
        batch_size: Clips in a batch.
        lip_probability: Chance that a sample's loss is taken over the lips: 1 - eta, the paper's eta being
            0.2; 0 in stage 1.
        outside_lips: Weight of what lies outside of the lips in that loss. The paper has 0.
        lips_by_area: Whether the loss over the lips is divided by their area (`diffusion.losses`). The paper
            does not tell; undivided it is a hundredth of the plain loss, which then is all that is learnt.
        dropout: Chance that a sample goes without its picture, its sound, its prompt; each by itself.
        timesteps: How noise levels are drawn (`diffusion.flow.draw_sigmas`). The paper does not tell; even,
            and then shifted, is what sampling visits.
        timestep_mean: Of the normal distribution of `logit_normal`; below 0 there is less noise.
        timestep_deviation: Of it; 1 is what Stable Diffusion 3 found best (arXiv 2403.03206, table 1).
        shift: Of the noise levels, as in sampling; 1 leaves them as they are drawn.
        optimizer: How parameters follow.
        parameters: Which are trained, frozen, or trained through a LoRA (`training.parameters`); every
            one must have a rule.
        saved: What blocks keep for the backward pass, by `checkpoint_name`; the rest is computed anew. None
            keeps everything.
    """

    audio: Literal["clip", "frame"] = "clip"
    steps: int = 1000
    batch_size: int = 16
    lip_probability: float = 0.0
    outside_lips: float = 0.0
    lips_by_area: bool = True
    dropout: float = 0.1
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    timestep_mean: float = 0.0
    timestep_deviation: float = 1.0
    shift: float = 3.0
    optimizer: OptimizerConfig = OptimizerConfig()
    parameters: Rules = EVERYTHING
    saved: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1:
            raise ConfigError("steps and batch_size must be at least 1")
        if self.batch_size % self.optimizer.accumulate:
            raise ConfigError(
                f"batch_size is {self.batch_size}; it has no {self.optimizer.accumulate} equal parts"
            )
        for name in ("lip_probability", "outside_lips", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for pattern, _ in self.parameters:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"parameters: {pattern!r} is no pattern ({error})") from None


@dataclass(frozen=True)
class PadText:
    """Fills prompts with zeros to one length, as the transformer does; the sound is for ears alone."""

    length: int

    def __call__(self, record: Record, rng: np.random.Generator | None = None) -> Record:
        """Pads; chance has no part in it."""
        text = record["text"]
        kept = {name: value for name, value in record.items() if name != "sound"}
        return kept | {"text": np.pad(text, ((0, self.length - len(text)), (0, 0)))}


def talking_loss(
    transformer: WanTransformer,
    batch: Batch,
    keys: Array,
    *,
    config: TalkingStageConfig,
    empty_text: Float[Array | np.ndarray, "1 L D"],
) -> tuple[Float[Array, ""], Metrics]:
    """Error of the velocity at drawn noise levels, with conditions dropped by chance.

    Args:
        transformer: With an adapter named `audio`. One named `motion` hears the clips' `motion`, `[B, 2]`, if
            they have that; it is never dropped, for the paper drops it not and no guidance leaves it out.
            One named `identity` sees their `face`, `[B, P, C]`, which is dropped together with the picture.
        batch: Encoded clips.
        keys: One for each clip: of its noise, its noise level, its dropout.
        config: The stage's settings.
        empty_text: What takes the place of a prompt that is dropped: the empty one, encoded.

    Raises:
        ConfigError: The transformer has an adapter named `identity`, and the clips have no `face`.
    """
    batch = _as_float32(batch)
    level_keys, noise_keys, drop_keys, lip_keys = jax.vmap(partial(jax.random.split, num=4), out_axes=1)(keys)
    sigma = draw_sigmas(
        level_keys,
        timesteps=config.timesteps,
        shift=config.shift,
        mean=config.timestep_mean,
        deviation=config.timestep_deviation,
    )
    drop = partial(jax.random.bernoulli, p=config.dropout, shape=(len(_DROPPED),))
    kept = dict(zip(_DROPPED, 1.0 - jax.vmap(drop, out_axes=1)(drop_keys), strict=True))
    noise = _noise(noise_keys, batch)
    velocity = _velocity(transformer, batch, noise, sigma, kept, config.audio, empty_text)
    masked = jax.vmap(partial(jax.random.bernoulli, p=config.lip_probability))(lip_keys)
    target, lips = velocity_target(batch["latents"], noise), batch["lips"]
    value = velocity_loss(
        velocity, target, lips, masked, outside=config.outside_lips, by_area=config.lips_by_area
    ).mean()
    return value, _everywhere_and_at_lips(velocity, target, lips)


def validation_losses(
    transformer: WanTransformer,
    batch: Batch,
    sigma: Float[Array, ""],
    *,
    config: TalkingStageConfig,
    empty_text: Float[Array | np.ndarray, "1 L D"],
) -> Metrics:
    """Errors of the velocity at one noise level, from noise that is always the same, with every condition.

    Args:
        transformer: As for `talking_loss`.
        batch: Encoded clips.
        sigma: The noise level.
        config: The stage's settings.
        empty_text: As for `talking_loss`.
    """
    batch = _as_float32(batch)
    count = len(batch["latents"])
    noise = _noise(jax.random.split(jax.random.key(0), count), batch)
    kept = dict.fromkeys(_DROPPED, jnp.ones(count))
    velocity = _velocity(transformer, batch, noise, jnp.full(count, sigma), kept, config.audio, empty_text)
    target = velocity_target(batch["latents"], noise)
    return _everywhere_and_at_lips(velocity, target, batch["lips"])


_DROPPED = ("picture", "sound", "prompt")


def _as_float32(batch: Batch) -> Batch:
    """Records are stored in half of it."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)


def _noise(keys: Array, batch: Batch) -> Float[Array, "B F h w C"]:
    shape = batch["latents"].shape[1:]
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _velocity(
    transformer: WanTransformer,
    batch: Batch,
    noise: Float[Array, "B F h w C"],
    sigma: Float[Array, " B"],
    kept: Mapping[str, Float[Array, " B"]],
    audio: Literal["clip", "frame"],
    empty_text: Float[Array | np.ndarray, "1 L D"],
) -> Float[Array, "B F h w C"]:
    """What is predicted; `kept` says with 1 and 0 which clip has which condition."""
    latents = batch["latents"]
    silent = jnp.pad(empty_text, ((0, 0), (0, batch["text"].shape[1] - empty_text.shape[1]), (0, 0)))
    text = jnp.where(kept["prompt"][:, None, None] > 0, batch["text"], silent)
    conditions = transformer.conditions(text, batch["image"])
    conditions["image"] = Condition(conditions["image"].tokens, scale=kept["picture"])
    adapter = transformer.adapters["audio"]
    hear = adapter.clip_level if audio == "clip" else adapter.frame_level
    conditions["audio"] = hear(batch["audio"], 4 * latents.shape[1] - 3, scale=kept["sound"])
    conditions |= _identity(transformer, batch, kept["picture"])
    first_frame = first_frame_condition(batch["first_frame"]) * kept["picture"][:, None, None, None, None]
    moves = "motion" in batch and "motion" in transformer.adapters
    offset = transformer.adapters["motion"](batch["motion"]) if moves else None
    noisy = add_noise(latents, noise, sigma)
    return transformer(noisy, first_frame, TRAIN_TIMESTEPS * sigma, conditions, offset)


def _everywhere_and_at_lips(
    velocity: Float[Array, "B F h w C"], target: Float[Array, "B F h w C"], lips: Float[Array, "B F h w"]
) -> Metrics:
    everywhere, at_lips = (
        velocity_loss(velocity, target, lips, jnp.full(len(lips), only)).mean() for only in (False, True)
    )
    return {"loss_everywhere": everywhere, "loss_at_lips": at_lips}


def _identity(
    transformer: WanTransformer, batch: Batch, has_picture: Float[Array, " B"]
) -> dict[str, Condition]:
    """The face, where the transformer sees faces. It is the picture's, and goes where that goes."""
    if "identity" not in transformer.adapters:
        return {}
    if "face" not in batch:
        raise ConfigError("the model has an identity_adapter, but clips have no face; encode them with it")
    scale = IDENTITY_SCALE * has_picture
    return {"identity": transformer.adapters["identity"](batch["face"], scale=scale)}


def sampling_inputs(records: list[Record], empty_text: Float[Array, "1 L C"]) -> SamplerInputs:
    """What a sampler needs to make these encoded clips anew."""
    names = [name for name in ("first_frame", "image", "audio", "motion", "face") if name in records[0]]
    stacked = {name: jnp.asarray(np.stack([r[name] for r in records]), jnp.float32) for name in names}
    length = max(len(record["text"]) for record in records)
    padded = [np.pad(record["text"], ((0, length - len(record["text"])), (0, 0))) for record in records]
    return SamplerInputs(
        first_frame=first_frame_condition(stacked["first_frame"]),
        text=jnp.asarray(np.stack(padded), jnp.float32),
        negative_text=jnp.repeat(empty_text, len(records), axis=0),
        image=stacked["image"],
        audio=stacked["audio"],
        motion=stacked.get("motion"),
        face=stacked.get("face"),
    )
