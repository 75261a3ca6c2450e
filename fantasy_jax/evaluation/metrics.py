"""Correlation of curves, energy of audio per video frame, differences of images, and visible blocks."""

import numpy as np

from fantasy_jax.typing import Float, UInt8
from fantasy_jax.video import SAMPLE_RATE

_WINDOW = 0.08
"""Length of the window around a frame in seconds, about half of a short syllable."""


def correlation(one: Float[np.ndarray, " T"], other: Float[np.ndarray, " T"]) -> float:
    """Pearson correlation; 0 if one of the two is constant."""
    one, other = one - one.mean(), other - other.mean()
    scale = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / scale) if scale > 1e-9 else 0.0


def windowed_rms(
    waveform: Float[np.ndarray, " samples"], num_frames: int, fps: int | float
) -> Float[np.ndarray, " T"]:
    """Root mean square of the audio under a Hann window of 80 ms around the middle of every video frame.

    Args:
        waveform: Audio at 16 kHz; zeros follow if it is shorter than the video.
        num_frames: Number of video frames T.
        fps: Video frames per second.
    """
    half = int(_WINDOW / 2 * SAMPLE_RATE)
    window = np.hanning(2 * half)
    last = int(np.ceil(num_frames / fps * SAMPLE_RATE)) + half
    padded = np.pad(waveform, (half, max(last - waveform.size, 0)))
    middles = ((np.arange(num_frames) + 0.5) / fps * SAMPLE_RATE).astype(int)
    return np.sqrt([np.average(padded[i : i + 2 * half] ** 2, weights=window) for i in middles])


def psnr(
    one: UInt8[np.ndarray, "*n"] | Float[np.ndarray, "*n"],
    other: UInt8[np.ndarray, "*n"] | Float[np.ndarray, "*n"],
    peak: float = 255.0,
) -> float:
    """Peak signal-to-noise ratio of two images, videos or latents, in dB; 100 if they are identical.

    Args:
        one: An array.
        other: One of equal shape.
        peak: Range of the values.
    """
    return float(-10 * np.log10(np.square((one.astype(np.float64) - other) / peak).mean() + 1e-10))


def border_step(video: UInt8[np.ndarray, "T H W C"], side: int) -> float:
    """Mean absolute step between neighbouring pixels across borders of blocks, over that elsewhere.

    About 1 if the grid of blocks cannot be seen.

    Args:
        video: The frames.
        side: Rows and columns of a block; at least two blocks must fit.
    """
    steps = []
    for axis in (1, 2):
        step = np.abs(np.diff(video.astype(np.float32), axis=axis))
        mean = step.mean(axis=tuple(i for i in range(4) if i != axis))
        border = np.arange(mean.size) % side == side - 1
        steps.append((mean[border].mean(), mean[~border].mean()))
    across, elsewhere = np.sum(steps, axis=0)
    return float(across / max(elsewhere, 1e-9))
