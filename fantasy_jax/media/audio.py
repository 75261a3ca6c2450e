"""Reading of audio, piece by piece, and writing of WAV files."""

import itertools
import math
import wave
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from fantasy_jax.errors import MediaError
from fantasy_jax.files import atomic_write
from fantasy_jax.media.decoding import Piece, SoundReport, placed_sound
from fantasy_jax.typing import Float, Float32, Int16
from fantasy_jax.video import SAMPLE_RATE

_CANCELLED = 0.1
"""Power of the mean of two channels over their own, below which they cancel; 0.5 if they are independent."""
_BLOCK = 0.25
"""Seconds in which that is measured."""


@dataclass(frozen=True)
class AudioPart:
    """A part of a file's audio.

    Attributes:
        path: The file.
        start: Where the part begins, in seconds.
        seconds: Its duration; the file may end before.
    """

    path: str | Path
    start: float = 0.0
    seconds: float = math.inf


def audio_part(path: str | Path, start: float = 0.0, seconds: float = math.inf) -> str | Path | AudioPart:
    """A part of a file's audio; the file itself if nothing is left out."""
    return AudioPart(path, start, seconds) if start or seconds < math.inf else path


@dataclass(frozen=True)
class AudioTrack:
    """The audio of a file.

    Attributes:
        waveform: Mono, in [-1, 1].
        missing: Start and end, in seconds, of what the file lacks or what cannot be decoded: silence.
    """

    waveform: Float32[np.ndarray, " samples"]
    missing: Float[np.ndarray, "N 2"]


def read_audio(
    path: str | Path, rate: int = SAMPLE_RATE, *, start: float = 0.0, seconds: float = math.inf
) -> Float32[np.ndarray, " samples"]:
    """Reads the audio of an audio or video file as mono, in [-1, 1].

    Audio lies where its timestamps say, beside the frames of a video (`read_audio_track`). Channels are
    averaged and resampled by soxr at high quality, as `librosa.load` does, while the file is decoded: memory
    holds little more than the result.

    Args:
        path: An audio or video file.
        rate: Sampling rate of the result, in Hz.
        start: Seconds that are left out.
        seconds: What is needed of it; reading stops soon after.

    Raises:
        MediaError: The file is missing or has no audio, its audio is empty or ends before `start`, or too
            much of it cannot be decoded.
    """
    return read_audio_track(path, rate, start=start, seconds=seconds).waveform


def read_audio_track(
    path: str | Path, rate: int = SAMPLE_RATE, *, start: float = 0.0, seconds: float = math.inf
) -> AudioTrack:
    """Reads the audio of a file like `read_audio`, with the places where it is missing.

    Time zero is that of the first video frame; without video, that of the first sample. What the file lacks
    and packets that cannot be decoded are silent, which is logged. More channels than two are mixed to stereo
    by the coefficients of ITU-R BS.775. Where two channels cancel each other, one of them is used.

    Args:
        path: An audio or video file.
        rate: Sampling rate of the waveform, in Hz.
        start: Seconds that are left out.
        seconds: What is needed of it.

    Raises:
        MediaError: As `read_audio`.
    """
    report = SoundReport()
    pieces = _mono(_from(placed_sound(path, report), start), report)
    samples = bytearray()  # it grows in place
    for piece in _at_rate(_take(pieces, seconds), rate):
        samples += piece.tobytes()
    report.check(path)
    if not samples:
        raise _beyond(path, report, start)
    report.log(path)
    missing = np.array([*report.holes, *report.damaged]).reshape(-1, 2) - start
    return AudioTrack(np.frombuffer(samples, np.float32), missing)


def audio_seconds(part: str | Path | AudioPart) -> float:
    """Duration of the audio of a file, or of a part of one, which is decoded, but not kept in memory.

    Raises:
        MediaError: As `read_audio`.
    """
    part = part if isinstance(part, AudioPart) else AudioPart(part)
    samples: Counter[int] = Counter()
    for rate, piece in _take(_from(placed_sound(part.path, SoundReport()), part.start), part.seconds):
        samples[rate] += piece.shape[1]
    return min(sum((count / rate for rate, count in samples.items()), 0.0), part.seconds)


