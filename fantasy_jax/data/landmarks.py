"""Faces' landmarks and bodies' joints in the frames of a video, each person's own through all of them.

What finds them in a single picture is behind two small interfaces, `FaceDetector` and `BodyDetector`; who is
who from frame to frame, and what becomes of frames in which somebody is not found, is decided here for all
detectors. MediaPipe's two are at hand; DWPose would be another `BodyDetector` of a few lines.
"""

import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from fantasy_jax.config import ConfigError
from fantasy_jax.typing import Bool, Float, Float32, UInt8

JOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)
"""The joints of a body in COCO's order, which every detector of bodies can give; left is the person's."""


@dataclass(frozen=True)
class FaceLayout:
    """Which of a detector's points are what; right and left are the person's own.

    Attributes:
        outer_lips: Around the lips' outer border, in order.
        inner_lips: Around the opening of the mouth, in order.
        right_eye: Around the eye, beginning with its two corners.
        left_eye: Likewise.
        nose_tip: One point.
        mouth_corners: Right, left.
        lip_middles: Of the opening: on the upper lip, on the lower lip.
        rigid: Those that move with the head, hardly with the face: forehead, temples, nose, eyes' corners.
    """

    outer_lips: tuple[int, ...]
    inner_lips: tuple[int, ...]
    right_eye: tuple[int, ...]
    left_eye: tuple[int, ...]
    nose_tip: int
    mouth_corners: tuple[int, int]
    lip_middles: tuple[int, int]
    rigid: tuple[int, ...]


# fmt: off
MEDIAPIPE_FACE = FaceLayout(
    outer_lips=(61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185),
    inner_lips=(78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191),
    right_eye=(33, 133, 7, 163, 144, 145, 153, 154, 155, 173, 157, 158, 159, 160, 161, 246),
    left_eye=(263, 362, 249, 390, 373, 374, 380, 381, 382, 398, 384, 385, 386, 387, 388, 466),
    nose_tip=1,
    mouth_corners=(61, 291),
    lip_middles=(13, 14),
    rigid=(10, 151, 9, 8, 168, 6, 197, 195, 5, 33, 133, 362, 263,
           127, 356, 21, 251, 54, 284, 67, 297, 109, 338),
)
"""The 468 points of MediaPipe's face mesh (its `face_landmarks_connections`)."""
# fmt: on
_MESH_POINTS = 468
_MEDIAPIPE_JOINTS = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)
"""Where `JOINTS` are among MediaPipe's 33."""
_FACE_URL = (
    "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/"
    "face_landmarker.task"
)
_POSE_URL = (
    "https://storage.googleapis.com/mediapipe-models/pose_landmarker/pose_landmarker_full/float16/1/"
    "pose_landmarker_full.task"
)
_BLANK = np.zeros((64, 64, 3), np.uint8)
_NEARER = 3.0
"""What is looked at closely is a square of so many sides of the face."""
_MEMORY = 25
"""Frames for which a face that is lost is looked for where it was."""


@dataclass(frozen=True)
class Face:
    """One face in one picture.

    Attributes:
        points: x, y in pixels, and depth in the same unit, smaller nearer; may lie outside of the picture.
        confidence: In [0, 1].
        box: Left, top, right, bottom, around the points.
    """

    points: Float32[np.ndarray, "P 3"]
    confidence: float
    box: Float32[np.ndarray, "4"]


@dataclass(frozen=True)
class Body:
    """One body in one picture.

    Attributes:
        joints: x, y in pixels, as `JOINTS` names them.
        visibility: Of each, in [0, 1]; low where it is hidden or outside of the picture.
    """

    joints: Float32[np.ndarray, "17 2"]
    visibility: Float32[np.ndarray, "17"]


