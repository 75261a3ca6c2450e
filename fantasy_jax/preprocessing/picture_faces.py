"""Faces of the picture that driving videos animate."""

from pathlib import Path

import numpy as np

from fantasy_jax.errors import MediaError
from fantasy_jax.preprocessing.boxes import box_center
from fantasy_jax.preprocessing.landmarks import FaceDetector, five_points
from fantasy_jax.preprocessing.tracking import find_faces
from fantasy_jax.typing import Float, UInt8


def find_people(
    image: UInt8[np.ndarray, "H W 3"], detector: FaceDetector, *, name: str | Path = "image"
) -> tuple[Float[np.ndarray, "N 4"], Float[np.ndarray, "N 5 2"]]:
    """Finds the faces of a picture, from left to right by their centre.

    Boxes that the user gives (`boxes.place_boxes`) need no detection.

    Args:
        image: RGB.
        detector: As of `driving.open_detector`.
        name: Name of the picture in messages.

    Returns:
        Left, top, right, bottom of the landmarks of each face, in pixels, which may lie outside of the
        picture; and the points of `landmarks.five_points`, x and y in pixels. Both float64.

    Raises:
        MediaError: There is no face.
    """
    faces = sorted(find_faces(detector, image), key=lambda face: float(box_center(face.box)[0]))
    if not faces:
        raise MediaError(
            f"{name}: no face found; use a picture that shows a face from the front, or give its box"
        )
    boxes = np.stack([face.box for face in faces]).astype(np.float64)
    points = np.stack([five_points(face.points, detector.layout) for face in faces]).astype(np.float64)
    return boxes, points
