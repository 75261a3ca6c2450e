"""ArcFace's IResNet, the face encoder: an embedding of a face's identity, and features at each position.

Source: insightface, `recognition/arcface_torch/backbones/iresnet.py`, without the dropout before the last
layer, which the published weights are trained without. It runs in float32: the norms before its convolutions
yield values of very different sizes, and the network costs less than one block of the transformer.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Depth, Settings, Width
from fantasy_jax.errors import ConfigError
from fantasy_jax.typing import Array, DType, Float

_EPSILON = 1e-5
_MOMENTUM = 0.9
"""PyTorch's momentum of 0.1 is `1 - momentum` here."""


@dataclass(frozen=True)
class FaceEncoderConfig(Settings):
    """Sizes of the network; the defaults are IResNet-100's.

    Attributes:
        depths: Blocks of each stage. Each stage halves height and width.
        widths: Channels of each stage; the first convolution has those of the first stage.
        embedding: Width E of the embedding.
        image_size: Height and width of the crop, in pixels.
    """

    depths: tuple[Depth, ...] = (3, 13, 30, 3)
    widths: tuple[Width, ...] = (64, 128, 256, 512)
    embedding: Width = 512
    image_size: Width = 112

    def __post_init__(self):
        super().__post_init__()
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ConfigError(f"depths {self.depths} and widths {self.widths} need equal lengths, at least 1")
        if self.image_size % 2 ** len(self.depths):
            raise ConfigError(
                f"image_size is {self.image_size}; it must be a multiple of {2 ** len(self.depths)}"
            )

    @property
    def feature_width(self) -> int:
        """Channels of the spatial features."""
        return self.widths[-1]

    @property
    def feature_size(self) -> int:
        """Rows (and columns) of the features; P is its square."""
        return self.image_size // 2 ** len(self.depths)


IRESNET50 = FaceEncoderConfig(depths=(3, 4, 14, 3))


class FaceBlock(nnx.Module):
    """Norm, convolution, norm, PReLU, convolution, norm, and a residual connection."""

    def __init__(
        self, channels: int, width: int, stride: int, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType
    ):
        """Builds one block; with a stride of 2, a convolution downsamples the residual connection."""
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
    """Encoder of aligned faces.

    Norms use their running statistics; after `train()` they use and record those of the batch.
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
            pixels: RGB in [-1, 1], `image_size` x `image_size`, from `preprocessing.face_crop`.

        Returns:
            The embedding, not normalised (its direction represents the identity), and the features that it is
            computed from, one for each position, row by row.

        Raises:
            ValueError: The crops have another size.
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
        padding=((padding, padding), (padding, padding)),  # with strides, "SAME" pads the end only
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
    """PReLU with a slope per channel; Flax's has a single slope."""
    return jnp.where(x >= 0, x, slope * x)
