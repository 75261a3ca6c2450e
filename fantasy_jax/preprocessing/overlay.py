"""Drawings that show which face of a driving video animates which person of a picture."""

import itertools
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
    numbers: Sequence[int],
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws boxes with labels on a copy of an image.

    Args:
        image: RGB.
        boxes: Left, top, right, bottom in pixels; parts outside of the image are not drawn.
        labels: A label for each box.
        numbers: Number of each box, from 1, which chooses its colour.
    """
    drawn = image.copy()
    for number, box, label in zip(numbers, boxes, labels, strict=True):
        left, top, right, bottom = (int(side) for side in np.round(box))
        cv2.rectangle(drawn, (left, top), (right, bottom), _colour(number), _thickness(image))
        _draw_label(drawn, label, (left, top), _colour(number))
    return drawn


def draw_people(
    frame: UInt8[np.ndarray, "H W 3"], people: Sequence[DrivingFace], index: int, numbers: Sequence[int]
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws the box, alignment points and number of every person on a copy of a frame.

    Args:
        frame: RGB.
        people: The people of the driving video.
        index: Number of the frame, from 0; in frames where a person is not found, its label says so.
        numbers: Number of each person, from 1, which is its label and chooses its colour.
    """
    labels = [
        str(number) if person.found[index] else f"{number} lost"
        for number, person in zip(numbers, people, strict=True)
    ]
    boxes = np.array([person.boxes[index] for person in people]).reshape(-1, 4)
    drawn = draw_boxes(frame, boxes, labels, numbers)
    for number, person in zip(numbers, people, strict=True):
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
    targets: Sequence[int],
    *,
    labels: UInt8[np.ndarray, "h w"] | None = None,
    height: int = 480,
) -> Iterator[UInt8[np.ndarray, "{height} _ 3"]]:
    """Yields the driving videos' frames beside the picture, a person's face and box in the same colour.

    Args:
        drivers: Frames and people of each driving video; the only frame of a picture is held.
        picture: RGB.
        boxes: The people of the picture, in its pixels; those without a driving face are labelled so.
        targets: The box, from 1, that each person of the drivers animates, one driver after another.
        labels: The person of each of the picture's video tokens, 0 for the background; None: not shown.
        height: Of the result, in pixels.

    Yields:
        RGB frames of one size, the picture on the right; as many as the shortest driving video has.
    """
    numbers = range(1, len(boxes) + 1)
    names = [str(number) if number in targets else f"{number} undriven" for number in numbers]
    right, scale = _to_height(picture, height), height / len(picture)
    if labels is not None:
        right = tint_people(right, labels)
    right = draw_boxes(right, scale * boxes, names, numbers)
    remaining = iter(targets)
    own = [[next(remaining) for _ in people] for _, people in drivers]
    lengths = [len(people[0].found) for _, people in drivers]
    longest = min((length for length in lengths if length > 1), default=1)
    held = [
        itertools.repeat(next(iter(frames))) if length == 1 else frames
        for (frames, _), length in zip(drivers, lengths, strict=True)
    ]
    for index, frames in enumerate(itertools.islice(zip(*held, strict=False), longest)):
        left = [
            _to_height(draw_people(frame, people, min(index, length - 1), numbers), height)
            for frame, (_, people), length, numbers in zip(frames, drivers, lengths, own, strict=True)
        ]
        yield np.hstack([*left, right])


def _to_height(image: UInt8[np.ndarray, "H W 3"], height: int) -> UInt8[np.ndarray, "{height} _ 3"]:
    width = max(round(image.shape[1] * height / image.shape[0]), 1)
    interpolation = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(image, (width, height), interpolation=interpolation)


def tint_people(
    image: UInt8[np.ndarray, "H W 3"], labels: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Colours the video tokens of each person.

    Args:
        image: RGB.
        labels: The person of each of the picture's video tokens, from 1; 0 for the background.
    """
    size = (image.shape[1], image.shape[0])
    people = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    colours = np.array([(0, 0, 0), *map(_colour, range(1, int(labels.max()) + 1))])
    tinted = 0.65 * image + 0.35 * colours[people]
    return np.where(people[..., None] > 0, tinted, image).astype(np.uint8)


def _colour(number: int) -> tuple[int, int, int]:
    return _COLOURS[(number - 1) % len(_COLOURS)]


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
