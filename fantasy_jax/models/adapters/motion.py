"""The motion adapter: how much face and body are to move becomes a part of the timestep's embedding.

Source: arXiv 2504.04842, section 3 and figure 2: an MLP for each of the two intensities, joined along the
channels, a residual block, average pooling, added to the timestep's embedding. The released weights have none
of it and the paper gives no sizes; they are chosen here. The last layer starts from zero, so that a new
adapter leaves a trained transformer as it was.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from fantasy_jax.models.layers import LayerNorm
from fantasy_jax.typing import Array, DType, Float

NEUTRAL = 0.5
"""The intensity of a usual clip, of face and of body."""


@dataclass(frozen=True)
class MotionAdapterConfig:
    """Sizes of the adapter; the defaults are for the 14B transformer.

    Attributes:
        hidden: Of each MLP, and of what it gives: a number in [0, 1] holds little, and 256 is the width of
            the timestep's own sinusoid, too. With it the adapter has five million parameters.
        positions: Vectors that an MLP makes of its number. The paper pools, and a number alone has no axis to
            pool over: the residual block mixes these, the pooling takes their mean.
        width: The transformer's.
    """

    hidden: int = 256
    positions: int = 8
    width: int = 5120


class MotionAdapter(nnx.Module):
    """Turns the two intensities of a clip into what is added to its timestep's embedding."""

    def __init__(
        self,
        config: MotionAdapterConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the adapter; `dtype` is of no consequence, for all of it is float32, as the timestep is."""
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
        """Intensities of face and body in [0, 1], normalised as `data.motion` does, to an offset; float32."""
        centred = (2 * intensities.astype(jnp.float32) - 1)[..., None]
        face = self.face_out(nnx.silu(self.face_in(centred[:, 0])))
        body = self.body_out(nnx.silu(self.body_in(centred[:, 1])))
        x = jnp.concatenate([y.reshape(len(y), self.config.positions, -1) for y in (face, body)], axis=-1)
        hidden = self.conv1(nnx.silu(self.norm1(x)))
        x = x + self.conv2(nnx.silu(self.norm2(hidden)))
        return self.out(x.mean(axis=1))

    def exaggerated(
        self, intensities: Float[Array, "B 2"], scale: float | Float[Array, ""]
    ) -> Float[Array, "B D"]:
        """The offset, so many times as far from that of neutral intensities; 1 is as trained."""
        neutral = self(jnp.full_like(intensities, NEUTRAL))
        return neutral + scale * (self(intensities) - neutral)
