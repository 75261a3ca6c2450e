"""Faces that are drawn as squares, and a detector that finds them, for tests without MediaPipe."""

import contextlib

import numpy as np

from fantasy_jax.preprocessing.landmarks import MEDIAPIPE_FACE, DetectedFace

SIDE = 30
"""Of a square, in pixels."""
RELATIVE = np.random.default_rng(0).uniform(0.1, 0.9, (468, 2))
RELATIVE[[33, 133, 362, 263]] = (0.2, 0.3), (0.4, 0.3), (0.6, 0.3), (0.8, 0.3)
RELATIVE[[1, 61, 291]] = (0.5, 0.5), (0.3, 0.7), (0.7, 0.7)


class Squares:
    """Detects squares, one for each level of green; landmarks have fixed places in them.

    Those below 30 pixels are cut off by the border of a close-up.
    """

    layout = MEDIAPIPE_FACE

    def detect(self, image):
        faces = []
        for level in np.unique(image[..., 1][image[..., 1] > 0]):
            rows, columns = np.nonzero(image[..., 1] == level)
            box = np.float32([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            if (box[2:] - box[:2] < SIDE).any():
                continue
            points = np.hstack([box[:2] + RELATIVE * (box[2:] - box[:2]), np.zeros((468, 1))])
            faces.append(DetectedFace(points.astype(np.float32), 0.9, box))
        return sorted(faces, key=lambda face: -float(face.box[2] - face.box[0]))


def open_squares(config, own=None):
    """Takes the place of `driving.open_detector`."""
    del config, own
    return contextlib.nullcontext(Squares())


def clip(*people, frames=20, height=120, side=SIDE):
    """Draws squares.

    Args:
        people: Level of green, and left edge: a number, or a function that gives it, or None, in every frame.
        frames: Number of frames.
        height: Of the video, which is 320 pixels wide.
        side: Of the squares.
    """
    video = np.zeros((frames, height, 320, 3), np.uint8)
    for level, left in people:
        for index in range(frames):
            place = left(index) if callable(left) else left
            if place is not None:
                video[index, 40 : 40 + side, place : place + side] = (9, level, 9)
    return video
