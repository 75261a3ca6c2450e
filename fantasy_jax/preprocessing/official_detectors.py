"""FantasyPortrait's own face detector and landmark network, two ONNX files that onnxruntime runs.

Source: fantasy-portrait, `diffsynth/models/{face_det,face_align,face_utils}.py`, which are HelloMeme's. The
files, `face_det.onnx` and `face_landmark.onnx`, are optional: MediaPipe's detector does without them. The
functions of the pre- and postprocessing need neither onnxruntime nor the files.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.special import softmax

from fantasy_jax.errors import ConfigError
from fantasy_jax.preprocessing.alignment import apply_affine
from fantasy_jax.preprocessing.boxes import box_iou, box_side
from fantasy_jax.preprocessing.landmarks import DetectedFace, FaceLayout
from fantasy_jax.typing import Float, Float32, Int, UInt8

OFFICIAL_FACE = FaceLayout(
    outer_lips=tuple(range(118, 150)),
    inner_lips=tuple(range(150, 182)),
    right_eye=(74, 85, *range(75, 85), *range(86, 96)),
    left_eye=(96, 107, *range(97, 107), *range(108, 118)),
    nose_tip=36,
    mouth_corners=(149, 133),
    lip_middles=(157, 173),
    rigid=(*range(33, 48), 74, 96),
    outline_ends=(0, 32),
    eye_centers=(182, 202),
)
"""The 222 landmarks of the official network.

Read from the official code: the groups, tip of the nose, corners of the mouth, centres and outer corners of
the eyes, and ends of the outline. Inner corners of the eyes and middles of the lips are assumed to lie
opposite in the sequence of their contour.
"""

INPUT_SIZE = (272, 160)
"""Height and width of the detector's input, in pixels."""
CROP_SIZE = 128
"""Side of the landmark network's input, in pixels."""
_STRIDES = (8, 16, 32)
_BINS = 8
_MEAN, _STD = np.float32([103.53, 116.28, 123.675]), np.float32([57.375, 57.12, 58.395])
_MIN_SCORE, _MAX_IOU, _MAX_CANDIDATES = 0.4, 0.3, 200
_MIN_PROBABILITY = 1e-4
_FACE_IN_CROP = 0.85
"""Longer side of the face in the crop, as a fraction of the crop."""
_PASSES = 3


def resize_matrix(height: int, width: int, size: tuple[int, int] = INPUT_SIZE) -> Float[np.ndarray, "3 3"]:
    """Returns the matrix that fits an image into the detector's input, centred and with its aspect ratio.

    Args:
        height: Of the image, in pixels.
        width: Likewise.
        size: Height and width of the input, in pixels.
    """
    scale = min(size[0] / height, size[1] / width)
    return np.array(
        [
            [scale, 0, size[1] / 2 - scale * width / 2],
            [0, scale, size[0] / 2 - scale * height / 2],
            [0, 0, 1],
        ]
    )


def detector_input(image: UInt8[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "1 3 272 160"]:
    """Returns the detector's input for an RGB image: BGR, normalised, black beside the image."""
    matrix = resize_matrix(*image.shape[:2])
    resized = cv2.warpPerspective(_bgr(image), matrix, INPUT_SIZE[::-1])
    normalised = (resized.astype(np.float32) / 255 - _MEAN / 255) / (_STD / 255)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None])


def decode_boxes(
    scores: Sequence[Float[np.ndarray, "_ 1"]],
    distances: Sequence[Float[np.ndarray, "_ 32"]],
    height: int,
    width: int,
) -> tuple[Int[np.ndarray, "N 4"], Float[np.ndarray, " N"]]:
    """Decodes the detector's output.

    Every cell predicts the distances of a box's four sides from its corner, each as the mean of a softmax
    over 8 bins, in strides.

    Args:
        scores: Score of every cell, row by row, for the strides 8, 16 and 32.
        distances: Logits of left, top, right and bottom, likewise.
        height: Of the image, in pixels.
        width: Likewise.

    Returns:
        Boxes in whole pixels of the image, clipped to it, and their scores, the highest first.
    """
    boxes = [_cell_boxes(*of_stride) for of_stride in zip(_STRIDES, distances, strict=True)]
    found, confidence = np.concatenate(boxes), np.concatenate(scores)[:, 0]
    certain = confidence > _MIN_SCORE
    found, confidence = found[certain], confidence[certain]
    kept = suppress_overlaps(found, confidence)
    corners = apply_affine(np.linalg.inv(resize_matrix(height, width))[:2], found[kept].reshape(-1, 2))
    corners = corners.clip(0, (width, height)).reshape(-1, 4)
    # The official code rounds to float32 before it truncates.
    return corners.astype(np.float32).astype(np.int32), confidence[kept].astype(np.float64)


def _cell_boxes(stride: int, distances: Float[np.ndarray, "N 32"]) -> Float[np.ndarray, "N 4"]:
    """Returns the boxes of all cells of a stride, in pixels of the input."""
    rows, columns = (np.arange(side / stride) * stride for side in INPUT_SIZE)
    x, y = np.meshgrid(columns, rows)
    corners = np.stack([x, y, x, y], axis=-1).reshape(-1, 4)
    bins = softmax(distances.reshape(len(corners), 4, _BINS), axis=-1)
    return corners + np.array([-1, -1, 1, 1]) * (bins * np.arange(_BINS)).sum(axis=-1) * stride


