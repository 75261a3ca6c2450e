"""What is measured in a clip, and what it has to reach."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from scipy.ndimage import uniform_filter1d

from fantasy_jax.config import ConfigError
from fantasy_jax.data.face_crop import CROP_SIZE
from fantasy_jax.data.landmarks import FaceTrack
from fantasy_jax.data.prepare.config import PrepareConfig
from fantasy_jax.data.speech import SAMPLE_RATE
from fantasy_jax.evaluation.mouth import correlation
from fantasy_jax.typing import Float, Float32, UInt8

_WINDOW = 480
"""Samples that WebRTC's detector looks at, 30 ms."""


class Dropped(Exception):
    """A clip that is not kept: which filter, and a line that says why."""

    def __init__(self, reason: str, message: str):
        """Both; the reason is a key of `REASONS`."""
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Filter:
    """A measure that has to reach a threshold.

    Attributes:
        setting: The threshold's name in `PrepareConfig`.
        label: What is measured, for people.
        message: Why a clip is dropped; `{value}` and `{wanted}` are filled in.
    """

    setting: str
    label: str
    message: str


FILTERS = {
    "gap": Filter(
        "max_gap",
        "frame shown at another time than its own, s",
        "the file has no frames for {value:.2f} s around one time; at most {wanted:.2f} s are allowed",
    ),
    "missing_sound": Filter(
        "max_missing_sound",
        "sound missing at the end, s",
        "the sound ends {value:.2f} s before the clip; at most {wanted:.2f} s are allowed",
    ),
    "speech": Filter(
        "min_speech", "share with speech", "speech in {value:.0%} of it; {wanted:.0%} are needed"
    ),
    "face_frames": Filter(
        "min_face_frames",
        "share of frames with a sure face",
        "a face that is sure enough in {value:.0%} of the frames; {wanted:.0%} are needed",
    ),
    "face_side": Filter(
        "min_face_side",
        "face's side over the picture's",
        "the face takes {value:.0%} of the picture's side; {wanted:.0%} are needed",
    ),
    "face_inside": Filter(
        "min_face_inside",
        "share of the face inside",
        "{value:.0%} of the face lie inside of the picture; {wanted:.0%} are needed",
    ),
    "sharpness": Filter(
        "min_sharpness",
        "variance of the Laplacian",
        "sharpness of the face is {value:.0f}; {wanted:.0f} is needed",
    ),
    "sync": Filter(
        "min_sync",
        "correlation of lips and sound",
        "lips follow the sound by {value:.2f}; {wanted:.2f} is needed",
    ),
}
"""In the order in which they are asked, cheap ones first; a clip is dropped by the first that it fails."""

REASONS = {
    "same": "the same file as another",
    "caption": "no caption",
    "unreadable": "cannot be read, or no further",
    "crash": "ends the process that reads it",
    "small": "would have to be enlarged",
    "no_sound": "no sound",
    "short": "scene shorter than a clip",
    "no_face": "no face",
    "error": "an error in a stage",
} | {name: found.label for name, found in FILTERS.items()}
"""Everything that a clip, or a whole video, can be dropped for."""


def check(name: str, value: float, config: PrepareConfig, measures: dict[str, float]) -> None:
    """Notes a measure, and asks whether it is good enough.

    Raises:
        Dropped: It is not.
    """
    found = FILTERS[name]
    wanted = getattr(config, found.setting)
    measures[name] = float(value)
    if value > wanted if found.setting.startswith("max") else value < wanted:
        raise Dropped(name, found.message.format(value=value, wanted=wanted))


def speech_share(waveform: Float[np.ndarray, " samples"], strictness: int) -> float:
    """Share of windows of 30 ms in which WebRTC's voice activity detector hears speech.

    Args:
        waveform: 16 kHz.
        strictness: Its mode, from 0 to 3.
    """
    try:
        import webrtcvad
    except ImportError as error:
        raise ConfigError(f"webrtcvad is missing ({error}); pip install 'fantasy_jax[prepare]'") from error
    detector = webrtcvad.Vad(strictness)
    samples = np.round(waveform.clip(-1, 1) * 32767).astype("<i2")
    windows = [samples[i : i + _WINDOW] for i in range(0, samples.size - _WINDOW + 1, _WINDOW)]
    return float(np.mean([detector.is_speech(x.tobytes(), SAMPLE_RATE) for x in windows])) if windows else 0.0


