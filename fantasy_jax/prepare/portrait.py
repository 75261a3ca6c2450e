"""Clips of people who act: everything that filters and records need to know, computed on first use."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from fantasy_jax.data.records import Record
from fantasy_jax.errors import MediaError
from fantasy_jax.prepare.analysis import ClipAnalysis, Dropped, PrepareTask, crop_video, make_thumbnail
from fantasy_jax.preprocessing.driving import DrivingFace, driving_face, find_people
from fantasy_jax.preprocessing.face_crop import CROP_SIZE, TEMPLATE
from fantasy_jax.preprocessing.landmarks import DetectedFace, FaceLayout
from fantasy_jax.preprocessing.overlay import draw_boxes, tint_people
from fantasy_jax.preprocessing.people import box_growth, people_labels
from fantasy_jax.typing import Float, UInt8
from fantasy_jax.video import PIXELS_PER_TOKEN


class PortraitClip(ClipAnalysis):
    """A clip under examination, of which all faces are used, tracked as those of a driving video are."""

    @property
    def layout(self) -> FaceLayout:
        """Indices of the landmarks."""
        return self._detectors.faces.layout

    @cached_property
    def _found(self) -> list[dict[int, DetectedFace]]:
        try:
            config = self.task.config.driving
            found, _ = find_people(self.segment.video, self._detectors.faces, config, name="the clip")
        except MediaError as error:
            raise Dropped("no_face", "no face is found") from error
        return found

    @property
    def count(self) -> int:
        """Number of people."""
        return len(self._found)

    @property
    def detections(self) -> list[list[DetectedFace]]:
        """The detections of each person's face, in the frames where it is found."""
        return [[track[index] for index in sorted(track)] for track in self._found]

    @cached_property
    def people(self) -> Sequence[DrivingFace]:
        """The face of each person in all frames before cropping, from left to right."""
        smooth, length = self.task.config.driving.smooth, self.segment.num_frames
        return [driving_face(track, length, self.layout, smooth=smooth) for track in self._found]

    @cached_property
    def _cropped(self) -> tuple[UInt8[np.ndarray, "T H W 3"], tuple[int, int]]:
        boxes = np.concatenate([person.boxes for person in self.people])
        center = (boxes[:, :2].min(axis=0) + boxes[:, 2:].max(axis=0)) / 2
        return crop_video(self.segment.video, center, self.task.video.size)

    @property
    def video(self) -> UInt8[np.ndarray, "T H W 3"]:
        """Frames of the clip, cropped around all faces."""
        return self._cropped[0]

    @property
    def boxes(self) -> Float[np.ndarray, "P T 4"]:
        """Left, top, right, bottom of each face in these frames."""
        return np.stack([person.boxes for person in self.people]) - np.tile(self._cropped[1], 2)

    def record(self) -> Record:
        """Makes the clip's record, without its prompt; people are padded with zeros to `max_people`."""
        points = np.stack([person.points for person in self.people]) - self._cropped[1]

        def padded(values: np.ndarray) -> np.ndarray:
            missing = self.task.config.max_people - len(values)
            return np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)).astype(np.float32)

        return {
            "video": self.video,
            "people": np.int32(self.count),
            "face_box": padded(self.boxes),
            "face_points": padded(points),
        }

    def thumbnail(self) -> UInt8[np.ndarray, "h w 3"]:
        """The first frame, with the box of each face and the video tokens of each person."""
        first, (height, width) = self.boxes[:, 0], self.task.video.size
        labels = people_labels(first, list(map(box_growth, self.boxes)), (height, width), 1)
        tokens = labels[0].reshape(height // PIXELS_PER_TOKEN, -1).astype(np.uint8)
        image = make_thumbnail(tint_people(self.video[0], tokens))
        numbers = range(1, self.count + 1)
        return draw_boxes(image, first * len(image) / height, list(map(str, numbers)), numbers)


def grey_record(task: PrepareTask) -> Record:
    """A record of a clip that shows nothing, without its prompt, which tells the schema."""
    length, (height, width), people = task.video.num_frames, task.video.size, task.config.max_people
    points = TEMPLATE * min(height, width) / CROP_SIZE
    return {
        "video": np.full((length, height, width, 3), 128, np.uint8),
        "people": np.int32(people),
        "face_box": np.tile(np.float32([0, 0, width, height]), (people, length, 1)),
        "face_points": np.tile(points.astype(np.float32), (people, length, 1, 1)),
    }
