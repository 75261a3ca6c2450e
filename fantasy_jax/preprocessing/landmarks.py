"""Types of facial landmarks and body joints, and the interfaces of their detectors.

A detector finds landmarks in single images; `tracking` assigns them to persons over the frames of a video.
`mediapipe_detectors` has MediaPipe's two detectors; another one, such as DWPose, implements `FaceDetector`
or `BodyDetector`.
"""

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import numpy as np

from fantasy_jax.config import Fraction, NonNegativeInt, PositiveInt, Range, Settings
from fantasy_jax.typing import Bool, Float, Float32, UInt8

JOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)
"""The joints of a body in the order of COCO; left and right are the person's own."""


@dataclass(frozen=True)
class FaceLayout:
    """Indices of a face detector's landmarks; left and right are the person's own.

    Attributes:
        outer_lips: Outer border of the lips, in order.
        inner_lips: Inner border of the lips, in order.
        right_eye: Border of the right eye, its two corners first.
        left_eye: Border of the left eye, likewise.
        nose_tip: Tip of the nose.
        mouth_corners: Right corner, left corner.
        lip_middles: Middles of the inner border on the upper and on the lower lip; None if the detector has
            no such landmarks.
        rigid: Landmarks that move with the head and hardly with the expression: forehead, temples, nose,
            corners of the eyes.
        outline_ends: Ends of the face's outline beside the right and the left ear.
        midline: Middle of the forehead, tip of the chin; None if the detector has no landmark on the
            forehead.
        eye_centers: Centre of the right and of the left eye; None if the detector has no such landmarks.
    """

    outer_lips: tuple[int, ...]
    inner_lips: tuple[int, ...]
    right_eye: tuple[int, ...]
    left_eye: tuple[int, ...]
    nose_tip: int
    mouth_corners: tuple[int, int]
    lip_middles: tuple[int, int] | None
    rigid: tuple[int, ...]
    outline_ends: tuple[int, int]
    midline: tuple[int, int] | None = None
    eye_centers: tuple[int, int] | None = None


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
    outline_ends=(234, 454),
    midline=(10, 152),
)
"""The 468 landmarks of MediaPipe's face mesh (its `face_landmarks_connections`)."""
# fmt: on


@dataclass(frozen=True)
class DetectedFace:
    """A face in one image.

    Attributes:
        points: Landmarks: x and y in pixels, and depth in the same unit, smaller nearer. They may lie outside
            of the image.
        confidence: In [0, 1].
        box: Left, top, right, bottom of the landmarks, in pixels.
        angles: Pitch and yaw in degrees, 0 for a face seen from the front; None if the detector does not
            estimate them.
    """

    points: Float32[np.ndarray, "P 3"]
    confidence: float
    box: Float32[np.ndarray, "4"]
    angles: Float32[np.ndarray, "2"] | None = None


@dataclass(frozen=True)
class DetectedBody:
    """A body in one image.

    Attributes:
        joints: x and y in pixels, in the order of `JOINTS`.
        visibility: Of each joint, in [0, 1]; low where it is occluded or outside of the image.
    """

    joints: Float32[np.ndarray, "17 2"]
    visibility: Float32[np.ndarray, "17"]


@dataclass(frozen=True)
class FaceTrack:
    """The face of one person in all frames of a clip.

    Attributes:
        points: Landmarks as in `DetectedFace`, for every frame; NaN where the face is absent.
        present: Whether the face is detected, or interpolated over a short gap.
        score: Confidence of the detector, interpolated likewise; 0 where the face is absent.
        layout: Indices of the landmarks.
    """

    points: Float32[np.ndarray, "T P 3"]
    present: Bool[np.ndarray, " T"]
    score: Float32[np.ndarray, " T"]
    layout: FaceLayout

    @property
    def boxes(self) -> Float32[np.ndarray, "T 4"]:
        """Left, top, right, bottom in every frame; NaN where the face is absent."""
        return np.concatenate([self.points[..., :2].min(axis=1), self.points[..., :2].max(axis=1)], axis=1)

    @property
    def size(self) -> float:
        """Mean of the longer side of the box, in pixels."""
        boxes = self.boxes[self.present]
        return float((boxes[:, 2:] - boxes[:, :2]).max(axis=1).mean())


@dataclass(frozen=True)
class BodyTrack:
    """The body of one person in all frames of a clip.

    Attributes:
        joints: As in `DetectedBody`, for every frame; NaN where it is not detected or was not searched.
        visibility: Of each joint; 0 in these frames.
    """

    joints: Float32[np.ndarray, "T 17 2"]
    visibility: Float32[np.ndarray, "T 17"]


@runtime_checkable
class FaceDetector(Protocol):
    """Detects the faces in an image."""

    layout: FaceLayout

    def detect(self, image: UInt8[np.ndarray, "H W 3"]) -> list[DetectedFace]:
        """Returns all faces of an RGB image, the largest first."""
        ...


@runtime_checkable
class BodyDetector(Protocol):
    """Detects the bodies in an image."""

    def detect(self, image: UInt8[np.ndarray, "H W 3"]) -> list[DetectedBody]:
        """Returns all bodies of an RGB image, in any order."""
        ...


@dataclass(frozen=True)
class LandmarkConfig(Settings):
    """Settings of detection and tracking.

    Attributes:
        face_model: MediaPipe's FaceLandmarker, a .task file.
        pose_model: MediaPipe's PoseLandmarker, a .task file.
        max_faces: Maximum number of faces in an image.
        min_confidence: Of detection and of landmarks, in [0, 1]; MediaPipe's default.
        min_side: Images whose shorter side has fewer pixels are upscaled to it: in images of 64 pixels the
            landmarks would otherwise be off by a tenth of the face.
        max_gap: Longest gap of a face's detections that is interpolated, in frames; a hand passing in front
            of a face takes about as long.
        min_frames: Tracks with fewer detections are dropped as false detections.
        body_step: Bodies are searched in every `body_step`-th frame: a search takes three times as long as
            one for faces, and the variance over a clip needs no more.
    """

    face_model: str = "models/face_landmarker.task"
    pose_model: str = "models/pose_landmarker.task"
    max_faces: Annotated[int, Range(1, 1000)] = 4
    min_confidence: Fraction = 0.5
    min_side: Annotated[int, Range(1, 8192)] = 512
    max_gap: NonNegativeInt = 5
    min_frames: PositiveInt = 5
    body_step: PositiveInt = 3


def five_points(points: Float[np.ndarray, "*n P C"], layout: FaceLayout) -> Float[np.ndarray, "*n 5 2"]:
    """Returns ArcFace's alignment points: centres of the eyes, tip of the nose, corners of the mouth.

    In ArcFace's order the eye and the mouth corner that are left in the image of an upright face come first.
    The centre of an eye is the layout's landmark for it; without one it is the mean of the eye's corners,
    which blinking does not move.
    """
    points = points[..., :2]
    if layout.eye_centers:
        eyes = [points[..., i, :] for i in layout.eye_centers]
    else:
        eyes = [points[..., list(eye[:2]), :].mean(axis=-2) for eye in (layout.right_eye, layout.left_eye)]
    rest = [points[..., i, :] for i in (layout.nose_tip, *layout.mouth_corners)]
    return np.stack([*eyes, *rest], axis=-2)
