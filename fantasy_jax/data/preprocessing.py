"""Pictures and sound as the networks take them, equal to what the original programs make of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import soxr
from PIL import Image

from fantasy_jax.typing import Array, Float, Float32

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FEATURE_WINDOW, FEATURE_HOP = 400, 320
"""Samples that one feature sees, and from one to the next: wav2vec2's grid, 25 ms every 20 ms."""


def fit_picture(picture: Image.Image, longest_edge: int, *, multiple: int = 16) -> Image.Image:
    """The picture in the size that is generated.

    The longest edge becomes `longest_edge` (Lanczos; sides cut to whole pixels), then both sides grow
    to multiples of `multiple` (bicubic). Source: fantasy-talking, `utils.py` and `pipelines/wan_video.py`.

    Args:
        picture: RGB.
        longest_edge: In pixels.
        multiple: Of eight pixels a latent and two latents a token.
    """
    scale = longest_edge / max(picture.size)
    width, height = (max(int(side * scale), 1) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    grown = tuple(-(-side // multiple) * multiple for side in picture.size)
    return picture.resize(grown)


def to_pixels(picture: Image.Image) -> Float[np.ndarray, "H W 3"]:
    """A picture's bytes in [-1, 1], float32."""
    return np.asarray(picture, np.float32) * np.float32(2 / 255) - np.float32(1)


def clip_pixels(pixels: Float[Array, "B H W 3"], size: int = 224) -> Float[Array, "B {size} {size} 3"]:
    """Pixels in [-1, 1] as CLIP takes them: resized to a square, normalised by its mean and deviation.

    Resized like PyTorch's bicubic (a = -0.75, corners not aligned, no antialiasing), which JAX's is not:
    that one has a = -0.5 and antialiases. Source: Wan2.1, `wan/modules/clip.py`, `CLIPModel.visual`.
    """
    rows = jnp.asarray(bicubic_matrix(pixels.shape[1], size), pixels.dtype)
    columns = jnp.asarray(bicubic_matrix(pixels.shape[2], size), pixels.dtype)
    exact = jax.lax.Precision.HIGHEST  # by default a TPU would round colours to bfloat16 here
    resized = jnp.einsum("bhwc,xw->bhxc", pixels, columns, precision=exact)
    resized = jnp.einsum("bhxc,yh->byxc", resized, rows, precision=exact)
    return (resized * 0.5 + 0.5 - jnp.asarray(_CLIP_MEAN)) / jnp.asarray(_CLIP_STD)


def bicubic_matrix(source: int, target: int) -> Float32[np.ndarray, "{target} {source}"]:
    """Weights that resize one side; pixels beyond the border repeat the one at the border.

    PyTorch keeps positions in float32, rounded once (a fused multiply-add), and so does this: positions in
    float64 put the result up to 4e-5 off, float32 rounded twice 2e-6.
    """
    a = -0.75

    def near(x):  # up to one pixel away
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x):  # up to two
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


def normalise_waveform(waveform: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """Zero mean, unit variance, in float32, as transformers' `Wav2Vec2FeatureExtractor`."""
    waveform = waveform.astype(np.float32)
    return (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)


def resample(
    waveform: Float[np.ndarray, " samples"], rate: int, target: int = 16_000
) -> Float[np.ndarray, " resampled"]:
    """Another sampling rate, by soxr at high quality, as `librosa.load` does.

    Args:
        waveform: One channel.
        rate: Its samples a second.
        target: The samples a second that are wanted.

    Returns:
        `ceil(samples * target / rate)` samples: soxr's own count may be one less, and is filled with silence.
    """
    if rate == target:
        return waveform
    length = math.ceil(waveform.size * target / rate)
    resampled = soxr.resample(waveform, rate, target, quality="HQ")[:length]
    return np.pad(resampled, (0, length - resampled.size))


def wav2vec2_length(samples: int) -> int:
    """How many features wav2vec2 makes of a waveform of 16 kHz, for any of its released sizes."""
    return max(samples - FEATURE_WINDOW, -FEATURE_HOP) // FEATURE_HOP + 1
