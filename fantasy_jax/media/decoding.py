"""Decoding of sound onto the time axis of its file.

Samples lie where their timestamps say: what a file lacks, and what cannot be decoded, is silence. Rate,
channels and format may change inside of a file.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
from av.format import Flags
from av.stream import Disposition

from fantasy_jax.errors import MediaError
from fantasy_jax.media.paths import check_exists, file_url
from fantasy_jax.media.reading import first_frame_time
from fantasy_jax.typing import Float32

_TOLERANCE = 0.015
"""Seconds by which timestamps may deviate from the samples before them; less than a packet of most codecs."""
_START_TOLERANCE = 0.002
"""Likewise, of the first timestamp, which no rounding has moved."""
_ALL_HOLES, _RESTART = 3600.0, 1.0
"""Seconds; a timestamp that is further ahead than holes may last in all, or further behind than the second,
belongs to a clock that has restarted. No packet lasts longer than the second, either."""
_RATES = 1000, 1_000_000
"""Smallest and largest sampling rate, in Hz. A few bytes of a file of 1 Hz would be hours of sound."""
MAX_DAMAGE = 0.25
"""Fraction of a sound that may be damaged."""

Piece = tuple[int, Float32[np.ndarray, "channels samples"]]
"""Consecutive samples and their rate."""


@dataclass
class SoundReport:
    """What is wrong with a sound, as far as it has been decoded.

    Attributes:
        seconds: Duration.
        holes: Start and end of what the file lacks, in seconds.
        damaged: Likewise, of what cannot be decoded.
        cancelled: Seconds in which the two channels cancel each other, so that one of them is used.
        restarts: How often the clock of its timestamps restarts.
        ended: Why nothing more can be read; empty at the end of the file.
    """

    seconds: float = 0.0
    holes: list[tuple[float, float]] = field(default_factory=list)
    damaged: list[tuple[float, float]] = field(default_factory=list)
    cancelled: float = 0.0
    restarts: int = 0
    ended: str = ""

    def check(self, path: str | Path) -> None:
        """Raises a MediaError if more than `MAX_DAMAGE` of a sound is damaged."""
        damage = _total(self.damaged)
        if damage > MAX_DAMAGE * self.seconds:
            raise MediaError(
                f"{path}: {damage:.2f} of {self.seconds:.2f} s of the audio cannot be decoded, or are not "
                f"finite; at most {MAX_DAMAGE:.0%} may be damaged"
            )

    def log(self, path: str | Path) -> None:
        """Logs a warning about each thing that is wrong."""
        notes = []
        inside = [span for span in self.holes if span[0]]  # at the start it is a sound that begins later
        for spans, what in ((inside, "missing"), (self.damaged, "damaged")):
            if spans:
                notes.append(
                    f"{_total(spans):.2f} s of the audio are {what} and silent, first at {spans[0][0]:.2f} s"
                )
        if self.cancelled > min(1, self.seconds / 10):  # not for a moment of noise
            notes.append(
                f"the channels cancel each other in {self.cancelled:.1f} s of the audio; one is used there"
            )
        if self.restarts:
            notes.append(
                f"the timestamps of the audio restart {self.restarts} times; it is read without gaps there"
            )
        if self.ended:
            notes.append(f"the audio cannot be read beyond {self.seconds:.2f} s ({self.ended})")
        for note in notes:
            logging.getLogger(__name__).warning("%s: %s", path, note)


def _total(spans: list[tuple[float, float]]) -> float:
    return sum((end - start for start, end in spans), 0.0)


def placed_sound(path: str | Path, report: SoundReport) -> Iterator[Piece]:
    """Yields the sound of a file without gaps, from the time of its first video frame on.

    Files without video begin with their first sample.

    Args:
        path: The file.
        report: Filled in.

    Yields:
        One or two channels; more are mixed to stereo by the coefficients of ITU-R BS.775, without the LFE
        channel.

    Raises:
        MediaError: The file is missing or has no audio, or its audio is empty or of an unusual rate.
    """
    with _open_audio(path) as container:
        stream = container.streams.audio[0]
        lasts = container.duration / av.time_base if container.duration else math.inf
        place = _Placement(_time_zero(path, container), min(lasts, _ALL_HOLES), report)
        convert, stated = _Converter(), _states_times(container)
        for part in _decode(container, stream, report):
            decoded = isinstance(part, av.AudioFrame)
            rate = _rate(part, stream) if decoded else stream.rate
            if (decoded or rate) and not _RATES[0] <= rate <= _RATES[1]:
                raise MediaError(
                    f"{path}: has {rate} samples a second; {_RATES[0]} to {_RATES[1]} can be read"
                )
            if decoded:
                time = float(part.pts * part.time_base) if stated and part.pts is not None else None
                yield from place(rate, convert(part), time)
            else:
                yield from place.damage(rate, part)
    if not report.seconds:
        raise MediaError(f"{path}: the audio has no samples; use a file that is not empty")


@contextmanager
def _open_audio(path: str | Path) -> Iterator[av.container.InputContainer]:
    """Opens a file that has an audio stream; decoding errors become a MediaError."""
    check_exists(path, "audio file")
    if os.path.getsize(path) == 0:
        raise MediaError(f"{path}: the file is empty; use an audio file")
    try:
        with av.open(file_url(path), metadata_errors="replace") as container:
            if not container.streams.audio:
                raise MediaError(f"{path}: has no audio; use a file that has an audio stream")
            if not container.streams.audio[0].codec_context:
                raise MediaError(f"{path}: its audio has an unknown codec; use a WAV or MP3 file")
            yield container
    except av.FFmpegError as error:
        raise MediaError(f"{path}: not readable audio ({error.strerror}); use a WAV or MP3 file") from error


def _time_zero(path: str | Path, container: av.container.InputContainer) -> float | None:
    """The time at which a sound begins; None: that of its first sample."""
    if any(not x.disposition & Disposition.attached_pic for x in container.streams.video):
        return first_frame_time(path)
    stream = container.streams.audio[0]
    return None if stream.start_time is None else float(stream.start_time * stream.time_base)


def _states_times(container: av.container.InputContainer) -> bool:
    """Whether timestamps are the file's: FFmpeg makes up those of raw streams, such as MP3, from one rate."""
    flags = Flags(container.format.flags)
    return Flags.ts_discont in flags or Flags.generic_index not in flags


