"""Which person of a picture gets which driving video or sound."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.preprocessing.boxes import place_boxes
from fantasy_jax.preprocessing.landmarks import FaceDetector
from fantasy_jax.preprocessing.picture_faces import find_people
from fantasy_jax.typing import Float, Int


@dataclass(frozen=True)
class Role:
    """What a person of the picture is given, for messages.

    Attributes:
        name: Such as `driver` or `sound`.
        option: The option of the command line.
    """

    name: str
    option: str


def people_of(
    fitted: Image.Image,
    image: Image.Image,
    detector: FaceDetector | None,
    boxes: Sequence[Float[np.ndarray, "4"]],
) -> Float[np.ndarray, "N 4"]:
    """Faces of the people of a picture, from left to right, or in the order of the given boxes.

    Args:
        fitted: The picture in the size that is generated.
        image: The picture as it is given, in which faces are detected.
        detector: Needed without boxes.
        boxes: Faces as fractions of the picture's sides (`boxes.parse_box`); no face is detected then.

    Returns:
        Left, top, right, bottom in pixels of `fitted`.

    Raises:
        ConfigError: Two boxes overlap, or one is not inside of the picture.
    """
    if len(boxes):
        return place_boxes(boxes, fitted.height, fitted.width, option="--box")
    found, _ = find_people(np.asarray(image), detector)
    return found * np.tile(np.array(fitted.size) / image.size, 2)


def assign(
    count: int, people: int, targets: Sequence[int], role: Role
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Assigns drivers or sounds to people: in order, unless targets are given.

    Args:
        count: Drivers or sounds.
        people: People of the picture; 0 counts as one.
        targets: The person, from 1, of each; may be empty.
        role: What is assigned.

    Returns:
        The person of each, and notes about people who get none.

    Raises:
        ConfigError: There are not as many targets as drivers or sounds, one does not exist or occurs twice.
        MediaError: There are fewer people.
    """
    shown = max(people, 1)
    if count > shown:
        found = f"{people} people" if people > 1 else "one person" if people else "no face"
        raise MediaError(
            f"there are {count} {role.name}s, but the picture shows {found}; give {role.option} fewer times, "
            "or a --box for each person"
        )
    if targets and len(targets) != count:
        raise ConfigError(
            f"--person is given {len(targets)} times; give it {count}, once for each {role.name}"
        )
    if len(set(targets)) != len(targets):
        raise ConfigError(f"--person names the same person twice; give every {role.name} its own")
    if wrong := [target for target in targets if not 1 <= target <= shown]:
        raise ConfigError(f"--person={wrong[0]}: the picture shows {shown}; people are counted from 1")
    assigned = tuple(targets) or tuple(range(1, count + 1))
    missing = [number for number in range(1, shown + 1) if number not in assigned]
    return assigned, tuple(f"person {number} of the picture has no {role.name}" for number in missing)


def without_effect(
    labels: Int[np.ndarray, "F S"] | None, targets: Sequence[int], role: Role
) -> tuple[str, ...]:
    """Notes about people without a video token: every token of theirs shows a later person, too, or none."""
    hidden = [] if labels is None else sorted(set(targets) - set(labels[0].tolist()))
    return tuple(
        f"person {number} of the picture is too small or too close to another; their {role.name} has no "
        "effect"
        for number in hidden
    )
