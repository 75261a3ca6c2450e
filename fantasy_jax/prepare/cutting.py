"""Cutting of a video into segments of one length, frame rate and size, within scenes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fantasy_jax.media import stream_video
from fantasy_jax.preprocessing.scenes import cut_detector
from fantasy_jax.typing import UInt8


@dataclass(frozen=True)
class Segment:
    """A part of a scene that is as long as a clip, or a whole scene that is shorter.

    Attributes:
        first: Index of its first frame in the video.
        video: Its frames; None if it is shorter than a clip.
        num_frames: Number of its frames.
        gap: Largest difference between the time of a frame and its own time in the file, in seconds.
    """

    first: int
    video: UInt8[np.ndarray, "T H W 3"] | None
    num_frames: int
    gap: float


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the smallest height and width of the same aspect ratio that cover `size`."""
    scale = max(size[0] / height, size[1] / width)
    return max(round(height * scale), size[0]), max(round(width * scale), size[1])


def cut(
    path: str, *, fps: int, num_frames: int, size: tuple[int, int], threshold: float
) -> Iterator[Segment]:
    """Yields the segments of a video in order; the rest of a scene that has segments is left out.

    Args:
        path: The file.
        fps: Frames per second.
        num_frames: Frames of a segment.
        size: Height and width of the frames, in pixels.
        threshold: See `PrepareConfig.cut_threshold`.

    Yields:
        Segments, and scenes that are too short for one.

    Raises:
        MediaError: The file is unreadable from here on; intact segments before that are yielded.
    """
    is_cut = cut_detector(fps, threshold)
    frames: list[np.ndarray] = []
    gap, found = 0.0, 0

    def short_scene(end: int) -> Iterator[Segment]:
        if frames and not found:
            yield Segment(end - len(frames), None, len(frames), gap)

    index = -1
    for index, (time, frame) in enumerate(stream_video(path, fps, size)):
        if is_cut(index, frame):
            yield from short_scene(index)
            frames, gap, found = [], 0.0, 0
        frames.append(frame)
        gap = max(gap, abs(time - index / fps))
        if len(frames) == num_frames:
            yield Segment(index + 1 - num_frames, np.stack(frames), num_frames, gap)
            frames, gap, found = [], 0.0, found + 1
    yield from short_scene(index + 1)
