"""Who in the picture is driven by whom: driving videos tracked, and matched with the faces of the picture."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.pipelines.casting import Role, assign, people_of, without_effect
from fantasy_jax.preprocessing.driving import (
    ALIGNED_SIZE,
    DrivingConfig,
    DrivingFace,
    DrivingVideo,
    align_people,
    kept_frames,
    open_detector,
    track_people,
)
from fantasy_jax.preprocessing.landmarks import FaceDetector
from fantasy_jax.preprocessing.overlay import overlay_frames
from fantasy_jax.preprocessing.people import box_growth, people_labels
from fantasy_jax.typing import Float, Int, UInt8
from fantasy_jax.video import PIXELS_PER_TOKEN, TEMPORAL_FACTOR, VideoConfig, latent_frames

DriverInput = str | Path | UInt8[np.ndarray, "_ _ _ 3"]
"""A driving video: a path of a video or a picture, or frames at the frame rate of the output."""
DRIVER = Role("driver", "--driver")


@dataclass(frozen=True)
class Driver:
    """A driving video, and the people of it that drive.

    Attributes:
        name: Its path, for messages.
        frames: RGB, at the frame rate of the output; can be iterated repeatedly.
        people: The people who drive.
    """

    name: str
    frames: Iterable[UInt8[np.ndarray, "H W 3"]]
    people: Sequence[DrivingFace]

    @property
    def length(self) -> int:
        """Number of frames."""
        return len(self.people[0].found)

    def cut(self, num_frames: int) -> "Driver":
        """The first frames; a driving video of one frame stays as it is."""
        people = [
            DrivingFace(x.boxes[:num_frames], x.points[:num_frames], x.found[:num_frames])
            for x in self.people
        ]
        return replace(self, people=people)


@dataclass(frozen=True)
class Scene:
    """A picture and what drives it.

    Attributes:
        picture: Of the size that is generated.
        boxes: Left, top, right, bottom of the people of the picture, in its pixels; none if nobody has to be
            told apart.
        drivers: Driving videos, cut to the length of the clip.
        targets: The person, from 1, that each person of the drivers drives, one driver after another.
        num_frames: Frames T of the clip, 4k + 1.
        notes: What the user should know: who is not driven, which frames were lost.
    """

    picture: Image.Image
    boxes: Float[np.ndarray, "N 4"]
    drivers: Sequence[Driver]
    targets: tuple[int, ...]
    num_frames: int
    notes: tuple[str, ...]

    @cached_property
    def people(self) -> list[DrivingFace]:
        """The people of all drivers."""
        return [person for driver in self.drivers for person in driver.people]

    def faces(self, size: int = ALIGNED_SIZE) -> Iterator[UInt8[np.ndarray, "P {size} {size} 3"]]:
        """Yields the aligned faces of the people who drive, frame by frame; the drivers are read again.

        Args:
            size: Side of an aligned face, in pixels.
        """
        aligned = []
        for driver in self.drivers:
            frames = itertools.islice(driver.frames, driver.length)  # where the clip is shorter, they go on
            faces = align_people(frames, driver.people, size=size, name=driver.name)
            aligned.append(itertools.repeat(*faces, self.num_frames) if driver.length == 1 else faces)
        return map(np.concatenate, zip(*aligned, strict=True))

    def overlay(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Frames that show the drivers, the picture, and who drives whom (`preprocessing.overlay`)."""
        drivers = [(driver.frames, driver.people) for driver in self.drivers]
        labels = self.labels()
        if labels is not None:
            rows = self.picture.height // PIXELS_PER_TOKEN
            labels = labels[0].astype(np.uint8).reshape(rows, -1)
        picture = np.asarray(self.picture)
        return overlay_frames(drivers, picture, self.boxes, self.targets, labels=labels)

    def labels(self) -> Int[np.ndarray, "F S"] | None:
        """The person that each video token shows (`preprocessing.people`); None if nobody is told apart."""
        if not len(self.boxes):
            return None
        width, height = self.picture.size
        growths = [np.zeros(4)] * len(self.boxes)
        for target, person in zip(self.targets, self.people, strict=True):
            growths[target - 1] = box_growth(person.boxes)
        return people_labels(self.boxes, growths, (height, width), latent_frames(self.num_frames))


