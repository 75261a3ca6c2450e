"""The measuring instrument: how far a mouth is open, read from the pixels of a video.

It knows where the face is in the first frame and nothing else: not the renderer, not the sound. Only the
course of what it gives has a meaning, not its zero or its scale. Changing it makes old figures worthless.
"""

import cv2
import numpy as np

from fantasy_jax.typing import Float, UInt8

_SIDE = 32
"""The mouth is looked at in this many rows and columns, whatever the size of the face."""
_MARGIN = 3


def mouth_opening(
    video: UInt8[np.ndarray, "T H W 3"], box: Float[np.ndarray, "4"]
) -> Float[np.ndarray, " T"]:
    """Opening of the mouth in every frame, in arbitrary units.

    A first guess is how much of the mouth's surroundings differs in colour from the skin beside it, more
    than in the frames where it differs least. How every pixel goes along with that guess gives a picture of
    what opening does to this face; how much of that picture is in a frame is the opening.

    Args:
        video: RGB.
        box: Left, top, right, bottom of the head in the first frame, in pixels.
    """
    crops = _crop_mouth(video, box)
    beside = crops[:, :, [*range(_MARGIN), *range(-_MARGIN, 0)]].reshape(len(crops), -1, 3)
    skin = np.median(beside, axis=1)[:, None, None]
    difference = np.linalg.norm(crops - skin, axis=-1)
    guess = (difference - np.quantile(difference, 0.1, axis=0))[:, :, _MARGIN + 2 : -_MARGIN - 2].mean((1, 2))
    deviation = crops - crops.mean(axis=0)
    pattern = np.tensordot(guess - guess.mean(), deviation, axes=1)
    opening = (deviation * pattern).sum(axis=(1, 2, 3))
    return opening / (np.linalg.norm(pattern) + 1e-9)


def _crop_mouth(
    video: UInt8[np.ndarray, "T H W 3"], box: Float[np.ndarray, "4"]
) -> Float[np.ndarray, "T side side 3"]:
    """The lower middle of the face in every frame, in [0, 1]."""
    left, top, right, bottom = (float(side) for side in box)
    x, y, half_width, half_height = (
        (left + right) / 2,
        (top + bottom) / 2,
        (right - left) / 2,
        (bottom - top) / 2,
    )
    left, right = x - 0.55 * half_width, x + 0.55 * half_width
    top, bottom = y + 0.28 * half_height, y + 0.98 * half_height
    step_x, step_y = (right - left) / _SIDE, (bottom - top) / _SIDE
    # From the centres of the crop's pixels to those of the frame's.
    place = np.array([[step_x, 0, left + step_x / 2 - 0.5], [0, step_y, top + step_y / 2 - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size, border = (_SIDE, _SIDE), cv2.BORDER_REPLICATE
    frames = [
        cv2.warpAffine(frame.astype(np.float32), place, size, flags=flags, borderMode=border)
        for frame in video
    ]
    return np.stack(frames) / 255


def correlation(one: Float[np.ndarray, " T"], other: Float[np.ndarray, " T"]) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    one, other = one - one.mean(), other - other.mean()
    scale = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / scale) if scale > 1e-9 else 0.0