def suppress_overlaps(boxes: Float[np.ndarray, "N 4"], scores: Float[np.ndarray, " N"]) -> list[int]:
    """Greedy non-maximum suppression at an intersection over union of 0.3.

    Returns:
        Indices of the boxes that remain, the highest score first.
    """
    kept: list[int] = []
    for index in np.argsort(scores)[-_MAX_CANDIDATES:][::-1]:
        if all(box_iou(boxes[index], boxes[other]) <= _MAX_IOU for other in kept):
            kept.append(int(index))
    return kept


def crop_matrix_from_box(
    box: Float[np.ndarray, "4"] | Int[np.ndarray, "4"], size: int = CROP_SIZE
) -> Float[np.ndarray, "2 3"]:
    """Returns the matrix of the landmark network's crop around a box, without rotation.

    Args:
        box: Left, top, right, bottom in pixels.
        size: Side of the crop, in pixels.
    """
    box = np.asarray(box, np.float64)
    scale = size / box_side(box) * _FACE_IN_CROP
    shift = size / 2 - scale * (box[:2] + box[2:]) / 2
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])


def crop_matrix_from_landmarks(
    points: Float[np.ndarray, "222 2"], size: int = CROP_SIZE
) -> Float[np.ndarray, "2 3"]:
    """Returns the matrix of the landmark network's crop around landmarks, with the eyes level.

    Args:
        points: The 222 landmarks, x and y in pixels.
        size: Side of the crop, in pixels.
    """
    points = np.asarray(points, np.float64)
    x, y = points[96] - points[74]
    # Added as in the official code, so that the results are equal.
    angle = np.arctan2(y, x + 1e-8)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    turned = points @ turn.T
    low, high = turned.min(axis=0), turned.max(axis=0)
    scale = size / (high - low).max() * _FACE_IN_CROP
    return np.hstack([scale * turn, (size / 2 - scale * (low + high) / 2)[:, None]])


class OfficialFaces(AbstractContextManager):
    """The two official networks on single images, a `FaceDetector` and a context manager.

    Every face's landmarks come from three passes, each on a crop around the landmarks of the one before.
    Unlike the official tracker it keeps faces of less than 96 pixels and faces whose boxes overlap slightly.
    """

    layout = OFFICIAL_FACE

    def __init__(self, detection_model: str, landmark_model: str):
        """Loads the networks on the CPU.

        Args:
            detection_model: `face_det.onnx`.
            landmark_model: `face_landmark.onnx`.

        Raises:
            ConfigError: onnxruntime or a file is missing, or a file is not such a network.
        """
        self._detector = _open_session(detection_model, outputs=6)
        self._landmarks = _open_session(landmark_model, outputs=3)

    def __exit__(self, *error: object) -> None:
        """Releases the networks."""
        del self._detector, self._landmarks

    def detect(self, image: UInt8[np.ndarray, "H W 3"]) -> list[DetectedFace]:
        """Returns all faces, the largest first; depth is 0."""
        outputs = _run(self._detector, detector_input(image))
        scores = [x.reshape(-1, 1) for x in outputs[:3]]
        distances = [x.reshape(-1, 4 * _BINS) for x in outputs[3:]]
        boxes, confidences = decode_boxes(scores, distances, *image.shape[:2])
        faces = [
            self._refine(image, box, confidence)
            for box, confidence in zip(boxes, confidences, strict=True)
            if (box[2:] > box[:2]).all()
        ]
        return sorted((face for face in faces if face), key=lambda face: -box_side(face.box))

    def _refine(
        self, image: UInt8[np.ndarray, "H W 3"], box: Int[np.ndarray, "4"], confidence: float
    ) -> DetectedFace | None:
        """Returns the face in a box, or None if the landmark network does not see one."""
        matrix = crop_matrix_from_box(box)
        for _ in range(_PASSES):
            crop = cv2.warpAffine(_bgr(image), matrix, (CROP_SIZE, CROP_SIZE))
            given = crop.transpose(2, 0, 1)[None].astype(np.float32) / 255
            landmarks, angles, probability = _run(self._landmarks, given)
            points = landmarks[0].reshape(2, -1).T.astype(np.float64) * CROP_SIZE
            points = apply_affine(cv2.invertAffineTransform(matrix), points)
            matrix = crop_matrix_from_landmarks(points)
        if float(np.ravel(probability)[0]) < _MIN_PROBABILITY:
            return None
        flat = np.concatenate([points, np.zeros((len(points), 1))], axis=1).astype(np.float32)
        around = np.concatenate([points.min(axis=0), points.max(axis=0)]).astype(np.float32)
        return DetectedFace(flat, float(confidence), around, np.rad2deg(angles[0, :2]).astype(np.float32))


def _bgr(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    return cv2.cvtColor(image, cv2.COLOR_RGB2BGR)


def _open_session(model: str, *, outputs: int) -> Any:
    """Returns an ONNX session; errors of the package or of the file become a ConfigError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"onnxruntime cannot be imported ({error}); pip install 'fantasy_jax[prepare]'"
        ) from error
    if not Path(model).is_file():
        raise ConfigError(f"{model}: no such face model; give the file of the official release")
    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    except Exception as error:  # the classes of onnxruntime's errors have no common base
        raise ConfigError(f"{model}: not a readable ONNX file; download it again") from error
    if len(session.get_outputs()) != outputs:
        raise ConfigError(
            f"{model}: has {len(session.get_outputs())} outputs, not {outputs}; give the official file"
        )
    return session


def _run(session: Any, value: Float32[np.ndarray, "1 3 _ _"]) -> list[np.ndarray]:
    return session.run(None, {session.get_inputs()[0].name: value})
