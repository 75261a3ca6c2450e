"""Reading and writing of images, audio and video; the only module that uses codecs."""

import io
import itertools
import math
import os
import wave
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import soxr
from PIL import Image, ImageOps, UnidentifiedImageError

from fantasy_jax.errors import MediaError
from fantasy_jax.files import atomic_write
from fantasy_jax.typing import Float, Float32, Int16, UInt8
from fantasy_jax.video import SAMPLE_RATE

_VIDEO_AUDIO_RATE = 44_100
"""Sampling rate of the audio stream in a written video, in Hz."""
_DEFAULT_FPS = Fraction(25)
_EPSILON = 1e-6
"""Tolerance for rounding when frame times are compared, in seconds."""


def read_image(path: str | Path) -> Image.Image:
    """Reads an image as 8-bit RGB.

    The EXIF orientation is applied; 16-bit, grey and palette images are converted; transparent areas are
    composited over white (the official code drops the alpha channel and shows the colour below it).

    Raises:
        MediaError: The file is missing, not an image, or truncated.
    """
    _check_exists(path, "image")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: not a readable image; use a PNG, JPEG or WebP file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: the image is damaged or truncated ({error}); save it again") from error
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image, path)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """Converts 16- and 32-bit grey images; Pillow would clip their values at 255."""
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise MediaError(f"{path}: the image contains values that are not finite; save it with 8 bits")
    largest = {"F": 1.0 if values.max(initial=0) <= 1 else 255.0}.get(image.mode, 65535.0)
    return Image.fromarray((values / largest * 255).round().clip(0, 255).astype(np.uint8))


def read_audio(
    path: str | Path, rate: int = SAMPLE_RATE, *, seconds: float = math.inf
) -> Float32[np.ndarray, " samples"]:
    """Reads the audio of an audio or video file as mono, in [-1, 1].

    Channels are averaged and resampled by soxr at high quality, as `librosa.load` does.

    Args:
        path: An audio or video file.
        rate: Sampling rate of the result, in Hz.
        seconds: What is needed of it; reading stops soon after.

    Raises:
        MediaError: The file is missing or has no audio, or its audio is empty or not finite.
    """
    waveform, source_rate = _decode_audio(path, seconds=seconds)
    return resample(waveform.mean(axis=0, dtype=np.float32), source_rate, rate)


def read_audio_track(path: str | Path, rate: int = SAMPLE_RATE) -> Float32[np.ndarray, " samples"]:
    """Reads a video's audio like `read_audio`, aligned with the time of the first video frame.

    Audio before that time is cut off; if the audio starts later, zeros come first.

    Raises:
        MediaError: As `read_audio`.
    """
    waveform = read_audio(path, rate)
    with av.open(str(path)) as container:
        starts = [
            float((stream.start_time or 0) * stream.time_base)
            for stream in (container.streams.audio[0], *container.streams.video[:1])
        ]
    late = round((starts[0] - starts[-1]) * rate)
    return np.pad(waveform, (late, 0)) if late > 0 else waveform[-late:]


def _decode_audio(
    path: str | Path, *, rate: int | None = None, layout: str | None = None, seconds: float = float("inf")
) -> tuple[Float32[np.ndarray, "channels samples"], int]:
    """Returns samples by channel and their rate; decoding stops soon after `seconds`."""
    _check_exists(path, "audio file")
    if os.path.getsize(path) == 0:
        raise MediaError(f"{path}: the file is empty; use an audio file")
    pieces: list[np.ndarray] = []
    length = 0
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise MediaError(f"{path}: has no audio; use a file that has an audio stream")
            source_rate = rate or container.streams.audio[0].rate
            for frame in container.decode(audio=0):
                parts = [part.to_ndarray() for part in resampler.resample(frame)]
                pieces += parts
                length += sum(part.shape[1] for part in parts)
                if length > seconds * source_rate:
                    break
            pieces += [part.to_ndarray() for part in resampler.resample(None)]
    except av.FFmpegError as error:
        raise MediaError(f"{path}: not readable audio ({error.strerror}); use a WAV or MP3 file") from error
    if not pieces or sum(piece.shape[1] for piece in pieces) == 0:
        raise MediaError(f"{path}: the audio has no samples; use a file that is not empty")
    waveform = np.concatenate(pieces, axis=1)
    if not np.isfinite(waveform).all():
        raise MediaError(f"{path}: the audio contains samples that are not finite; save it again")
    return waveform, source_rate


def resample(
    waveform: Float[np.ndarray, " samples"], rate: int, target: int = SAMPLE_RATE
) -> Float[np.ndarray, " resampled"]:
    """Changes the sampling rate by soxr at high quality, as `librosa.load` does.

    Args:
        waveform: One channel.
        rate: Its sampling rate, in Hz.
        target: Sampling rate of the result, in Hz.

    Returns:
        `ceil(samples * target / rate)` samples; where soxr gives one sample fewer, a zero is appended.
    """
    if rate == target:
        return waveform
    length = math.ceil(waveform.size * target / rate)
    resampled = soxr.resample(waveform, rate, target, quality="HQ")[:length]
    return np.pad(resampled, (0, length - resampled.size))


def write_audio(path: str | Path, waveform: Int16[np.ndarray, " samples"], rate: int) -> None:
    """Writes a mono 16-bit WAV file.

    Raises:
        MediaError: The folder is not writable.
    """
    with atomic_write(path) as partial, wave.open(str(partial), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(waveform, "<i2").tobytes())


