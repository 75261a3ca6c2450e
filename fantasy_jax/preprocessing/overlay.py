"""Drawings that show which face of a driving video animates which person of a picture."""

from collections.abc import Iterable, Iterator, Sequence

import cv2
import numpy as np

from fantasy_jax.preprocessing.boxes import box_side
from fantasy_jax.preprocessing.driving import DrivingFace
from fantasy_jax.typing import Float, UInt8

_COLOURS = ((255, 80, 60), (60, 170, 255), (90, 220, 90), (255, 200, 40), (220, 110, 255), (60, 230, 220))
_TEXT_HEIGHT = 0.045
"""Height of capitals, as a fraction of the image's height."""
_FONT_HEIGHT = 21
"""Height of capitals of OpenCV's font at scale 1, in pixels."""


def draw_boxes(
    image: UInt8[np.ndarray, "H W 3"],
    boxes: Float[np.ndarray, "N 4"],
    labels: Sequence[str],
    *,
    first: int = 0,
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws boxes with labels on a copy of an image.

    Args:
        image: RGB.
        boxes: Left, top, right, bottom in pixels; parts outside of the image are not drawn.
        labels: A label for each box.
        first: Number of the first box's colour; the others' follow.
    """
    drawn = image.copy()
    for number, (box, label) in enumerate(zip(boxes, labels, strict=True), first):
        left, top, right, bottom = (int(side) for side in np.round(box))
        cv2.rectangle(drawn, (left, top), (right, bottom), _colour(number), _thickness(image))
        _draw_label(drawn, label, (left, top), _colour(number))
    return drawn


def draw_people(
    frame: UInt8[np.ndarray, "H W 3"], people: Sequence[DrivingFace], index: int, *, first: int = 0
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws the box, alignment points and number of every person on a copy of a frame.

    Args:
        frame: RGB.
        people: The people of the driving video.
        index: Number of the frame, from 0; in frames where a person is not found, its label says so.
        first: How many people come before these; numbers count from 1, and so do colours.
    """
    labels = [
        str(number) if person.found[index] else f"{number} lost"
        for number, person in enumerate(people, first + 1)
    ]
    boxes = np.array([person.boxes[index] for person in people]).reshape(-1, 4)
    drawn = draw_boxes(frame, boxes, labels, first=first)
    for number, person in enumerate(people, first):
        radius = max(round(box_side(person.boxes[index]) / 50), 2)
        for point in np.round(person.points[index]).astype(int):
            place = (int(point[0]), int(point[1]))
            cv2.circle(drawn, place, radius, _colour(number), -1, cv2.LINE_AA)
            cv2.circle(drawn, place, radius, (255, 255, 255), 1, cv2.LINE_AA)
    return drawn


def overlay_frames(
    drivers: Sequence[tuple[Iterable[UInt8[np.ndarray, "_ _ 3"]], Sequence[DrivingFace]]],
    picture: UInt8[np.ndarray, "H W 3"],
    boxes: Float[np.ndarray, "N 4"],
    *,
    height: int = 480,
) -> Iterator[UInt8[np.ndarray, "{height} _ 3"]]:
    """Yields the driving videos' frames beside the picture, a person's face and box in the same colour.

    Args:
        drivers: Frames and people of each driving video. People are numbered from 1 over all of them; person
            `n` animates box `n`.
        picture: RGB.
        boxes: The people of the picture, in its pixels; those without a driving face are labelled so.
        height: Of the result, in pixels.

    Yields:
        RGB frames of one size, the picture on the right; as many as the shortest driving video has.
    """
    counts = [len(people) for _, people in drivers]
    labels = [
        str(number) if number <= sum(counts) else f"{number} undriven" for number in range(1, len(boxes) + 1)
    ]
    right = _to_height(draw_boxes(picture, boxes, labels), height)
    for index, frames in enumerate(zip(*(frames for frames, _ in drivers), strict=False)):
        left = [
            _to_height(draw_people(frame, people, index, first=sum(counts[:number])), height)
            for number, (frame, (_, people)) in enumerate(zip(frames, drivers, strict=True))
        ]
        yield np.hstack([*left, right])


def _to_height(image: UInt8[np.ndarray, "H W 3"], height: int) -> UInt8[np.ndarray, "{height} _ 3"]:
    width = max(round(image.shape[1] * height / image.shape[0]), 1)
    interpolation = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=interpolation)


def _colour(number: int) -> tuple[int, int, int]:
    return _COLOURS[number % len(_COLOURS)]


def _thickness(image: UInt8[np.ndarray, "H W 3"]) -> int:
    return max(round(min(image.shape[:2]) / 240), 1)


def _draw_label(
    image: UInt8[np.ndarray, "H W 3"], label: str, corner: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    """Writes black text on a filled rectangle above a corner, moved so that it lies in the image."""
    scale, thick = _TEXT_HEIGHT * image.shape[0] / _FONT_HEIGHT, _thickness(image)
    (width, height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, scale, thick)
    margin = height // 3 + thick
    left = min(max(corner[0], 0), max(image.shape[1] - width - 2 * margin, 0))
    bottom = max(corner[1], height + 2 * margin)
    ends = (left, bottom - height - 2 * margin), (left + width + 2 * margin, bottom)
    cv2.rectangle(image, *ends, colour, -1)
    where = (left + margin, bottom - margin)
    cv2.putText(image, label, where, cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), thick, cv2.LINE_AA)
