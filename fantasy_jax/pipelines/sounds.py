"""The sounds of a clip: what the model is conditioned on, and what the written video plays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from fantasy_jax import media
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.media import AudioPart
from fantasy_jax.models.wav2vec2 import Wav2Vec2Model
from fantasy_jax.pipelines.base import AudioInput, as_waveform
from fantasy_jax.system import encoders
from fantasy_jax.typing import Array, Float
from fantasy_jax.video import FEATURE_WINDOW, SAMPLE_RATE

MIX_RATE = 44_100
"""Sampling rate of a mix of several sounds, in Hz; that of the audio in a written video."""


@dataclass(frozen=True)
class Sounds:
    """The sounds of a clip.

    Attributes:
        waveforms: What conditions the model, 16 kHz, in [-1, 1]: one for each person who speaks.
        num_samples: Samples of 16 kHz of the longest sound that is played.
        played: What the written video plays: a file, a part of one, or a waveform.
        rate: Sampling rate of that waveform, in Hz.
    """

    waveforms: tuple[Float[np.ndarray, " _"], ...]
    num_samples: int
    played: AudioInput | AudioPart
    rate: int = SAMPLE_RATE

    @property
    def seconds(self) -> float:
        """Duration of what is played."""
        return self.num_samples / SAMPLE_RATE

    def encode(self, encoder: Wav2Vec2Model, num_samples: int) -> Float[Array, "1 P A C"]:
        """Speech features of each waveform, all cut, or padded with silence, to one length.

        Args:
            encoder: The speech encoder.
            num_samples: The length.
        """
        encoded = [
            encoders.encode_audio(encoder, waveform[:num_samples], num_samples=num_samples)
            for waveform in self.waveforms
        ]
        return jnp.stack(encoded, axis=1)


def read_sounds(
    audio: AudioInput | Sequence[AudioInput],
    voice: AudioInput | Sequence[AudioInput] | None = None,
    sampling_rate: int = SAMPLE_RATE,
    max_seconds: float | None = None,
    start: float = 0.0,
) -> Sounds:
    """Reads the sounds of a clip.

    Several sounds are played together. Sounds that end before the longest one are followed by silence, and so
    is a voice that ends before the sounds.

    Args:
        audio: What is played: a path, a waveform in [-1, 1], or several of them, one for each person.
        voice: The voice alone, of each sound: conditions the model in place of the sound.
        sampling_rate: Samples per second of waveforms.
        max_seconds: Seconds that are used; None: all.
        start: Seconds that are left out before them.

    Raises:
        ConfigError: There is no sound, or the numbers of sounds and voices differ.
        MediaError: A sound cannot be read, is no audio, is empty or shorter than a window of the speech
            encoder; or all are shorter than `max_seconds`.
    """
    sounds, voices = _listed(audio), [] if voice is None else _listed(voice)
    if not sounds:
        raise ConfigError("there is no sound; give --audio at least once")
    if voice is not None and len(voices) != len(sounds):
        raise ConfigError(
            f"--voice is given {len(voices)} times, and --audio {len(sounds)} times; give a voice for each "
            "sound, or none"
        )
    seconds = math.inf if max_seconds is None else max_seconds
    waveforms, conditions = (
        tuple(as_waveform(x, sampling_rate, start=start, seconds=seconds) for x in xs)
        for xs in (sounds, voices)
    )
    for given, waveform in zip((*sounds, *voices), (*waveforms, *conditions), strict=False):
        if waveform.size < FEATURE_WINDOW:
            name = given if isinstance(given, str | Path) else "audio"
            shortest = FEATURE_WINDOW / SAMPLE_RATE
            raise MediaError(
                f"{name}: lasts {waveform.size / SAMPLE_RATE:g} s; at least {shortest:g} s are needed"
            )
    conditions = conditions or waveforms
    num_samples = max(waveform.size for waveform in waveforms)
    if max_seconds is not None:
        if num_samples < round(max_seconds * SAMPLE_RATE):
            name = sounds[0] if isinstance(sounds[0], str | Path) else "audio"
            raise MediaError(
                f"{name}: lasts {num_samples / SAMPLE_RATE:.2f} s{f' from {start:g} s on' if start else ''}, "
                f"less than the {max_seconds:g} s of --seconds or sample.max_seconds; ask for less, or leave "
                "it out to use all"
            )
        num_samples = round(max_seconds * SAMPLE_RATE)
    if len(sounds) > 1:
        mixed = mix(sounds, sampling_rate, start=start, seconds=seconds)
        return Sounds(conditions, num_samples, mixed, MIX_RATE)
    if not isinstance(sounds[0], str | Path):
        return Sounds(conditions, num_samples, waveforms[0])
    return Sounds(conditions, num_samples, media.audio_part(sounds[0], start))


def mix(
    sounds: Sequence[AudioInput],
    sampling_rate: int = SAMPLE_RATE,
    *,
    start: float = 0.0,
    seconds: float = math.inf,
) -> Float[np.ndarray, " samples"]:
    """The sum of sounds, which start together, at `MIX_RATE`; scaled down where it exceeds 1."""
    waveforms = [
        as_waveform(sound, sampling_rate, MIX_RATE, start=start, seconds=seconds) for sound in sounds
    ]
    mixed = np.zeros(max(waveform.size for waveform in waveforms), np.float32)
    for waveform in waveforms:
        mixed[: waveform.size] += waveform
    return mixed / max(np.abs(mixed).max(), 1.0)


def _listed(audio: AudioInput | Sequence[AudioInput]) -> list[AudioInput]:
    return list(audio) if isinstance(audio, list | tuple) else [audio]
