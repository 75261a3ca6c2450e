"""Conditions as data: what cross-attention attends to, and its keys and values.

A block of the transformer owns one query. Every condition (text, image, audio, identity, expression) adds
keys and values of its own, and the attended values are summed, each with its scale, before the block's one
output projection, as in the released weights (fantasy-talking, `model.py`, `WanCrossAttentionProcessor`). A
new condition is a new entry in a mapping, not a new block.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.models.attention import attention, grouped_attention
from fantasy_jax.models.layers import RMSNorm, stack_layers, to_device
from fantasy_jax.sharding import constrain, constrain_last
from fantasy_jax.typing import Array, DType, Float, Int, Leaf

_XAVIER = nnx.initializers.xavier_uniform()

KeysValues = tuple[Float[Array, "... L D"], Float[Array, "... L D"]]
"""Keys and values of a condition that are kept over the steps, `[R, L, D]` of R rows, with people and latent
frames where `Condition.tokens` has them; those of all blocks have an axis of blocks first."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """Tokens that cross-attention attends to, the same in every block.

    Attributes:
        tokens: For every video token (`[B, L, D]`), per latent frame (`[B, F, L, D]`), or per person and
            latent frame (`[B, P, F, L, D]`). None where their keys and values are kept.
        lengths: Number of tokens that are not padding, for each sample (`[B]`) or each sample and latent
            frame (`[B, F]`); None: all.
        scale: Multiplier of the attended values, a number or `[B]`; 0 removes the condition exactly.
        mask: Whose tokens each video token attends to, bool `[B, S, F, P]`, for tokens per person; sharded
            along space like the video tokens. A video token that attends to nobody's gets exactly zero.
            None: everybody's.
        rows: Row of the kept keys and values that each sample attends to, int32 `[B]`; None: the tokens are
            projected in every block.
        start: The latent frame of these keys and values at which each sample begins, int32 `[B]`.
    """

    tokens: Leaf
    lengths: Leaf = None
    scale: Leaf = 1.0
    mask: Leaf = None
    rows: Leaf = None
    start: Leaf = None

    @property
    def per_frame(self) -> bool:
        """Whether each latent frame has tokens of its own."""
        return self.tokens.ndim > 3

    @property
    def per_person(self) -> bool:
        """Whether each person has tokens of their own."""
        return self.tokens.ndim == 5

    def at_frames(self, start: Int[Array, ""], count: int, row: Int[Array, ""]) -> "Condition":
        """The condition of some latent frames of one sample, without the axis of samples.

        Args:
            start: The first latent frame. Tokens for every video token are the same in all of them.
            count: Number of latent frames.
            row: The sample; where there are fewer, the last one.
        """
        tokens, lengths, scale, mask, rows = (
            None if x is None else select_row(jnp.atleast_1d(x), row)
            for x in (self.tokens, self.lengths, self.scale, self.mask, self.rows)
        )
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=count)
        if tokens is not None and tokens.ndim > 2:
            tokens = cut(tokens, axis=tokens.ndim - 3)
        lengths = cut(lengths, axis=0) if lengths is not None and lengths.ndim else lengths
        mask = None if mask is None else cut(mask, axis=1)
        first = None if self.start is None else select_row(self.start, row) + start
        parts = {"tokens": tokens, "lengths": lengths, "scale": scale, "mask": mask, "rows": rows}
        return replace(self, **parts, start=first)


def select_row(x: Array, row: Int[Array, ""]) -> Array:
    """A row of an array or, where it has a single one, that, which copies nothing."""
    return x[0] if len(x) == 1 else jnp.take(x, row, axis=0, mode="clip")


class KVProjection(nnx.Module):
    """Key and value projections of one condition in one block."""

    def __init__(
        self,
        token_width: int,
        width: int,
        num_heads: int,
        *,
        use_bias: bool,
        norm_epsilon: float | None,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
        value_init: nnx.Initializer = _XAVIER,
    ):
        """Builds the projections.

        Args:
            token_width: Width of the condition's tokens.
            width: Width D of the transformer.
            num_heads: Attention heads N.
            use_bias: Whether both projections have a bias.
            norm_epsilon: Epsilon of the RMS norm on the keys; None leaves the norm out.
            rngs: For the initial weights.
            dtype: Type of the matrix products.
            param_dtype: Type of the parameters.
            value_init: Initializer of the values; zeros make a new condition a no-op until it is trained.
        """

        def linear(kernel_init: nnx.Initializer) -> nnx.Linear:
            return nnx.Linear(
                token_width,
                width,
                use_bias=use_bias,
                kernel_init=kernel_init,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.key, self.value = linear(_XAVIER), linear(value_init)
        self.key_norm = (
            RMSNorm(width, epsilon=norm_epsilon, param_dtype=param_dtype, rngs=rngs) if norm_epsilon else None
        )
        self.num_heads = num_heads

    def __call__(
        self, q: Float[Array, "B S F N K"], condition: Condition, kept: KeysValues | None = None
    ) -> Float[Array, "B S F N K"]:
        """Attends from every video token to the condition's tokens and applies the scale.

        Args:
            q: Queries.
            condition: What they attend to.
            kept: Keys and values of this block that `condition.rows` selects from; None: of the tokens.
        """
        k, v = self.keys_and_values(condition) if kept is None else self._select(condition, kept, q.shape[2])
        q = self.positioned_queries(q, condition)
        lengths = condition.lengths
        match k.ndim:
            case 4:
                flat = q.reshape(len(q), -1, *q.shape[3:])
                attended = _attend(flat, k, v, lengths).reshape(q.shape)
            case 5:
                attended = jax.vmap(_attend, (2, 1, 1, 1), out_axes=2)(q, k, v, lengths)
            case _:
                in_axes = (2, 2, 2, 1, 2)
                attended = jax.vmap(_attend_people, in_axes, out_axes=2)(q, k, v, lengths, condition.mask)
        scale = jnp.asarray(condition.scale, attended.dtype)
        return attended * scale.reshape(-1, 1, 1, 1, 1)

    def keys_and_values(
        self, condition: Condition
    ) -> tuple[Float[Array, "B *n L N K"], Float[Array, "B *n L N K"]]:
        """Keys and values of the condition's tokens, split into heads."""
        k, v = self.key(condition.tokens), self.value(condition.tokens)
        if self.key_norm is not None:
            k = self.key_norm(k).astype(v.dtype)
        k, v = (x.reshape(*x.shape[:-1], self.num_heads, -1) for x in (k, v))
        return k, v

    def _select(
        self, condition: Condition, kept: KeysValues, frames: int
    ) -> tuple[Float[Array, "B *n L N K"], Float[Array, "B *n L N K"]]:
        """Kept keys and values of each sample's rows and frames, split into heads, sharded for attention."""
        rows = condition.rows

        def select(x: Float[Array, "R ... L D"]) -> Float[Array, "B ... L N K"]:
            x = x if len(x) == len(rows) == 1 else jnp.take(x, rows, axis=0, mode="clip")
            if x.ndim > 3 and x.shape[-3] > frames:
                cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=frames, axis=x.ndim - 4)
                x = jax.vmap(cut)(x, condition.start)
            x = x.reshape(*x.shape[:-1], self.num_heads, -1)
            return constrain(x, "batch", *[None] * (x.ndim - 3), "heads", None)

        k, v = map(select, kept)
        return k, v

    def positioned_queries(
        self, q: Float[Array, "B S F N K"], condition: Condition
    ) -> Float[Array, "B S F N K"]:
        """The queries as they attend to this condition; a subclass can add positions."""
        del condition
        return q


