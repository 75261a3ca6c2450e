"""Geometry of boxes `[left, top, right, bottom]` in pixels."""

import numpy as np

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