def stream_audio(part: str | Path | AudioPart, rate: int) -> Iterator[Float32[np.ndarray, "2 samples"]]:
    """Yields the audio of an audio or video file as stereo, piece by piece.

    Args:
        part: A file, or a part of one.
        rate: Sampling rate, in Hz.

    Raises:
        MediaError: As `read_audio`.
    """
    part = part if isinstance(part, AudioPart) else AudioPart(part)
    report, left = SoundReport(), part.seconds * rate
    pieces = _take(_from(placed_sound(part.path, report), part.start), part.seconds)
    stereo = ((given, np.broadcast_to(piece, (2, piece.shape[1]))) for given, piece in pieces)
    for piece in _at_rate(stereo, rate):
        yield piece[:, : round(min(left, piece.shape[1]))]
        left -= piece.shape[1]
        if left <= 0:
            break
    report.check(part.path)
    if report.seconds <= part.start:
        raise _beyond(part.path, report, part.start)


def _beyond(path: str | Path, report: SoundReport, start: float) -> MediaError:
    return MediaError(f"{path}: lasts {report.seconds:.2f} s; nothing is left from {start:g} s on")


def _from(pieces: Iterable[Piece], start: float) -> Iterator[Piece]:
    """Leaves out the first seconds."""
    for rate, piece in pieces:
        skipped = min(round(start * rate), piece.shape[1])
        start -= skipped / rate
        if skipped < piece.shape[1]:
            yield rate, piece[:, skipped:]


def _take(pieces: Iterable[Piece], seconds: float) -> Iterator[Piece]:
    """The first pieces, until they last longer than this."""
    for rate, piece in pieces:
        yield rate, piece
        seconds -= piece.shape[1] / rate
        if seconds < 0:
            return


def _mono(pieces: Iterable[Piece], report: SoundReport) -> Iterator[Piece]:
    """Averages channels; in blocks in which two cancel each other, one of them is taken."""
    mix = _Mix(report)
    kind: tuple[int, int] | None = None
    waiting: list[np.ndarray] = []
    for rate, piece in itertools.chain(pieces, [(0, np.zeros((0, 0), np.float32))]):
        if waiting and ((rate, len(piece)) != kind or sum(x.shape[1] for x in waiting) >= _BLOCK * rate):
            yield kind[0], mix(kind[0], np.concatenate(waiting, axis=1))[None]
            waiting = []
        kind = rate, len(piece)
        if len(piece) == 1:
            yield rate, piece
        elif piece.size:
            waiting.append(piece)


class _Mix:
    """The mean of two channels or, where it cancels what they have in common, one of them."""

    def __init__(self, report: SoundReport):
        self._report, self._channel, self._was_one = report, None, None

    def __call__(self, rate: int, block: Float32[np.ndarray, "2 samples"]) -> Float32[np.ndarray, " samples"]:
        """Mixes a block."""
        mean = block.mean(axis=0, dtype=np.float32)
        power = np.square(block, dtype=np.float64).mean(axis=1)
        one = bool(np.square(mean, dtype=np.float64).mean() < _CANCELLED * power.mean())
        if one:
            self._report.cancelled += mean.size / rate
            if self._channel is None or power[self._channel] < power.max() / 4:
                self._channel = int(power.argmax())
        before, self._was_one = self._was_one, one
        if before is None or before == one:
            return block[self._channel] if one else mean
        faded = np.linspace(float(before), float(one), rate // 100, dtype=np.float32)[: mean.size]
        weight = np.pad(faded, (0, mean.size - faded.size), mode="edge")
        return mean + weight * (block[self._channel] - mean)


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


def _at_rate(pieces: Iterable[Piece], target: int) -> Iterator[Float32[np.ndarray, "*channels m"]]:
    """`resample` of consecutive pieces, as one as long as their rate stays; mono has no axis of channels."""
    for rate, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        yield from _resample_pieces((piece for _, piece in group), rate, target)


def _resample_pieces(
    pieces: Iterable[Float32[np.ndarray, "channels n"]], rate: int, target: int
) -> Iterator[Float32[np.ndarray, "*channels m"]]:
    """`resample` of consecutive pieces of one rate; together the results have the same bits."""
    stream, taken, given = None, 0, 0
    for piece in pieces:
        channels = len(piece)
        samples = piece[0] if channels == 1 else piece.T
        if rate != target:
            stream = stream or soxr.ResampleStream(rate, target, channels, dtype="float32", quality="HQ")
            taken += len(samples)
            samples = stream.resample_chunk(np.ascontiguousarray(samples))
            given += len(samples)
        yield samples.T
    if stream is not None:
        left = math.ceil(taken * target / rate) - given
        samples = stream.resample_chunk(np.zeros_like(samples[:0]), last=True)[:left].T
        yield np.pad(samples, [(0, 0)] * (samples.ndim - 1) + [(0, left - samples.shape[-1])])


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
