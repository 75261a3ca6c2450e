"""Who in the picture speaks: sounds matched with the faces of the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.pipelines.casting import Role, assign, people_of, without_effect
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.preprocessing.mediapipe_detectors import MediaPipeFaces
from fantasy_jax.preprocessing.people import MAX_GROWTH, people_labels
from fantasy_jax.typing import Float, Int

SOUND = Role("sound", "--audio")


@dataclass(frozen=True)
class Speakers:
    """Who speaks.

    Attributes:
        boxes: Left, top, right, bottom of the people of the picture, in pixels of the size that is generated;
            none if nobody has to be told apart.
        targets: The person, from 1, that each sound belongs to.
        size: Height and width of the picture.
        notes: What the user should know: who has no sound, whose sound has no effect.
    """

    boxes: Float[np.ndarray, "N 4"]
    targets: tuple[int, ...]
    size: tuple[int, int]
    notes: tuple[str, ...] = ()

    def labels(self, num_latent_frames: int) -> Int[np.ndarray, "F S"] | None:
        """The person that each video token shows (`preprocessing.people`); None if nobody is told apart.

        A person's region is the face's box, grown on each side. How far the head will move is not known, so
        that it grows as far as the motion of a driver can grow it, unless it meets another's.
        """
        if not len(self.boxes):
            return None
        growths = [np.full(4, _largest_growth(self.boxes))] * len(self.boxes)
        return people_labels(self.boxes, growths, self.size, num_latent_frames)


def find_speakers(
    image: Image.Image,
    fitted: Image.Image,
    count: int,
    *,
    boxes: Sequence[Float[np.ndarray, "4"]] = (),
    people: Sequence[int] = (),
    landmarks: LandmarkConfig,
) -> Speakers:
    """Matches sounds with the people of the picture, from left to right unless `people` or `boxes` say so.

    A single sound belongs to the whole picture, unless a person is named and the picture shows several.

    Args:
        image: RGB, as it is given.
        fitted: The same in the size that is generated.
        count: Sounds.
        boxes: The people of the picture, as fractions of its sides; no face is detected then.
        people: The person, from 1 in the order of the boxes or from the left, that each sound belongs to.
        landmarks: Settings of the face detector.

    Raises:
        ConfigError: There is one box alone, boxes overlap, a person does not exist or occurs twice, or the
            detector is missing.
        MediaError: There are more sounds than people in the picture.
    """
    size, nobody = (fitted.height, fitted.width), np.zeros((0, 4))
    if count == 1 and not len(boxes) and not people:
        return Speakers(nobody, (1,), size)
    if len(boxes) == 1:
        raise ConfigError(
            "--box: one box tells nobody apart, because what is outside of it follows the sound, too; give a "
            "box for each person of the picture, or none"
        )
    if len(boxes):
        placed = people_of(fitted, image, None, boxes)
    else:
        with MediaPipeFaces(landmarks) as detector:
            placed = people_of(fitted, image, detector, boxes)
    if not len(placed):
        raise MediaError("the picture shows no face that is found; give a --box for each person")
    targets, notes = assign(count, len(placed), people, SOUND)
    speakers = Speakers(placed if len(placed) > 1 else nobody, targets, size)
    more = without_effect(speakers.labels(1), targets, SOUND)
    return Speakers(speakers.boxes, targets, size, (*notes, *more))


def _largest_growth(boxes: Float[np.ndarray, "N 4"]) -> float:
    """By how much of their size all boxes can grow on each side without meeting: between 0 and 0.25."""
    growth = MAX_GROWTH
    for one, other in combinations(boxes, 2):
        gaps = np.maximum(other[:2] - one[2:], one[:2] - other[2:])
        sides = one[2:] - one[:2] + other[2:] - other[:2]
        growth = min(growth, float((gaps / sides).max()))
    return max(growth, 0.0)