def _decode(
    container: av.container.InputContainer, stream: av.AudioStream, report: SoundReport
) -> Iterator[av.AudioFrame | float]:
    """Yields frames, and the duration of each packet that cannot be decoded, in seconds."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except IndexError:  # PyAV's, at a stream that begins inside of the file
            packets = container.demux(stream)
            continue
        except av.FFmpegError as error:
            report.ended = error.strerror
            return
        if packet is None:
            return
        try:
            yield from packet.decode()
        except av.FFmpegError:
            yield float((packet.duration or 0) * stream.time_base)


def _rate(frame: av.AudioFrame, stream: av.AudioStream) -> int:
    """A frame's sampling rate; FFmpeg's MPEG decoders give a frame that of the one before it."""
    context = stream.codec_context
    return context.sample_rate if context.name.startswith(("mp1", "mp2", "mp3")) else frame.sample_rate


class _Converter:
    """Conversion of frames, whose format may change, to float samples of one or two channels."""

    def __init__(self):
        self._resampler, self._format = None, None

    def __call__(self, frame: av.AudioFrame) -> Float32[np.ndarray, "channels samples"]:
        """The samples of a frame."""
        channels = frame.layout.nb_channels
        if channels <= 2:
            return self._converted(frame, "fltp", None)
        try:
            return self._converted(frame, "fltp", "stereo")
        except (av.FFmpegError, ValueError):  # of microphones, rather than loudspeakers
            packed = self._converted(frame, "flt", None)
            return packed.reshape(-1, channels).T.mean(axis=0, keepdims=True)

    def _converted(
        self, frame: av.AudioFrame, sample_format: str, layout: str | None
    ) -> Float32[np.ndarray, "rows columns"]:
        key = frame.format.name, frame.layout.name, frame.sample_rate, sample_format
        if key != self._format:
            self._resampler, self._format = av.AudioResampler(format=sample_format, layout=layout), key
        return np.concatenate([part.to_ndarray() for part in self._resampler.resample(frame)], axis=1)


class _Placement:
    """Consecutive pieces of sound, from frames and their times."""

    def __init__(self, zero: float | None, longest_hole: float, report: SoundReport):
        """Starts at no position.

        Args:
            zero: Time at which the sound begins; None: that of the first frame.
            longest_hole: Seconds that holes may last in all.
            report: Filled in; its duration is the position.
        """
        self._zero, self._longest, self._report, self._channels = zero, longest_hole, report, 1

    def __call__(
        self, rate: int, samples: Float32[np.ndarray, "channels samples"], time: float | None
    ) -> Iterator[Piece]:
        """Yields a frame's samples after silence where the file has a hole, or what of them is new."""
        self._channels = len(samples)
        position = self._report.seconds
        if time is not None:
            self._zero = time - position if self._zero is None else self._zero
            late = time - self._zero - position
            tolerance = _TOLERANCE if position else _START_TOLERANCE
            if abs(late) > max(self._longest, _RESTART) or (position and late < -_RESTART):
                self._report.restarts += 1
                self._zero += late
            elif late > tolerance:
                self._longest -= late
                yield from self._silence(rate, late, self._report.holes)
            elif late < -tolerance:
                samples = samples[:, round(-late * rate) :]
        if not np.isfinite(samples).all():
            yield from self.damage(rate, samples.shape[1] / rate)
        elif samples.size:
            self._report.seconds += samples.shape[1] / rate
            yield rate, samples

    def damage(self, rate: int, seconds: float) -> Iterator[Piece]:
        """Yields silence in place of samples that cannot be decoded."""
        if rate and 0 < seconds <= _RESTART:  # otherwise the next timestamp tells
            yield from self._silence(rate, seconds, self._report.damaged)

    def _silence(self, rate: int, seconds: float, spans: list[tuple[float, float]]) -> Iterator[Piece]:
        start, left = self._report.seconds, round(seconds * rate)
        self._report.seconds += left / rate
        spans.append((start, self._report.seconds))
        while left > 0:
            yield rate, np.zeros((self._channels, min(left, rate)), np.float32)
            left -= rate
