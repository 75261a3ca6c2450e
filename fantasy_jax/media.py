"""Pictures, sound and video in and out: the only file that touches a codec."""

import io
import math
import os
import tempfile
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fantasy_jax.data.preprocessing import resample
from fantasy_jax.typing import Float32, Int16, UInt8

_SOUND_RATE = 44_100
"""Of the sound in a written video, in Hz."""
_EPSILON = 1e-6
"""Seconds by which rounding may move a frame's time."""


class MediaError(ValueError):
    """A file that cannot be read or written; one line says which, what is wrong and what to do."""


def read_picture(path: str | Path) -> Image.Image:
    """Reads a picture as RGB, 8 bits.

    Turned upright by its EXIF tag; 16 bits, grey and palettes are converted; what is transparent is laid
    over white (the official code drops transparency, which shows whatever colour lies under it).

    Raises:
        MediaError: The file is missing, no picture, or truncated.
    """
    _check_exists(path, "picture")
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except UnidentifiedImageError as error:
        raise MediaError(f"{path}: not a picture that can be read; give a PNG, JPEG or WebP") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: the picture is damaged or cut off ({error}); save it anew") from error
    if picture.mode.startswith(("I", "F")):
        picture = _to_eight_bits(picture, path)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


def _to_eight_bits(picture: Image.Image, path: str | Path) -> Image.Image:
    """Grey pictures of 16 or 32 bits; Pillow would cut their values off at 255."""
    values = np.asarray(picture, np.float64)
    if not np.isfinite(values).all():
        raise MediaError(f"{path}: the picture holds values that are no numbers; save it as 8 bits")
    largest = {"F": 1.0 if values.max(initial=0) <= 1 else 255.0}.get(picture.mode, 65535.0)
    return Image.fromarray((values / largest * 255).round().clip(0, 255).astype(np.uint8))


def read_sound(path: str | Path, rate: int = 16_000) -> Float32[np.ndarray, " samples"]:
    """Reads the sound of any file that has some, mono, in [-1, 1].

    The mean of the channels, resampled by soxr at high quality, as `librosa.load` does.

    Args:
        path: A sound file, or a video.
        rate: In Hz.

    Raises:
        MediaError: The file is missing, holds no sound, or sound that is empty or no numbers.
    """
    waveform, source_rate = _decode_sound(path)
    return resample(waveform.mean(axis=0, dtype=np.float32), source_rate, rate)


def read_soundtrack(path: str | Path, rate: int = 16_000) -> Float32[np.ndarray, " samples"]:
    """As `read_sound`, from the time of the video's first frame on.

    Sound that began before is cut, and before sound that begins later there is silence.

    Raises:
        MediaError: As `read_sound`.
    """
    waveform = read_sound(path, rate)
    with av.open(str(path)) as container:
        starts = [
            float((stream.start_time or 0) * stream.time_base)
            for stream in (container.streams.audio[0], *container.streams.video[:1])
        ]
    late = round((starts[0] - starts[-1]) * rate)
    return np.pad(waveform, (late, 0)) if late > 0 else waveform[-late:]


def _decode_sound(
    path: str | Path, *, rate: int | None = None, layout: str | None = None, seconds: float = float("inf")
) -> tuple[Float32[np.ndarray, "channels samples"], int]:
    """Samples by channel, and their rate; stops soon after `seconds`."""
    _check_exists(path, "sound file")
    if os.path.getsize(path) == 0:
        raise MediaError(f"{path}: the file is empty; give a sound file")
    pieces: list[np.ndarray] = []
    length = 0
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise MediaError(f"{path}: holds no sound; give a file that does")
            source_rate = rate or container.streams.audio[0].rate
            for frame in container.decode(audio=0):
                parts = [part.to_ndarray() for part in resampler.resample(frame)]
                pieces += parts
                length += sum(part.shape[1] for part in parts)
                if length > seconds * source_rate:
                    break
            pieces += [part.to_ndarray() for part in resampler.resample(None)]
    except av.FFmpegError as error:
        raise MediaError(
            f"{path}: not sound that can be read ({error.strerror}); give a WAV or MP3"
        ) from error
    if not pieces or sum(piece.shape[1] for piece in pieces) == 0:
        raise MediaError(f"{path}: the sound has no samples; give one that is not empty")
    waveform = np.concatenate(pieces, axis=1)
    if not np.isfinite(waveform).all():
        raise MediaError(f"{path}: the sound holds samples that are no numbers (NaN); save it anew")
    return waveform, source_rate


