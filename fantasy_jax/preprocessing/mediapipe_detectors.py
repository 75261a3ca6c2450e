"""MediaPipe's detectors of facial landmarks and body joints."""

import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fantasy_jax.errors import ConfigError
from fantasy_jax.preprocessing.boxes import box_iou, box_side
from fantasy_jax.preprocessing.landmarks import MEDIAPIPE_FACE, DetectedBody, DetectedFace, LandmarkConfig
from fantasy_jax.typing import Float, UInt8

_MESH_POINTS = 468
_MEDIAPIPE_JOINTS = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)
"""Indices of `JOINTS` among MediaPipe's 33 joints."""
_FACE_URL = (
    "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/"
    "face_landmarker.task"
)
_POSE_URL = (
    "https://storage.googleapis.com/mediapipe-models/pose_landmarker/pose_landmarker_full/float16/1/"
    "pose_landmarker_full.task"
)
_BLANK = np.zeros((64, 64, 3), np.uint8)


class MediaPipeFaces(AbstractContextManager):
    """MediaPipe's FaceLandmarker on single images, a `FaceDetector` and a context manager.

    MediaPipe's video mode is not used: its tracked faces may merge, and results depend on earlier frames.
    """

    layout = MEDIAPIPE_FACE

    def __init__(self, config: LandmarkConfig):
        """Loads the model.

        Raises:
            ConfigError: MediaPipe or the model file is missing, or the file is not such a model.
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
            # The landmarker does not return its confidence; the detector in its bundle does.
            with zipfile.ZipFile(config.face_model) as bundle:
                detector = bundle.read("face_detector.tflite")
            options = vision.FaceDetectorOptions(
                base_options=base_options(model_asset_buffer=detector), min_detection_confidence=0.05
            )
            self._detector = opened.enter_context(vision.FaceDetector.create_from_options(options))
            self.detect(_BLANK)  # MediaPipe prints some of its messages on the first image
            self._opened = opened.pop_all()

    def __exit__(self, *error: object) -> None:
        """Closes the model; otherwise MediaPipe prints a traceback when Python exits."""
        with _silenced():
            self._opened.close()

    def detect(self, image: UInt8[np.ndarray, "H W 3"]) -> list[DetectedFace]:
        """Returns all faces, the largest first."""
        converted, scale = _to_mediapipe(image, self._min_side)
        found = self._landmarker.detect(converted).face_landmarks
        if not found:
            return []
        scored = [
            (_to_box(detection.bounding_box), detection.categories[0].score)
            for detection in self._detector.detect(converted).detections
        ]
        faces = []
        for landmarks in found:
            # Depth is relative to the image's width, as x is.
            unit = np.array([converted.width, converted.height, converted.width])
            points = np.array([(p.x, p.y, p.z) for p in landmarks[:_MESH_POINTS]]) * unit
            box = np.concatenate([points[:, :2].min(axis=0), points[:, :2].max(axis=0)])
            confidence = max((score for other, score in scored if box_iou(box, other) > 0.3), default=0.0)
            points, box = (np.float32(x / scale) for x in (points, box))
            faces.append(DetectedFace(points, float(confidence), box))
        return sorted(faces, key=lambda face: -box_side(face.box))


class MediaPipeBodies(AbstractContextManager):
    """MediaPipe's PoseLandmarker on single images, a `BodyDetector` and a context manager."""

    def __init__(self, config: LandmarkConfig):
        """Loads the model.

        Raises:
            ConfigError: MediaPipe or the model file is missing, or the file is not such a model.
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
        """Closes the model; otherwise MediaPipe prints a traceback when Python exits."""
        with _silenced():
            self._landmarker.close()

    def detect(self, image: UInt8[np.ndarray, "H W 3"]) -> list[DetectedBody]:
        """Returns all bodies, in any order."""
        converted, scale = _to_mediapipe(image, self._min_side)
        unit = np.array([converted.width, converted.height]) / scale
        bodies = []
        for landmarks in self._landmarker.detect(converted).pose_landmarks:
            joints = [landmarks[i] for i in _MEDIAPIPE_JOINTS]
            points = np.array([(joint.x, joint.y) for joint in joints]) * unit
            visibility = np.array([joint.visibility for joint in joints], np.float32)
            bodies.append(DetectedBody(points.astype(np.float32), visibility))
        return bodies


@contextmanager
def _loading(model: str, url: str) -> Iterator[tuple[Any, Any]]:
    """Yields MediaPipe's `vision` and `BaseOptions`; errors of a model file become a ConfigError."""
    try:
        from mediapipe.tasks.python import BaseOptions, vision
    except ImportError as error:
        raise ConfigError(
            f"mediapipe cannot be imported ({error}); pip install 'fantasy_jax[prepare]'"
        ) from error
    if not Path(model).is_file():
        raise ConfigError(f"{model}: no such landmark model; download it from {url}")
    try:
        with _silenced():
            yield vision, BaseOptions
    except (RuntimeError, ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{model}: not the expected landmark model; download it from {url}") from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Discards what MediaPipe prints to stderr while loading and closing, which no setting disables."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _to_mediapipe(image: UInt8[np.ndarray, "H W 3"], min_side: int) -> tuple[Any, float]:
    """Returns MediaPipe's image, upscaled to `min_side`, and the scale."""
    from mediapipe import Image, ImageFormat

    scale = max(min_side / min(image.shape[:2]), 1.0)
    if scale > 1:
        size = tuple(round(side * scale) for side in image.shape[1::-1])
        image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    return Image(image_format=ImageFormat.SRGB, data=np.ascontiguousarray(image)), scale


def _to_box(found: Any) -> Float[np.ndarray, "4"]:
    """Converts MediaPipe's box to left, top, right, bottom."""
    left, top = found.origin_x, found.origin_y
    return np.array([left, top, left + found.width, top + found.height], np.float64)
