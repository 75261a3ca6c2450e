"""Masks of faces for dubbing: outlines, their pixels, their latents, and pasting with a soft edge.

A mask of the lips alone is too small for latents of 8 x 8 pixels, which then keep the old mouth, and it holds
the chin in place; `mouth` is therefore the lower face, from the bridge of the nose to below the chin.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from fantasy_jax.preprocessing.landmarks import FaceLayout, five_points
from fantasy_jax.typing import Bool, Float, UInt8
from fantasy_jax.video import PIXELS_PER_LATENT, by_latent_frame

MaskMode = Literal["mouth", "face", "none"]
"""What is generated: the lower face, the whole face, or the whole crop around it."""
MASK_MODES: tuple[MaskMode, ...] = ("mouth", "face", "none")

_MARGIN = 0.08
"""How far an outline lies outside the landmarks, in heights of the face: the jaw must be free to move."""
_CORNERS = 32
"""Corners of an outline's rounding, and of the ellipse of a box."""
_BRIDGE = 0.0
"""Height of the bridge of the nose in the box of a head, from -1 at the hair to 1 at the chin."""
_SHIFT = 4
"""Bits of OpenCV's fractional coordinates."""


@dataclass(frozen=True)
class Square:
    """A square part of a frame.

    Attributes:
        left: Its first column.
        top: Its first row.
        side: Its rows and columns.
    """

    left: int
    top: int
    side: int

    def cut(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "side side 3"]:
        """The pixels of the square, a view of the frame."""
        return frame[self.top : self.top + self.side, self.left : self.left + self.side]

    def local(self, points: Float[np.ndarray, "*n 2"]) -> Float[np.ndarray, "*n 2"]:
        """Points of the frame, x and y, relative to the square's corner."""
        return points - np.array([self.left, self.top], points.dtype)


def square_around(
    boxes: Float[np.ndarray, "T 4"], height: int, width: int, *, enlargement: float = 1.8
) -> Square:
    """The square around all boxes of a face, moved and, where necessary, shrunk into the frame.

    Args:
        boxes: Left, top, right, bottom in pixels.
        height: Of the frame.
        width: Of the frame.
        enlargement: Side of the square, in longer sides of the union of the boxes.
    """
    union = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)]).astype(np.float64)
    side = max(min(round(float(enlargement * (union[2:] - union[:2]).max())), height, width), 1)
    corner = np.round((union[:2] + union[2:] - side) / 2)
    left, top = np.clip(corner, 0, (width - side, height - side)).astype(int)
    return Square(int(left), int(top), side)


def landmark_outline(
    points: Float[np.ndarray, "P C"], layout: FaceLayout, mode: MaskMode
) -> Float[np.ndarray, "Q 2"]:
    """A convex outline of the lower or of the whole face.

    The lower face are the landmarks below the middle between the eyes and the tip of the nose, along the
    axis of the face.

    Args:
        points: Landmarks, x and y in pixels, perhaps with depth.
        layout: Indices of the landmarks.
        mode: `mouth`; every other mode gives the whole face.
    """
    points = points[:, :2].astype(np.float64)
    *eyes, nose, right, left = five_points(points, layout).astype(np.float64)
    middle = np.mean(eyes, axis=0)
    axis = (right + left) / 2 - middle
    axis /= np.linalg.norm(axis) + 1e-9
    along = points @ axis
    margin = _MARGIN * float(np.ptp(along))
    chosen = points[along >= (middle + nose) @ axis / 2] if mode == "mouth" else points
    return _widened(chosen, margin)


def box_outline(box: Float[np.ndarray, "4"], mode: MaskMode) -> Float[np.ndarray, "Q 2"]:
    """The same outline for a head of which only the box is known.

    Args:
        box: Left, top, right, bottom of the head, from hair to chin, in pixels.
        mode: `mouth`; every other mode gives the whole face.
    """
    circle = _circle()
    if mode == "mouth":
        edge = np.array([[-1.0, _BRIDGE], [1.0, _BRIDGE]])
        edge[:, 0] *= np.sqrt(1 - _BRIDGE**2)
        circle = np.concatenate([circle[circle[:, 1] >= _BRIDGE], edge])
    box = box.astype(np.float64)
    half = (box[2:] - box[:2]) / 2
    return _widened((box[:2] + box[2:]) / 2 + circle * half, _MARGIN * 2 * float(half[1]))


