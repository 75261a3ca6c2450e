"""What a clip is conditioned on: the one list of fields for loss, sampler, parity and compilation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.registry import Component
from fantasy_jax.typing import Array, Bool, DType, Float, Leaf
from fantasy_jax.video import VideoConfig

_NOT_INPUTS = ("latents", "lips", "waveform", "record", "dataset")
"""Fields of an encoded record or batch that clips are not conditioned on."""
_BASE = ("first_frame", "text", "image")
"""Fields of an encoded record that the transformer takes without an adapter."""
_PEOPLE = ("labels", "owners")
"""Fields of an encoded record that say whose expression each video token attends to."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ClipInputs:
    """The inputs that a batch of clips is conditioned on.

    For one clip of several windows (`diffusion/windows.py`), the first-frame condition spans a window; it and
    the image can have a row for each of several pictures. All else spans the clip.

    Attributes:
        first_frame: The first-frame condition, `[B, F, h, w, 4 + C]` (`first_frame_condition`).
        text: The encoded prompt, padded or not, `[B, L, D]`.
        negative_text: What takes its place where the prompt is dropped, `[B, L, D]`; its length may differ.
            In sampling the negative prompt, in training the empty one.
        image: The image encoder's tokens, `[B, I, E]`.
        adapters: Inputs of adapters by name, such as `audio` `[B, A, C]`, `motion` `[B, 2]`, `face` `[B, P,
            C]`, `expression` `[B, N, T, M]` of N people, or `audio` `[B, N, A, C]` of N sounds, one for each
            person who speaks. An adapter whose input is missing is not used.
        labels: Whom each video token shows, `[B, F, S]`: person 1, 2, ..., or 0 for the background. None: all
            tokens attend to everybody's input.
        owners: For inputs per person, by name, the label of the person that each belongs to, `[B, N]`; -1 for
            nobody's, as padding has. Where it is missing, input n belongs to person n + 1.
    """

    first_frame: Leaf
    text: Leaf
    negative_text: Leaf
    image: Leaf
    adapters: dict[str, Leaf] = field(default_factory=dict)
    labels: Leaf = None
    owners: dict[str, Leaf] = field(default_factory=dict)

    def attended_people(self, name: str, *, everybody: bool = False) -> Bool[Array, "B S F N"] | None:
        """Whose input each video token attends to, in the adapter input called `name`.

        The background attends to everybody, a person to their own input only, and a person without one to
        nobody. Source: fantasy-portrait, `utils.py` and `infer_multi.py`, which does the same for two people;
        for three it lets each person attend to the inputs of others, which is not reproduced.

        Args:
            name: The input.
            everybody: Whether all tokens attend as the background does.

        Returns:
            None if there are no labels.
        """
        if self.labels is None:
            return None
        count = self.adapters[name].shape[1]
        owners = self.owners.get(name)
        owners = jnp.arange(1, count + 1)[None] if owners is None else owners
        labels = self.labels.swapaxes(1, 2)[..., None]
        owners = owners[:, None, None]
        return ((labels == 0) | (labels == owners) | everybody) & (owners > 0)

    @classmethod
    def from_batch(
        cls, batch: Mapping[str, Any], empty_text: Float[Array | np.ndarray, "1 L D"]
    ) -> "ClipInputs":
        """The inputs of a batch of encoded clips.

        Args:
            batch: Fields of `data.encoded`, each with a leading axis of clips; text padded to one length.
            empty_text: The empty prompt, encoded.
        """
        count, not_adapters = len(batch["text"]), (*_NOT_INPUTS, *_BASE, *_PEOPLE)
        return cls(
            first_frame=first_frame_condition(batch["first_frame"]),
            text=batch["text"],
            negative_text=jnp.broadcast_to(empty_text, (count, *empty_text.shape[1:])),
            image=batch["image"],
            adapters={name: value for name, value in batch.items() if name not in not_adapters},
            labels=batch.get("labels"),
            owners={"expression": batch["owners"]} if "owners" in batch else {},
        )

    @classmethod
    def from_records(
        cls, records: Sequence[Mapping[str, Any]], empty_text: Float[Array | np.ndarray, "1 L D"]
    ) -> "ClipInputs":
        """The inputs of encoded clips of one size, stacked, as `as_float32` makes them."""
        length = max(len(record["text"]) for record in records)
        texts = [np.pad(r["text"], ((0, length - len(r["text"])), (0, 0))) for r in records]
        names = [name for name in records[0] if name not in (*_NOT_INPUTS, "text")]
        batch = {name: np.stack([record[name] for record in records]) for name in names}
        return cls.from_batch(as_float32(batch | {"text": np.stack(texts)}), empty_text)

    @classmethod
    def spec(
        cls,
        model: ModelConfig,
        video: VideoConfig,
        batch_size: int,
        *,
        people: int = 1,
        dtype: DType = np.float32,
        sharding: Sharding | None = None,
    ) -> "ClipInputs":
        """Inputs without values, for the longest clips.

        Args:
            model: Sizes of the networks.
            video: Size and length of the clips.
            batch_size: Clips.
            people: People in each clip, for inputs per person; of several, each has a sound.
            dtype: Type of the arrays.
            sharding: Sharding of every array.
        """

        def array(*shape: int, dtype: DType = dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=sharding)

        def adapter_input(row: Component) -> jax.ShapeDtypeStruct:
            shape = row.network.input_shape(model.networks[row.slot], video)
            each = row.network.per_person == "always" or (row.network.per_person == "several" and people > 1)
            return array(*((people,) if each else ()), *shape)

        text = array(model.transformer.text_length, model.text_encoder.dim)
        latents = video.latent_shape(batch_size, model.transformer.condition_channels)
        return cls(
            first_frame=array(*latents[1:]),
            text=text,
            negative_text=text,
            image=array(model.image_encoder.num_tokens, model.image_encoder.dim),
            adapters={row.network.input: adapter_input(row) for row in model.adapters.values()},
            labels=array(video.latent_frames, video.tokens_per_frame, dtype=np.int32) if people > 1 else None,
        )


def as_float32(batch: Mapping[str, Any]) -> dict[str, Array]:
    """A batch of records, which are stored as float16, as float32; integers remain integers."""
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    return {
        name: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for name, x in arrays.items()
    }


def first_frame_condition(latents: Float[Array, "B F h w C"]) -> Float[Array, "B F h w E"]:
    """The transformer's first-frame condition: four channels of mask, then the latents.

    Args:
        latents: Those of `system.encoders.first_frame_latents`.

    Returns:
        E = 4 + C channels; the mask is one in the first latent frame and zero after it.
    """
    mask = jnp.zeros((*latents.shape[:-1], 4), latents.dtype).at[:, 0].set(1)
    return jnp.concatenate([mask, latents], axis=-1)
