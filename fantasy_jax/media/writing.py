"""Writing of videos with audio."""

import errno
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from fantasy_jax.errors import MediaError
from fantasy_jax.files import atomic_write
from fantasy_jax.media.audio import AudioPart, audio_seconds, stream_audio
from fantasy_jax.media.paths import video_format
from fantasy_jax.typing import Float32, UInt8

_AUDIO_RATE = 44_100
"""Sampling rate of the audio stream in a written video, in Hz."""
_AUDIO_BLOCK = 1024
"""Samples that AAC encodes together."""
_IDENTITY, _BT709 = 0, 1
"""Matrices, primaries and transfer characteristics of ITU-T H.273, as FFmpeg numbers them."""
_LIMITED_RANGE, _FULL_RANGE = 1, 2
_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)
"""Errors of a disk that is full or damaged."""


def write_video(
    path: str | Path,
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    fps: int | Fraction,
    *,
    audio: str | Path | AudioPart | None = None,
    background: str | Path | None = None,
    lossless: bool = False,
) -> None:
    """Writes an mp4 or mov file (H.264 in BT.709, AAC), atomically.

    Frames and audio are read when they are needed; memory does not grow with the length.

    Args:
        path: Output file; an existing file is replaced. The suffix of its name decides the format.
        frames: RGB frames of one size, as an array `[T, H, W, 3]` or one by one. Odd sides are extended by
            one repeated row or column, because H.264 needs even sides.
        fps: Frames per second.
        audio: File whose audio is added, or a part of one; cut to the length of the video or padded with
            silence.
        background: File whose audio is mixed with that, likewise; where the sum is louder than a file can
            hold, all of it is made quieter.
        lossless: Keeps every pixel: `read_video` returns the same bytes, but few players support the file.

    Raises:
        MediaError: The name has another suffix, there are no frames, the folder is not writable, the audio is
            not readable, or the frames are too large for H.264.
    """
    container_format = video_format(path)
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise MediaError(f"{path}: the video has no frames; nothing is written")
    with atomic_write(path) as partial, _encoding(path):
        options = {"movflags": "+faststart"}
        with av.open(str(partial), "w", format=container_format, container_options=options) as container:
            stream = _add_video(container, _even_sides(first).shape[:2], fps, lossless=lossless)
            sources = [x for x in (audio, background) if x is not None]
            track = _AudioTrack(container, sources) if sources else None
            for count, frame in enumerate(itertools.chain([first], remaining), 1):
                container.mux(stream.encode(_converted(frame, stream)))
                if track is not None:
                    track.write_until(float(count / fps))
            container.mux(stream.encode(None))
            if track is not None:
                track.finish(float(count / fps))


def _add_video(
    container: av.container.OutputContainer, size: tuple[int, int], fps: int | Fraction, *, lossless: bool
) -> av.VideoStream:
    """Adds an H.264 stream of this height and width, tagged as what it is: BT.709, or RGB if lossless."""
    codec, pixels, quality = (
        ("libx264rgb", "rgb24", {"qp": "0", "preset": "ultrafast"})
        if lossless
        else ("libx264", "yuv420p", {"crf": "16"})
    )
    stream = container.add_stream(codec, rate=fps, options=quality)
    stream.height, stream.width = size
    stream.pix_fmt = pixels
    context = stream.codec_context
    context.color_primaries = context.color_trc = _BT709
    context.colorspace, context.color_range = (
        (_IDENTITY, _FULL_RANGE) if lossless else (_BT709, _LIMITED_RANGE)
    )
    return stream


def _converted(frame: UInt8[np.ndarray, "H W 3"], stream: av.VideoStream) -> av.VideoFrame:
    """A frame in the stream's pixel format; YUV has the matrix and range of BT.709."""
    rgb = av.VideoFrame.from_ndarray(_even_sides(frame), format="rgb24")
    if stream.pix_fmt == "rgb24":
        return rgb
    return rgb.reformat(
        format=stream.pix_fmt,
        dst_colorspace=_BT709,
        src_color_range=_FULL_RANGE,
        dst_color_range=_LIMITED_RANGE,
    )


