"""The motion adapter: the intensities of face and body motion become a part of the timestep embedding.

Source: arXiv 2504.04842, section 3 and figure 2: an MLP for each of the two intensities, concatenated along
the channels, a residual block, average pooling, added to the timestep embedding. There are no released
weights and the paper gives no sizes; they are chosen here. The last layer is zero-initialised, so that a new
adapter is a no-op.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Settings, Width
from fantasy_jax.models.adapters.base import Adapter
from fantasy_jax.models.layers import LayerNorm
from fantasy_jax.typing import Array, DType, Float
from fantasy_jax.video import VideoConfig

NEUTRAL = 0.5
"""Intensity of a usual clip, of face and of body."""


@dataclass(frozen=True)
class MotionAdapterConfig(Settings):
    """Sizes of the adapter; the defaults are for the 14B transformer.

    Attributes:
        hidden: Hidden width of each MLP; 256 is also the width of the timestep sinusoid. The adapter then has
            five million parameters.
        positions: Vectors that each MLP makes of its number. The paper pools, and a number alone has no axis
            to pool over: the residual block mixes these vectors, and the pooling averages them.
        width: Width D of the transformer.
    """

    hidden: Width = 256
    positions: Width = 8
    width: Width = 5120


class MotionAdapter(Adapter):
    """Turns the two intensities of a clip into an offset of its timestep embedding.

    It has no dropout group: the paper neither drops the intensities nor guides by them.
    """

    input = "motion"
    gives = "time_offset"

    @classmethod
    def input_shape(cls, config: MotionAdapterConfig, video: VideoConfig) -> tuple[int, ...]:
        """Shape `[2]` of the intensities."""
        return (2,)

    def __init__(
        self,
        config: MotionAdapterConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the adapter; like the timestep embedding it is float32 whatever the `dtype`."""
        del dtype
        self.config = config
        types = {"rngs": rngs, "param_dtype": param_dtype}
        hidden, joined = config.hidden, 2 * config.hidden
        self.face_in, self.body_in = (nnx.Linear(1, hidden, **types) for _ in range(2))
        self.face_out, self.body_out = (
            nnx.Linear(hidden, config.positions * hidden, **types) for _ in range(2)
        )
        self.norm1, self.norm2 = (LayerNorm(joined, epsilon=1e-5, **types) for _ in range(2))
        self.conv1, self.conv2 = (nnx.Conv(joined, joined, 3, **types) for _ in range(2))
        self.out = nnx.Linear(joined, config.width, kernel_init=nnx.initializers.zeros, **types)

    def __call__(self, intensities: Float[Array, "B 2"]) -> Float[Array, "B D"]:
        """Maps intensities of face and body in [0, 1] (`preprocessing.motion`) to the offset, float32."""
        centred = (2 * intensities.astype(jnp.float32) - 1)[..., None]
        face = self.face_out(nnx.silu(self.face_in(centred[:, 0])))
        body = self.body_out(nnx.silu(self.body_in(centred[:, 1])))
        x = jnp.concatenate([y.reshape(len(y), self.config.positions, -1) for y in (face, body)], axis=-1)
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        x = x + self.conv2(nnx.silu(self.norm2(hidden)))
        return self.out(x.mean(axis=1))

    def time_offset(
        self, features: Float[Array, "B 2"], *, scale: float | Float[Array, ""] | None = None
    ) -> Float[Array, "B D"]:
        """The offset of these intensities, extrapolated away from neutral by `scale` (None: as trained)."""
        if scale is None:
            return self(features)
        neutral = self(jnp.full_like(features, NEUTRAL))
        return neutral + scale * (self(features) - neutral)