def write_sound(path: str | Path, waveform: Int16[np.ndarray, " samples"], rate: int) -> None:
    """Writes a WAV file of 16 bits, mono.

    Raises:
        MediaError: The folder cannot be written to.
    """
    with whole_or_nothing(path) as partial, wave.open(str(partial), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(waveform, "<i2").tobytes())


def read_video(path: str | Path) -> tuple[UInt8[np.ndarray, "T H W 3"], float]:
    """Frames and frames a second of a whole video.

    Raises:
        MediaError: The file is missing or holds no video.
    """
    _check_exists(path, "video")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: holds no video")
            fps = float(container.streams.video[0].average_rate)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except av.FFmpegError as error:
        raise MediaError(f"{path}: not a video that can be read ({error.strerror})") from error
    if not frames:
        raise MediaError(f"{path}: the video has no frames")
    return np.stack(frames), fps


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself.

    Attributes:
        height: As it is shown, in pixels: turned upright, its pixels square.
        width: Likewise.
        has_sound: Whether there is a stream of sound.
    """

    height: int
    width: int
    has_sound: bool


def probe_video(path: str | Path) -> VideoInfo:
    """Looks at a video's first frame.

    Raises:
        MediaError: The file is missing or holds no video that can be read.
    """
    _check_exists(path, "video")
    with _video_errors(path), av.open(str(path)) as container:
        if not container.streams.video:
            raise MediaError(f"{path}: holds no video")
        for frame in container.decode(video=0):
            height, width = _shown_size(frame, container.streams.video[0])
            return VideoInfo(height, width, bool(container.streams.audio))
    raise MediaError(f"{path}: the video has no frames")


def stream_video(
    path: str | Path, fps: int | float, size: tuple[int, int]
) -> Iterator[tuple[float, UInt8[np.ndarray, "H W 3"]]]:
    """Frames of a video at an even rate, one after another, whatever the rate of the file.

    Frame `k` is the one whose time is nearest to `k / fps`, so that a file of another or of a varying rate
    keeps its pace. Frames that the decoder calls damaged are left out.

    Args:
        path: The file.
        fps: Frames a second that are wanted.
        size: Their height and width.

    Yields:
        When the file has this frame, in seconds since its first, and the frame: RGB, turned upright.

    Raises:
        MediaError: The file is missing or holds no video, or the stream cannot be decoded any further.
    """
    _check_exists(path, "video")
    with _video_errors(path), av.open(str(path)) as container:
        if not container.streams.video:
            raise MediaError(f"{path}: holds no video")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        count, last, step = 0, None, 1 / fps
        for time, frame in _timed_frames(container, stream):
            while last and count / fps < (last[0] + time) / 2 - _EPSILON:
                yield last[0], _upright(last[1], size)
                count += 1
            step = time - last[0] if last else step
            last = time, frame
        while last and count / fps < last[0] + step / 2 - _EPSILON:
            yield last[0], _upright(last[1], size)
            count += 1


def _timed_frames(container, stream) -> Iterator[tuple[float, av.VideoFrame]]:
    """Whole frames, each later than the one before, with seconds since the first."""
    start, previous = None, -math.inf
    step = 1 / float(stream.average_rate or 25)
    for frame in container.decode(stream):
        time = previous + step if frame.time is None else frame.time
        if not math.isfinite(time):
            time = 0.0
        if frame.is_corrupt or time <= previous:
            continue
        start, previous = time if start is None else start, time
        yield time - start, frame


def _shown_size(frame: av.VideoFrame, stream) -> tuple[int, int]:
    width = round(frame.width * float(stream.sample_aspect_ratio or 1))
    return (width, frame.height) if frame.rotation % 180 else (frame.height, width)


def _upright(frame: av.VideoFrame, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """Scaled to a height and width, then turned as the file's display matrix says."""
    turns = round(frame.rotation / 90) % 4
    height, width = size[::-1] if turns % 2 else size
    array = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    return np.ascontiguousarray(np.rot90(array, turns))


