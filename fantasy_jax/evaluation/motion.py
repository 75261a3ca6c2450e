"""Amount of facial and head motion, measured from the pixels of a video.

The measurement uses nothing but the position of the face in the first frame. It is the standard deviation
over time that arXiv 2504.04842 (section 3) calls intensity, of optical flow instead of landmarks. The flow is
OpenCV's Farneback method, on frames enlarged to the size that its parameters suit.
"""

import cv2
import numpy as np

from fantasy_jax.typing import Float, UInt8

_SIDE = 256
"""Pixels of the shorter side of the enlarged frames."""
_UPPER_HEAD, _FEATURES = (0.0, 0.55), (0.26, 0.98)
"""Top and bottom of two regions as fractions of the head's height; speech does not move the upper one."""


def motion(video: UInt8[np.ndarray, "T H W 3"], box: Float[np.ndarray, "4"]) -> tuple[float, float]:
    """Standard deviation of the motion of the facial features and of the head.

    Flow is measured against the middle frame, without the first frame: it is the given image, sharper than
    the generated ones, and the difference would count as motion.

    Args:
        video: RGB frames; with fewer than three the result is 0.
        box: Left, top, right, bottom of the head in the first frame, in pixels.

    Returns:
        In percent of the head's height: the standard deviation over time of the position of brows, eyes, nose
        and mouth relative to the head, and of the position of the head.
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

    def region(rows: tuple[float, float], margin: float) -> Float[np.ndarray, "T h w 2"]:
        """Flow in these rows of the head, without this fraction of its width at both sides."""
        above, below = (_index(top + fraction * height) for fraction in rows)
        return flows[:, above:below, _index(left + margin * width) : _index(right - margin * width)]

    head = np.median(region(_UPPER_HEAD, 0.0), axis=(1, 2), keepdims=True)
    features = region(_FEATURES, 0.2) - head
    features_std, head_std = (
        100 * float(np.sqrt(flow.var(axis=0).sum(axis=-1).mean())) / height for flow in (features, head)
    )
    return features_std, head_std


def _enlarge(frame: UInt8[np.ndarray, "H W 3"], scale: float) -> UInt8[np.ndarray, "h w 3"]:
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def _index(position: float) -> int:
    return max(round(position), 0)
