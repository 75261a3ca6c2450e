"""Faces of the picture that driving videos animate."""

import numpy as np

from fantasy_jax.preprocessing.boxes import box_center
from fantasy_jax.preprocessing.landmarks import FaceDetector, five_points
from fantasy_jax.preprocessing.tracking import find_faces
from fantasy_jax.typing import Float, UInt8


def find_people(
    image: UInt8[np.ndarray, "H W 3"], detector: FaceDetector
) -> tuple[Float[np.ndarray, "N 4"], Float[np.ndarray, "N 5 2"]]:
    """Finds the faces of a picture, from left to right by their centre.

    Boxes that the user gives (`boxes.place_boxes`) need no detection.

    Args:
        image: RGB.
        detector: As of `driving.open_detector`.

    Returns:
        Left, top, right, bottom of the landmarks of each face, in pixels, which may lie outside of the
        picture; and the points of `landmarks.five_points`, x and y in pixels. Both float64, and empty if
        there is no face.
    """
    faces = sorted(find_faces(detector, image), key=lambda face: float(box_center(face.box)[0]))
    boxes = np.array([face.box for face in faces], np.float64).reshape(-1, 4)
    points = [five_points(face.points, detector.layout) for face in faces]
    return boxes, np.array(points, np.float64).reshape(-1, 5, 2)
