"""Mouth opening per frame, measured from the pixels of a video.

The measurement uses nothing but the position of the face in the first frame. Only the shape of the resulting
curve is meaningful, not its offset or scale, unless two videos of a face are compared. Figures from different
versions of it are not comparable.
"""

import cv2
import numpy as np

from fantasy_jax.typing import Float, UInt8

_SIDE = 32
"""Rows and columns of the crop around the mouth, whatever the size of the face."""
_MARGIN = 3


def mouth_opening(
    video: UInt8[np.ndarray, "T H W 3"],
    box: Float[np.ndarray, "4"],
    reference: UInt8[np.ndarray, "T H W 3"] | None = None,
) -> Float[np.ndarray, " T"]:
    """Opening of the mouth in every frame, in arbitrary units.

    A first estimate is how much the colours around the mouth differ from the skin beside it, less what they
    differ in the frames where they do least. The covariance of each pixel with this estimate is the pattern
    that opening leaves in this face; the projection of each frame onto the pattern is the result.

    Args:
        video: RGB frames.
        box: Left, top, right, bottom of the head in the first frame, in pixels.
        reference: Another video of the same face, whose pattern is used: openings of both have the same
            offset and scale then.
    """
    crops = _crop_mouth(video if reference is None else reference, box)
    beside = crops[:, :, [*range(_MARGIN), *range(-_MARGIN, 0)]].reshape(len(crops), -1, 3)
    skin = np.median(beside, axis=1)[:, None, None]
    difference = np.linalg.norm(crops - skin, axis=-1)
    inside = slice(_MARGIN + 2, -_MARGIN - 2)
    estimate = (difference - np.quantile(difference, 0.1, axis=0))[:, :, inside].mean((1, 2))
    mean = crops.mean(axis=0)
    centered = crops - mean
    pattern = np.tensordot(estimate - estimate.mean(), centered, axes=1)
    if reference is not None:
        centered = _crop_mouth(video, box) - mean
    opening = (centered * pattern).sum(axis=(1, 2, 3))
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
    # Maps centres of the crop's pixels to centres of the frame's.
    matrix = np.array([[step_x, 0, left + step_x / 2 - 0.5], [0, step_y, top + step_y / 2 - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size, border = (_SIDE, _SIDE), cv2.BORDER_REPLICATE
    frames = [
        cv2.warpAffine(frame.astype(np.float32), matrix, size, flags=flags, borderMode=border)
        for frame in video
    ]
    return np.stack(frames) / 255