def keep_keys_and_values(layers: KVProjection, condition: Condition) -> KeysValues:
    """Keys and values of a condition in all blocks.

    Args:
        layers: Stacked projections of all blocks.
        condition: Its samples are the rows.

    Returns:
        With an axis of blocks first. Their width is sharded over the devices that share a clip, so that they
        are gathered block by block, like sharded parameters.
    """
    graphdef, state = nnx.split(layers)

    def project(state: nnx.State) -> KeysValues:
        k, v = nnx.merge(graphdef, to_device(state)).keys_and_values(condition)
        k, v = (constrain_last(x.reshape(*x.shape[:-2], -1), "kept") for x in (k, v))
        return k, v

    return jax.lax.map(project, state)


def zero_init_kv_layers(
    token_width: int,
    width: int,
    num_heads: int,
    num_layers: int,
    *,
    rngs: nnx.Rngs,
    dtype: DType,
    param_dtype: DType,
    projection: type[KVProjection] = KVProjection,
) -> KVProjection:
    """Stacked key and value projections of a new adapter, without bias or norm.

    The values are zero-initialised, so that a new adapter starts as a no-op.
    """
    return stack_layers(
        lambda rngs: projection(
            token_width,
            width,
            num_heads,
            use_bias=False,
            norm_epsilon=None,
            value_init=nnx.initializers.zeros,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        ),
        num_layers,
        rngs=rngs,
    )


def _attend(q: Array, k: Array, v: Array, lengths: Array | None) -> Array:
    return attention(q, k, v, kv_lengths=lengths, name="products")


def _attend_people(q: Array, k: Array, v: Array, lengths: Array | None, mask: Array | None) -> Array:
    return grouped_attention(q, k, v, kv_lengths=lengths, mask=mask)
