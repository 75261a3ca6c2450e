"""Synthetic speech with known mouth movements: syllables of vowels and consonants in a random voice.

A source-filter synthesiser: harmonics of a gliding pitch under four formants, and bands of noise for
fricatives. Articulation is drawn first, and both the waveform and the mouth follow from it: a wider jaw
raises the first formant and the level, closed lips mute the sound. As in real speech, the mouth can therefore
be inferred from level and formants.
"""

from dataclasses import dataclass

import numpy as np

from fantasy_jax.typing import Float
from fantasy_jax.video import SAMPLE_RATE, audio_samples

_CONTROL_RATE = 200
"""Rate of the articulation tracks, in Hz."""

# Jaw opening, lip rounding, three formants in Hz (means of adult speakers, Peterson and Barney 1952).
_VOWELS = {
    "a": (1.00, 0.0, 730, 1250, 2500),
    "ae": (0.80, 0.0, 660, 1720, 2410),
    "e": (0.55, 0.0, 530, 1840, 2480),
    "schwa": (0.45, 0.1, 500, 1400, 2450),
    "o": (0.55, 0.8, 500, 900, 2410),
    "i": (0.35, 0.0, 290, 2250, 2950),
    "u": (0.28, 1.0, 320, 850, 2250),
}
# Jaw opening (None: the vowel's), voicing, three formants, level of noise, its centre and width in Hz.
_CONSONANTS = {
    "m": (0.00, 0.22, 260, 1000, 2200, 0.00, 3000, 2000),
    "b": (0.00, 0.03, 250, 900, 2200, 0.01, 1500, 1500),
    "f": (0.08, 0.00, 400, 1200, 2400, 0.12, 4500, 2500),
    "s": (0.12, 0.00, 350, 1700, 2600, 0.20, 5600, 1200),
    "sh": (0.15, 0.00, 350, 1700, 2400, 0.20, 3000, 900),
    "d": (0.15, 0.10, 300, 1700, 2600, 0.04, 4000, 2000),
    "l": (0.30, 0.45, 380, 1100, 2600, 0.00, 3000, 2000),
    "g": (0.30, 0.08, 300, 1500, 2200, 0.04, 2000, 1000),
    "": (None, 0.80, 500, 1500, 2500, 0.00, 3000, 2000),
}
_VOWEL_PROBABILITIES = np.array([0.28, 0.14, 0.14, 0.12, 0.12, 0.12, 0.08])
_GAIN_BANDS = (250, 1000, 2500, 5000)
"""Frequencies in Hz at which spectral gains are given."""
_FORMANT_WIDTHS = np.array([90.0, 120.0, 170.0, 250.0])


@dataclass(frozen=True)
class Voice:
    """A speaker and the recording conditions.

    Attributes:
        pitch: Mean fundamental frequency, in Hz.
        melody: Range of the pitch glide, as a fraction of the pitch.
        tract: Scale of all formants; above 1 for a shorter vocal tract.
        breath: Level of noise under the vowels, relative to theirs.
        rate: Syllables per second.
        level: Root mean square of stressed vowels; full scale is 1.
        noise: Root mean square of the room noise.
        sharpness: Exponent of the formant resonances.
        whisper: Fraction of the vowels' amplitude that is noise instead of voice.
        syllable_gain_std: Standard deviation, in dB, of random spectral gains per syllable, which make the
            level follow the mouth independently of timbre.
        pauses: Probability of a pause in place of a syllable.
        tilt: Spectral tilt of the microphone above 500 Hz, in dB per octave.
        room_gain: Spectral gain of the room in dB at `_GAIN_BANDS`, `[4]`.
    """

    pitch: float
    melody: float
    tract: float
    breath: float
    rate: float
    level: float
    noise: float
    sharpness: float
    whisper: float
    syllable_gain_std: float
    pauses: float
    tilt: float
    room_gain: np.ndarray


@dataclass(frozen=True)
class Speech:
    """An utterance and the mouth movements that produce it.

    Attributes:
        waveform: `[samples]`, 16 kHz.
        opening: Opening of the jaw in each video frame, `[T]`, from 0 (lips closed) to 1.
        rounding: Rounding of the lips in each video frame, `[T]`, from 0 to 1.
    """

    waveform: np.ndarray
    opening: np.ndarray
    rounding: np.ndarray


