"""How much features and head move, read from the pixels of a video.

Like the mouth's, these instruments know where the face is in the first frame and nothing else. What they give
is a deviation over time, the root of what arXiv 2504.04842 (section 3) calls intensity, with the flow of
pixels in place of landmarks. The optical flow is Farneback's, by OpenCV, on frames enlarged to what it was
made for.
"""

import cv2
import numpy as np

from fantasy_jax.typing import Float, UInt8

_SIDE = 256
"""Frames are enlarged so that their shorter side has this many pixels."""
_UPPER_HEAD, _FEATURES = (0.0, 0.55), (0.26, 0.98)
"""Top and bottom of parts of a face, as shares of the head's height. Heads do not speak above their noses."""


def motion(video: UInt8[np.ndarray, "T H W 3"], box: Float[np.ndarray, "4"]) -> tuple[float, float]:
    """How far things move over a clip.

    Every frame is held against the middle one, but for the first: that is given, sharper than what is made
    from it, and the difference would be taken for motion.

    Args:
        video: RGB; in less than three frames nothing moves.
        box: Left, top, right, bottom of the head in the first frame, in pixels.

    Returns:
        Of the features and of the head, in percent of the head's height: the standard deviation over time of
        the places of brows, eyes, nose and mouth on the head, and of the head's own place.
    """
    if len(video) < 3:
        return 0.0, 0.0
    scale = _SIDE / min(video.shape[1:3])
    frames = [cv2.cvtColor(_enlarge(frame, scale), cv2.COLOR_RGB2GRAY) for frame in video[1:]]
    middle = frames[len(frames) // 2]
    flows = np.stack(
        [cv2.calcOpticalFlowFarneback(middle, frame, None, 0.5, 4, 25, 3, 7, 1.5, 0) for frame in frames]
    )
    left, top, right, bottom = (float(side) * scale for side in box)
    height, width = bottom - top, right - left

    def part(rows: tuple[float, float], aside: float) -> Float[np.ndarray, "T h w 2"]:
        """Flow in these rows of the head, without this share of its width on both sides."""
        above, below = (_at(top + share * height) for share in rows)
        return flows[:, above:below, _at(left + aside * width) : _at(right - aside * width)]

    head = np.median(part(_UPPER_HEAD, 0.0), axis=(1, 2), keepdims=True)
    features = part(_FEATURES, 0.2) - head
    of_features, of_head = (
        100 * float(np.sqrt(course.var(axis=0).sum(axis=-1).mean())) / height for course in (features, head)
    )
    return of_features, of_head


def _enlarge(frame: UInt8[np.ndarray, "H W 3"], scale: float) -> UInt8[np.ndarray, "h w 3"]:
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def _at(place: float) -> int:
    return max(round(place), 0)
