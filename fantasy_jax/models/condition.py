"""Conditions as data: what cross-attention listens to, and the keys and values it sees of it.

A block of the transformer owns one query. Every condition (text, picture, audio, later identity and
expression) adds keys and values of its own, and the attended values are summed, each with its scale,
before the block's one output projection, as in the released weights (fantasy-talking, `model.py`,
`WanCrossAttentionProcessor`). A new condition is a new entry in a mapping, not a new block.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.models.attention import attention
from fantasy_jax.models.layers import RMSNorm, stack_layers
from fantasy_jax.models.rope import rotate, time_table
from fantasy_jax.typing import Array, DType, Float, Leaf

_XAVIER = nnx.initializers.xavier_uniform()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Condition:
    """One thing to listen to, the same in every block.

    Attributes:
        tokens: Seen by every video token (`[B, L, D]`), or per latent frame (`[B, F, L, D]`).
        lengths: How many of the tokens are real, for each sample (`[B]`) or each sample and frame (`[B, F]`);
            None: all.
        scale: Weight of what is attended, a number or `[B]`; 0 takes the condition out exactly.
        times: When latent frames (`[B, F]`) and tokens (`[B, L]` or `[B, F, L]`) are, in one unit; turns
            queries and keys so that heads can tell before from after. None: tokens are a set.
    """

    tokens: Leaf
    lengths: Leaf = None
    scale: Leaf = 1.0
    times: tuple[Leaf, Leaf] | None = None


class KeyValue(nnx.Module):
    """The projections by which one block hears one condition."""

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
        """Builds the projections; `norm_epsilon` None leaves keys without RMS norm.

        Values that start from zero (`value_init`) add nothing until they are trained.
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

    def __call__(self, q: Float[Array, "B S F N K"], condition: Condition) -> Float[Array, "B S F N K"]:
        """Attends from every video token to the condition's tokens; the scale is applied."""
        tokens = condition.tokens
        k, v = self.key(tokens), self.value(tokens)
        if self.key_norm is not None:
            k = self.key_norm(k).astype(v.dtype)
        k, v = (x.reshape(*x.shape[:-1], self.num_heads, -1) for x in (k, v))
        if condition.times is not None:
            frames, moments = condition.times
            q = rotate(q, *time_table(frames[:, None], q.shape[-1]))
            k = rotate(k, *time_table(moments, k.shape[-1]))
        if tokens.ndim == 4:
            attended = jax.vmap(_attend, in_axes=(2, 1, 1, 1), out_axes=2)(q, k, v, condition.lengths)
        else:
            batch, space, frames = q.shape[:3]
            flat = q.reshape(batch, space * frames, *q.shape[3:])
            attended = _attend(flat, k, v, condition.lengths).reshape(q.shape)
        scale = jnp.asarray(condition.scale, attended.dtype)
        return attended * scale.reshape(-1, 1, 1, 1, 1)


def silent_layers(
    token_width: int,
    width: int,
    num_heads: int,
    num_layers: int,
    *,
    rngs: nnx.Rngs,
    dtype: DType,
    param_dtype: DType,
) -> KeyValue:
    """What all blocks hear a new adapter's condition with, stacked: without bias or norm, values at zero."""
    return stack_layers(
        lambda rngs: KeyValue(
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
    return attention(q, k, v, kv_lengths=lengths)
