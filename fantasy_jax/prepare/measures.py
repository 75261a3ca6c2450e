"""Measurements of clips: speech, faces, sharpness, and synchrony of lips and audio."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import uniform_filter1d

from fantasy_jax.errors import ConfigError
from fantasy_jax.evaluation.metrics import correlation
from fantasy_jax.preprocessing.face_crop import CROP_SIZE
from fantasy_jax.preprocessing.landmarks import DetectedFace, FaceLayout, FaceTrack
from fantasy_jax.preprocessing.motion import face_intensity
from fantasy_jax.preprocessing.one_euro import head_angles
from fantasy_jax.typing import Float, Float32, UInt8
from fantasy_jax.video import SAMPLE_RATE

_WINDOW = 480
"""Samples of a window of WebRTC's detector, 30 ms."""


def speech_fraction(waveform: Float[np.ndarray, " samples"], strictness: int) -> float:
    """Returns the fraction of windows of 30 ms in which WebRTC's voice activity detector finds speech.

    Args:
        waveform: 16 kHz.
        strictness: Mode of the detector, from 0 to 3.

    Raises:
        ConfigError: The detector is not installed.
    """
    try:
        import webrtcvad
    except ImportError as error:
        raise ConfigError(f"webrtcvad is missing ({error}); pip install 'fantasy_jax[prepare]'") from error
    detector = webrtcvad.Vad(strictness)
    samples = np.round(waveform.clip(-1, 1) * 32767).astype("<i2")
    windows = [samples[i : i + _WINDOW] for i in range(0, samples.size - _WINDOW + 1, _WINDOW)]
    return float(np.mean([detector.is_speech(x.tobytes(), SAMPLE_RATE) for x in windows])) if windows else 0.0


def leftmost_first(faces: Sequence[FaceTrack]) -> list[FaceTrack]:
    """Sorts faces by the mean of their left edge."""
    return sorted(faces, key=lambda face: float(np.nanmean(face.boxes[:, 0])))


def fraction_inside(face: FaceTrack, height: int, width: int) -> float:
    """Returns the fraction of a face's landmarks inside the image, in the worst frame."""
    points = face.points[face.present][..., :2]
    inside = (points >= 0) & (points < np.array([width, height]))
    return float(inside.all(axis=-1).mean(axis=1).min())


def box_inside(boxes: Float[np.ndarray, "T 4"], height: int, width: int) -> float:
    """Returns the fraction of a box's area inside the image, in the worst frame."""
    inside = np.clip(boxes, 0, [width, height, width, height])
    areas, all_areas = ((x[:, 2:] - x[:, :2]).prod(axis=1) for x in (inside, boxes))
    return float((areas / np.maximum(all_areas, 1e-9)).min())


def mean_side(boxes: Float[np.ndarray, "T 4"]) -> float:
    """Returns the mean of a box's longer side, in pixels."""
    return float((boxes[:, 2:] - boxes[:, :2]).max(axis=1).mean())


