"""What a clip is conditioned on: the one list of fields for loss, sampler, parity and compilation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from fantasy_jax.system.model import ModelConfig
from fantasy_jax.typing import Array, DType, Float, Leaf
from fantasy_jax.video import VideoConfig

_NOT_INPUTS = ("latents", "lips", "waveform", "record")
"""Fields of an encoded record that clips are not conditioned on."""
_BASE = ("first_frame", "text", "image")
"""Fields of an encoded record that the transformer takes without an adapter."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClipInputs:
    """The inputs that a batch of clips is conditioned on.

    Attributes:
        first_frame: The first-frame condition, `[B, F, h, w, 4 + C]` (`first_frame_condition`).
        text: The encoded prompt, padded or not, `[B, L, D]`.
        negative_text: What takes its place where the prompt is dropped, `[B, L, D]`; its length may differ.
            In sampling the negative prompt, in training the empty one.
        image: The image encoder's tokens, `[B, I, E]`.
        adapters: Inputs of adapters by name, such as `audio` `[B, A, C]`, `motion` `[B, 2]`, `face` `[B, P,
            C]`. An adapter whose input is missing is not used.
    """

    first_frame: Leaf
    text: Leaf
    negative_text: Leaf
    image: Leaf
    adapters: dict[str, Leaf] = field(default_factory=dict)

    @classmethod
    def from_batch(
        cls, batch: Mapping[str, Any], empty_text: Float[Array | np.ndarray, "1 L D"]
    ) -> "ClipInputs":
        """The inputs of a batch of encoded clips.

        Args:
            batch: Fields of `data.encoded`, each with a leading axis of clips; text padded to one length.
            empty_text: The empty prompt, encoded.
        """
        count = len(batch["text"])
        return cls(
            first_frame=first_frame_condition(batch["first_frame"]),
            text=batch["text"],
            negative_text=jnp.broadcast_to(empty_text, (count, *empty_text.shape[1:])),
            image=batch["image"],
            adapters={name: value for name, value in batch.items() if name not in (*_NOT_INPUTS, *_BASE)},
        )

    @classmethod
    def from_records(
        cls, records: Sequence[Mapping[str, Any]], empty_text: Float[Array | np.ndarray, "1 L D"]
    ) -> "ClipInputs":
        """The inputs of encoded clips, stacked as float32."""
        length = max(len(record["text"]) for record in records)
        texts = [np.pad(r["text"], ((0, length - len(r["text"])), (0, 0))) for r in records]
        names = [name for name in records[0] if name not in (*_NOT_INPUTS, "text")]
        batch = {name: np.stack([record[name] for record in records]) for name in names}
        batch = {name: jnp.asarray(value, jnp.float32) for name, value in batch.items()}
        return cls.from_batch(batch | {"text": jnp.asarray(np.stack(texts), jnp.float32)}, empty_text)

    @classmethod
    def spec(
        cls,
        model: ModelConfig,
        video: VideoConfig,
        batch_size: int,
        *,
        dtype: DType = np.float32,
        sharding: Sharding | None = None,
    ) -> "ClipInputs":
        """Inputs without values, for the longest clips.

        Args:
            model: Sizes of the networks.
            video: Size and length of the clips.
            batch_size: Clips.
            dtype: Type of the arrays.
            sharding: Sharding of every array.
        """

        def array(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

        text = array(model.transformer.text_length, model.text_encoder.dim)
        latents = video.latent_shape(batch_size, model.transformer.condition_channels)
        return cls(
            first_frame=array(*latents[1:]),
            text=text,
            negative_text=text,
            image=array(model.image_encoder.num_tokens, model.image_encoder.dim),
            adapters={
                row.network.input: array(*row.network.input_shape(model.networks[row.slot], video))
                for row in model.adapters.values()
            },
        )


def first_frame_condition(latents: Float[Array, "B F h w C"]) -> Float[Array, "B F h w E"]:
    """The transformer's first-frame condition: four channels of mask, then the latents.

    Args:
        latents: Latents of the first frame followed by grey frames (`system.encoders.first_frame_latents`).

    Returns:
        E = 4 + C channels; the mask is one in the first latent frame and zero after it.
    """
    mask = jnp.zeros((*latents.shape[:-1], 4), latents.dtype).at[:, 0].set(1)
    return jnp.concatenate([mask, latents], axis=-1)
