"""How much head and features move, read from the pixels of a video.

Like the mouth's, these instruments know where the face is in the first frame and nothing else. The optical
flow is Farneback's, by OpenCV, on frames enlarged to what it was made for. Mouth and chin are left
out: they move with the speech, whatever else does.
"""

import cv2
import numpy as np

from fantasy_jax.typing import Float, UInt8

_SIDE = 256
"""Frames are enlarged so that their shorter side has this many pixels."""


def motion(video: UInt8[np.ndarray, "T H W 3"], box: Float[np.ndarray, "4"]) -> tuple[float, float]:
    """How far things move over a clip.

    Args:
        video: RGB.
        box: Left, top, right, bottom of the head in the first frame, in pixels.

    Returns:
        Of the features and of the head, in percent of the head's height: the mean distance, over frames, from
        where they were in the first one. What the features do is counted on top of what the head does.
    """
    scale = _SIDE / min(video.shape[1:3])
    frames = [cv2.cvtColor(_enlarge(frame, scale), cv2.COLOR_RGB2GRAY) for frame in video]
    left, top, right, bottom = (float(side) * scale for side in box)
    flows = [
        cv2.calcOpticalFlowFarneback(frames[0], frame, None, 0.5, 4, 25, 3, 7, 1.5, 0) for frame in frames[1:]
    ]
    height, width = bottom - top, right - left
    head = (slice(_at(top), _at(top + 0.55 * height)), slice(_at(left), _at(right)))
    eyes = (
        slice(_at(top + 0.3 * height), _at(top + 0.52 * height)),
        slice(_at(left + 0.2 * width), _at(right - 0.2 * width)),
    )
    of_head = np.array([np.median(flow[head], axis=(0, 1)) for flow in flows])
    beside = [flow[eyes] - moved for flow, moved in zip(flows, of_head, strict=True)]
    return (
        100 * float(np.mean([np.linalg.norm(flow, axis=-1).mean() for flow in beside])) / height,
        100 * float(np.linalg.norm(of_head, axis=-1).mean()) / height,
    )


def _enlarge(frame: UInt8[np.ndarray, "H W 3"], scale: float) -> UInt8[np.ndarray, "h w 3"]:
    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def _at(place: float) -> int:
    return max(round(place), 0)
