"""A video to clips of one length, rate and size, none of them across a cut."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from fantasy_jax.config import ConfigError
from fantasy_jax.media import stream_video
from fantasy_jax.typing import UInt8

_WIDTH = 256
"""Frames are looked at in this width for cuts, as PySceneDetect itself does."""


@dataclass(frozen=True)
class Cut:
    """A piece of a scene.

    Attributes:
        first: Number of its first frame in the video.
        video: Its frames; None for a scene that is shorter than a clip.
        num_frames: How many there are.
        gap: The most seconds by which a frame is shown at another time than its own.
    """

    first: int
    video: UInt8[np.ndarray, "T H W 3"] | None
    num_frames: int
    gap: float


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The size to which a picture is scaled so that it just covers another, its shape kept."""
    scale = max(size[0] / height, size[1] / width)
    return max(round(height * scale), size[0]), max(round(width * scale), size[1])


def cut(path: str, *, fps: int, num_frames: int, size: tuple[int, int], threshold: float) -> Iterator[Cut]:
    """Clips of a video, one after another: each scene gives as many as it holds, and its rest is left out.

    Args:
        path: The file.
        fps: Frames a second.
        num_frames: Of a clip.
        size: Height and width of its frames.
        threshold: Change from frame to frame that is a cut, see `PrepareConfig.cut_threshold`.

    Yields:
        Clips, and scenes that hold none.

    Raises:
        MediaError: The file cannot be read, or no further; what was whole before that has been yielded.
    """
    is_cut = _cut_detector(fps, threshold)
    frames: list[np.ndarray] = []
    gap, found = 0.0, 0

    def rest(first: int) -> Iterator[Cut]:
        if frames and not found:
            yield Cut(first - len(frames), None, len(frames), gap)

    index = -1
    for index, (time, frame) in enumerate(stream_video(path, fps, size)):
        if is_cut(index, frame):
            yield from rest(index)
            frames, gap, found = [], 0.0, 0
        frames.append(frame)
        gap = max(gap, abs(time - index / fps))
        if len(frames) == num_frames:
            yield Cut(index + 1 - num_frames, np.stack(frames), num_frames, gap)
            frames, gap, found = [], 0.0, found + 1
    yield from rest(index + 1)


def _cut_detector(fps: int, threshold: float) -> Any:
    try:
        from scenedetect import ContentDetector, FrameTimecode
    except ImportError as error:
        raise ConfigError(f"scenedetect is missing ({error}); pip install 'fantasy_jax[prepare]'") from error
    # Every cut counts: with a minimum length a clip could lie across one.
    detector = ContentDetector(threshold=threshold, min_scene_len=0)

    def is_cut(index: int, frame: UInt8[np.ndarray, "H W 3"]) -> bool:
        size = (_WIDTH, _WIDTH * len(frame) // frame.shape[1])
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        bgr = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
        return bool(detector.process_frame(FrameTimecode(index, fps=float(fps)), bgr))

    return is_cut
