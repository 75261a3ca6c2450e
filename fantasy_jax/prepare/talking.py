"""Clips of a person who talks: everything that filters and records need to know, computed on first use."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from fantasy_jax.data.records import Record
from fantasy_jax.errors import MediaError
from fantasy_jax.media import AudioTrack
from fantasy_jax.prepare import measures
from fantasy_jax.prepare.analysis import ClipAnalysis, Detectors, Dropped, PrepareTask, crop_video
from fantasy_jax.prepare.cutting import Segment
from fantasy_jax.preprocessing.face_crop import CROP_SIZE, TEMPLATE, crop_face
from fantasy_jax.preprocessing.landmarks import FaceTrack, five_points
from fantasy_jax.preprocessing.lip_mask import lip_mask
from fantasy_jax.preprocessing.motion import body_intensity, face_intensity
from fantasy_jax.preprocessing.tracking import track_bodies, track_faces
from fantasy_jax.typing import Bool, Float, Float32, UInt8
from fantasy_jax.video import SAMPLE_RATE, audio_samples

_CLEARLY = 0.5
"""Standard deviations of chance by which the correlation at another lag must exceed that in step."""


class TalkingClip(ClipAnalysis):
    """A clip under examination, of which one face and the audio are used."""

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
        super().__init__(segment, task, detectors)
        if offset:
            self.measures["offset"] = offset
        self._audio, self._offset, self._faces = audio, offset, faces

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


def grey_record(task: PrepareTask) -> Record:
    """A record of a clip that shows nothing, without its prompt, which tells the schema."""
    length, size = task.video.num_frames, task.video.size
    return {
        "video": np.full((length, *size, 3), 128, np.uint8),
        "lips": np.zeros((length, *size), np.uint8),
        "waveform": np.zeros(task.video.num_samples, np.int16),
        "face_points": (TEMPLATE * min(size) / CROP_SIZE).astype(np.float32),
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
    cropped, corner = crop_video(video, center, size)
    return cropped, replace(face, points=face.points - np.array([*corner, 0], np.float32))


def _face_points(video: UInt8[np.ndarray, "T H W 3"], face: FaceTrack) -> Float32[np.ndarray, "5 2"]:
    """Returns the five points by which the face encoder's crop of the first frame is aligned."""
    points = five_points(face.points[0], face.layout).astype(np.float32)
    try:
        crop_face(video[0], points, name="the first frame")
    except MediaError as error:
        raise Dropped("face_inside", str(error)) from error
    return points
