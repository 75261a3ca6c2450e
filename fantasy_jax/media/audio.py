"""Reading of audio, piece by piece, and writing of WAV files."""

import itertools
import math
import os
import wave
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import soxr

from fantasy_jax.errors import MediaError
from fantasy_jax.files import atomic_write
from fantasy_jax.media.paths import check_exists, file_url
from fantasy_jax.typing import Float, Float32, Int16
from fantasy_jax.video import SAMPLE_RATE


def read_audio(
    path: str | Path, rate: int = SAMPLE_RATE, *, seconds: float = math.inf
) -> Float32[np.ndarray, " samples"]:
    """Reads the audio of an audio or video file as mono, in [-1, 1].

    Channels are averaged and resampled by soxr at high quality, as `librosa.load` does, while the file is
    decoded: memory holds little more than the result.

    Args:
        path: An audio or video file.
        rate: Sampling rate of the result, in Hz.
        seconds: What is needed of it; reading stops soon after.

    Raises:
        MediaError: The file is missing or has no audio, or its audio is empty or not finite.
    """
    with _open_audio(path) as container:
        source_rate = container.streams.audio[0].rate
    mono = (piece.mean(axis=0, dtype=np.float32) for piece in stream_audio(path))
    samples = bytearray()  # it grows in place
    for piece in _resample_pieces(_take(mono, seconds * source_rate), source_rate, rate):
        samples += piece.tobytes()
    return np.frombuffer(samples, np.float32)


def audio_seconds(path: str | Path) -> float:
    """Duration of the audio of an audio or video file, which is decoded, but not kept in memory.

    Raises:
        MediaError: As `read_audio`.
    """
    with _open_audio(path) as container:
        rate = container.streams.audio[0].rate
    return sum(piece.shape[1] for piece in stream_audio(path)) / rate


def read_audio_track(path: str | Path, rate: int = SAMPLE_RATE) -> Float32[np.ndarray, " samples"]:
    """Reads a video's audio like `read_audio`, aligned with the time of the first video frame.

    Audio before that time is cut off; if the audio starts later, zeros come first.

    Raises:
        MediaError: As `read_audio`.
    """
    waveform = read_audio(path, rate)
    with av.open(file_url(path)) as container:
        starts = [
            float((stream.start_time or 0) * stream.time_base)
            for stream in (container.streams.audio[0], *container.streams.video[:1])
        ]
    late = round((starts[0] - starts[-1]) * rate)
    return np.pad(waveform, (late, 0)) if late > 0 else waveform[-late:]


def stream_audio(
    path: str | Path, *, rate: int | None = None, layout: str | None = None
) -> Iterator[Float32[np.ndarray, "channels samples"]]:
    """Yields the audio of an audio or video file, samples by channel, piece by piece.

    Args:
        path: The file.
        rate: Sampling rate, in Hz; None: the file's.
        layout: Layout of the channels, by FFmpeg's name; None: the file's.

    Raises:
        MediaError: The file is missing or has no audio, or its audio is empty or not finite.
    """
    resampler, empty = av.AudioResampler(format="fltp", layout=layout, rate=rate), True
    with _open_audio(path) as container:
        for frame in itertools.chain(container.decode(audio=0), [None]):
            for part in resampler.resample(frame):
                piece = part.to_ndarray()
                if not np.isfinite(piece).all():
                    raise MediaError(f"{path}: the audio contains samples that are not finite; save it again")
                empty = empty and not piece.size
                yield piece
    if empty:
        raise MediaError(f"{path}: the audio has no samples; use a file that is not empty")


@contextmanager
def _open_audio(path: str | Path) -> Iterator[av.container.InputContainer]:
    """Opens a file that has an audio stream; decoding errors become a MediaError."""
    check_exists(path, "audio file")
    if os.path.getsize(path) == 0:
        raise MediaError(f"{path}: the file is empty; use an audio file")
    try:
        with av.open(file_url(path)) as container:
            if not container.streams.audio:
                raise MediaError(f"{path}: has no audio; use a file that has an audio stream")
            yield container
    except av.FFmpegError as error:
        raise MediaError(f"{path}: not readable audio ({error.strerror}); use a WAV or MP3 file") from error


def _take(pieces: Iterable[Float32[np.ndarray, " n"]], samples: float) -> Iterator[Float32[np.ndarray, " n"]]:
    """The first pieces, until they have more than this number of samples."""
    for piece in pieces:
        yield piece
        samples -= piece.size
        if samples < 0:
            return


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


def _resample_pieces(
    pieces: Iterable[Float32[np.ndarray, " n"]], rate: int, target: int
) -> Iterator[Float32[np.ndarray, " m"]]:
    """`resample` of consecutive pieces; together the results have the same bits."""
    if rate == target:
        yield from pieces
        return
    stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
    taken = given = 0
    for piece in pieces:
        taken += piece.size
        resampled = stream.resample_chunk(piece)
        given += resampled.size
        yield resampled
    left = math.ceil(taken * target / rate) - given
    resampled = stream.resample_chunk(np.zeros(0, np.float32), last=True)[:left]
    yield np.pad(resampled, (0, left - resampled.size))


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
