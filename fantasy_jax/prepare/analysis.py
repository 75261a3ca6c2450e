"""Everything that filters and records need to know of a clip, computed on first use."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fantasy_jax.data.records import Record
from fantasy_jax.errors import MediaError
from fantasy_jax.prepare import measures
from fantasy_jax.prepare.config import PrepareConfig
from fantasy_jax.prepare.cutting import Segment
from fantasy_jax.preprocessing.face_crop import crop_face
from fantasy_jax.preprocessing.landmarks import BodyDetector, FaceDetector, FaceTrack, five_points
from fantasy_jax.preprocessing.lip_mask import lip_mask
from fantasy_jax.preprocessing.motion import body_intensity, face_intensity
from fantasy_jax.preprocessing.tracking import track_bodies, track_faces
from fantasy_jax.typing import Bool, Float32, UInt8
from fantasy_jax.video import SAMPLE_RATE, VideoConfig, audio_samples


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
        audio: Float32[np.ndarray, " samples"],
        task: PrepareTask,
        detectors: Detectors,
    ):
        """Takes a clip that is not analysed yet.

        Args:
            segment: Its frames.
            audio: Audio of the whole video, 16 kHz.
            task: The settings.
            detectors: Detectors of faces and bodies.

        Raises:
            Dropped: The segment is too short.
        """
        if segment.video is None:
            raise Dropped(
                "short", f"a scene of {segment.num_frames} frames; {task.video.num_frames} are required"
            )
        self.segment, self.task = segment, task
        self.measures: dict[str, float] = {}
        self._audio, self._detectors = audio, detectors

    @cached_property
    def audio(self) -> Float32[np.ndarray, " samples"]:
        """Audio of the clip, which may end too early."""
        start = audio_samples(self.segment.first, self.task.video.fps)
        return self._audio[start : start + self.task.video.num_samples]

    @property
    def missing_seconds(self) -> float:
        """Seconds of audio missing at the end."""
        return (self.task.video.num_samples - self.audio.size) / SAMPLE_RATE

    @cached_property
    def waveform(self) -> Float32[np.ndarray, " samples"]:
        """Audio of the clip, padded with zeros to its length."""
        return np.pad(self.audio, (0, self.task.video.num_samples - self.audio.size))

    @cached_property
    def faces(self) -> Sequence[FaceTrack]:
        """All faces, the largest first."""
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
        several = self.task.config.face is None and len(self.faces) > 1
        return f"{len(self.faces)} faces; the largest is used, --face=N selects another" if several else ""

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

    def sync(self) -> float:
        """Measures how well the lips follow the audio; notes the lag."""
        rms = measures.frame_rms(self.waveform, len(self.video))
        value, lag = measures.best_lag(measures.lip_opening(self.face), rms, self.task.config.max_lag)
        self.measures["lag"] = float(lag)
        return value

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