def read_video(path: str | Path) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """Reads all frames of a video and its frame rate.

    Raises:
        MediaError: The file is missing or is not a video.
    """
    _check_exists(path, "video")
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
    _check_exists(path, "video")
    with _open_video(path) as container:
        stream = container.streams.video[0]
        fps = Fraction(stream.average_rate or _DEFAULT_FPS)
        for frame in container.decode(stream):
            return VideoInfo(*_displayed_size(frame, stream), bool(container.streams.audio), fps)
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
    _check_exists(path, "video")
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
    _check_exists(path, "video or image")
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
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: has no video stream")
            yield container
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: not a readable video ({reason})") from error


def encode_jpeg(image: UInt8[np.ndarray, "H W 3"], quality: int = 80) -> bytes:
    """Returns the image as the bytes of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=quality)
    return file.getvalue()


def write_video(
    path: str | Path,
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    fps: int | Fraction,
    *,
    audio: str | Path | None = None,
    background: str | Path | None = None,
    lossless: bool = False,
) -> None:
    """Writes an mp4 (H.264, AAC), atomically.

    Args:
        path: Output file; an existing file is replaced.
        frames: RGB frames of one size, as an array `[T, H, W, 3]` or one by one. Odd sides are extended by
            one repeated row or column, because H.264 needs even sides.
        fps: Frames per second.
        audio: File whose audio is added, cut to the length of the video or padded with silence.
        background: File whose audio is mixed with it; where the sum would clip, all of it is made quieter.
        lossless: Keeps every pixel: `read_video` returns the same bytes, but few players support the file.

    Raises:
        MediaError: There are no frames, the folder is not writable, the audio is not readable, or the frames
            are too large for H.264.
    """
    remaining = iter(frames)
    first = next(remaining, None)
    if first is None:
        raise MediaError(f"{path}: the video has no frames; nothing is written")
    with atomic_write(path) as partial, _encoding(path):
        options = {"movflags": "+faststart"}
        with av.open(str(partial), "w", format="mp4", container_options=options) as container:
            codec, pixels, quality = (
                ("libx264rgb", "rgb24", {"qp": "0", "preset": "ultrafast"})
                if lossless
                else ("libx264", "yuv420p", {"crf": "16"})
            )
            video_stream = container.add_stream(codec, rate=fps, options=quality)
            video_stream.height, video_stream.width = _even_sides(first).shape[:2]
            video_stream.pix_fmt = pixels
            audio_stream = None if audio is None else container.add_stream("aac", rate=_VIDEO_AUDIO_RATE)
            if audio_stream is not None:
                audio_stream.layout, audio_stream.bit_rate = "stereo", 192_000
            count = 0
            for frame in itertools.chain([first], remaining):
                count += 1
                shown = av.VideoFrame.from_ndarray(_even_sides(frame), format="rgb24")
                container.mux(video_stream.encode(shown))
            container.mux(video_stream.encode(None))
            if audio_stream is not None:
                waveform = _audio_of_length(audio, float(count / fps))
                if background is not None:
                    waveform = waveform + _audio_of_length(background, float(count / fps))
                    waveform = waveform / max(float(np.abs(waveform).max(initial=0)), 1.0)
                _encode_audio(container, audio_stream, waveform.astype(np.float32))


@contextmanager
def _encoding(path: str | Path) -> Iterator[None]:
    """Errors of encoding, such as that of frames that are too wide, become a MediaError."""
    try:
        yield
    except av.FFmpegError as error:
        raise MediaError(f"{path}: cannot be encoded ({error.strerror})") from error


def _even_sides(frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.pad(frame, [(0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)], "edge")


def _audio_of_length(path: str | Path, seconds: float) -> Float32[np.ndarray, "2 samples"]:
    """Reads stereo audio, cut to a length or padded with silence."""
    waveform, _ = _decode_audio(path, rate=_VIDEO_AUDIO_RATE, layout="stereo", seconds=seconds)
    samples = round(seconds * _VIDEO_AUDIO_RATE)
    return np.pad(waveform[:, :samples], [(0, 0), (0, max(samples - waveform.shape[1], 0))])


def _encode_audio(container, stream, waveform: Float32[np.ndarray, "2 samples"]) -> None:
    for start in range(0, waveform.shape[1], 1024):
        piece = np.ascontiguousarray(waveform[:, start : start + 1024])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = _VIDEO_AUDIO_RATE, start
        frame.time_base = Fraction(1, _VIDEO_AUDIO_RATE)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_contact_sheet(
    path: str | Path,
    frames: UInt8[np.ndarray, "T H W 3"],
    fps: int | float,
    *,
    columns: int = 6,
    rows: int = 2,
) -> None:
    """Writes a PNG with evenly spaced frames of a video, each labelled with its time.

    Raises:
        MediaError: The folder is not writable.
    """
    picked = np.unique(np.linspace(0, len(frames) - 1, columns * rows).round().astype(int))
    side = 192
    tiles = []
    for index in picked:
        height, width = frames.shape[1:3]
        size = (side, round(side * height / width / 2) * 2)
        tile = cv2.resize(frames[index], size, interpolation=cv2.INTER_CUBIC)
        tile = cv2.copyMakeBorder(tile, 0, 20, 0, 2, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        where = (4, tile.shape[0] - 5)
        cv2.putText(
            tile, f"{index / fps:.2f} s", where, cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA
        )
        tiles.append(tile)
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    sheet = np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])
    with atomic_write(path) as partial:
        Image.fromarray(sheet).save(partial, format="PNG")


def _check_exists(path: str | Path, kind: str) -> None:
    if not Path(path).is_file():
        raise MediaError(f"{path}: no such {kind}")