def check_audio(path: str | Path | AudioPart, seconds: float = math.inf) -> None:
    """Decodes a sound as `write_video` does, so that what it cannot read is found before frames are made.

    Args:
        path: An audio or video file, or a part of one.
        seconds: What is used of it; little more than this is decoded.

    Raises:
        MediaError: As `stream_audio`.
    """
    with closing(_Samples(path)) as source:
        source.drop(seconds * _AUDIO_RATE)


@contextmanager
def _encoding(path: str | Path) -> Iterator[None]:
    """Errors of encoding, such as that of frames that are too wide, become a MediaError."""
    try:
        yield
    except av.FFmpegError as error:
        if error.errno in _DISK:
            raise MediaError(f"{path}: cannot be written ({error.strerror})") from error
        raise MediaError(f"{path}: cannot be encoded ({error.strerror})") from error


def _even_sides(frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], "edge")


class _AudioTrack:
    """Audio of files, mixed and written to a video's container while its frames are written."""

    def __init__(self, container: av.container.OutputContainer, paths: Sequence[str | Path | AudioPart]):
        """Adds the stream, and reads the beginning of the files: MediaError if that is not possible."""
        self._sources = [_Samples(path) for path in paths]
        self._gain = 1 / max(_peak(paths), 1.0) if len(paths) > 1 else 1.0
        self._container, self._written = container, 0
        self._stream = container.add_stream("aac", rate=_AUDIO_RATE)
        self._stream.layout, self._stream.bit_rate = "stereo", 192_000

    def write_until(self, seconds: float) -> None:
        """Writes whole blocks up to this time."""
        while self._written + _AUDIO_BLOCK <= round(seconds * _AUDIO_RATE):
            self._write(_AUDIO_BLOCK)

    def finish(self, seconds: float) -> None:
        """Writes what is left up to this time, and closes the files."""
        self.write_until(seconds)
        if left := round(seconds * _AUDIO_RATE) - self._written:
            self._write(left)
        self._container.mux(self._stream.encode(None))
        for source in self._sources:
            source.close()

    def _write(self, samples: int) -> None:
        mixed = sum(source.take(samples) for source in self._sources) * np.float32(self._gain)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(mixed), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = _AUDIO_RATE, self._written
        frame.time_base = Fraction(1, _AUDIO_RATE)
        self._container.mux(self._stream.encode(frame))
        self._written += samples


class _Samples:
    """The samples of a file, in any portions."""

    def __init__(self, path: str | Path | AudioPart):
        self._pieces = stream_audio(path, _AUDIO_RATE)
        self._read = next(self._pieces)

    def close(self) -> None:
        """Closes the file."""
        self._pieces.close()

    def drop(self, samples: float) -> None:
        """Decodes this many samples, or all, and drops them piece by piece."""
        dropped = self._read.shape[1]
        while dropped <= samples and (piece := next(self._pieces, None)) is not None:
            dropped += piece.shape[1]

    def take(self, samples: int) -> Float32[np.ndarray, "2 {samples}"]:
        """The next samples, and silence after the end."""
        while self._read.shape[1] < samples:
            piece = next(self._pieces, None)
            if piece is None:
                piece = np.zeros((2, samples - self._read.shape[1]), np.float32)
            self._read = np.concatenate([self._read, piece], axis=1)
        taken, self._read = np.split(self._read, [samples], axis=1)
        return taken


def _peak(paths: Sequence[str | Path | AudioPart]) -> float:
    """Largest absolute value of the sum of files; they are decoded, but not kept."""
    shortest, *others = sorted(paths, key=audio_seconds)
    sources, peak = [_Samples(path) for path in others], 0.0
    for piece in stream_audio(shortest, _AUDIO_RATE):
        mixed = sum((source.take(piece.shape[1]) for source in sources), piece)
        peak = max(peak, float(np.abs(mixed).max(initial=0)))
    return peak
