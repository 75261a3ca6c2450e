"""The identity adapter: a face's features to tokens by a Q-Former, and keys and values for every block.

Source: arXiv 2504.04842, section 3, figure 2 and equation 4. The paper names ArcFace, a Q-Former, and a
cross-attention of its own in every block, added with weight 0.5; the released weights have none of it. Sizes
are therefore chosen here, each with its reason. Values start from zero, as the audio adapter's do, so that a
new adapter leaves a trained transformer as it was.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.models.attention import attention
from fantasy_jax.models.condition import Condition, silent_layers
from fantasy_jax.models.layers import LayerNorm, scan_layers, stack_layers
from fantasy_jax.typing import Array, DType, Float

IDENTITY_SCALE = 0.5
"""Weight of what is attended: lambda 2 of the paper's equation 4."""

_EPSILON = 1e-5


@dataclass(frozen=True)
class IdentityAdapterConfig:
    """Sizes of the adapter; the defaults are for ArcFace's IResNet and the 14B transformer.

    Attributes:
        feature_width: Channels of the face encoder's spatial features.
        feature_size: Rows, and columns, of these features. Faces are aligned, so that a place has a meaning,
            and each gets an embedding that is learned.
        num_queries: Identity tokens. BLIP-2's Q-Former has 32, as has PuLID's; InstantID's and IP-Adapter's
            have 16. The larger, for they cost nothing beside 512 tokens of text.
        depth: Blocks of the Q-Former: 4, as in InstantID and IP-Adapter. BLIP-2's 12 were pretrained as BERT;
            these are trained from nothing.
        token_width: Of the Q-Former and of the tokens: 1024, between BLIP-2's 768 and InstantID's 1280.
        token_heads: Of the Q-Former's attention: 64 wide, as in all of these.
        mlp_ratio: Hidden width of the Q-Former's MLPs over `token_width`: 4, as in all of these.
        width: The transformer's.
        num_heads: The transformer's.
        num_layers: The transformer's.
    """

    feature_width: int = 512
    feature_size: int = 7
    num_queries: int = 32
    depth: int = 4
    token_width: int = 1024
    token_heads: int = 16
    mlp_ratio: int = 4
    width: int = 5120
    num_heads: int = 40
    num_layers: int = 40

    def __post_init__(self):
        if self.token_width % self.token_heads:
            raise ValueError(
                f"token_heads is {self.token_heads}; it must divide token_width {self.token_width}"
            )


class QFormerBlock(nnx.Module):
    """Queries attend to each other, then to the face; then an MLP. Each behind a norm."""

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
        q, k, v = self._heads(self.qkv(self.norm1(x)), 3)
        x = x + self.out(attention(q, k, v).reshape(x.shape))
        (q,), (k, v) = self._heads(self.query(self.norm2(x)), 1), self._heads(self.key_value(face), 2)
        x = x + self.face_out(attention(q, k, v).reshape(x.shape))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.norm3(x)), approximate=False))

    def _heads(self, x: Array, count: int) -> list[Array]:
        """What lies side by side in the last axis, each cut into heads."""
        x = x.reshape(*x.shape[:2], count, self.num_heads, -1)
        return [x[:, :, i] for i in range(count)]


class IdentityAdapter(nnx.Module):
    """Turns a face's features into what the transformer's blocks attend to."""

    def __init__(
        self,
        config: IdentityAdapterConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the adapter; the values of all blocks start from zero."""
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
        self.layers = silent_layers(
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

    def __call__(
        self, features: Float[Array, "B P C"], *, scale: float | Float[Array, " B"] = IDENTITY_SCALE
    ) -> Condition:
        """Every video token sees the whole face.

        Args:
            features: Of the face encoder: P places of C channels, before they are pooled into a vector.
            scale: Weight of what is attended; 0 for a sample without a face.
        """
        return Condition(self.tokens(features), scale=scale)


def _normal(rngs: nnx.Rngs, shape: tuple[int, int], dtype: DType) -> Array:
    return jax.random.normal(rngs.params(), shape, dtype) * 0.02
