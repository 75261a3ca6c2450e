"""ArcFace's IResNet, which tells faces apart: one vector for a face, and features of each place in it.

Source: insightface, `recognition/arcface_torch/backbones/iresnet.py`; the published files are trained without
the dropout before the last layer, and it is left out. All of it is float32: norms before convolutions make
large and small values of the same place, and the whole network costs less than one block of the transformer.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from fantasy_jax.typing import Array, DType, Float

_EPSILON = 1e-5
_MOMENTUM = 0.9
"""PyTorch's 0.1, counted from the other side."""


@dataclass(frozen=True)
class FaceEncoderConfig:
    """Sizes of the network; the defaults are IResNet-100's.

    Attributes:
        depths: Blocks of each stage. A stage halves the sides.
        widths: Channels of each stage; what comes before them has the first one's.
        embedding: Width of the vector.
        image_size: Sides of the square crop, in pixels.
    """

    depths: tuple[int, ...] = (3, 13, 30, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    embedding: int = 512
    image_size: int = 112

    def __post_init__(self):
        if len(self.depths) != len(self.widths) or min(self.depths, default=0) < 1:
            raise ValueError(
                f"depths {self.depths} and widths {self.widths}: each stage needs both, from 1 on"
            )
        if self.image_size % 2 ** len(self.depths):
            raise ValueError(f"image_size is {self.image_size}; {len(self.depths)} stages cannot halve it")

    @property
    def feature_size(self) -> int:
        """Rows, and columns, of the features of places."""
        return self.image_size // 2 ** len(self.depths)


IRESNET50 = FaceEncoderConfig(depths=(3, 4, 14, 3))


class FaceBlock(nnx.Module):
    """Two convolutions with norms before, between and behind them; the second one may halve the sides."""

    def __init__(
        self, channels: int, width: int, stride: int, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType
    ):
        """Builds one block; where it halves the sides, what goes past it is convolved, too."""
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.norm1 = _norm(channels, **types)
        self.conv1 = _conv(channels, width, 3, 1, **types)
        self.norm2 = _norm(width, **types)
        self.slope = nnx.Param(jnp.full(width, 0.25, param_dtype))
        self.conv2 = _conv(width, width, 3, stride, **types)
        self.norm3 = _norm(width, **types)
        self.conv_past = _conv(channels, width, 1, stride, **types) if stride > 1 else None
        self.norm_past = _norm(width, **types) if stride > 1 else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        """Runs the block."""
        hidden = _prelu(self.norm2(self.conv1(self.norm1(x))), self.slope[...])
        if self.conv_past is not None:
            x = self.norm_past(self.conv_past(x))
        return x + self.norm3(self.conv2(hidden))


class FaceEncoder(nnx.Module):
    """Aligned faces to vectors and features.

    Norms use their stored statistics; after `train()` those of the batch, which they then also record.
    """

    def __init__(
        self,
        config: FaceEncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the network."""
        self.config = config
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        channels = config.widths[0]
        self.conv_in = _conv(3, channels, 3, 1, **types)
        self.norm_in = _norm(channels, **types)
        self.slope_in = nnx.Param(jnp.full(channels, 0.25, param_dtype))
        stages = []
        for depth, width in zip(config.depths, config.widths, strict=True):
            first = FaceBlock(channels, width, 2, **types)
            stages.append(nnx.List([first, *(FaceBlock(width, width, 1, **types) for _ in range(depth - 1))]))
            channels = width
        self.stages = nnx.List(stages)
        self.norm_out = _norm(channels, **types)
        self.embed = nnx.Linear(config.feature_size**2 * channels, config.embedding, **types)
        self.norm_embedding = _norm(config.embedding, **types)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> tuple[Float[Array, "B E"], Float[Array, "B P C"]]:
        """Encodes aligned faces.

        Args:
            pixels: RGB in [-1, 1], `image_size` on both sides, as `fantasy_jax.data.face_crop` cuts them.

        Returns:
            The embedding, whose direction tells who it is, of any length; and the features that it is made
            from, one for each place of the face, row by row.

        Raises:
            ValueError: The crops are of another size.
        """
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(
                f"faces are {pixels.shape[1]} x {pixels.shape[2]}; the encoder takes {size} x {size}"
            )
        x = _prelu(self.norm_in(self.conv_in(pixels)), self.slope_in[...])
        for stage in self.stages:
            for block in stage:
                x = block(x)
        features = self.norm_out(x).reshape(len(x), -1, x.shape[-1])
        return self.norm_embedding(self.embed(features.reshape(len(x), -1))), features


def _conv(channels: int, width: int, size: int, stride: int, **types: DType | nnx.Rngs) -> nnx.Conv:
    padding = size // 2
    return nnx.Conv(
        channels,
        width,
        (size, size),
        stride,
        padding=((padding, padding), (padding, padding)),  # with strides, JAX's "SAME" pads the end alone
        use_bias=False,
        **types,
    )


def _norm(width: int, **types: DType | nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(
        width,
        use_running_average=True,
        momentum=_MOMENTUM,
        epsilon=_EPSILON,
        use_fast_variance=False,
        **types,
    )


def _prelu(x: Float[Array, "B H W C"], slope: Float[Array, " C"]) -> Float[Array, "B H W C"]:
    """Flax's has one slope for all channels."""
    return jnp.where(x >= 0, x, slope * x)
