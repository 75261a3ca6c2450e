"""Held-out people driven by others' acts, with the true answer: their own faces, drawn with these acts.

Drivers are rendered clips of other people. Their features come from the model's motion encoder, as in
sampling.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from fantasy_jax.data.encoded import encode_records
from fantasy_jax.data.records import Record
from fantasy_jax.miniature.acting import Performance
from fantasy_jax.miniature.clips import (
    SyntheticClip,
    SyntheticConfig,
    SyntheticGroup,
    plan_clip,
    plan_group,
)
from fantasy_jax.miniature.held_out import HeldOutClips
from fantasy_jax.miniature.synthetic import render_groups
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipelines.config import PortraitSampleConfig
from fantasy_jax.pipelines.scene import Driver, Scene
from fantasy_jax.preprocessing.driving import DrivingFace
from fantasy_jax.system.encoders import encode_motion
from fantasy_jax.system.networks import Networks
from fantasy_jax.video import VideoConfig

_FIRST_DRIVER = 100_000
"""Number of the first test clip whose person drives; no test clip of a dataset has so high a number."""
_BATCH_SIZE = 16
_HIDDEN = ("shift_x", "shift_y", "roll", "body")
"""Factors that the alignment of drivers hides: place and roll of the head, and the shoulders."""


@dataclass(frozen=True)
class Driven:
    """Records of people who are driven; lists have an entry for each clip.

    What alignment hides of drivers, the place and roll of the head, is that of the picture.

    Attributes:
        pictures: The clips whose first frames are the pictures.
        truths: The true answers: the people of the pictures, drawn with the acts of their drivers.
        others: The same people with the acts of the next clip's drivers.
        drivers: The drivers of each clip, each alone in a clip.
    """

    pictures: list[Record]
    truths: list[Record]
    others: list[Record]
    drivers: list[list[Record]]

    @property
    def people(self) -> int:
        """People in each clip."""
        return len(self.drivers[0])


def draw_driven(video: VideoConfig, data: SyntheticConfig, *, people: int, count: int) -> Driven:
    """Draws and renders held-out clips and their drivers.

    Args:
        video: Size, length and frame rate of clips of one person.
        data: The dataset; its seed, `acting` and `close` are used.
        people: People in each clip.
        count: Number of clips.
    """
    groups = [_plan(data, video, i, people) for i in range(count)]
    drivers = [
        [plan_clip(data, video, "test", _FIRST_DRIVER + i * people + n) for n in range(people)]
        for i in range(count)
    ]
    following = [*drivers[1:], drivers[0]]
    truths, others = (
        [act_as(*pair) for pair in zip(groups, acts, strict=True)] for acts in (drivers, following)
    )
    alone = _render(video, [_alone(clip) for each in drivers for clip in each])
    return Driven(
        *(_render(video, x) for x in (groups, truths, others)),
        [alone[i * people : (i + 1) * people] for i in range(count)],
    )


def draw_own(video: VideoConfig, data: SyntheticConfig, *, count: int) -> Driven:
    """Draws and renders held-out clips of one person that drive themselves: each is its own true answer.

    Args:
        video: Size, length and frame rate of the clips.
        data: The dataset; its seed and `acting` are used.
        count: Number of clips.
    """
    clips = _render(video, [_plan(data, video, i, 1) for i in range(count)])
    return Driven(clips, clips, [*clips[1:], clips[0]], [[clip] for clip in clips])


class DrivenClips(HeldOutClips):
    """Driven people, encoded; `latents` are those of the true answers.

    Attributes:
        driven: The records.
    """

    def __init__(
        self,
        networks: Networks,
        video: VideoConfig,
        config: PortraitSampleConfig,
        driven: Driven,
        *,
        seed: int = 0,
    ):
        """Encodes pictures, drivers and true answers.

        Args:
            networks: Networks with trained weights.
            video: Size, length and frame rate of clips of one person.
            config: Sampling settings.
            driven: The records.
            seed: Seed of the initial noise.
        """
        wide = video.for_size(video.height, driven.people * video.width)
        super().__init__(networks, wide, config, driven.truths, seed=seed)
        self.driven = driven
        own = driven.pictures is driven.truths
        pictures = self.encoded if own else encode_records(self.networks, driven.pictures)
        self.encoded = [
            truth | {name: picture[name] for name in ("first_frame", "image")} | self._driven_by(i)
            for i, (truth, picture) in enumerate(zip(self.encoded, pictures, strict=True))
        ]

    def by(self, transformer: WanTransformer) -> "DrivenClips":
        """The same clips, generated by another transformer."""
        clips = copy(self)
        clips.networks = self.networks.replace(transformer=transformer)
        return clips

    def _driven_by(self, index: int) -> Record:
        """The features of a clip's drivers, and the person that each video token shows."""
        picture, drivers = self.driven.pictures[index], self.driven.drivers[index]
        people, num_frames = len(drivers), self.video.num_frames
        boxes = picture["face_box"][:, 0].astype(np.float64) if people > 1 else np.empty((0, 4))
        numbers = tuple(range(1, people + 1))
        image = Image.fromarray(picture["video"][0])
        scene = Scene(image, boxes, [_driver(x) for x in drivers], numbers, num_frames, ())
        encoder = self.networks["motion_encoder"]
        labels = scene.labels()
        if labels is None:
            labels = np.zeros((self.video.latent_frames, self.video.tokens_per_frame), np.int32)
        return {
            "expression": np.asarray(encode_motion(encoder, scene.faces(encoder.config.image_size))[0]),
            "labels": labels,
            "owners": np.int32(numbers),
        }


def act_as(group: SyntheticGroup, drivers: Sequence[SyntheticClip]) -> SyntheticGroup:
    """The group with the acts of drivers, one for each person; heads and shoulders stay in their place.

    The prompt is its first sentence: further ones name the emotions of the group's own acts.
    """
    people = []
    for person, driver in zip(group.people, drivers, strict=True):
        own: Performance = person.performance
        still = {name: np.full_like(getattr(own, name), getattr(own, name)[0]) for name in _HIDDEN}
        people.append(replace(person, performance=replace(driver.performance, **still)))
    return replace(group, people=tuple(people), prompt=group.prompt.partition(".")[0] + ".")


def _plan(data: SyntheticConfig, video: VideoConfig, index: int, people: int) -> SyntheticGroup:
    if people > 1:
        return plan_group(data, video, "test", index, people)
    return _alone(plan_clip(data, video, "test", index))


def _alone(clip: SyntheticClip) -> SyntheticGroup:
    return SyntheticGroup((clip,), (0.0,), clip.prompt)


def _render(video: VideoConfig, groups: Sequence[SyntheticGroup]) -> list[Record]:
    starts = range(0, len(groups), _BATCH_SIZE)
    batches = (list(groups[start : start + _BATCH_SIZE]) for start in starts)
    return [record for batch in batches for record in render_groups(video, batch)]


def _driver(record: Record) -> Driver:
    boxes, points = (record[name][0].astype(np.float64) for name in ("face_box", "face_points"))
    return Driver("driver", record["video"], [DrivingFace(boxes, points, np.ones(len(boxes), bool))])
