"""Who is where in the picture: boxes of faces, and the person that each video token shows.

Source: fantasy-portrait, `utils.py` and `infer_multi.py`.
"""

from collections.abc import Sequence

import numpy as np

from fantasy_jax.preprocessing.boxes import box_center
from fantasy_jax.typing import Float, Int, UInt8
from fantasy_jax.video import PIXELS_PER_TOKEN

MAX_GROWTH = 0.25
"""Largest growth of a box on each side, in widths or heights of the face."""


def reading_order(boxes: Float[np.ndarray, "N 4"]) -> list[int]:
    """Indices of boxes from left to right, by their centres."""
    return [int(i) for i in np.argsort([box_center(box)[0] for box in boxes], kind="stable")]


def box_growth(boxes: Float[np.ndarray, "T 4"]) -> Float[np.ndarray, "4"]:
    """How far a driving face moves beyond its first box: left, up, right, down, in sizes of that box.

    Each is between 0 and 0.25.

    Args:
        boxes: Left, top, right, bottom in each frame.
    """
    first = boxes[0]
    width, height = first[2] - first[0], first[3] - first[1]
    outwards = np.array([first[:2] - boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0) - first[2:]])
    return np.clip((outwards / [width, height]).reshape(-1), 0, MAX_GROWTH)


def grow_box(
    box: Float[np.ndarray, "4"], growth: Float[np.ndarray, "4"], height: int, width: int
) -> Int[np.ndarray, "4"]:
    """A face's box in the picture, grown as its driver moves, rounded down and clipped to the picture.

    Args:
        box: Left, top, right, bottom in pixels.
        growth: From `box_growth`.
        height: Height of the picture.
        width: Its width.
    """
    box = box.astype(int)
    outwards = growth * np.tile(box[2:] - box[:2], 2) * [-1, -1, 1, 1]
    return np.clip((box + outwards).astype(int), 0, [width, height, width, height])


def paint_labels(boxes: Int[np.ndarray, "N 4"], height: int, width: int) -> UInt8[np.ndarray, "H W"]:
    """The person of each pixel: n for the n-th box, 0 for the background; later boxes cover earlier ones."""
    labels = np.zeros((height, width), np.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes, 1):
        labels[top:bottom, left:right] = number
    return labels


def people_labels(
    boxes: Float[np.ndarray, "N 4"],
    growths: Sequence[Float[np.ndarray, "4"]],
    size: tuple[int, int],
    num_latent_frames: int,
) -> Int[np.ndarray, "F S"]:
    """The person of each video token, from the faces' boxes.

    Args:
        boxes: Left, top, right, bottom in pixels of the picture.
        growths: Of each box, as of `box_growth`.
        size: Height and width of the picture, multiples of 16.
        num_latent_frames: Latent frames F.
    """
    grown = [grow_box(box, growth, *size) for box, growth in zip(boxes, growths, strict=True)]
    return token_labels(paint_labels(np.stack(grown), *size), num_latent_frames)


def token_labels(labels: UInt8[np.ndarray, "H W"], num_latent_frames: int) -> Int[np.ndarray, "F S"]:
    """The person of each video token: the largest label of its pixels, the same in every latent frame.

    Args:
        labels: From `paint_labels`; height and width are multiples of 16.
        num_latent_frames: Latent frames F.
    """
    rows, columns = (side // PIXELS_PER_TOKEN for side in labels.shape)
    tokens = labels.reshape(rows, PIXELS_PER_TOKEN, columns, PIXELS_PER_TOKEN).max(axis=(1, 3))
    return np.tile(tokens.reshape(-1).astype(np.int32), (num_latent_frames, 1))