def draw_voice(rng: np.random.Generator) -> Voice:
    """Draws a voice; higher pitch goes with shorter vocal tracts."""
    height = rng.uniform()
    return Voice(
        pitch=90 * 2 ** (1.35 * height + rng.normal() * 0.12),
        melody=rng.uniform(0.04, 0.18),
        tract=0.94 + 0.24 * height + rng.normal() * 0.03,
        breath=rng.uniform(0.01, 0.08),
        rate=rng.uniform(2.8, 4.6),
        level=0.1 * 10 ** rng.uniform(-0.35, 0.35),
        noise=10 ** rng.uniform(-5.0, -2.6),
        sharpness=rng.uniform(0.8, 2.5),
        whisper=max(rng.uniform(-1.0, 0.7), 0.0),
        syllable_gain_std=rng.uniform(0.0, 12.0),
        pauses=rng.uniform(0.05, 0.35),
        tilt=rng.uniform(-7.0, 1.0),
        room_gain=rng.normal(0, 4, len(_GAIN_BANDS)),
    )


def speak(rng: np.random.Generator, voice: Voice, *, num_frames: int, fps: int | float) -> Speech:
    """Synthesises random syllables and pauses.

    Args:
        rng: Random generator.
        voice: The speaker.
        num_frames: Duration in video frames T.
        fps: Video frames per second.
    """
    seconds = num_frames / fps
    times = np.arange(int(np.ceil(seconds * _CONTROL_RATE)) + 1) / _CONTROL_RATE
    tracks = _articulate(rng, voice, times)
    while tracks[:, 0].std() < 0.12:  # redraw clips with hardly any speech
        tracks = _articulate(rng, voice, times)
    opening, rounding = tracks[:, 0], tracks[:, 1]
    samples = np.arange(audio_samples(num_frames, fps)) / SAMPLE_RATE
    waveform = _voiced(rng, voice, times, tracks, samples) + _noises(rng, voice, times, tracks, samples)
    waveform = voice.level * _record(voice, waveform) + voice.noise * rng.normal(size=waveform.size)
    frames = (np.arange(num_frames) + 0.5) / fps  # the middle of each frame's exposure
    return Speech(
        np.clip(waveform, -1, 1).astype(np.float32),
        np.interp(frames, times, opening).astype(np.float32),
        np.interp(frames, times, rounding).astype(np.float32),
    )


