"""Faces as ArcFace takes them: found, turned upright, scaled and cut, by five points.

Source: insightface, `python-package/insightface/utils/face_align.py`.
"""

import logging

import cv2
import numpy as np
from PIL import Image

from fantasy_jax.data.landmarks import LandmarkConfig, MediaPipeFaces, find_faces, five_points
from fantasy_jax.media import MediaError
from fantasy_jax.typing import Float, UInt8

CROP_SIZE = 112
"""Side of ArcFace's crops, in pixels."""

TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where the points lie in such a crop: the eyes' middles, the nose's tip, the mouth's corners."""


def find_face(
    picture: Image.Image, config: LandmarkConfig, *, number: int | None = None, name: str = "picture"
) -> Float[np.ndarray, "5 2"] | None:
    """Five points of a picture's face, as `crop_face` takes them; None where there is no face.

    Args:
        picture: RGB.
        config: Of the detector.
        number: Which of several, from 1, counted from the left; None takes the largest, and says so.
        name: What the picture is called in messages.

    Raises:
        ConfigError: The detector's model is missing.
        MediaError: There are not that many faces.
    """
    with MediaPipeFaces(config) as detector:
        faces, layout = find_faces(detector, np.asarray(picture)), detector.layout
    if number is None:
        if len(faces) > 1:
            told = "the largest is taken; sample.face takes another, counted from the left"
            logging.getLogger(__name__).warning("%s: shows %d faces; %s", name, len(faces), told)
        return five_points(faces[0].points, layout) if faces else None
    if len(faces) < number:
        raise MediaError(f"{name}: shows {len(faces)} faces, and number {number} is wanted; set sample.face")
    return five_points(sorted(faces, key=lambda face: face.box[0])[number - 1].points, layout)


def crop_face(
    picture: Image.Image | UInt8[np.ndarray, "H W 3"],
    points: Float[np.ndarray, "5 2"] | None,
    size: int = CROP_SIZE,
    *,
    name: str = "picture",
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The face that five points belong to, where ArcFace expects it; what lies outside the picture is black.

    Args:
        picture: RGB.
        points: x and y in pixels of what `TEMPLATE` has, in its order; None: nobody was found.
        size: Sides of the crop, in pixels.
        name: What the picture is called in messages.

    Raises:
        MediaError: There is no face, or part of it lies outside the picture.
    """
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    if points is None or not np.isfinite(points).all():
        raise MediaError(f"{name}: no face is found; take one that shows a face from the front")
    if (points < 0).any() or (points > (width - 1, height - 1)).any():
        raise MediaError(f"{name}: the face is partly outside the picture; take one that shows all of it")
    if np.ptp(points, axis=0).max() < 1:
        raise MediaError(f"{name}: the face is smaller than a pixel; take one that shows it larger")
    matrix = similarity(points, TEMPLATE * (size / CROP_SIZE))
    return cv2.warpAffine(pixels, matrix, (size, size), flags=cv2.INTER_LINEAR)


def points_in_box(box: Float[np.ndarray, "4"]) -> Float[np.ndarray, "5 2"]:
    """Where the five points are to be expected in a head that looks straight ahead.

    For drawings, in which no detector sees a face.

    Args:
        box: Left, top, right, bottom of the head, from hair to chin, in pixels.
    """
    middle, half = (box[2:] + box[:2]) / 2, (box[2:] - box[:2]) / 2
    places = [[-0.38, -0.17], [0.38, -0.17], [0.0, 0.26], [-0.3, 0.53], [0.3, 0.53]]
    return (middle + np.array(places) * half).astype(np.float32)


def similarity(
    source: Float[np.ndarray, "P 2"], target: Float[np.ndarray, "P 2"]
) -> Float[np.ndarray, "2 3"]:
    """Rotation, scale and shift that bring points nearest to others, in the least squares (Umeyama 1991).

    As complex numbers the points are a line, `target = a source + b`; a mirror image is none.
    """
    z, w = (np.asarray(points, np.float64) @ [1, 1j] for points in (source, target))
    a = np.vdot(z - z.mean(), w - w.mean()) / np.vdot(z - z.mean(), z - z.mean())
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
