"""Windows of a token sequence, one for each latent frame.

Audio and expression tokens are given per video frame, or several per video frame; each latent frame attends
to the tokens around its own video frames only.

Source: fantasy-talking, `model.py`, `split_audio_sequence` and `split_tensor_with_padding`.
"""

import jax.numpy as jnp
import numpy as np

from fantasy_jax.typing import Array, Float, Int
from fantasy_jax.video import TEMPORAL_FACTOR, latent_frames


def window_ranges(
    num_tokens: int, num_frames: int, *, expand: int = 0, least_half: int = 0
) -> Int[np.ndarray, "F 2"]:
    """First and last token, both included, of each latent frame's window; may reach outside the clip.

    Python floats and truncation as in the official code.

    Args:
        num_tokens: Tokens A of the whole clip.
        num_frames: Video frames T = 4k + 1.
        expand: Tokens added on both sides.
        least_half: Tokens that a window has at least on each side of its middle, before it is expanded.
    """
    per_frame = num_tokens / num_frames
    half = max(int(per_frame * TEMPORAL_FACTOR / 2), least_half)
    centers = [
        int((per_frame * ((i - 1) * TEMPORAL_FACTOR + 1) + per_frame * (i * TEMPORAL_FACTOR + 1)) / 2) - 1
        for i in range(1, latent_frames(num_frames))
    ]
    ranges = [(center - half, center + half) for center in centers]
    # The first latent frame is one video frame, not four: its window ends where the second one starts.
    last = ranges[0][0] if ranges else half
    ranges.insert(0, (last - 2 * half, last))
    return np.array(ranges) + np.array([-expand, expand])


def split_windows(
    tokens: Float[Array, "B A D"], ranges: Int[np.ndarray, "F 2"]
) -> tuple[Float[Array, "B F L D"], Int[Array, " F"]]:
    """Cuts windows out of the tokens; those that reach outside the clip are padded with zeros on the right.

    Returns:
        The windows, and the number of tokens of each that are not padding.
    """
    first = np.maximum(ranges[:, 0], 0)
    lengths = np.maximum(np.minimum(ranges[:, 1], tokens.shape[1] - 1) - first + 1, 0)
    offsets = np.arange(ranges[0, 1] - ranges[0, 0] + 1)
    real = offsets < lengths[:, None]
    positions = np.where(real, first[:, None] + offsets, 0)
    windows = jnp.where(real[..., None], tokens[:, positions], 0)
    return windows, jnp.asarray(lengths, jnp.int32)
