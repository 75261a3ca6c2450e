"""Detection of scene cuts in a stream of frames, by PySceneDetect."""

from collections.abc import Callable

import cv2
import numpy as np

from fantasy_jax.errors import ConfigError
from fantasy_jax.typing import UInt8

CUT_THRESHOLD = 27.0
"""Default threshold of PySceneDetect's ContentDetector: mean change of hue, saturation and brightness."""
_WIDTH = 256
"""Width of the frames in which cuts are detected, as in PySceneDetect itself."""


def cut_detector(
    fps: int | float, threshold: float = CUT_THRESHOLD
) -> Callable[[int, UInt8[np.ndarray, "H W 3"]], bool]:
    """Returns a function that tells whether a frame begins a new scene.

    It takes the frames of one video in order, each with its index. The first frame is no cut.

    Args:
        fps: Frames per second.
        threshold: Threshold of PySceneDetect's ContentDetector.

    Raises:
        ConfigError: PySceneDetect is not installed.
    """
    try:
        from scenedetect import ContentDetector, FrameTimecode
    except ImportError as error:
        raise ConfigError(f"scenedetect is missing ({error}); pip install 'fantasy_jax[prepare]'") from error
    # Every cut counts: with a minimum scene length a segment could contain one.
    detector = ContentDetector(threshold=threshold, min_scene_len=0)

    def is_cut(index: int, frame: UInt8[np.ndarray, "H W 3"]) -> bool:
        size = (_WIDTH, _WIDTH * len(frame) // frame.shape[1])
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        bgr = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
        return bool(detector.process_frame(FrameTimecode(index, fps=float(fps)), bgr))

    return is_cut
