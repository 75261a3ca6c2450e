"""From the inputs of a clip to the transformer's conditions, and from these to the velocity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from fantasy_jax.models.condition import Condition, KeysValues, keep_keys_and_values, select_row
from fantasy_jax.models.wan import NUM_TIMESTEPS, WanTransformer
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.typing import Array, Float, Int, Leaf
from fantasy_jax.video import video_frames

Kept = bool | Float[Array, " B"]
"""Whether a dropout group is kept; or 1 and 0 for each sample."""

AdapterOptions = Mapping[str, Mapping[str, Any]]
"""Keyword arguments of each adapter's `condition` or `time_offset`, by the adapter's name."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditions:
    """Everything that the transformer takes beside latents and noise level.

    Attributes:
        first_frame: The first-frame condition, `[B, F, h, w, 4 + C]`.
        attended: Conditions of cross-attention by name.
        time_offset: Added to the timestep embedding, `[B, D]`; None: nothing.
    """

    first_frame: Leaf
    attended: dict[str, Condition]
    time_offset: Leaf = None

    def at_frames(self, start: Int[Array, " N"], count: int, row: Int[Array, " N"]) -> "Conditions":
        """The conditions of N windows of one clip, as a batch.

        Args:
            start: First latent frame of each window.
            count: Latent frames of a window.
            row: Row of the first-frame condition and of the image; conditions of one row are the same in all
                windows.
        """

        def cut(start: Int[Array, ""], row: Int[Array, ""]) -> Conditions:
            return Conditions(
                select_row(self.first_frame, row),
                {name: x.at_frames(start, count, row) for name, x in self.attended.items()},
                None if self.time_offset is None else select_row(self.time_offset, row),
            )

        return jax.vmap(cut)(start, row)


def condition(
    transformer: WanTransformer,
    inputs: ClipInputs,
    *,
    keep: Mapping[str, Kept] | None = None,
    options: AdapterOptions | None = None,
    num_frames: int | None = None,
) -> Conditions:
    """Builds the conditions of a batch of clips.

    A dropped text becomes the negative text. A dropped image sets the first-frame condition to zero and
    removes the image's tokens. A dropped adapter is removed, by a scale of 0.

    Args:
        transformer: With its adapters.
        inputs: What the clips are conditioned on.
        keep: By dropout group: `text`, `image`, and the groups of adapters. Groups that are missing are kept.
        options: Keyword arguments of adapters, such as `{"audio": {"attention": "clip"}}`.
        num_frames: Video frames T that the inputs of adapters span; None: those of the first-frame condition.
    """
    keep, options = keep or {}, options or {}
    batch = len(inputs.first_frame)
    num_frames = video_frames(inputs.first_frame.shape[1]) if num_frames is None else num_frames
    attended = transformer.conditions(_select_text(transformer, inputs, keep.get("text", True)), inputs.image)
    image_weight = _weight(keep.get("image", True), batch)
    attended["image"] = replace(attended["image"], scale=image_weight)
    attended["text"] = replace(attended["text"], scale=jnp.ones(batch))
    first_frame = inputs.first_frame
    if keep.get("image", True) is not True:
        first_frame = first_frame * image_weight[:, None, None, None, None]
    offset = None
    for name, adapter in transformer.adapters.items():
        features = inputs.adapters.get(adapter.input)
        if features is None:
            continue
        settings = dict(options.get(name, {}))
        if adapter.gives == "time_offset":
            more = adapter.time_offset(features, **settings)
            offset = more if offset is None else offset + more
            continue
        scale = settings.pop("scale", adapter.default_scale) * _weight(
            keep.get(adapter.dropout_group, True), len(features)
        )
        attended[name] = adapter.condition(features, num_frames, scale=scale, **settings)
        if attended[name].per_person:
            mask = inputs.attended_people(adapter.input, everybody=not adapter.masked)
            attended[name] = replace(attended[name], mask=mask)
    return Conditions(first_frame, attended, offset)


