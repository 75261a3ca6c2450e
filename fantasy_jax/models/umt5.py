"""Encoder of UMT5, the text encoder. Source: Wan2.1, `wan/modules/t5.py`."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.config import Depth, Settings, Width
from fantasy_jax.models.attention import attention
from fantasy_jax.models.layers import RMSNorm, scan_layers, stack_layers
from fantasy_jax.typing import Array, DType, Float, Int

_MAX_DISTANCE = 128
_EPSILON = 1e-6


@dataclass(frozen=True)
class UMT5Config(Settings):
    """Sizes of the encoder; the defaults are UMT5-XXL's."""

    vocab_size: Width = 256384
    dim: Width = 4096
    dim_attn: Width = 4096
    dim_ffn: Width = 10240
    num_heads: Width = 64
    num_layers: Depth = 24
    num_buckets: Width = 32


class UMT5Block(nnx.Module):
    """Self-attention with the block's own relative position bias, and a gated MLP."""

    def __init__(self, config: UMT5Config, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds one block."""
        types = {"rngs": rngs, "param_dtype": param_dtype}
        linear = {"use_bias": False, "dtype": dtype, **types}
        self.norm1 = RMSNorm(config.dim, epsilon=_EPSILON, **types)
        self.query, self.key, self.value = (
            nnx.Linear(config.dim, config.dim_attn, **linear) for _ in range(3)
        )
        self.out = nnx.Linear(config.dim_attn, config.dim, **linear)
        self.position = nnx.Embed(config.num_buckets, config.num_heads, **types)
        self.norm2 = RMSNorm(config.dim, epsilon=_EPSILON, **types)
        self.gate = nnx.Linear(config.dim, config.dim_ffn, **linear)
        self.mlp_in = nnx.Linear(config.dim, config.dim_ffn, **linear)
        self.mlp_out = nnx.Linear(config.dim_ffn, config.dim, **linear)
        self.num_heads = config.num_heads

    def __call__(
        self, x: Float[Array, "B L D"], lengths: Int[Array, " B"], buckets: Int[Array, "L L"]
    ) -> Float[Array, "B L D"]:
        """Runs the block; tokens after `lengths` are padding and are masked."""
        normed = self.norm1(x)
        q, k, v = (
            project(normed).reshape(*x.shape[:2], self.num_heads, -1)
            for project in (self.query, self.key, self.value)
        )
        bias = jnp.moveaxis(self.position(buckets), -1, 0)[None].astype(jnp.float32)
        attended = attention(q, k, v, kv_lengths=lengths, bias=bias, scale=1.0)  # T5 does not scale
        x = x + self.out(attended.reshape(*x.shape[:2], -1))
        normed = self.norm2(x)
        return x + self.mlp_out(self.mlp_in(normed) * nnx.gelu(self.gate(normed), approximate=True))


class UMT5Encoder(nnx.Module):
    """Encoder of token ids."""

    def __init__(
        self,
        config: UMT5Config,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the encoder."""
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.dim, param_dtype=param_dtype, rngs=rngs)
        self.blocks = stack_layers(
            lambda rngs: UMT5Block(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype),
            config.num_layers,
            rngs=rngs,
        )
        self.norm = RMSNorm(config.dim, epsilon=_EPSILON, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "B L"], lengths: Int[Array, " B"]) -> Float[Array, "B L D"]:
        """Encodes; float32.

        Args:
            ids: Token ids, padded on the right.
            lengths: Number of tokens of each text before the padding; features of the padding are zero.
        """
        x = self.embed(ids).astype(jnp.float32)
        buckets = jnp.asarray(_position_buckets(ids.shape[1], self.config.num_buckets))
        x = scan_layers(lambda block, x: block(x, lengths, buckets), self.blocks, x)
        real = jnp.arange(ids.shape[1]) < lengths[:, None]
        return jnp.where(real[..., None], self.norm(x), 0)


def _position_buckets(length: int, num_buckets: int) -> Int[np.ndarray, "{length} {length}"]:
    """Bucket of the distance of each key from each query: exact if it is small, logarithmic if it is large.

    The logarithm is computed in float32, as in PyTorch: at the borders of buckets the last bit matters.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distance)
    ratio = np.maximum(size, 1).astype(np.float32) / np.float32(exact)
    far = exact + (
        np.log(ratio) / np.float32(math.log(_MAX_DISTANCE / exact)) * np.float32(half - exact)
    ).astype(np.int32)
    return np.where(size < exact, size, np.minimum(far, half - 1)) + half * (distance > 0)