def sharpness(video: UInt8[np.ndarray, "T H W 3"], boxes: Float[np.ndarray, "T 4"]) -> float:
    """Returns the variance of the Laplacian of a face, the median of up to nine frames.

    The face is scaled to one size, because larger faces would have other values.

    Args:
        video: RGB.
        boxes: Left, top, right, bottom of the face in pixels; frames where they are NaN are skipped.
    """
    values = []
    frames = np.flatnonzero(np.isfinite(boxes).all(axis=1))
    for index in frames[:: max(len(frames) // 8, 1)]:
        left, top, right, bottom = boxes[index].round().astype(int).clip(0)
        crop = video[index, top:bottom, left:right]
        if crop.size:
            scaled = cv2.resize(crop, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA)
            grey = cv2.cvtColor(scaled, cv2.COLOR_RGB2GRAY)
            values.append(cv2.Laplacian(grey, cv2.CV_64F).var())
    return float(np.median(values)) if values else 0.0


def turning(faces: Sequence[DetectedFace], layout: FaceLayout) -> float:
    """Returns the variation of a head's angles over a clip, in degrees.

    It is the root of the summed variances of pitch and yaw.
    """
    angles = np.array([head_angles(face, layout) for face in faces])
    return float(np.sqrt(angles.var(axis=0).sum()))


def expression(faces: Sequence[DetectedFace], layout: FaceLayout) -> float:
    """Returns the variation of a face's key points over a clip, in distances between the eyes.

    It is the root of `preprocessing.motion.face_intensity`, which leaves the head's pose out.
    """
    points, score = np.stack([face.points for face in faces]), np.array([face.confidence for face in faces])
    track = FaceTrack(points, np.ones(len(faces), bool), score.astype(np.float32), layout)
    return math.sqrt(face_intensity(track))


def lip_opening(face: FaceTrack) -> Float32[np.ndarray, " T"]:
    """Returns the distance of the lips over the face's height; frames without a face are interpolated."""
    upper, lower = (face.points[:, i, :2] for i in face.layout.lip_middles)
    boxes = face.boxes
    opening = np.linalg.norm(upper - lower, axis=-1) / (boxes[:, 3] - boxes[:, 1])
    frames = np.arange(len(opening))
    return np.interp(frames, frames[face.present], opening[face.present]).astype(np.float32)


def frame_rms(waveform: Float[np.ndarray, " samples"], num_frames: int) -> Float32[np.ndarray, " T"]:
    """Returns the root mean square of the samples of each video frame."""
    pieces = np.array_split(waveform, num_frames)
    return np.array([np.sqrt(np.square(piece).mean()) for piece in pieces], np.float32)


def lag_correlations(
    opening: Float[np.ndarray, " T"], rms: Float[np.ndarray, " T"], max_lag: int
) -> Float[np.ndarray, " lags"]:
    """Returns the correlation of lips and audio at all lags from `-max_lag` to `max_lag`.

    Both are averaged over three frames first, because lips do not follow faster changes.

    Args:
        opening: Opening of the lips in every frame.
        rms: Root mean square of the audio of every frame.
        max_lag: Largest lag in either direction, in frames.

    Returns:
        One for each lag in frames, which is positive if the lips are late.
    """
    length = len(opening)
    opening, rms = (uniform_filter1d(x.astype(np.float64), 3, mode="nearest") for x in (opening, rms))

    def at(lag: int) -> float:
        lips = opening[max(lag, 0) : length + min(lag, 0)]
        audio = rms[max(-lag, 0) : length - max(lag, 0)]
        return correlation(lips, audio)

    return np.array([at(lag) for lag in range(-max_lag, max_lag + 1)])


@dataclass(frozen=True)
class Lag:
    """The lag between lips and audio.

    Attributes:
        value: Correlation in step: the highest within `max_lag`.
        in_step: Its lag, in frames.
        top: Lag of the local maximum that the correlations rise to from there.
        elsewhere: Lag of the highest correlation of all.
        peak: Lag of the highest correlation, interpolated between frames by a parabola.
        gain: Highest correlation minus `value`.
    """

    value: float
    in_step: int
    top: int
    elsewhere: int
    peak: float
    gain: float


def find_lag(correlations: Float[np.ndarray, " lags"], max_lag: int) -> Lag:
    """Compares the correlation of lips and audio in step with that at other lags (`lag_correlations`)."""
    lags = np.arange(correlations.size) - correlations.size // 2
    near = np.where(np.abs(lags) <= max_lag, correlations, -np.inf)
    value, best = near.max(), correlations.max()
    top = start = int(near.argmax())
    while (higher := top + int(correlations[max(top - 1, 0) : top + 2].argmax()) - (top > 0)) != top:
        top = higher
    elsewhere = int(lags[correlations.argmax()])
    peak = elsewhere + _between(correlations)
    return Lag(float(value), int(lags[start]), int(lags[top]), elsewhere, peak, float(best - value))


def _between(values: Float[np.ndarray, " lags"]) -> float:
    """Where the parabola through the highest value and its neighbours is highest, relative to that value."""
    index = int(values.argmax())
    if not 0 < index < values.size - 1:
        return 0.0
    before, highest, after = values[index - 1 : index + 2]
    bend = before - 2 * highest + after
    return float((before - after) / (2 * bend)) if bend < 0 else 0.0


def chance(num_frames: int) -> float:
    """Standard deviation of the correlation of independent lips and audio, of this many frames in all."""
    return math.sqrt(3 / num_frames)  # three neighbours are averaged
