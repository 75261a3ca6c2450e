"""Training the transformer to talk: first the whole clip's sound for every token, then each frame its own.

Source: arXiv 2504.04842, sections 3.2 and 4.1.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.config import ConfigError
from fantasy_jax.data.records import Record
from fantasy_jax.diffusion.flow import TRAIN_TIMESTEPS, add_noise, shift_sigma, velocity_target
from fantasy_jax.diffusion.losses import velocity_loss
from fantasy_jax.diffusion.sampler import SamplerInputs
from fantasy_jax.models.adapters.identity import IDENTITY_SCALE
from fantasy_jax.models.condition import Condition
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipeline import first_frame_condition
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Batch, Metrics
from fantasy_jax.typing import Array, Float


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
        dropout: Chance that a sample goes without its picture, its sound, its prompt; each by itself.
        shift: Of the noise levels, as in sampling; 1 draws them evenly.
        optimizer: How parameters follow.
        trainable: Patterns of the paths of the parameters that are trained, searched for; the rest is frozen.
        saved: What blocks keep for the backward pass, by `checkpoint_name`; the rest is computed anew. None
            keeps everything.
    """

    audio: Literal["clip", "frame"] = "clip"
    steps: int = 1000
    batch_size: int = 16
    lip_probability: float = 0.0
    outside_lips: float = 0.0
    dropout: float = 0.1
    shift: float = 3.0
    optimizer: OptimizerConfig = OptimizerConfig()
    trainable: tuple[str, ...] = ("",)
    saved: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1:
            raise ConfigError("steps and batch_size must be at least 1")
        for name in ("lip_probability", "outside_lips", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")


@dataclass(frozen=True)
class PadText:
    """Fills prompts with zeros to one length, as the transformer does."""

    length: int

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """Pads; chance has no part in it."""
        text = record["text"]
        return record | {"text": np.pad(text, ((0, self.length - len(text)), (0, 0)))}


def talking_loss(
    transformer: WanTransformer,
    batch: Batch,
    key: Array,
    *,
    config: TalkingStageConfig,
    empty_text: Float[Array | np.ndarray, "1 L C"],
) -> tuple[Float[Array, ""], Metrics]:
    """Error of the velocity at a drawn noise level, with conditions dropped by chance.

    Args:
        transformer: With an adapter named `audio`. One named `motion` hears the clips' `motion`, `[B, 2]`, if
            they have that; it is never dropped, for the paper drops it not and no guidance leaves it out.
            One named `identity` sees their `face`, `[B, P, C]`, which is dropped together with the picture.
        batch: Encoded clips.
        key: Of noise, its level and dropout.
        config: The stage's settings.
        empty_text: What takes the place of a prompt that is dropped: the empty one, encoded.

    Raises:
        ConfigError: The transformer has an adapter named `identity`, and the clips have no `face`.
    """
    latents = jnp.asarray(batch["latents"])
    count, frames = latents.shape[:2]
    level_key, noise_key, drop_key, lip_key = jax.random.split(key, 4)
    sigma = shift_sigma(jax.random.uniform(level_key, (count,)), config.shift)
    noise = jax.random.normal(noise_key, latents.shape)
    kept = 1.0 - jax.random.bernoulli(drop_key, config.dropout, (3, count))
    has_picture, has_sound, has_prompt = kept.astype(jnp.float32)

    silent = jnp.pad(empty_text, ((0, 0), (0, batch["text"].shape[1] - empty_text.shape[1]), (0, 0)))
    text = jnp.where(has_prompt[:, None, None] > 0, batch["text"], silent)
    conditions = transformer.conditions(text, jnp.asarray(batch["image"]))
    conditions["image"] = Condition(conditions["image"].tokens, scale=has_picture)
    adapter = transformer.adapters["audio"]
    hear = adapter.clip_level if config.audio == "clip" else adapter.frame_level
    conditions["audio"] = hear(jnp.asarray(batch["audio"]), 4 * frames - 3, scale=has_sound)
    conditions |= _identity(transformer, batch, has_picture)
    first_frame = first_frame_condition(batch["first_frame"]) * has_picture[:, None, None, None, None]

    moves = "motion" in batch and "motion" in transformer.adapters
    offset = transformer.adapters["motion"](jnp.asarray(batch["motion"])) if moves else None
    noisy = add_noise(latents, noise, sigma)
    velocity = transformer(noisy, first_frame, TRAIN_TIMESTEPS * sigma, conditions, offset)
    masked = jax.random.bernoulli(lip_key, config.lip_probability, (count,))
    target, lips = velocity_target(latents, noise), jnp.asarray(batch["lips"])
    outside = config.outside_lips
    value = velocity_loss(velocity, target, lips, masked, outside=outside).mean()
    everywhere, at_lips = (
        velocity_loss(velocity, target, lips, jnp.full(count, only)).mean() for only in (False, True)
    )
    return value, {"loss_everywhere": everywhere, "loss_at_lips": at_lips}


def _identity(
    transformer: WanTransformer, batch: Batch, has_picture: Float[Array, " B"]
) -> dict[str, Condition]:
    """The face, where the transformer sees faces. It is the picture's, and goes where that goes."""
    if "identity" not in transformer.adapters:
        return {}
    if "face" not in batch:
        raise ConfigError("the model has an identity_adapter, but clips have no face; encode them with it")
    scale = IDENTITY_SCALE * has_picture
    return {"identity": transformer.adapters["identity"](jnp.asarray(batch["face"]), scale=scale)}


def sampling_inputs(records: list[Record], empty_text: Float[Array, "1 L C"]) -> SamplerInputs:
    """What a sampler needs to make these encoded clips anew."""
    names = [name for name in ("first_frame", "image", "audio", "motion", "face") if name in records[0]]
    stacked = {name: jnp.asarray(np.stack([r[name] for r in records])) for name in names}
    length = max(len(record["text"]) for record in records)
    text = jnp.asarray(np.stack([np.pad(r["text"], ((0, length - len(r["text"])), (0, 0))) for r in records]))
    return SamplerInputs(
        first_frame=first_frame_condition(stacked["first_frame"]),
        text=text,
        negative_text=jnp.repeat(empty_text, len(records), axis=0),
        image=stacked["image"],
        audio=stacked["audio"],
        motion=stacked.get("motion"),
        face=stacked.get("face"),
    )
