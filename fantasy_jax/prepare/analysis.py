"""Everything that filters and records need to know of a clip, computed on first use."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fantasy_jax.config import as_json
from fantasy_jax.data.records import Record
from fantasy_jax.errors import MediaError
from fantasy_jax.media import AudioTrack
from fantasy_jax.prepare import measures
from fantasy_jax.prepare.config import PrepareConfig
from fantasy_jax.prepare.cutting import Segment
from fantasy_jax.preprocessing.face_crop import crop_face
from fantasy_jax.preprocessing.landmarks import BodyDetector, FaceDetector, FaceTrack, five_points
from fantasy_jax.preprocessing.lip_mask import lip_mask
from fantasy_jax.preprocessing.motion import body_intensity, face_intensity
from fantasy_jax.preprocessing.tracking import track_bodies, track_faces
from fantasy_jax.typing import Bool, Float, Float32, UInt8
from fantasy_jax.video import SAMPLE_RATE, VideoConfig, audio_samples

_CLEARLY = 0.5
"""Standard deviations of chance by which the correlation at another lag must exceed that in step."""


class Dropped(Exception):
    """A clip or video is not kept.

    Attributes:
        reason: Key of `filters.REASONS`; the message explains it in one line.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class PrepareTask:
    """What determines the clips of a video beside its bytes.

    Attributes:
        config: Settings and thresholds.
        video: Size, length and frame rate of clips.
    """

    config: PrepareConfig
    video: VideoConfig

    def as_json(self) -> dict[str, Any]:
        """All settings, with the models of detection by content, since paths differ between machines."""
        described = as_json(self)
        landmarks = described["config"]["landmarks"]
        for name in ("face_model", "pose_model"):
            path = Path(landmarks[name])
            landmarks[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else path.name
        return described


@dataclass(frozen=True)
class Detectors:
    """The detectors of faces and bodies."""

    faces: FaceDetector
    bodies: BodyDetector


OpenDetectors = Callable[[PrepareConfig], AbstractContextManager[Detectors]]
"""Opens detectors in the process that uses them; it must be picklable."""


class ClipAnalysis:
    """A clip under examination; properties raise `Dropped` where the clip lacks what they need.

    Attributes:
        segment: Its frames before cropping.
        task: The settings.
        measures: Values measured so far, for the report.
    """

    def __init__(
        self,
        segment: Segment,
        audio: AudioTrack,
        task: PrepareTask,
        detectors: Detectors,
        offset: float = 0.0,
        faces: Sequence[FaceTrack] | None = None,
    ):
        """Takes a clip that is not analysed yet.

        Args:
            segment: Its frames.
            audio: Audio of the whole video, 16 kHz.
            task: The settings.
            detectors: Detectors of faces and bodies.
            offset: Frames by which the lips are late in the whole video, which is undone.
            faces: All faces, if they have been tracked before.

        Raises:
            Dropped: The segment is too short.
        """
        if segment.video is None:
            raise Dropped(
                "short", f"a scene of {segment.num_frames} frames; {task.video.num_frames} are required"
            )
        self.segment, self.task = segment, task
        self.measures: dict[str, float] = {}
        if offset:
            self.measures["offset"] = offset
        self._audio, self._detectors, self._offset, self._faces = audio, detectors, offset, faces

    @property
    def _start(self) -> int:
        """The sample of the video's audio at which the clip begins; negative before the audio does."""
        fps = self.task.video.fps
        return audio_samples(self.segment.first, fps) - round(self._offset / fps * SAMPLE_RATE)

    @property
    def missing_seconds(self) -> float:
        """Seconds of the clip in which the file has no audio, or none that can be decoded."""
        start = self._start / SAMPLE_RATE
        end = start + self.task.video.num_samples / SAMPLE_RATE
        there = self._audio.waveform.size / SAMPLE_RATE
        spans = [(start, min(end, 0.0)), (max(start, there), end), *self._audio.missing.tolist()]
        return sum(max(min(end, after) - max(start, before), 0.0) for before, after in spans)

    @cached_property
    def waveform(self) -> Float32[np.ndarray, " samples"]:
        """Audio of the clip, padded with zeros to its length."""
        length = self.task.video.num_samples
        before = min(max(-self._start, 0), length)
        audio = self._audio.waveform[max(self._start, 0) :][: length - before]
        return np.pad(audio, (before, length - before - audio.size))

    @cached_property
    def faces(self) -> Sequence[FaceTrack]:
        """All faces, the largest first."""
        faces = self._faces
        if faces is None:
            faces = track_faces(self._detectors.faces, self.segment.video, self.task.config.landmarks)
        self.measures["faces"] = float(len(faces))
        return faces

    @cached_property
    def uncropped_face(self) -> FaceTrack:
        """The face that is used, in the frames before cropping."""
        return choose_face(self.faces, self.task.config.face)

    @property
    def note(self) -> str:
        """Message about a clip that is kept; empty if there is nothing to say."""
        notes = []
        if self.task.config.face is None and len(self.faces) > 1:
            notes.append(f"{len(self.faces)} faces; the largest is used, --face=N selects another")
        if self._offset:
            late = "late" if self._offset < 0 else "early"
            notes.append(
                f"the audio is {abs(self._offset):.2f} frames {late} in the whole video, which is undone"
            )
        return "; ".join(notes)

    @property
    def confident(self) -> Bool[np.ndarray, " T"]:
        """Frames in which the face is detected with enough confidence."""
        face = self.uncropped_face
        return face.present & (face.score >= self.task.config.min_face_confidence)

    @cached_property
    def _cropped(self) -> tuple[UInt8[np.ndarray, "T H W 3"], FaceTrack]:
        if not self.confident[0]:
            raise Dropped("face_frames", "no confident face in the first frame, the reference image")
        return crop_around(self.segment.video, self.uncropped_face, self.task.video.size)

    @property
    def video(self) -> UInt8[np.ndarray, "T H W 3"]:
        """Frames of the clip, cropped around the face."""
        return self._cropped[0]

    @property
    def face(self) -> FaceTrack:
        """The face in these frames."""
        return self._cropped[1]

    def lag_correlations(self) -> Float[np.ndarray, " lags"]:
        """Correlations of lips and audio (`measures.lag_correlations`)."""
        config, length = self.task.config, self.segment.num_frames
        furthest = max(min(config.max_offset, length // 3), config.max_lag)
        rms = measures.frame_rms(self.waveform, length)
        return measures.lag_correlations(measures.lip_opening(self.uncropped_face), rms, furthest)

    def sync(self) -> float:
        """Measures how well the lips follow the audio; notes the lag.

        Raises:
            Dropped: They follow it clearly better at another lag.
        """
        correlations, max_lag = self.lag_correlations(), self.task.config.max_lag
        lag = measures.find_lag(correlations, max_lag)
        clearly = lag.gain > _CLEARLY * measures.chance(self.segment.num_frames)
        best = lag.elsewhere if clearly else lag.top
        self.measures["lag"] = float(best)
        if abs(best) > max_lag:
            late, value = "early" if best > 0 else "late", correlations[best + correlations.size // 2]
            raise Dropped(
                "sync",
                f"the audio is {abs(best)} frames {late}: its correlation with the lips is {value:.2f} "
                f"there, and {lag.value:.2f} in step",
            )
        return lag.value

    def record(self) -> Record:
        """Makes the clip's record, without its prompt; measures the motion intensities.

        Raises:
            Dropped: The face of the first frame cannot be cropped.
        """
        video, face = self.video, self.face
        (body,) = track_bodies(self._detectors.bodies, video, [face], self.task.config.landmarks)
        self.measures["face_motion"] = face_intensity(face)
        self.measures["body_motion"] = body_intensity(body, face)
        return {
            "video": video,
            "lips": lip_mask(face, *self.task.video.size),
            "waveform": np.round(self.waveform.clip(-1, 1) * 32767).astype(np.int16),
            "face_points": _face_points(video, face),
        }


def choose_face(faces: Sequence[FaceTrack], number: int | None) -> FaceTrack:
    """Chooses the face that is used.

    Args:
        faces: All faces of the clip, the largest first.
        number: Number from the left, from 1; None chooses the largest.

    Raises:
        Dropped: There is no face, or there are not that many.
    """
    if not faces:
        raise Dropped("no_face", "no face is found")
    if number is None:
        return faces[0]
    if number > len(faces):
        raise Dropped("no_face", f"there are {len(faces)} faces, but --face is {number}")
    return measures.leftmost_first(faces)[number - 1]


def crop_around(
    video: UInt8[np.ndarray, "T H W 3"], face: FaceTrack, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "T height width 3"], FaceTrack]:
    """Crops a video to a height and width, with the face as central as the image allows."""
    center = np.nanmean((face.boxes[:, :2] + face.boxes[:, 2:]) / 2, axis=0)
    room = np.array([video.shape[2] - size[1], video.shape[1] - size[0]])
    left, top = np.clip(np.round(center - np.array(size[::-1]) / 2), 0, room).astype(int)
    cropped = np.ascontiguousarray(video[:, top : top + size[0], left : left + size[1]])
    return cropped, replace(face, points=face.points - np.array([left, top, 0], np.float32))


def _face_points(video: UInt8[np.ndarray, "T H W 3"], face: FaceTrack) -> Float32[np.ndarray, "5 2"]:
    """Returns the five points by which the face encoder's crop of the first frame is aligned."""
    points = five_points(face.points[0], face.layout).astype(np.float32)
    try:
        crop_face(video[0], points, name="the first frame")
    except MediaError as error:
        raise Dropped("face_inside", str(error)) from error
    return points
