"""Detection, alignment and cropping of faces for ArcFace, by five points.

Source: insightface, `python-package/insightface/utils/face_align.py`.
"""

import logging

import cv2
import numpy as np
from PIL import Image

from fantasy_jax.errors import MediaError
from fantasy_jax.preprocessing.alignment import fit_similarity
from fantasy_jax.preprocessing.landmarks import LandmarkConfig, five_points
from fantasy_jax.preprocessing.mediapipe_detectors import MediaPipeFaces
from fantasy_jax.preprocessing.tracking import find_faces
from fantasy_jax.typing import Float, UInt8

CROP_SIZE = 112
"""Side of ArcFace's crops, in pixels."""

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Positions of `landmarks.five_points` in a crop of this size."""


def find_face(
    image: Image.Image, config: LandmarkConfig, *, number: int | None = None, name: str = "image"
) -> Float[np.ndarray, "5 2"] | None:
    """Finds the face of an image.

    Args:
        image: RGB.
        config: Settings of the detector.
        number: Number of the face, from 1, counted from the left; None selects the largest face and logs a
            warning if there are several.
        name: Name of the image in messages.

    Returns:
        The five points that `crop_face` takes, or None if there is no face.

    Raises:
        ConfigError: The detector's model is missing.
        MediaError: There are fewer than `number` faces.
    """
    with MediaPipeFaces(config) as detector:
        faces, layout = find_faces(detector, np.asarray(image)), detector.layout
    if number is None:
        if len(faces) > 1:
            logging.getLogger(__name__).warning(
                "%s: shows %d faces; the largest is used; sample.face selects another, counted from the left",
                name,
                len(faces),
            )
        return five_points(faces[0].points, layout) if faces else None
    if len(faces) < number:
        raise MediaError(f"{name}: shows {len(faces)} faces, but sample.face is {number}")
    return five_points(sorted(faces, key=lambda face: face.box[0])[number - 1].points, layout)


def crop_face(
    image: Image.Image | UInt8[np.ndarray, "H W 3"],
    points: Float[np.ndarray, "5 2"] | None,
    size: int = CROP_SIZE,
    *,
    name: str = "image",
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Aligns and crops a face as ArcFace expects it; areas outside of the image are black.

    Args:
        image: RGB.
        points: x and y in pixels, in the order of `TEMPLATE`; None if no face was found.
        size: Side of the crop, in pixels.
        name: Name of the image in messages.

    Raises:
        MediaError: There is no face, or part of it lies outside of the image.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    if points is None or not np.isfinite(points).all():
        raise MediaError(f"{name}: no face found; use an image that shows a face from the front")
    if (points < 0).any() or (points > (width - 1, height - 1)).any():
        raise MediaError(f"{name}: the face is partly outside the image; use one that shows the whole face")
    if np.ptp(points, axis=0).max() < 1:
        raise MediaError(f"{name}: the face is smaller than a pixel; use an image with a larger face")
    matrix = fit_similarity(points, TEMPLATE * (size / CROP_SIZE))
    return cv2.warpAffine(pixels, matrix, (size, size), flags=cv2.INTER_LINEAR)


def points_in_box(box: Float[np.ndarray, "4"]) -> Float[np.ndarray, "5 2"]:
    """Estimates the five points of a head that faces the camera, for drawings that no detector recognises.

    Args:
        box: Left, top, right, bottom of the head, from hair to chin, in pixels.
    """
    center, half = (box[2:] + box[:2]) / 2, (box[2:] - box[:2]) / 2
    places = [[-0.38, -0.17], [0.38, -0.17], [0.0, 0.26], [-0.3, 0.53], [0.3, 0.53]]
    return (center + np.array(places) * half).astype(np.float32)
