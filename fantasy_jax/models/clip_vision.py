"""CLIP's vision tower, the image encoder. Source: Wan2.1, `wan/modules/clip.py`.

The transformer attends to the features of the last block but one, so the last block, the final norm and the
projection to CLIP's embedding space are not built.
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
class CLIPVisionConfig(Settings):
    """Sizes of the tower; the defaults are ViT-H/14's.

    Attributes:
        image_size: Height and width of the image, in pixels.
        patch_size: Height and width of a patch, in pixels.
        dim: Model width D.
        mlp_ratio: Hidden width of an MLP as a multiple of `dim`.
        num_heads: Attention heads.
        num_layers: Blocks of the whole tower; the last one is not built.
    """

    image_size: Width = 224
    patch_size: Width = 14
    dim: Width = 1280
    mlp_ratio: Width = 4
    num_heads: Width = 16
    num_layers: Depth = 32

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: its patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


class CLIPBlock(nnx.Module):
    """Self-attention and MLP, pre-norm."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds one block."""
        types = {"rngs": rngs, "param_dtype": param_dtype}
        hidden = config.dim * config.mlp_ratio
        self.norm1 = LayerNorm(config.dim, epsilon=_EPSILON, **types)
        self.qkv = nnx.Linear(config.dim, 3 * config.dim, dtype=dtype, **types)
        self.out = nnx.Linear(config.dim, config.dim, dtype=dtype, **types)
        self.norm2 = LayerNorm(config.dim, epsilon=_EPSILON, **types)
        self.mlp_in = nnx.Linear(config.dim, hidden, dtype=dtype, **types)
        self.mlp_out = nnx.Linear(hidden, config.dim, dtype=dtype, **types)
        self.num_heads = config.num_heads

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Runs the block."""
        q, k, v = jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        x = x + self.out(multi_head_attention(q, k, v, self.num_heads))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.norm2(x)), approximate=False))


class CLIPVisionModel(nnx.Module):
    """Encoder of images; features are those of the last block but one."""

    def __init__(
        self,
        config: CLIPVisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the tower."""
        self.config = config
        types = {"rngs": rngs, "param_dtype": param_dtype}
        channels = 3 * config.patch_size**2
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.patch_in = nnx.Linear(channels, config.dim, use_bias=False, dtype=dtype, **types)
        self.class_token = nnx.Param(_normal(rngs, (config.dim,), param_dtype))
        self.position = nnx.Param(_normal(rngs, (tokens, config.dim), param_dtype))
        self.norm_in = LayerNorm(config.dim, epsilon=_EPSILON, **types)
        self.blocks = stack_layers(
            lambda rngs: CLIPBlock(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype),
            config.num_layers - 1,
            rngs=rngs,
        )

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B L D"]:
        """Encodes; float32.

        Args:
            pixels: From `preprocessing.images.clip_image_preprocess`, `image_size` x `image_size`.
        """
        batch, side, size = pixels.shape[0], pixels.shape[1], self.config.patch_size
        x = pixels.reshape(batch, side // size, size, side // size, size, 3).transpose(0, 1, 3, 2, 4, 5)
        x = self.patch_in(x.reshape(batch, (side // size) ** 2, -1)).astype(jnp.float32)
        first = jnp.broadcast_to(self.class_token, (batch, 1, self.config.dim))
        x = self.norm_in(jnp.concatenate([first, x], axis=1) + self.position)
        return scan_layers(lambda block, x: block(x), self.blocks, x)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DType) -> Array:
    return jax.random.normal(rngs.params(), shape, dtype) / shape[-1] ** 0.5