@dataclass(frozen=True)
class FaceTrack:
    """One person's face through a clip.

    Attributes:
        points: As in `Face`, in every frame; NaN where it is absent.
        present: Where it is: found, or interpolated over a short gap.
        score: The detector's confidence, interpolated likewise; 0 where absent.
        layout: Which point is what.
    """

    points: Float32[np.ndarray, "T P 3"]
    present: Bool[np.ndarray, " T"]
    score: Float32[np.ndarray, " T"]
    layout: FaceLayout

    @property
    def boxes(self) -> Float32[np.ndarray, "T 4"]:
        """Left, top, right, bottom in every frame, NaN where it is absent."""
        return np.concatenate([self.points[..., :2].min(axis=1), self.points[..., :2].max(axis=1)], axis=1)

    @property
    def size(self) -> float:
        """Mean of the longer side of its box, in pixels."""
        boxes = self.boxes[self.present]
        return float((boxes[:, 2:] - boxes[:, :2]).max(axis=1).mean())


@dataclass(frozen=True)
class BodyTrack:
    """One person's body through a clip.

    Attributes:
        joints: As in `Body`, in every frame; NaN where it is not found, or was not looked for.
        visibility: Of each; 0 there.
    """

    joints: Float32[np.ndarray, "T 17 2"]
    visibility: Float32[np.ndarray, "T 17"]


@runtime_checkable
class FaceDetector(Protocol):
    """Finds faces in a picture."""

    layout: FaceLayout

    def detect(self, picture: UInt8[np.ndarray, "H W 3"]) -> list[Face]:
        """All faces, the largest first; RGB."""
        ...


@runtime_checkable
class BodyDetector(Protocol):
    """Finds bodies in a picture."""

    def detect(self, picture: UInt8[np.ndarray, "H W 3"]) -> list[Body]:
        """All bodies, in no order; RGB."""
        ...


