"""Preprocessing of images, equal to that of the original implementations."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.typing import Array, Float, Float32, UInt8
from fantasy_jax.video import PIXELS_PER_TOKEN

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_ASPECT = 4
"""Longer over shorter side of what is generated; more leaves the face a few tokens."""


def fit_image(image: Image.Image, longest_edge: int, *, multiple: int = 16) -> Image.Image:
    """Resizes an image to the size that is generated.

    The longest edge becomes `longest_edge` (Lanczos; sides rounded down to whole pixels), then both sides are
    rounded up to multiples of `multiple` (bicubic). Source: fantasy-talking, `utils.py` and
    `pipelines/wan_video.py`.

    Args:
        image: RGB.
        longest_edge: In pixels.
        multiple: In pixels; 8 pixels per latent times 2 latents per token.
    """
    scale = longest_edge / max(image.size)
    width, height = (max(int(side * scale), 1) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    rounded_up = tuple(-(-side // multiple) * multiple for side in image.size)
    return image.resize(rounded_up)


def fit_picture(
    image: Image.Image, longest_edge: int, size: tuple[int, int] | None = None, *, name: str | Path = "image"
) -> tuple[Image.Image, Image.Image]:
    """Returns the part of a picture that is shown, and that part in the size that is generated.

    Without a size that is the whole picture (`fit_image`); with one it is the largest part around the middle
    that has its shape. A size is rounded to multiples of 16, which is logged, and so is what is cut off.

    Args:
        image: RGB.
        longest_edge: In pixels, without a size.
        size: Height and width in pixels.
        name: Name of the picture in messages.

    Raises:
        ConfigError: The size is not positive, or one side is over four times as long as the other.
        MediaError: One side of the picture is that long, and there is no size.
    """
    log = logging.getLogger(__name__)
    if size is None:
        if _is_extreme(*image.size):
            raise MediaError(
                f"{name}: {image.width} x {image.height} pixels; one side may be at most {_MAX_ASPECT} times "
                "as long as the other; crop it, or give a size"
            )
        return image, fit_image(image, longest_edge)
    if min(size) < 1:
        raise ConfigError(f"size is {size[0]} x {size[1]}; both sides must be positive")
    height, width = (max(round(side / PIXELS_PER_TOKEN), 1) * PIXELS_PER_TOKEN for side in size)
    if (height, width) != tuple(size):
        log.warning(
            "size: %d x %d is rounded to multiples of %d: %d x %d", *size, PIXELS_PER_TOKEN, height, width
        )
    if _is_extreme(width, height):
        raise ConfigError(
            f"size is {height} x {width}; one side may be at most {_MAX_ASPECT} times as long as the other"
        )
    scale = min(image.width / width, image.height / height)
    shown = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = (image.width - shown[0]) // 2, (image.height - shown[1]) // 2
    if shown != image.size:
        log.warning("%s: of %d x %d pixels the %d x %d in the middle are shown", name, *image.size, *shown)
    part = image.crop((left, top, left + shown[0], top + shown[1]))
    return part, part.resize((width, height), Image.Resampling.LANCZOS)


def _is_extreme(width: int, height: int) -> bool:
    return max(width, height) > _MAX_ASPECT * min(width, height)


def to_pixels(image: Image.Image) -> Float[np.ndarray, "H W 3"]:
    """Converts an 8-bit image to pixels in [-1, 1], float32."""
    return np.asarray(image, np.float32) * np.float32(2 / 255) - np.float32(1)


def clip_image_preprocess(
    pixels: Float[Array, "B H W 3"], size: int = 224
) -> Float[Array, "B {size} {size} 3"]:
    """Resizes pixels in [-1, 1] to a square and normalises them by CLIP's mean and standard deviation.

    Resizing equals PyTorch's bicubic mode (a = -0.75, `align_corners=False`, no antialiasing), which
    `jax.image.resize` does not offer: it has a = -0.5 and antialiases. Source: Wan2.1,
    `wan/modules/clip.py`, `CLIPModel.visual`.
    """
    rows = jnp.asarray(bicubic_matrix(pixels.shape[1], size), pixels.dtype)
    columns = jnp.asarray(bicubic_matrix(pixels.shape[2], size), pixels.dtype)
    exact = jax.lax.Precision.HIGHEST  # the default on TPU would round colours to bfloat16
    resized = jnp.einsum("bhwc,xw->bhxc", pixels, columns, precision=exact)
    resized = jnp.einsum("bhxc,yh->byxc", resized, rows, precision=exact)
    return (resized * 0.5 + 0.5 - jnp.asarray(_CLIP_MEAN)) / jnp.asarray(_CLIP_STD)


def bicubic_matrix(source: int, target: int) -> Float32[np.ndarray, "{target} {source}"]:
    """Returns the weights that resize one side; border pixels are repeated beyond the border.

    Positions are float32 and rounded once (a fused multiply-add), as in PyTorch: float64 positions change the
    result by up to 4e-5, float32 positions rounded twice by 2e-6.
    """
    a = -0.75

    def near(x):  # distances of up to one pixel
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x):  # distances of one to two pixels
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    scale = np.float64(np.float32(source) / np.float32(target))
    position = (scale * (np.arange(target) + 0.5) - 0.5).astype(np.float32)
    left = np.floor(position)
    fraction = (position - left).astype(np.float64)
    weights = (far(fraction + 1), near(fraction), near(1 - fraction), far(2 - fraction))
    matrix = np.zeros((target, source), np.float32)
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        taps = np.clip(left.astype(int) + offset, 0, source - 1)
        np.add.at(matrix, (np.arange(target), taps), weight)
    return matrix


def from_uint8(video: UInt8[Array | np.ndarray, "*n H W 3"]) -> Float[Array, "*n H W 3"]:
    """Converts 8-bit values to pixels in [-1, 1]."""
    return jnp.asarray(video, jnp.float32) / 127.5 - 1


def to_uint8(video: Float[Array | np.ndarray, "*n H W 3"]) -> UInt8[Array | np.ndarray, "*n H W 3"]:
    """Converts pixels in [-1, 1] to 8-bit values, truncated rather than rounded, as in the official code.

    Pixels beyond [-1, 1] become 0 or 255; the result is an array of NumPy or JAX, as the argument is.
    """
    return ((video + 1) * 127.5).clip(0, 255).astype(np.uint8)
