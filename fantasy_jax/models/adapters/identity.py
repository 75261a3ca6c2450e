"""The identity adapter: features of a face to tokens by a Q-Former, and keys and values for every block.

Source: arXiv 2504.04842, section 3, figure 2 and equation 4. The paper names ArcFace, a Q-Former, and a
separate cross-attention in every block, added with weight 0.5; there are no released weights. Sizes are
therefore chosen here, each with its reason. Values are zero-initialised, as the audio adapter's are, so that
a new adapter is a no-op.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Depth, Settings, Width
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.adapters.base import Adapter
from fantasy_jax.models.attention import multi_head_attention
from fantasy_jax.models.condition import Condition, zero_init_kv_layers
from fantasy_jax.models.layers import LayerNorm, scan_layers, stack_layers
from fantasy_jax.typing import Array, DType, Float
from fantasy_jax.video import VideoConfig

IDENTITY_SCALE = 0.5
"""Multiplier of the attended face: lambda 2 of the paper's equation 4."""

_EPSILON = 1e-5


@dataclass(frozen=True)
class IdentityAdapterConfig(Settings):
    """Sizes of the adapter; the defaults are for ArcFace's IResNet and the 14B transformer.

    Attributes:
        feature_width: Channels of the face encoder's spatial features.
        feature_size: Rows, and columns, of these features. Faces are aligned, so each place has a meaning and
            gets a learned embedding.
        num_queries: Identity tokens. BLIP-2's and PuLID's Q-Formers have 32, InstantID's and IP-Adapter's 16;
            32 cost little beside 512 tokens of text.
        depth: Blocks of the Q-Former: 4, as in InstantID and IP-Adapter. BLIP-2's 12 were pretrained as BERT;
            these are trained from scratch.
        token_width: Width of the Q-Former and of its tokens: 1024, between BLIP-2's 768 and InstantID's 1280.
        token_heads: Attention heads of the Q-Former, 64 wide as in all of these.
        mlp_ratio: Hidden width of the Q-Former's MLPs over `token_width`: 4, as in all of these.
        width: Width D of the transformer.
        num_heads: Attention heads of the transformer.
        num_layers: Blocks of the transformer.
    """

    feature_width: Width = 512
    feature_size: Width = 7
    num_queries: Width = 32
    depth: Depth = 4
    token_width: Width = 1024
    token_heads: Width = 16
    mlp_ratio: Width = 4
    width: Width = 5120
    num_heads: Width = 40
    num_layers: Depth = 40

    def __post_init__(self):
        super().__post_init__()
        if self.token_width % self.token_heads:
            raise ConfigError(
                f"token_heads is {self.token_heads}; it must divide token_width {self.token_width}"
            )


class QFormerBlock(nnx.Module):
    """Self-attention of the queries, cross-attention to the face, and an MLP, each after a norm."""

    def __init__(self, config: IdentityAdapterConfig, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds one block."""
        width, types = config.token_width, {"rngs": rngs, "param_dtype": param_dtype}
        hidden = config.mlp_ratio * width
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width, epsilon=_EPSILON, **types) for _ in range(3))
        self.qkv = nnx.Linear(width, 3 * width, dtype=dtype, **types)
        self.out = nnx.Linear(width, width, dtype=dtype, **types)
        self.query = nnx.Linear(width, width, dtype=dtype, **types)
        self.key_value = nnx.Linear(width, 2 * width, dtype=dtype, **types)
        self.face_out = nnx.Linear(width, width, dtype=dtype, **types)
        self.mlp_in = nnx.Linear(width, hidden, dtype=dtype, **types)
        self.mlp_out = nnx.Linear(hidden, width, dtype=dtype, **types)
        self.num_heads = config.token_heads

    def __call__(self, x: Float[Array, "B L D"], face: Float[Array, "B P D"]) -> Float[Array, "B L D"]:
        """Runs the block on queries `x`."""
        q, k, v = jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        x = x + self.out(multi_head_attention(q, k, v, self.num_heads))
        k, v = jnp.split(self.key_value(face), 2, axis=-1)
        x = x + self.face_out(multi_head_attention(self.query(self.norm2(x)), k, v, self.num_heads))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.norm3(x)), approximate=False))


class IdentityAdapter(Adapter):
    """Turns the features of a face into tokens that the transformer's blocks attend to."""

    input = "face"
    dropout_group = "image"  # the face is the image's, and is dropped with it
    default_scale = IDENTITY_SCALE

    @classmethod
    def input_shape(cls, config: IdentityAdapterConfig, video: VideoConfig) -> tuple[int, ...]:
        """Shape `[P, C]` of the face encoder's spatial features."""
        return config.feature_size**2, config.feature_width

    def __init__(
        self,
        config: IdentityAdapterConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the adapter; the values of all blocks are zero-initialised."""
        self.config = config
        width, types = config.token_width, {"rngs": rngs, "param_dtype": param_dtype}
        self.face_in = nnx.Linear(config.feature_width, width, dtype=dtype, **types)
        self.position = nnx.Param(_normal(rngs, (config.feature_size**2, width), param_dtype))
        self.norm_in = LayerNorm(width, epsilon=_EPSILON, **types)
        self.queries = nnx.Param(_normal(rngs, (config.num_queries, width), param_dtype))
        self.blocks = stack_layers(
            lambda rngs: QFormerBlock(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype),
            config.depth,
            rngs=rngs,
        )
        self.norm_out = LayerNorm(width, epsilon=_EPSILON, **types)
        self.layers = zero_init_kv_layers(
            width,
            config.width,
            config.num_heads,
            config.num_layers,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )

    def tokens(self, features: Float[Array, "B P C"]) -> Float[Array, "B L D"]:
        """Spatial features of faces, row by row, to identity tokens, float32."""
        face = self.norm_in(self.face_in(features) + self.position)
        queries = jnp.broadcast_to(
            self.queries[...].astype(jnp.float32), (len(features), *self.queries.shape)
        )
        return self.norm_out(scan_layers(lambda block, x: block(x, face), self.blocks, queries))

    def condition(
        self,
        features: Float[Array, "B P C"],
        num_frames: int,
        *,
        scale: float | Float[Array, " B"] = IDENTITY_SCALE,
    ) -> Condition:
        """Identity tokens, seen by every video token.

        Args:
            features: Spatial features of the face encoder: P places of C channels, before pooling.
            num_frames: Video frames; the tokens are the same for all of them.
            scale: Multiplier of the attended values; 0 for a sample without a face.
        """
        del num_frames
        return Condition(self.tokens(features), scale=scale)


def _normal(rngs: nnx.Rngs, shape: tuple[int, int], dtype: DType) -> Array:
    return jax.random.normal(rngs.params(), shape, dtype) * 0.02