@dataclass(frozen=True)
class LandmarkConfig:
    """How landmarks are found and followed.

    Attributes:
        face_model: MediaPipe's FaceLandmarker, a .task file.
        pose_model: MediaPipe's PoseLandmarker, likewise.
        max_faces: In one picture.
        min_confidence: Of detection and of landmarks, in [0, 1]; MediaPipe's own default.
        min_side: A picture whose shorter side has fewer pixels is enlarged to it: at 64 pixels landmarks are
            off by a tenth of the face otherwise.
        max_gap: Frames that are interpolated where a face is not found; a hand passes in that time.
        min_frames: Tracks that were found in fewer are mistakes of the detector, and dropped.
        body_step: Bodies are looked for in every such frame: it takes three times as long as for faces, and a
            variance over the clip needs no more.
    """

    face_model: str = "models/face_landmarker.task"
    pose_model: str = "models/pose_landmarker.task"
    max_faces: int = 4
    min_confidence: float = 0.5
    min_side: int = 512
    max_gap: int = 5
    min_frames: int = 5
    body_step: int = 3

    def __post_init__(self):
        for name in ("max_faces", "min_side", "min_frames", "body_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.max_gap < 0:
            raise ConfigError(f"max_gap is {self.max_gap}; 0 interpolates nothing, less is not possible")
        if not 0 <= self.min_confidence <= 1:
            raise ConfigError(f"min_confidence is {self.min_confidence}; it must lie between 0 and 1")


def five_points(points: Float[np.ndarray, "*n P C"], layout: FaceLayout) -> Float[np.ndarray, "*n 5 2"]:
    """What ArcFace aligns by: the eyes' middles, the nose's tip, the mouth's corners.

    In its order: the eye and the corner that are left in the picture of an upright face come first. An eye's
    middle is that of its corners, so that a blink does not move it.
    """
    points = points[..., :2]
    eyes = [points[..., list(eye[:2]), :].mean(axis=-2) for eye in (layout.right_eye, layout.left_eye)]
    rest = [points[..., i, :] for i in (layout.nose_tip, *layout.mouth_corners)]
    return np.stack([*eyes, *rest], axis=-2)


def track_faces(
    detector: FaceDetector,
    video: UInt8[np.ndarray, "T H W 3"],
    config: LandmarkConfig,
    *,
    progress: bool = False,
) -> list[FaceTrack]:
    """Every face of a clip without cuts, the largest first.

    A face goes on where it was: of the ways to give a frame's faces to those that are known, the nearest one
    is taken, and none that leaps by more than its own size.

    Args:
        detector: Finds faces in one frame.
        video: RGB.
        config: How long a face may be lost.
        progress: Show a bar.
    """
    tracks: list[dict[int, Face]] = []
    for index, frame in enumerate(tqdm(video, desc="Faces", unit="frame", disable=not progress)):
        last = [track[max(track)] for track in tracks]
        lately = [face.box for face, track in zip(last, tracks, strict=True) if index - max(track) <= _MEMORY]
        found = find_faces(detector, frame, around=lately)
        leaps = np.array([[_leap(face.box, other.box) for other in found] for face in last]).reshape(
            len(last), len(found)
        )
        rows, columns = linear_sum_assignment(np.minimum(leaps, 1))
        same = {column: row for row, column in zip(rows, columns, strict=True) if leaps[row, column] < 1}
        for number, face in enumerate(found):
            if number in same:
                tracks[same[number]][index] = face
            else:
                tracks.append({index: face})
    tracks = [track for track in tracks if len(track) >= min(config.min_frames, len(video))]
    whole = [_fill_gaps(track, len(video), config.max_gap, detector.layout) for track in tracks]
    return sorted(whole, key=lambda track: -track.size * track.present.mean())


def track_bodies(
    detector: BodyDetector,
    video: UInt8[np.ndarray, "T H W 3"],
    faces: Sequence[FaceTrack],
    config: LandmarkConfig,
    *,
    progress: bool = False,
) -> list[BodyTrack]:
    """The body of every face: looked for below and beside it, and taken if its nose lies in the face.

    Args:
        detector: Finds bodies in one frame.
        video: RGB.
        faces: Whose; a body is looked for only in the frames in which its face is.
        config: How often.
        progress: Show a bar.
    """
    joints = np.full((len(faces), len(video), len(JOINTS), 2), np.nan, np.float32)
    visibility = np.zeros(joints.shape[:-1], np.float32)
    for index, frame in enumerate(tqdm(video, desc="Bodies", unit="frame", disable=not progress)):
        for number, face in enumerate(faces):
            if index % config.body_step or not face.present[index]:
                continue
            middle, side = _middle(face.boxes[index]), _side(face.boxes[index])
            crop, corner = _crop(frame, middle + np.array([0, 1.5 * side]), 3 * side)
            bodies = detector.detect(crop) if crop.size else []
            away = [float(np.abs(body.joints[0] + corner - middle).max()) / side for body in bodies]
            if away and min(away) < 0.6:
                body = bodies[int(np.argmin(away))]
                joints[number, index], visibility[number, index] = body.joints + corner, body.visibility
    return [BodyTrack(*arrays) for arrays in zip(joints, visibility, strict=True)]


def find_faces(
    detector: FaceDetector, picture: UInt8[np.ndarray, "H W 3"], *, around: Sequence[np.ndarray] = ()
) -> list[Face]:
    """All faces of a picture, the largest first, each looked at closely.

    In the whole picture a small or turned face is often not found, or its points are off; a second look, at
    the surroundings of its box alone, finds it and is right. One that fills the picture needs none.

    Args:
        detector: Finds faces.
        picture: RGB.
        around: Boxes `[4]` in whose surroundings faces may be, too.
    """
    far = detector.detect(picture)
    boxes = [*around, *(face.box for face in far if all(_leap(face.box, box) >= 1 for box in around))]
    near = []
    for box in boxes:
        if _NEARER * _side(box) >= min(picture.shape[:2]) and any(_leap(face.box, box) < 1 for face in far):
            continue
        crop, corner = _crop(picture, _middle(box), _NEARER / 2 * _side(box))
        shift = np.array([*corner, 0], np.float32)
        for face in detector.detect(crop) if crop.size else []:
            near.append(Face(face.points + shift, face.confidence, face.box + np.tile(corner, 2)))
    near.sort(key=lambda face: -face.confidence)
    kept: list[Face] = []
    for face in [*near, *far]:
        if all(_overlap(face.box, other.box) < 0.4 for other in kept):
            kept.append(face)
    return sorted(kept, key=lambda face: -_side(face.box))


class MediaPipeFaces(AbstractContextManager):
    """MediaPipe's FaceLandmarker, picture by picture, as a `FaceDetector`; a context, that it be closed.

    Its mode for videos is not used: there the faces that it follows may fall onto one another, and what it
    finds depends on what it saw before.
    """

    layout = MEDIAPIPE_FACE

    def __init__(self, config: LandmarkConfig):
        """Loads the model.

        Raises:
            ConfigError: MediaPipe or the model's file is missing, or the file is no such model.
        """
        self._min_side = config.min_side
        with _loading(config.face_model, _FACE_URL) as (vision, base_options), ExitStack() as opened:
            options = vision.FaceLandmarkerOptions(
                base_options=base_options(model_asset_path=config.face_model),
                num_faces=config.max_faces,
                min_face_detection_confidence=config.min_confidence,
                min_face_presence_confidence=config.min_confidence,
            )
            self._landmarker = opened.enter_context(vision.FaceLandmarker.create_from_options(options))
            # The landmarker does not tell how sure it is; the detector inside of it does.
            with zipfile.ZipFile(config.face_model) as bundle:
                detector = bundle.read("face_detector.tflite")
            options = vision.FaceDetectorOptions(
                base_options=base_options(model_asset_buffer=detector), min_detection_confidence=0.05
            )
            self._detector = opened.enter_context(vision.FaceDetector.create_from_options(options))
            self.detect(_BLANK)  # some of what MediaPipe prints comes with the first picture
            self._opened = opened.pop_all()

    def __exit__(self, *error: object) -> None:
        """Lets the model go; left open, MediaPipe prints a traceback when Python ends."""
        with _silent():
            self._opened.close()

    def detect(self, picture: UInt8[np.ndarray, "H W 3"]) -> list[Face]:
        """All faces, the largest first."""
        image, scale = _image(picture, self._min_side)
        found = self._landmarker.detect(image).face_landmarks
        if not found:
            return []
        sure = [
            (_box(detection.bounding_box), detection.categories[0].score)
            for detection in self._detector.detect(image).detections
        ]
        faces = []
        for landmarks in found:
            # Depth is in widths of the picture, as x is.
            unit = np.array([image.width, image.height, image.width])
            points = np.array([(p.x, p.y, p.z) for p in landmarks[:_MESH_POINTS]]) * unit
            box = np.concatenate([points[:, :2].min(axis=0), points[:, :2].max(axis=0)])
            confidence = max((score for other, score in sure if _overlap(box, other) > 0.3), default=0.0)
            points, box = (np.float32(x / scale) for x in (points, box))
            faces.append(Face(points, float(confidence), box))
        return sorted(faces, key=lambda face: -_side(face.box))


class MediaPipeBodies(AbstractContextManager):
    """MediaPipe's PoseLandmarker, picture by picture, as a `BodyDetector`; a context, that it be closed."""

    def __init__(self, config: LandmarkConfig):
        """Loads the model.

        Raises:
            ConfigError: MediaPipe or the model's file is missing, or the file is no such model.
        """
        self._min_side = config.min_side
        with _loading(config.pose_model, _POSE_URL) as (vision, base_options):
            options = vision.PoseLandmarkerOptions(
                base_options=base_options(model_asset_path=config.pose_model),
                num_poses=config.max_faces,
                min_pose_detection_confidence=config.min_confidence,
                min_pose_presence_confidence=config.min_confidence,
            )
            self._landmarker = vision.PoseLandmarker.create_from_options(options)
            self.detect(_BLANK)

    def __exit__(self, *error: object) -> None:
        """Lets the model go; left open, MediaPipe prints a traceback when Python ends."""
        with _silent():
            self._landmarker.close()

    def detect(self, picture: UInt8[np.ndarray, "H W 3"]) -> list[Body]:
        """All bodies."""
        image, scale = _image(picture, self._min_side)
        unit = np.array([image.width, image.height]) / scale
        bodies = []
        for landmarks in self._landmarker.detect(image).pose_landmarks:
            joints = [landmarks[i] for i in _MEDIAPIPE_JOINTS]
            points = np.array([(joint.x, joint.y) for joint in joints]) * unit
            visibility = np.array([joint.visibility for joint in joints], np.float32)
            bodies.append(Body(points.astype(np.float32), visibility))
        return bodies


@contextmanager
def _loading(model: str, address: str) -> Iterator[tuple[Any, Any]]:
    """MediaPipe's `vision` and `BaseOptions`; what goes wrong with a model in here becomes one line."""
    try:
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError as error:
        raise ConfigError(
            f"mediapipe cannot be imported ({error}); pip install 'fantasy_jax[prepare]'"
        ) from error
    if not Path(model).is_file():
        raise ConfigError(f"{model}: no such landmark model; get it from {address}")
    try:
        with _silent():
            yield vision, BaseOptions
    except (RuntimeError, ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{model}: not the landmark model that is meant; get that from {address}"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps MediaPipe from printing what concerns nobody while it loads or lets go; no setting does."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _image(picture: UInt8[np.ndarray, "H W 3"], min_side: int) -> tuple[Any, float]:
    """MediaPipe's image, and by how much it was enlarged."""
    from mediapipe import Image, ImageFormat

    scale = max(min_side / min(picture.shape[:2]), 1.0)
    if scale > 1:
        size = tuple(round(side * scale) for side in picture.shape[1::-1])
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    return Image(image_format=ImageFormat.SRGB, data=np.ascontiguousarray(picture)), scale


def _crop(
    picture: UInt8[np.ndarray, "H W 3"], middle: Float[np.ndarray, "2"], radius: float
) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "2"]]:
    """What of a square lies in the picture, and where its upper left corner is."""
    left, top = np.maximum(np.round(middle - radius), 0).astype(int)
    right, bottom = np.maximum(np.round(middle + radius), 0).astype(int)
    return picture[top:bottom, left:right], np.array([left, top], np.float32)


