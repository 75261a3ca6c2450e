"""PD-FGC's motion encoder: head pose, eyes, emotion and mouth of a face, as features of one frame.

Source: FantasyPortrait, `pdf.py`, `FanEncoder`; the network is that of Dorniwang/PD-FGC-inference. It is for
inference: norms use their running statistics, and the dropout in the hourglass is left out. It runs in
float32, as it does there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from fantasy_jax.config import Range, Settings, Width
from fantasy_jax.errors import ConfigError
from fantasy_jax.typing import Array, DType, Float, Float32, Leaf

_EPSILON = 1e-5
_STRIDE = 4
"""Pixels per position of the hourglass."""


@dataclass(frozen=True)
class MotionEncoderConfig(Settings):
    """Sizes of the network; the defaults are PD-FGC's.

    Attributes:
        width: Channels of the hourglass; a multiple of 8.
        feature_dim: Width D of the features that the heads take, and of the mouth's features.
        pose_dim: Features of the head's pose.
        eye_dim: Features of the eyes.
        emotion_dim: Features of the emotion.
        landmarks: Heatmaps.
        depth: Levels of the hourglass. Each halves height and width.
        image_size: Height and width of the crop, in pixels.
    """

    width: Width = 256
    feature_dim: Width = 512
    pose_dim: Width = 6
    eye_dim: Width = 6
    emotion_dim: Width = 30
    landmarks: Width = 68
    depth: Annotated[int, Range(1, 16)] = 4
    image_size: Width = 224

    def __post_init__(self):
        super().__post_init__()
        if self.width % 8:
            raise ConfigError(f"width is {self.width}; it must be a multiple of 8")
        if self.feature_dim <= self.pose_dim + self.eye_dim:
            raise ConfigError(
                f"feature_dim is {self.feature_dim}; it must be larger than pose_dim + eye_dim "
                f"({self.pose_dim + self.eye_dim})"
            )
        if self.image_size % (2 * _STRIDE) or self.image_size < _STRIDE * 2**self.depth:
            raise ConfigError(
                f"image_size is {self.image_size}; it must be a multiple of {2 * _STRIDE}, and at least "
                f"{_STRIDE * 2**self.depth}"
            )

    @property
    def num_features(self) -> int:
        """Features M of a frame: those of head pose, eyes, emotion and mouth."""
        return self.pose_dim + self.eye_dim + self.emotion_dim + self.feature_dim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MotionParts:
    """The features of a frame by their meaning.

    Attributes:
        headpose: `[B, pose_dim]`.
        eye: `[B, eye_dim]`, gaze and blinking.
        emotion: `[B, emotion_dim]`.
        mouth: `[B, D]`.
    """

    headpose: Leaf
    eye: Leaf
    emotion: Leaf
    mouth: Leaf


class CountedNorm(nnx.BatchNorm):
    """A batch norm with PyTorch's counter of batches, which is unused; an export writes it as it was."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds the norm, which uses its running statistics."""
        super().__init__(
            width,
            use_running_average=True,
            epsilon=_EPSILON,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))


