"""Reading of videos."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from fantasy_jax.errors import MediaError
from fantasy_jax.media.images import read_image
from fantasy_jax.media.paths import check_exists, file_url
from fantasy_jax.typing import UInt8

_DEFAULT_FPS = Fraction(25)
_EPSILON = 1e-6
"""Tolerance for rounding when frame times are compared, in seconds."""


def read_video(path: str | Path) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """Reads all frames of a video and its frame rate.

    Raises:
        MediaError: The file is missing or is not a video.
    """
    check_exists(path, "video")
    with _open_video(path) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    if not frames:
        raise MediaError(f"{path}: the video has no frames")
    return np.stack(frames), fps


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video file.

    Attributes:
        height: Displayed height in pixels, after rotation and with square pixels.
        width: Displayed width, likewise.
        has_audio: Whether the file has an audio stream.
        fps: Average frames per second; 25 where the file does not say.
    """

    height: int
    width: int
    has_audio: bool
    fps: Fraction


def probe_video(path: str | Path) -> VideoInfo:
    """Reads a video's properties from its first frame.

    Raises:
        MediaError: The file is missing or is not a readable video.
    """
    check_exists(path, "video")
    with _open_video(path) as container:
        for frame in container.decode(video=0):
            stream = container.streams.video[0]
            height, width = _displayed_size(frame, stream)
            fps = Fraction(stream.average_rate or _DEFAULT_FPS)
            return VideoInfo(height, width, bool(container.streams.audio), fps)
    raise MediaError(f"{path}: the video has no frames")


def stream_video(
    path: str | Path, fps: int | float, size: tuple[int, int] | None = None
) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """Yields the frames of a video one by one at a constant frame rate.

    Frame `k` is the one whose time is nearest to `k / fps`, so that files with another or a variable frame
    rate keep their pace. Frames that the decoder marks as corrupt are skipped.

    Args:
        path: The file.
        fps: Frame rate of the result, in Hz.
        size: Height and width of the result, in pixels; by default those at which the video is displayed.

    Yields:
        The frame's own time, in seconds since the first frame, and the frame: RGB, upright.

    Raises:
        MediaError: The file is missing or is not a video, or the stream cannot be decoded any further.
    """
    check_exists(path, "video")
    with _open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        count, last, step = 0, None, 1 / fps
        for time, frame in _timed_frames(container, stream):
            size = size or _displayed_size(frame, stream)
            while last and count / fps < (last[0] + time) / 2 - _EPSILON:
                yield last[0], _upright(last[1], size)
                count += 1
            step = time - last[0] if last else step
            last = time, frame
        while last and count / fps < last[0] + step / 2 - _EPSILON:
            yield last[0], _upright(last[1], size)
            count += 1


def stream_frames(path: str | Path, fps: int | float) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Yields the frames of a video as `stream_video` does, or the only frame of an image.

    Args:
        path: A video or an image; animated GIF and PNG files count as videos.
        fps: Frame rate of the result, in Hz.

    Yields:
        RGB frames of one size, upright.

    Raises:
        MediaError: The file is missing, neither a video nor an image, or damaged.
    """
    check_exists(path, "video or image")
    if _is_still_image(path):
        yield np.array(read_image(path))
    else:
        for _, frame in stream_video(path, fps):
            yield frame


def _is_still_image(path: str | Path) -> bool:
    try:
        with Image.open(path) as image:
            # Of the other formats with several pictures, phones write MPO, where one is a preview.
            return image.format not in ("GIF", "PNG") or not getattr(image, "is_animated", False)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _timed_frames(container, stream) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yields intact frames with strictly increasing times, in seconds since the first."""
    start, previous = None, -math.inf
    step = 1 / float(stream.average_rate or _DEFAULT_FPS)
    for frame in container.decode(stream):
        time = previous + step if frame.time is None else frame.time
        if not math.isfinite(time):
            time = 0.0
        if frame.is_corrupt or time <= previous:
            continue
        start, previous = time if start is None else start, time
        yield time - start, frame


def _displayed_size(frame: av.VideoFrame, stream) -> tuple[int, int]:
    width = round(frame.width * float(stream.sample_aspect_ratio or 1))
    return (width, frame.height) if frame.rotation % 180 else (frame.height, width)


def _upright(frame: av.VideoFrame, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """Scales a frame to a height and width after rotation, and rotates it by the file's display matrix."""
    turns = round(frame.rotation / 90) % 4
    height, width = size[::-1] if turns % 2 else size
    array = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    return np.ascontiguousarray(np.rot90(array, turns))


@contextmanager
def _open_video(path: str | Path) -> Iterator[av.container.InputContainer]:
    """Opens a file that has a video stream; decoding errors become a MediaError."""
    try:
        with av.open(file_url(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: has no video stream")
            yield container
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: not a readable video ({reason})") from error