def _fill_gaps(track: dict[int, Face], count: int, max_gap: int, layout: FaceLayout) -> FaceTrack:
    """A track in all frames, short gaps interpolated linearly."""
    found = np.array(sorted(track))
    shape = track[found[0]].points.shape
    points, score = np.full((count, *shape), np.nan, np.float32), np.zeros(count, np.float32)
    present = np.zeros(count, bool)
    for first, last in zip(found, [*found[1:], found[-1]], strict=True):
        inside = range(first, last) if last - first - 1 <= max_gap and last > first else [first]
        for index in inside:
            share = (index - first) / max(last - first, 1)
            one, other = track[first], track[last]
            points[index] = (1 - share) * one.points + share * other.points
            score[index] = (1 - share) * one.confidence + share * other.confidence
            present[index] = True
    return FaceTrack(points, present, score, layout)


def _box(found: Any) -> Float[np.ndarray, "4"]:
    """MediaPipe's box as left, top, right, bottom."""
    left, top = found.origin_x, found.origin_y
    return np.array([left, top, left + found.width, top + found.height], np.float64)


def _middle(box: Float[np.ndarray, "4"]) -> Float[np.ndarray, "2"]:
    return (box[:2] + box[2:]) / 2


def _side(box: Float[np.ndarray, "4"]) -> float:
    return float((box[2:] - box[:2]).max())


def _leap(one: Float[np.ndarray, "4"], other: Float[np.ndarray, "4"]) -> float:
    """How far two boxes are apart, in sides of the larger one."""
    return float(np.abs(_middle(one) - _middle(other)).max()) / max(_side(one), _side(other))


def _overlap(one: Float[np.ndarray, "4"], other: Float[np.ndarray, "4"]) -> float:
    """Intersection over union."""
    inner = np.concatenate([np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])])
    area, first, second = (np.prod(np.maximum(box[2:] - box[:2], 0)) for box in (inner, one, other))
    return float(area / (first + second - area + 1e-9))
