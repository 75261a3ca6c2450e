"""Reading of videos."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from pathlib import Path

import av
import numpy as np

from fantasy_jax.errors import MediaError
from fantasy_jax.media.frames import TONE_MAPS, displayed_size, to_rgb
from fantasy_jax.media.images import DAMAGED_IMAGE, open_image, read_image
from fantasy_jax.media.paths import check_exists, file_url
from fantasy_jax.typing import UInt8

_DEFAULT_FPS = Fraction(25)
_LONGEST_GAP = 3600.0
"""Seconds between two frames beyond which a frame's time is wrong; it follows the one before it."""
_DOLBY_VISION = ("dvh1", "dvhe")
"""Tags of HEVC that only Dolby Vision can show; files with a compatible base layer have HEVC's own."""
_EPSILON = 1e-6
"""Tolerance for rounding when frame times are compared, in seconds."""


def read_video(path: str | Path) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """Reads all frames of a video, RGB and upright, and its frame rate.

    Raises:
        MediaError: The file is missing or is not a video.
    """
    check_exists(path, "video")
    with _open_video(path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or _DEFAULT_FPS)
        frames, size = [], None
        for frame in container.decode(stream):
            size = size or displayed_size(frame, stream)
            frames.append(to_rgb(frame, stream, size))
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
            height, width = displayed_size(frame, stream)
            fps = Fraction(stream.average_rate or _DEFAULT_FPS)
            return VideoInfo(height, width, bool(container.streams.audio), fps)
    raise MediaError(f"{path}: the video has no frames")


def first_frame_time(path: str | Path) -> float | None:
    """The time in the file at which a video's frames begin, in seconds; None if none can be decoded."""
    try:
        with _open_video(path) as container:
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                if not frame.is_corrupt and frame.time is not None:
                    return frame.time
    except MediaError:
        pass
    return None


def stream_video(
    path: str | Path, fps: int | float, size: tuple[int, int] | None = None, start: float = 0.0
) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """Yields the frames of a video one by one at a constant frame rate.

    Frame `k` is the one whose time is nearest to `k / fps`, so that files with another or a variable frame
    rate keep their pace. Frames that the decoder marks as corrupt are skipped.

    Args:
        path: The file.
        fps: Frame rate of the result, in Hz.
        size: Height and width of the result, in pixels; by default those at which the video is displayed.
        start: Seconds that are left out.

    Yields:
        The frame's own time, in seconds since the first frame, and the frame: RGB, upright.

    Raises:
        MediaError: The file is missing or is not a video, or the stream cannot be decoded any further.
    """
    check_exists(path, "video")
    with _open_video(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        first, count, last, step = round(start * fps), 0, None, 1 / fps
        for time, frame in _timed_frames(container, stream):
            size = size or displayed_size(frame, stream)
            while last and count / fps < (last[0] + time) / 2 - _EPSILON:
                if count >= first:
                    yield last[0], last[1]().copy()
                count += 1
            step = time - last[0] if last else step
            last = time, cache(partial(to_rgb, frame, stream, size))  # it may be repeated many times
        while last and count / fps < last[0] + step / 2 - _EPSILON:
            if count >= first:
                yield last[0], last[1]().copy()
            count += 1


def stream_frames(
    path: str | Path, fps: int | float, start: float = 0.0
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Yields the frames of a video as `stream_video` does, or the only frame of an image.

    Args:
        path: A video or an image; animated GIF and PNG files count as videos.
        fps: Frame rate of the result, in Hz.
        start: Seconds of a video that are left out.

    Yields:
        RGB frames of one size, upright.

    Raises:
        MediaError: The file is missing, neither a video nor an image, or damaged.
    """
    check_exists(path, "video or image")
    if _is_still_image(path):
        yield np.array(read_image(path))
    else:
        for _, frame in stream_video(path, fps, start=start):
            yield frame


def _is_still_image(path: str | Path) -> bool:
    try:
        with open_image(path) as image:
            # Of the other formats with several pictures, phones write MPO, where one is a preview.
            return image.format not in ("GIF", "PNG") or not getattr(image, "is_animated", False)
    except DAMAGED_IMAGE:
        return False


def _timed_frames(container, stream) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yields intact frames with strictly increasing times, in seconds since the first."""
    start, previous = None, -math.inf
    step = 1 / float(stream.average_rate or _DEFAULT_FPS)
    for frame in container.decode(stream):
        time = previous + step if frame.time is None else frame.time
        if not math.isfinite(time):
            time = 0.0
        if start is not None and time - previous > _LONGEST_GAP:
            time = previous + step
        if frame.is_corrupt or time <= previous:
            continue
        start, step = (time, step) if start is None else (start, time - previous)
        previous = time
        yield time - start, frame


@contextmanager
def _open_video(path: str | Path) -> Iterator[av.container.InputContainer]:
    """Opens a file that has a video stream; decoding errors become a MediaError."""
    try:
        with av.open(file_url(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise MediaError(f"{path}: has no video stream")
            context = container.streams.video[0].codec_context
            if context is None:
                raise MediaError(f"{path}: not a readable video (its codec is unknown)")
            if context.codec_tag in _DOLBY_VISION and context.color_trc not in TONE_MAPS:
                raise MediaError(
                    f"{path}: is Dolby Vision without a compatible base layer (profile 5), whose colours "
                    "cannot be converted; export it as HDR10, HLG or SDR"
                )
            yield container
    except (av.FFmpegError, UnicodeError, IndexError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: not a readable video ({reason})") from error
