"""The Perceiver resampler: a fixed number of learned queries gather a sequence of any length.

Source: IP-Adapter, `ip_adapter/resampler.py`, as FantasyPortrait has it (fantasy-portrait,
`diffsynth/models/wan_video_dit.py` and `model.py`). Queries attend to the input and to themselves at once;
each block normalises the input with a norm of its own and does not update it; there are no positions.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Depth, Settings, Width
from fantasy_jax.models.attention import multi_head_attention
from fantasy_jax.models.layers import LayerNorm, scan_layers, stack_layers
from fantasy_jax.typing import Array, DType, Float

_EPSILON = 1e-5


@dataclass(frozen=True)
class ResamplerConfig(Settings):
    """Sizes of a resampler; the defaults are FantasyPortrait's.

    Attributes:
        dim: Width of the queries.
        depth: Blocks.
        num_heads: Attention heads.
        head_dim: Width of a head; `num_heads` times this need not be `dim`.
        mlp_ratio: Hidden width of the MLPs over `dim`.
    """

    dim: Width = 1280
    depth: Depth = 4
    num_heads: Width = 20
    head_dim: Width = 64
    mlp_ratio: Width = 4


class PerceiverBlock(nnx.Module):
    """Attention of the queries to the input and to themselves, and an MLP, each after a norm."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds one block."""
        types = {"rngs": rngs, "param_dtype": param_dtype}
        dim, inner, hidden = config.dim, config.num_heads * config.head_dim, config.mlp_ratio * config.dim
        self.norm_input, self.norm_queries, self.norm_mlp = (
            LayerNorm(dim, epsilon=_EPSILON, **types) for _ in range(3)
        )
        linear = {"use_bias": False, "dtype": dtype, **types}
        self.query = nnx.Linear(dim, inner, **linear)
        self.key_value = nnx.Linear(dim, 2 * inner, **linear)
        self.out = nnx.Linear(inner, dim, **linear)
        self.mlp_in = nnx.Linear(dim, hidden, **linear)
        self.mlp_out = nnx.Linear(hidden, dim, **linear)
        self.num_heads = config.num_heads

    def __call__(self, queries: Float[Array, "B L D"], x: Float[Array, "B A D"]) -> Float[Array, "B L D"]:
        """Runs the block.

        Args:
            queries: The queries so far.
            x: The input, as it enters the first block.
        """
        normed = self.norm_queries(queries)
        k, v = jnp.split(self.key_value(jnp.concatenate([self.norm_input(x), normed], axis=1)), 2, axis=-1)
        queries = queries + self.out(multi_head_attention(self.query(normed), k, v, self.num_heads))
        return queries + self.mlp_out(nnx.gelu(self.mlp_in(self.norm_mlp(queries)), approximate=False))


class Resampler(nnx.Module):
    """Turns a sequence into `num_queries` tokens."""

    def __init__(
        self,
        config: ResamplerConfig,
        input_width: int,
        num_queries: int,
        output_width: int,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the resampler.

        Args:
            config: Sizes.
            input_width: Width of the input.
            num_queries: Tokens that it gives.
            output_width: Width of these tokens.
            rngs: For the initial weights.
            dtype: Type of the matrix products.
            param_dtype: Type of the parameters.
        """
        types = {"rngs": rngs, "param_dtype": param_dtype}
        initial = jax.random.normal(rngs.params(), (num_queries, config.dim), param_dtype)
        self.queries = nnx.Param(initial / config.dim**0.5)
        self.project_in = nnx.Linear(input_width, config.dim, dtype=dtype, **types)
        self.blocks = stack_layers(
            lambda rngs: PerceiverBlock(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype),
            config.depth,
            rngs=rngs,
        )
        self.project_out = nnx.Linear(config.dim, output_width, dtype=dtype, **types)
        self.norm_out = LayerNorm(output_width, epsilon=_EPSILON, **types)

    def __call__(self, x: Float[Array, "B A C"]) -> Float[Array, "B L D"]:
        """Resamples each sequence; float32 out."""
        x = self.project_in(x)
        queries = self.queries[...].astype(jnp.float32)
        queries = jnp.broadcast_to(queries, (len(x), *queries.shape))
        queries = scan_layers(lambda block, queries: block(queries, x), self.blocks, queries)
        return self.norm_out(self.project_out(queries))