def choose_face(faces: Sequence[FaceTrack], wanted: int | None) -> tuple[FaceTrack, str]:
    """The face that is meant, and what is to be said about it.

    Args:
        faces: All in the clip, the largest first.
        wanted: Its number from the left, beginning with 1; None takes the largest.

    Raises:
        Dropped: There is no face, or not that many.
    """
    if not faces:
        raise Dropped("no_face", "no face is found")
    if wanted is None:
        message = f"{len(faces)} faces; the largest is taken, --face=N takes another"
        return faces[0], message if len(faces) > 1 else ""
    if wanted > len(faces):
        raise Dropped("no_face", f"{len(faces)} faces are found; --face={wanted} is not there")
    return sorted(faces, key=lambda face: float(np.nanmean(face.boxes[:, 0])))[wanted - 1], ""


def shift_face(face: FaceTrack, left: int, top: int) -> FaceTrack:
    """A track in a part of the picture that begins at this corner."""
    return replace(face, points=face.points - np.array([left, top, 0], np.float32))


def share_inside(face: FaceTrack, height: int, width: int) -> float:
    """Share of the points that lie inside of the picture, in the worst frame."""
    points = face.points[face.present][..., :2]
    inside = (points >= 0) & (points < np.array([width, height]))
    return float(inside.all(axis=-1).mean(axis=1).min())


def sharpness(video: UInt8[np.ndarray, "T H W 3"], face: FaceTrack) -> float:
    """Variance of the Laplacian of the face, the median of up to nine frames.

    Scaled to one size, or large faces would be sharper.
    """
    values = []
    frames = np.flatnonzero(face.present)
    for index in frames[:: max(len(frames) // 8, 1)]:
        left, top, right, bottom = face.boxes[index].round().astype(int).clip(0)
        crop = video[index, top:bottom, left:right]
        if crop.size:
            scaled = cv2.resize(crop, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA)
            grey = cv2.cvtColor(scaled, cv2.COLOR_RGB2GRAY)
            values.append(cv2.Laplacian(grey, cv2.CV_64F).var())
    return float(np.median(values)) if values else 0.0


def lip_opening(face: FaceTrack) -> Float32[np.ndarray, " T"]:
    """Distance of the lips' inner middles over the face's height; frames without a face are interpolated."""
    upper, lower = (face.points[:, i, :2] for i in face.layout.lip_middles)
    boxes = face.boxes
    opening = np.linalg.norm(upper - lower, axis=-1) / (boxes[:, 3] - boxes[:, 1])
    frames = np.arange(len(opening))
    return np.interp(frames, frames[face.present], opening[face.present]).astype(np.float32)


def sound_energy(waveform: Float[np.ndarray, " samples"], num_frames: int) -> Float32[np.ndarray, " T"]:
    """Root mean square of the sound of each frame."""
    pieces = np.array_split(waveform, num_frames)
    return np.array([np.sqrt(np.square(piece).mean()) for piece in pieces], np.float32)


def best_lag(
    opening: Float[np.ndarray, " T"], energy: Float[np.ndarray, " T"], most: int
) -> tuple[float, int]:
    """How well lips follow the sound: the highest correlation at a lag of at most so many frames.

    Both are averaged over three frames first; lips cannot follow what is faster.

    Returns:
        The correlation, and its lag in frames; positive if lips are late.
    """
    length = len(opening)
    opening, energy = (uniform_filter1d(x.astype(np.float64), 3, mode="nearest") for x in (opening, energy))

    def at(lag: int) -> float:
        lips = opening[max(lag, 0) : length + min(lag, 0)]
        sound = energy[max(-lag, 0) : length - max(lag, 0)]
        return correlation(lips, sound)

    return max((at(lag), lag) for lag in range(-most, most + 1))
