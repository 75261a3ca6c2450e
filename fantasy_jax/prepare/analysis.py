"""What all clips under examination have in common, of whatever task."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fantasy_jax.config import as_json
from fantasy_jax.data.records import Record
from fantasy_jax.prepare.config import ClipsConfig
from fantasy_jax.prepare.cutting import Segment
from fantasy_jax.preprocessing.landmarks import BodyDetector, FaceDetector
from fantasy_jax.typing import Float, UInt8
from fantasy_jax.video import VideoConfig

_THUMBNAIL = 168
"""Longer side of the images in the report, in pixels."""


class Dropped(Exception):
    """A clip or video is not kept.

    Attributes:
        reason: Key of `filters.reasons_of`; the message explains it in one line.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class PrepareTask:
    """What determines the clips of a video beside its bytes.

    Attributes:
        config: Settings and thresholds; their type says what clips are for.
        video: Size, length and frame rate of clips.
    """

    config: ClipsConfig
    video: VideoConfig

    def as_json(self) -> dict[str, Any]:
        """All settings, with the models of detection by content, since paths differ between machines."""
        return _models_by_content(as_json(self))


def _models_by_content(settings: dict[str, Any]) -> dict[str, Any]:
    described = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = _models_by_content(value)
        elif name.endswith("_model") and value:
            path = Path(value)
            value = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else path.name
        described[name] = value
    return described


@dataclass(frozen=True)
class Detectors:
    """The detectors of faces and bodies; `bodies` is None for tasks that need none."""

    faces: FaceDetector
    bodies: BodyDetector | None = None


OpenDetectors = Callable[[ClipsConfig], AbstractContextManager[Detectors]]
"""Opens detectors in the process that uses them; it must be picklable."""


class ClipAnalysis(ABC):
    """A clip under examination; properties raise `Dropped` where the clip lacks what they need.

    Attributes:
        segment: Its frames before cropping.
        task: The settings.
        measures: Values measured so far, for the report.
    """

    def __init__(self, segment: Segment, task: PrepareTask, detectors: Detectors):
        """Takes a clip that is not analysed yet.

        Raises:
            Dropped: The segment is too short.
        """
        if segment.video is None:
            raise Dropped(
                "short", f"a scene of {segment.num_frames} frames; {task.video.num_frames} are required"
            )
        self.segment, self.task = segment, task
        self.measures: dict[str, float] = {}
        self._detectors = detectors

    @property
    def note(self) -> str:
        """Message about a clip that is kept; empty if there is nothing to say."""
        return ""

    @property
    @abstractmethod
    def video(self) -> UInt8[np.ndarray, "T H W 3"]:
        """Frames of the clip, cropped to its size."""

    @abstractmethod
    def record(self) -> Record:
        """Makes the clip's record, without its prompt.

        Raises:
            Dropped: The clip lacks what the record needs.
        """

    def thumbnail(self) -> UInt8[np.ndarray, "h w 3"]:
        """The first frame of a clip that is kept, for the report."""
        return make_thumbnail(self.video[0])


def make_thumbnail(frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """Downscales a frame for the report."""
    height, width = frame.shape[:2]
    scale = _THUMBNAIL / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def crop_video(
    video: UInt8[np.ndarray, "T H W 3"], center: Float[np.ndarray, "2"], size: tuple[int, int]
) -> tuple[UInt8[np.ndarray, "T height width 3"], tuple[int, int]]:
    """Crops a video.

    Args:
        video: RGB, at least as large as the crop.
        center: x and y of the centre of the crop, which is moved as far as the image requires.
        size: Height and width of the crop.

    Returns:
        The crop, and x and y of its upper left corner.
    """
    room = np.array([video.shape[2] - size[1], video.shape[1] - size[0]])
    left, top = np.clip(np.round(center - np.array(size[::-1]) / 2), 0, room).astype(int).tolist()
    return np.ascontiguousarray(video[:, top : top + size[0], left : left + size[1]]), (left, top)
