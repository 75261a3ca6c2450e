"""One video to its clips, kept or dropped: a function of the file's bytes and of the settings alone.

Processes here and workers of Apache Beam run the same function.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import cv2
import numpy as np

from fantasy_jax.config import ConfigError
from fantasy_jax.data.face_crop import crop_face
from fantasy_jax.data.landmarks import (
    BodyDetector,
    FaceDetector,
    FaceTrack,
    five_points,
    track_bodies,
    track_faces,
)
from fantasy_jax.data.lip_mask import lip_mask
from fantasy_jax.data.motion import body_intensity, face_intensity
from fantasy_jax.data.prepare import filters
from fantasy_jax.data.prepare.config import PrepareConfig
from fantasy_jax.data.prepare.cutting import Cut, covering, cut
from fantasy_jax.data.prepare.filters import Dropped, check
from fantasy_jax.data.prepare.scan import Source
from fantasy_jax.data.records import Record
from fantasy_jax.data.speech import SAMPLE_RATE
from fantasy_jax.media import MediaError, probe_video, read_soundtrack
from fantasy_jax.typing import Float32, UInt8

_THUMBNAIL = 168
"""Longer side of the pictures in the report, in pixels."""


@dataclass(frozen=True)
class Task:
    """What decides a video's clips, beside its bytes.

    Attributes:
        config: Thresholds.
        fps: Frames a second.
        num_frames: Of a clip, 4k + 1.
    """

    config: PrepareConfig
    fps: int
    num_frames: int


@dataclass(frozen=True)
class Detectors:
    """What looks at frames."""

    faces: FaceDetector
    bodies: BodyDetector


OpenDetectors = Callable[[PrepareConfig], AbstractContextManager[Detectors]]
"""Opens detectors in the process that uses them; it must pickle."""


@contextmanager
def mediapipe_detectors(config: PrepareConfig) -> Iterator[Detectors]:
    """MediaPipe's landmarkers of faces and bodies."""
    from fantasy_jax.data.landmarks import MediaPipeBodies, MediaPipeFaces

    with ExitStack() as opened:
        faces = opened.enter_context(MediaPipeFaces(config.landmarks))
        yield Detectors(faces, opened.enter_context(MediaPipeBodies(config.landmarks)))


@dataclass(frozen=True)
class Clip:
    """A clip, or a whole video, that was kept or dropped.

    Attributes:
        source: The video's name.
        digest: The video's.
        number: Of the clip in the video; -1 for the whole video.
        seconds: When it begins and ends.
        dropped: Why, a key of `filters.REASONS`; empty where it is kept.
        message: A line about it; may be empty where it is kept.
        measures: What was measured, up to the filter that dropped it.
        picture: One frame, small; None where there is none.
        record: What the networks are given: video, lips, sound, points of the first frame's face; None where
            dropped.
    """

    source: str
    digest: str
    number: int
    seconds: tuple[float, float]
    dropped: str
    message: str
    measures: dict[str, float] = field(default_factory=dict)
    picture: UInt8[np.ndarray, "H W 3"] | None = None
    record: Record | None = None

    def to_json(self) -> dict[str, Any]:
        """All but picture and record, JSON's types."""
        return asdict(replace(self, picture=None, record=None))

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> "Clip":
        """Reads it back."""
        return cls(**described | {"seconds": tuple(described["seconds"])})

    @property
    def line(self) -> str:
        """For the log and the report."""
        place = "" if self.number < 0 else f", {self.seconds[0]:.1f} to {self.seconds[1]:.1f} s"
        return f"{self.source}{place}: {self.message}"


def prepare_video(source: Source, task: Task, detectors: Detectors) -> Iterator[Clip]:
    """Every clip of a video, one after another.

    Nothing that is wrong with the file is raised; it becomes a clip that is dropped.
    """
    whole = Clip(source.name, source.digest, -1, (0.0, 0.0), "", "")
    number = 0
    try:
        size, sound = _open(source, task)
        pieces = cut(
            source.path,
            fps=task.fps,
            num_frames=task.num_frames,
            size=size,
            threshold=task.config.cut_threshold,
        )
        for piece in pieces:
            seconds = (piece.first / task.fps, (piece.first + piece.num_frames) / task.fps)
            yield _judge(replace(whole, number=number, seconds=seconds), piece, sound, task, detectors)
            number += 1
    except Dropped as dropped:
        yield replace(whole, dropped=dropped.reason, message=str(dropped))
    except MediaError as error:
        after = f" after {number} clips" if number else ""
        reason = str(error).removeprefix(f"{source.path}: ")
        yield replace(whole, dropped="unreadable", message=f"unreadable{after}: {reason}")
    except ConfigError:
        raise
    except Exception as error:  # one bad file, whatever is wrong with it, does not end the run
        yield replace(whole, dropped="error", message=_unforeseen(source, error))