def paint_mask(outline: Float[np.ndarray, "Q 2"] | None, side: int) -> Bool[np.ndarray, "{side} {side}"]:
    """The pixels inside an outline.

    Args:
        outline: A convex polygon, x and y in pixels; None: no pixel.
        side: Rows and columns of the mask.
    """
    mask = np.zeros((side, side), np.uint8)
    if outline is not None:
        # The origin of landmarks is the corner of the first pixel, that of OpenCV its centre.
        corners = np.round((outline - 0.5) * 2**_SHIFT).astype(np.int32)
        cv2.fillConvexPoly(mask, corners, 1, shift=_SHIFT)
    return mask > 0


def latent_mask(masks: Iterable[Bool[np.ndarray, "side side"]], size: int) -> Bool[np.ndarray, "F h w"]:
    """Projects masks onto the latent grid: a latent is free if the mask touches any of its pixels.

    The maximum is taken over the 8 x 8 pixels of a latent, and over its four frames; the first latent is one
    frame. An average instead would keep a part of the old mouth.

    Args:
        masks: Masks of `4k + 1` frames, square; one is held at a time.
        size: Side of the frames that are generated, in pixels, to which masks are resized.
    """
    cells = size // PIXELS_PER_LATENT
    blocks = (cells, PIXELS_PER_LATENT, cells, PIXELS_PER_LATENT)
    grids = (_resized_mask(mask, size).reshape(blocks).max(axis=(1, 3)) for mask in masks)
    return np.stack([np.any(group, axis=0) for group in by_latent_frame(grids)])


def opacity(mask: Bool[np.ndarray, "side side"]) -> Float[np.ndarray, "side side"]:
    """Opacity of generated pixels: it rises linearly from the mask's border inwards, and is 0 outside.

    The feather is 4 to 8 pixels wide, a 64th of the side in between; masks end at the border of the crop.

    Args:
        mask: From `paint_mask`.
    """
    feather = float(np.clip(len(mask) / 64, 4, 8))
    padded = np.pad(mask, 1).astype(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    return np.minimum(distance / feather, 1).astype(np.float32)


def paste(
    frame: UInt8[np.ndarray, "H W 3"],
    generated: UInt8[np.ndarray, "s s 3"],
    square: Square,
    alpha: Float[np.ndarray, "side side"],
) -> UInt8[np.ndarray, "H W 3"]:
    """Blends a generated crop into a frame. Pixels of opacity 0 keep the bytes of the frame.

    Args:
        frame: RGB.
        generated: The crop, in the size in which it is generated.
        square: Where the crop is.
        alpha: From `opacity`.
    """
    result = frame.copy()
    source = square.cut(result)
    weight = alpha[..., None]
    mixed = (1 - weight) * source + weight * resize_crop(generated, square.side)
    source[...] = np.where(weight > 0, np.round(mixed), source).astype(np.uint8)
    return result


def resize_crop(crop: UInt8[np.ndarray, "_ _ 3"], side: int) -> UInt8[np.ndarray, "{side} {side} 3"]:
    """Resizes a square: by area where it shrinks, else by cubic interpolation."""
    if len(crop) == side:
        return np.ascontiguousarray(crop)
    method = cv2.INTER_AREA if len(crop) > side else cv2.INTER_CUBIC
    return cv2.resize(crop, (side, side), interpolation=method)


def _resized_mask(mask: Bool[np.ndarray, "side side"], size: int) -> Bool[np.ndarray, "{size} {size}"]:
    """A mask in another size: every pixel that it touches."""
    if len(mask) == size:
        return mask
    return cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA) > 0


def _circle() -> Float[np.ndarray, "corners 2"]:
    angles = np.arange(_CORNERS) * 2 * np.pi / _CORNERS
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _widened(points: Float[np.ndarray, "P 2"], margin: float) -> Float[np.ndarray, "Q 2"]:
    """The convex hull of points, widened by a margin in all directions."""
    grown = (points[:, None] + margin * _circle()).reshape(-1, 2)
    return cv2.convexHull(grown.astype(np.float32))[:, 0].astype(np.float64)