class ConvBlock(nnx.Module):
    """Three convolutions, each after a norm and ReLU; the input is added to their outputs, concatenated."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds the block; a convolution in the residual connection changes `channels` to `width`."""
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.norm1 = CountedNorm(channels, **types)
        self.conv1 = _conv(channels, width // 2, 3, use_bias=False, **types)
        self.norm2 = CountedNorm(width // 2, **types)
        self.conv2 = _conv(width // 2, width // 4, 3, use_bias=False, **types)
        self.norm3 = CountedNorm(width // 4, **types)
        self.conv3 = _conv(width // 4, width // 4, 3, use_bias=False, **types)
        differs = channels != width
        self.norm_past = CountedNorm(channels, **types) if differs else None
        self.conv_past = _conv(channels, width, 1, use_bias=False, **types) if differs else None

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Runs the block."""
        first = self.conv1(nnx.relu(self.norm1(x)))
        second = self.conv2(nnx.relu(self.norm2(first)))
        third = self.conv3(nnx.relu(self.norm3(second)))
        if self.conv_past is not None:
            x = self.conv_past(nnx.relu(self.norm_past(x)))
        return x + jnp.concatenate([first, second, third], axis=-1)


class HourglassLevel(nnx.Module):
    """The blocks of one resolution: one at this resolution, two at half of it."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds the blocks."""
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.skip = ConvBlock(width, width, **types)
        self.before = ConvBlock(width, width, **types)
        self.after = ConvBlock(width, width, **types)


class Hourglass(nnx.Module):
    """Residual blocks at several resolutions, from fine to coarse and back."""

    def __init__(self, width: int, depth: int, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds the levels, the finest first."""
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.levels = nnx.List([HourglassLevel(width, **types) for _ in range(depth)])
        self.innermost = ConvBlock(width, width, **types)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Runs the levels. An odd size is rounded down when it is halved."""
        skipped = []
        for level in self.levels:
            skipped.append(level.skip(x))
            x = level.before(_max_pool(x))
        x = self.innermost(x)
        for level in reversed(self.levels):
            past = skipped.pop()
            x = past + upsample(level.after(x), past.shape[1:3])
        return x


class MotionHead(nnx.Module):
    """Linear, ReLU, norm, linear; then, except for the mouth, ReLU and a linear layer to few features."""

    def __init__(self, width: int, features: int | None, *, rngs: nnx.Rngs, dtype: DType, param_dtype: DType):
        """Builds the head; `features` is None for the mouth."""
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.dense1 = nnx.Linear(width, width, **types)
        self.norm = CountedNorm(width, **types)
        self.dense2 = nnx.Linear(width, width, **types)
        self.embed = None if features is None else nnx.Linear(width, features, **types)

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        """Runs the head."""
        x = self.dense2(self.norm(nnx.relu(self.dense1(x))))
        return x if self.embed is None else self.embed(nnx.relu(x))


class MotionEncoder(nnx.Module):
    """Encoder of the motion of aligned faces.

    `mouth_embed` is not used. Like the counters of the norms, it is part of the published file, and is kept
    so that an export equals that file.
    """

    def __init__(
        self,
        config: MotionEncoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the network."""
        self.config = config
        width, features = config.width, config.feature_dim
        types = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.conv_in = _conv(3, width // 4, 7, stride=2, **types)
        self.norm_in = CountedNorm(width // 4, **types)
        self.block1 = ConvBlock(width // 4, width // 2, **types)
        self.block2 = ConvBlock(width // 2, width // 2, **types)
        self.block3 = ConvBlock(width // 2, width, **types)
        self.hourglass = Hourglass(width, config.depth, **types)
        self.block4 = ConvBlock(width, width, **types)
        self.conv_out = _conv(width, width, 1, **types)
        self.norm_out = CountedNorm(width, **types)
        self.conv_heatmaps = _conv(width, config.landmarks, 1, **types)
        self.norm_heatmaps = CountedNorm(config.landmarks, **types)
        self.conv_map = _conv(config.landmarks, 1, 3, stride=2, **types)
        self.feature = nnx.Linear((config.image_size // (2 * _STRIDE)) ** 2, features, **types)
        sizes: Mapping[str, int | None] = {
            "headpose": config.pose_dim,
            "eye": config.eye_dim,
            "emotion": config.emotion_dim,
            "mouth": None,
        }
        self.heads = nnx.Dict({name: MotionHead(features, size, **types) for name, size in sizes.items()})
        self.mouth_embed = nnx.Linear(features, features - config.pose_dim - config.eye_dim, **types)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float32[Array, "B M"]:
        """Encodes aligned faces.

        Args:
            pixels: RGB in [-1, 1], `image_size` x `image_size`.

        Returns:
            Features of head pose, eyes, emotion and mouth, one after the other.

        Raises:
            ValueError: The crops have another size.
        """
        parts = self.parts(self.face_feature(pixels))
        features = jnp.concatenate([parts.headpose, parts.eye, parts.emotion, parts.mouth], axis=-1)
        return features.astype(jnp.float32)

    def face_feature(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Computes the feature that the heads take; arguments and errors are those of `__call__`."""
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            raise ValueError(
                f"faces are {pixels.shape[1]} x {pixels.shape[2]}; the encoder takes {size} x {size}"
            )
        x = _max_pool(self.block1(nnx.relu(self.norm_in(self.conv_in(pixels)))))
        x = self.block4(self.hourglass(self.block3(self.block2(x))))
        heatmaps = self.conv_heatmaps(nnx.relu(self.norm_out(self.conv_out(x))))
        x = self.conv_map(nnx.relu(self.norm_heatmaps(heatmaps)))
        return self.feature(nnx.relu(x.reshape(len(x), -1)))

    def parts(self, feature: Float[Array, "B D"]) -> MotionParts:
        """Runs the heads on `face_feature`."""
        return MotionParts(**{name: head(feature) for name, head in self.heads.items()})


def upsample(x: Float[Array, "B H W C"], size: tuple[int, int]) -> Float[Array, "B h w C"]:
    """Enlarges bilinearly, as `torch.nn.functional.interpolate` with `align_corners=False`.

    Args:
        x: Images.
        size: Height and width; any that are at least those of `x`.
    """
    return jax.image.resize(x, (len(x), *size, x.shape[-1]), "bilinear", antialias=False)


def _conv(
    channels: int, width: int, size: int, *, stride: int = 1, use_bias: bool = True, **types: DType | nnx.Rngs
) -> nnx.Conv:
    padding = size // 2
    return nnx.Conv(
        channels,
        width,
        (size, size),
        stride,
        padding=((padding, padding), (padding, padding)),  # with strides, "SAME" pads the end only
        use_bias=use_bias,
        **types,
    )


def _max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    return nnx.max_pool(x, (2, 2), strides=(2, 2))