def share_keys_and_values(
    transformer: WanTransformer, branches: Sequence[Conditions], texts: Sequence[int], *, per_frame: bool
) -> tuple[list[Conditions], dict[str, KeysValues]]:
    """Replaces tokens by keys and values, so that they are projected once, not in every step and branch.

    Branches that differ in their texts share all other tokens: what they leave out has a scale of 0.

    Args:
        transformer: With its adapters.
        branches: Conditions of the same clips.
        texts: A number for each branch; branches with the same number have the same text.
        per_frame: Whether tokens per latent frame are replaced, too; else those remain tokens.

    Returns:
        The conditions of each branch, and the keys and values that they share, by condition.
    """
    branches, kept = list(branches), {}
    for name, first in branches[0].attended.items():
        if first.per_frame and not per_frame:
            continue
        numbers = texts if name == "text" else [0] * len(branches)
        contents = list(dict.fromkeys(numbers))
        tokens = [branches[numbers.index(x)].attended[name].tokens for x in contents]
        whole = replace(first, tokens=jnp.concatenate(tokens))
        kept[name] = keep_keys_and_values(transformer.kv_layers(name), whole)
        for i, (branch, number) in enumerate(zip(branches, numbers, strict=True)):
            count = len(first.tokens)
            rows = contents.index(number) * count + jnp.arange(count)
            given = replace(branch.attended[name], tokens=None, rows=rows, start=jnp.zeros_like(rows))
            branches[i] = replace(branch, attended=branch.attended | {name: given})
    return branches, kept


def velocity(
    transformer: WanTransformer,
    latents: Float[Array, "B F h w C"],
    sigma: Float[Array, ""] | Float[Array, " B"],
    conditions: Conditions,
    kept: Mapping[str, KeysValues] = MappingProxyType({}),
) -> Float[Array, "B F h w C"]:
    """The transformer's prediction of noise minus data.

    Args:
        transformer: With its adapters.
        latents: Noisy latents.
        sigma: Noise level in [0, 1], of all samples or of each.
        conditions: From `condition` or `share_keys_and_values`.
        kept: From `share_keys_and_values`.
    """
    given = conditions.first_frame, _timestep(latents, sigma), conditions.attended, conditions.time_offset
    return transformer(latents, *given, kept)


def cached_velocity(
    transformer: WanTransformer,
    latents: Float[Array, "B F h w C"],
    sigma: Float[Array, ""] | Float[Array, " B"],
    conditions: Conditions,
    residual: Float[Array, "B S F D"] | None = None,
    *,
    kept: Mapping[str, KeysValues] = MappingProxyType({}),
) -> tuple[Float[Array, "B F h w C"], Float[Array, "B S F D"] | None]:
    """The velocity with what the blocks add to the tokens, or from what they added at another noise level.

    Args:
        transformer: With its adapters.
        latents: Noisy latents.
        sigma: Noise level in [0, 1], of all samples or of each.
        conditions: From `condition` or `share_keys_and_values`.
        residual: Added to the embedded tokens in place of running the blocks; None runs them.
        kept: From `share_keys_and_values`.

    Returns:
        The velocity; and the tokens after the blocks minus those before, in the transformer's `dtype`, or
        None where `residual` is given.
    """
    grid = transformer.grid(*latents.shape[2:4])
    timestep = _timestep(latents, sigma)
    before, time = transformer.embed(latents, conditions.first_frame, timestep, conditions.time_offset)
    if residual is not None:
        return transformer.head(before + residual, time, grid), None
    after = transformer.run_blocks(before, time, grid, conditions.attended, kept)
    return transformer.head(after, time, grid), (after - before).astype(transformer.dtype)


def _timestep(latents: Array, sigma: Float[Array, ""] | Float[Array, " B"]) -> Float[Array, " B"]:
    return jnp.broadcast_to(jnp.asarray(NUM_TIMESTEPS * sigma, jnp.float32), latents.shape[:1])


def _select_text(transformer: WanTransformer, inputs: ClipInputs, keep: Kept) -> Float[Array, "B L D"]:
    if isinstance(keep, bool):
        return inputs.text if keep else inputs.negative_text
    text, negative = (transformer.pad_text(x) for x in (inputs.text, inputs.negative_text))
    return jnp.where(keep[:, None, None] > 0, text, negative)


def _weight(keep: Kept, batch: int) -> Float[Array, " B"]:
    return jnp.full(batch, float(keep), jnp.float32) if isinstance(keep, bool) else keep
