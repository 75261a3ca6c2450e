"""Geometry of boxes `[left, top, right, bottom]` in pixels."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from fantasy_jax.errors import ConfigError
from fantasy_jax.typing import Float, UInt8


def box_center(box: Float[np.ndarray, "4"]) -> Float[np.ndarray, "2"]:
    """Returns x and y of the centre."""
    return (box[:2] + box[2:]) / 2


def box_side(box: Float[np.ndarray, "4"]) -> float:
    """Returns the longer side."""
    return float((box[2:] - box[:2]).max())


def box_distance(one: Float[np.ndarray, "4"], other: Float[np.ndarray, "4"]) -> float:
    """Returns the Chebyshev distance of the centres, in sides of the larger box."""
    return float(np.abs(box_center(one) - box_center(other)).max()) / max(box_side(one), box_side(other))


def box_iou(one: Float[np.ndarray, "4"], other: Float[np.ndarray, "4"]) -> float:
    """Returns the intersection over union."""
    inner = np.concatenate([np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])])
    area, first, second = (np.prod(np.maximum(box[2:] - box[:2], 0)) for box in (inner, one, other))
    return float(area / (first + second - area + 1e-9))


def crop_square(
    image: UInt8[np.ndarray, "H W 3"], center: Float[np.ndarray, "2"], radius: float
) -> tuple[UInt8[np.ndarray, "h w 3"], Float[np.ndarray, "2"]]:
    """Crops the part of a square that lies in the image.

    Args:
        image: RGB.
        center: x and y of the square's centre.
        radius: Half the square's side.

    Returns:
        The crop, which may be empty, and x and y of its upper left corner.
    """
    left, top = np.maximum(np.round(center - radius), 0).astype(int)
    right, bottom = np.maximum(np.round(center + radius), 0).astype(int)
    return image[top:bottom, left:right], np.array([left, top], np.float32)


def parse_box(text: str, *, option: str) -> Float[np.ndarray, "4"]:
    """Parses a box that is given on the command line.

    Args:
        text: Left, top, right, bottom, as fractions of the image's width and height, separated by commas.
        option: Name of the option in messages.

    Returns:
        The four fractions.

    Raises:
        ConfigError: These are not four numbers, or the box is empty or not inside of the image.
    """
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option}={text}: give four fractions, as in {option}=0.2,0.1,0.8,0.9") from error
    box = np.array([left, top, right, bottom])
    _check_inside(box, f"{option}={text}")
    return box


def place_boxes(
    boxes: Sequence[Float[np.ndarray, "4"]], height: int, width: int, *, option: str
) -> Float[np.ndarray, "N 4"]:
    """Converts boxes of different people from fractions of an image to pixels.

    Args:
        boxes: Left, top, right, bottom as fractions of the image, as of `parse_box`.
        height: Of the image, in pixels.
        width: Likewise.
        option: Name of the option in messages.

    Returns:
        Left, top, right, bottom in pixels, in the given order.

    Raises:
        ConfigError: Two boxes overlap, or one is empty or not inside of the image.
    """
    for number, box in enumerate(boxes, 1):
        _check_inside(box, f"{option}: box {number}")
    placed = np.array(boxes, np.float64).reshape(-1, 4) * (width, height, width, height)
    for first, second in combinations(range(len(placed)), 2):
        if box_iou(placed[first], placed[second]) > 0:
            raise ConfigError(
                f"{option}: boxes {first + 1} and {second + 1} overlap; give boxes that have no common area"
            )
    return placed


def _check_inside(box: Float[np.ndarray, "..."], name: str) -> None:
    """Raises a ConfigError unless a box, as fractions, has an area and lies in the image."""
    if box.shape != (4,) or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ConfigError(f"{name}: must satisfy 0 <= left < right <= 1 and 0 <= top < bottom <= 1")