@contextmanager
def _video_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{path}: not a video that can be read ({reason})") from error


def jpeg(picture: UInt8[np.ndarray, "H W 3"], quality: int = 80) -> bytes:
    """A picture as the bytes of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=quality)
    return file.getvalue()


def write_video(
    path: str | Path,
    frames: UInt8[np.ndarray, "T H W 3"],
    fps: int,
    *,
    sound: str | Path | None = None,
    lossless: bool = False,
) -> None:
    """Writes an mp4 (h264, aac) that any player plays; whole, or not at all.

    Args:
        path: Where to; an existing file is replaced.
        frames: The video. A side of odd length is doubled at its edge, for h264 has none.
        fps: Frames a second.
        sound: A file whose sound the video carries, cut to its length or followed by silence.
        lossless: Keep every pixel; `read_video` gives back the same bytes, but few players show it.

    Raises:
        MediaError: The folder cannot be written to, or the sound not be read.
    """
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], "edge")
    waveform = None
    if sound is not None:
        seconds = len(frames) / fps
        waveform, _ = _decode_sound(sound, rate=_SOUND_RATE, layout="stereo", seconds=seconds)
        samples = round(seconds * _SOUND_RATE)
        waveform = np.pad(waveform[:, :samples], [(0, 0), (0, max(samples - waveform.shape[1], 0))])
    with whole_or_nothing(path) as partial:
        options = {"movflags": "+faststart"}
        with av.open(str(partial), "w", format="mp4", container_options=options) as container:
            codec, pixels, quality = (
                ("libx264rgb", "rgb24", {"qp": "0", "preset": "ultrafast"})
                if lossless
                else ("libx264", "yuv420p", {"crf": "16"})
            )
            video = container.add_stream(codec, rate=fps, options=quality)
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = pixels
            audio = None if waveform is None else container.add_stream("aac", rate=_SOUND_RATE)
            if audio is not None:
                audio.layout, audio.bit_rate = "stereo", 192_000
            for frame in frames:
                container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(video.encode(None))
            if audio is not None:
                _encode_sound(container, audio, waveform)


def _encode_sound(container, stream, waveform: Float32[np.ndarray, "2 samples"]) -> None:
    for start in range(0, waveform.shape[1], 1024):
        piece = np.ascontiguousarray(waveform[:, start : start + 1024])
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = _SOUND_RATE, start, Fraction(1, _SOUND_RATE)
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
    """Writes one picture of frames picked evenly from a video, each with its time.

    Raises:
        MediaError: The folder cannot be written to.
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
    with whole_or_nothing(path) as partial:
        Image.fromarray(sheet).save(partial, format="PNG")


def check_writable(path: str | Path) -> None:
    """Makes the folder of an output and tries to write there, before any work is done for it.

    Raises:
        MediaError: The folder cannot be made or written to, or a folder lies where the file should.
    """
    path = Path(path)
    if path.is_dir():
        raise MediaError(f"{path}: is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error


@contextmanager
def whole_or_nothing(path: str | Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when all went well and vanishes otherwise."""
    path = Path(path)
    check_writable(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise MediaError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _check_exists(path: str | Path, kind: str) -> None:
    if not Path(path).is_file():
        raise MediaError(f"{path}: no such {kind}")