def make_scene(
    image: Image.Image,
    drivers: Sequence[DriverInput],
    *,
    fitted: Image.Image,
    video: VideoConfig,
    config: DrivingConfig,
    own: FaceDetector | None = None,
    start: float = 0.0,
    max_frames: int | None = None,
    boxes: Sequence[Float[np.ndarray, "4"]] = (),
    targets: Sequence[int] = (),
    progress: bool = False,
) -> Scene:
    """Tracks the driving videos, and matches their people with those of the picture.

    Several drivers drive one person each; one driver can show several people. Both go from left to right,
    unless `targets` or `boxes` say otherwise. Where the picture shows one face or none, and one person
    drives, the whole picture attends to that driver, as in the official script for one person.

    Args:
        image: RGB.
        drivers: Videos or pictures; a picture's expression is held.
        fitted: The picture in the size that is generated.
        video: Frame rate of the clip, and its number of frames if all drivers are pictures.
        config: Settings of detection and tracking.
        own: The model's own face detector, if it has one.
        start: Seconds of videos that are left out.
        max_frames: Frames that are used of videos; None: as many as `video` has.
        boxes: The people of the picture, as fractions of its sides (`boxes.parse_box`), in the order of their
            drivers; no face is detected in the picture then.
        targets: The person, from 1 in the order of the boxes or from the left, that each driver drives.
        progress: Whether to show progress bars.

    Raises:
        ConfigError: Boxes overlap, a target does not exist or occurs twice, or the detector is missing.
        MediaError: A driver cannot be read, shows no face or is too short; or there are more drivers than
            people in the picture.
    """
    if not drivers:
        raise ConfigError("there is no driver; name at least one video")
    max_frames = video.num_frames if max_frames is None else max_frames
    with open_detector(config, own) as detector:
        tracked = [
            _track(driver, video.fps, start, max_frames, detector, config, progress=progress)
            for driver in drivers
        ]
        placed = people_of(fitted, image, detector, boxes)
    notes: list[str] = []
    wanted = len(targets) or max(len(placed), 1)
    chosen = [_choose(driver, wanted if len(drivers) == 1 else 1, notes) for driver in tracked]
    num_frames = _common_length(chosen, video, notes)
    chosen = [driver.cut(num_frames) for driver in chosen]
    notes += [note for driver in chosen for note in _lost_poses(driver)]
    count = sum(len(driver.people) for driver in chosen)
    assigned, more = assign(count, len(placed), targets, DRIVER)
    notes += more
    several = placed if len(placed) > 1 else placed[:0]
    scene = Scene(fitted, several, chosen, assigned, num_frames, tuple(notes))
    return replace(scene, notes=(*notes, *without_effect(scene.labels(), scene.targets, DRIVER)))


def _track(
    driver: DriverInput,
    fps: int,
    start: float,
    max_frames: int,
    detector: FaceDetector,
    config: DrivingConfig,
    *,
    progress: bool,
) -> Driver:
    if isinstance(driver, np.ndarray):
        name, frames = "driver", driver[round(start * fps) :][:max_frames]
    else:
        name, frames = str(driver), DrivingVideo(driver, fps, max_frames, start)
    return Driver(name, frames, track_people(frames, detector, config, name=name, progress=progress))


def _choose(driver: Driver, wanted: int, notes: list[str]) -> Driver:
    """The people of a driver who drive: the largest one, or the first from the left."""
    if len(driver.people) <= wanted:
        return driver
    if wanted == 1:
        chosen, which = [max(driver.people, key=_size)], "the largest face drives"
    else:
        chosen, which = driver.people[:wanted], f"the first {wanted} from the left drive"
    notes.append(f"{driver.name}: shows {len(driver.people)} people; {which}")
    return replace(driver, people=chosen)


def _size(person: DrivingFace) -> float:
    """Mean area of a face over all frames, in pixels; frames without it count as zero."""
    sides = person.boxes[:, 2:] - person.boxes[:, :2]
    return float((sides.prod(axis=1) * person.found).mean())


def _common_length(drivers: Sequence[Driver], video: VideoConfig, notes: list[str]) -> int:
    """Frames of the clip: as many as the shortest driver has, 4k + 1 of them."""
    for driver in drivers:
        if driver.length == 1:
            notes.append(f"{driver.name}: is a single frame, whose expression is held")
    moving = [driver for driver in drivers if driver.length > 1]
    if not moving:
        return video.num_frames
    shortest = min(moving, key=lambda driver: driver.length)
    count = kept_frames(shortest.length)
    if count <= TEMPORAL_FACTOR:
        raise MediaError(
            f"{shortest.name}: has {shortest.length} frames at {video.fps} frames per second; "
            f"a clip needs at least {TEMPORAL_FACTOR + 1}"
        )
    if count < video.num_frames:
        notes.append(
            f"{shortest.name}: lasts {shortest.length} frames; the clip has {count}, not {video.num_frames}"
        )
    elif any(kept_frames(driver.length) > count for driver in moving):
        notes.append(f"{shortest.name}: is the shortest driver; the clip has {count} frames")
    return count


def _lost_poses(driver: Driver) -> list[str]:
    people = enumerate(driver.people, 1)
    return [
        f"{driver.name}: person {number} is not found in {person.lost} of {driver.length} frames, which "
        "repeat the last pose"
        for number, person in people
        if person.lost
    ]