def _record(voice: Voice, wave: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """Applies the frequency response of microphone and room, keeping the level."""
    frequency = np.maximum(np.fft.rfftfreq(wave.size, 1 / SAMPLE_RATE), 50)
    gain = voice.tilt * np.maximum(np.log2(frequency / 500), 0)
    gain += np.interp(np.log2(frequency), np.log2(_GAIN_BANDS), voice.room_gain)
    recorded = np.fft.irfft(np.fft.rfft(wave) * 10 ** (gain / 20), wave.size)
    return recorded * np.sqrt(np.square(wave).mean() / (np.square(recorded).mean() + 1e-12))


def _articulate(
    rng: np.random.Generator, voice: Voice, times: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n 13"]:
    """Tracks of opening, rounding, voicing, three formants, noise (level, centre, width), four gains."""
    targets = np.zeros((times.size, 13))
    start = -rng.uniform(0, 1 / voice.rate)  # start at a random point of a syllable
    rest = np.array([0.0, 0.0, 0.0, 450, 1450, 2450, 0.0, 3000, 2000, *[0.0] * len(_GAIN_BANDS)])
    while start < times[-1]:
        length = rng.uniform(0.75, 1.3) / voice.rate
        if rng.uniform() < voice.pauses:
            targets[times >= start] = rest
            start += length * rng.uniform(0.7, 2.0)
            continue
        consonant = _CONSONANTS[rng.choice(list(_CONSONANTS))]
        opening, rounding, *formants = _VOWELS[rng.choice(list(_VOWELS), p=_VOWEL_PROBABILITIES)]
        opening *= rng.uniform(0.75, 1.0)
        jaw, voicing, *others, noise, centre, width = consonant
        jaw = opening if jaw is None else min(jaw, opening)
        turn = start + length * rng.uniform(0.3, 0.42)
        gains = rng.normal(0, voice.syllable_gain_std, len(_GAIN_BANDS))
        noises = (noise, centre, width)
        targets[times >= start] = [jaw, rounding, voicing * 0.6, *others, *noises, *gains]
        amplitude = (0.22 + 0.78 * opening) * 10 ** rng.uniform(-0.15, 0.1)  # random stress
        voicing = amplitude * (1 - voice.whisper)
        noises = (max(voice.breath, voice.whisper * amplitude), 3000, 4000)
        targets[times >= turn] = [opening, rounding, voicing, *formants, *noises, *gains]
        start += length
    # Lips and jaw move slowly, the source changes quickly.
    slow, quick = _smooth(targets, 0.028), _smooth(targets, 0.012)
    return np.concatenate([slow[:, :2], quick[:, 2:3], slow[:, 3:6], quick[:, 6:]], axis=1)


def _smooth(tracks: Float[np.ndarray, "n C"], sigma: float) -> Float[np.ndarray, "n C"]:
    """Smooths over time with a Gaussian of `sigma` seconds."""
    reach = int(4 * sigma * _CONTROL_RATE)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (sigma * _CONTROL_RATE)) ** 2)
    padded = np.pad(tracks, ((reach, reach), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.size, axis=0)
    return windows @ (kernel / kernel.sum())


def _voiced(
    rng: np.random.Generator,
    voice: Voice,
    times: Float[np.ndarray, " n"],
    tracks: Float[np.ndarray, "n 13"],
    samples: Float[np.ndarray, " samples"],
) -> Float[np.ndarray, " samples"]:
    """Sum of the harmonics of the pitch, weighted by the formants over time."""
    glide = np.sin(2 * np.pi * (rng.uniform(0.6, 1.8) * times + rng.uniform()))
    pitch = voice.pitch * (1 + voice.melody * glide + 0.01 * rng.normal(size=times.size))
    formants = np.concatenate([tracks[:, 3:6], np.full((times.size, 1), 3500.0)], axis=1) * voice.tract
    count = int(5500 / voice.pitch)
    harmonics = pitch[:, None] * np.arange(1, count + 1)
    envelope = _resonance(harmonics, formants) ** voice.sharpness * harmonics**-0.8
    octaves = np.log2(harmonics)[..., None] - np.log2(_GAIN_BANDS)
    near = np.maximum(1 - np.abs(octaves) / 1.3, 0)
    envelope *= 10 ** ((near * tracks[:, None, 9:]).sum(axis=-1) / 20)
    # The level follows the articulation alone: formants would otherwise make narrow vowels louder.
    envelope *= (tracks[:, 2] / np.sqrt((envelope**2).sum(axis=1) / 2 + 1e-9))[:, None]
    phase = 2 * np.pi * np.cumsum(np.interp(samples, times, pitch)) / SAMPLE_RATE
    wave = np.zeros(samples.size)
    for k in range(count):
        wave += np.interp(samples, times, envelope[:, k]) * np.sin((k + 1) * phase + rng.uniform(0, 6.28))
    return wave


def _resonance(
    frequency: Float[np.ndarray, "n H"], formants: Float[np.ndarray, "n 4"]
) -> Float[np.ndarray, "n H"]:
    """Sum of the gains of four resonators."""
    distance = (frequency[..., None] - formants[:, None]) / _FORMANT_WIDTHS
    return (np.array([1.0, 0.6, 0.35, 0.2]) / np.sqrt(1 + distance**2)).sum(axis=-1)


def _noises(
    rng: np.random.Generator,
    voice: Voice,
    times: Float[np.ndarray, " n"],
    tracks: Float[np.ndarray, "n 13"],
    samples: Float[np.ndarray, " samples"],
) -> Float[np.ndarray, " samples"]:
    """Noise in three bands, mixed over time according to the fricatives."""
    count = samples.size
    frequency = np.fft.rfftfreq(count, 1 / SAMPLE_RATE)
    wave = np.zeros(count)
    centres = np.array([2000.0, 3200.0, 5500.0])
    nearness = np.exp(-0.5 * ((tracks[:, 7:8] - centres) / np.maximum(tracks[:, 8:9], 900)) ** 2)
    nearness /= nearness.sum(axis=1, keepdims=True) + 1e-9
    for band, centre in enumerate(centres * voice.tract):
        shape = np.exp(-0.5 * ((frequency - centre) / 900) ** 2)
        noise = np.fft.irfft(np.fft.rfft(rng.normal(size=count)) * shape, count)
        wave += np.interp(samples, times, tracks[:, 6] * nearness[:, band]) * noise / noise.std()
    return wave