def _open(source: Source, task: Task) -> tuple[tuple[int, int], Float32[np.ndarray, " samples"]]:
    """The size to which frames are scaled, and the sound."""
    info = probe_video(source.path)
    size = covering(info.height, info.width, task.config.size)
    enlarged = size[0] / info.height
    if enlarged > task.config.max_enlargement:
        raise Dropped(
            "small",
            f"{info.width} x {info.height} pixels would be enlarged {enlarged:.2f} times; "
            f"{task.config.max_enlargement:.2f} is allowed",
        )
    if not info.has_sound:
        raise Dropped("no_sound", "has no sound")
    return size, read_soundtrack(source.path)


def _judge(
    clip: Clip, piece: Cut, sound: Float32[np.ndarray, " samples"], task: Task, detectors: Detectors
) -> Clip:
    """Measures a clip until it fails or is through."""
    measures: dict[str, float] = {}
    picture = None if piece.video is None else thumbnail(piece.video[len(piece.video) // 2])
    try:
        record, message = _record(piece, sound, task, detectors, measures)
        return replace(
            clip, message=message, measures=measures, picture=thumbnail(record["video"][0]), record=record
        )
    except Dropped as dropped:
        reason, message = dropped.reason, str(dropped)
    except ConfigError:
        raise
    except Exception as error:  # nor does one bad clip
        reason, message = "error", _unforeseen(clip, error)
    return replace(clip, dropped=reason, message=message, measures=measures, picture=picture)


def _unforeseen(where: Source | Clip, error: Exception) -> str:
    logging.getLogger(__name__).debug("%s", where, exc_info=True)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _record(
    piece: Cut,
    sound: Float32[np.ndarray, " samples"],
    task: Task,
    detectors: Detectors,
    measures: dict[str, float],
) -> tuple[Record, str]:
    """A clip that passes all filters, as the networks are given it, and what is to be said about it."""
    config = task.config
    if piece.video is None:
        raise Dropped("short", f"a scene of {piece.num_frames} frames; {task.num_frames} are needed")
    check("gap", piece.gap, config, measures)
    heard = _heard(piece, sound, task, measures)
    check("speech", filters.speech_share(heard, config.speech_strictness), config, measures)
    faces = track_faces(detectors.faces, piece.video, config.landmarks)
    measures["faces"] = float(len(faces))
    face, several = filters.choose_face(faces, config.face)
    sure = face.present & (face.score >= config.min_face_confidence)
    check("face_frames", float(sure.mean()), config, measures)
    if not sure[0]:
        raise Dropped("face_frames", "no sure face in the first frame, which is the reference picture")
    video, face = _crop(piece.video, face, config.size)
    check("face_side", face.size / min(config.size), config, measures)
    check("face_inside", filters.share_inside(face, *config.size), config, measures)
    check("sharpness", filters.sharpness(video, face), config, measures)
    energy = filters.sound_energy(heard, len(video))
    sync, lag = filters.best_lag(filters.lip_opening(face), energy, config.max_lag)
    measures["lag"] = float(lag)
    check("sync", sync, config, measures)
    (body,) = track_bodies(detectors.bodies, video, [face], config.landmarks)
    measures |= {"face_motion": face_intensity(face), "body_motion": body_intensity(body, face)}
    record = {
        "video": video,
        "lips": lip_mask(face, *config.size),
        "sound": np.round(heard.clip(-1, 1) * 32767).astype(np.int16),
        "face_points": _face_points(video, face),
    }
    return record, several


def _heard(
    piece: Cut, sound: Float32[np.ndarray, " samples"], task: Task, measures: dict[str, float]
) -> Float32[np.ndarray, " heard"]:
    """The clip's sound, filled up with silence where a little is missing."""
    start = int(piece.first / task.fps * SAMPLE_RATE)
    length = int(task.num_frames / task.fps * SAMPLE_RATE)
    heard = sound[start : start + length]
    check("missing_sound", (length - heard.size) / SAMPLE_RATE, task.config, measures)
    return np.pad(heard, (0, length - heard.size))


def _face_points(video: UInt8[np.ndarray, "T H W 3"], face: FaceTrack) -> Float32[np.ndarray, "5 2"]:
    """What the reference picture's face is cut by, for the face encoder."""
    points = five_points(face.points[0], face.layout).astype(np.float32)
    try:
        crop_face(video[0], points, name="the first frame")
    except MediaError as error:
        raise Dropped("face_inside", str(error)) from error
    return points


def _crop(
    video: UInt8[np.ndarray, "T H W 3"], face: FaceTrack, size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "T height width 3"], FaceTrack]:
    """The part of the picture that is kept, with the face as near to its middle as the picture allows."""
    middle = np.nanmean((face.boxes[:, :2] + face.boxes[:, 2:]) / 2, axis=0)
    room = np.array([video.shape[2] - size[1], video.shape[1] - size[0]])
    left, top = np.clip(np.round(middle - np.array(size[::-1]) / 2), 0, room).astype(int)
    cropped = np.ascontiguousarray(video[:, top : top + size[0], left : left + size[1]])
    return cropped, filters.shift_face(face, int(left), int(top))


def thumbnail(frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """A frame made small, for the report."""
    height, width = frame.shape[:2]
    scale = _THUMBNAIL / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
