"""Which frames of a video are dubbed, and where: scenes, the speaker of each, one crop a scene, and masks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.preprocessing.boxes import box_center
from fantasy_jax.preprocessing.face_crop import points_in_box
from fantasy_jax.preprocessing.face_masks import (
    MaskMode,
    Square,
    box_outline,
    landmark_outline,
    paint_mask,
    square_around,
)
from fantasy_jax.preprocessing.landmarks import FaceDetector, FaceTrack, LandmarkConfig, five_points
from fantasy_jax.preprocessing.scenes import cut_detector
from fantasy_jax.preprocessing.tracking import track_faces
from fantasy_jax.typing import Bool, Float, Int, UInt8
from fantasy_jax.video import TEMPORAL_FACTOR, Frame, latent_frames, video_frames

MIN_FRAMES = TEMPORAL_FACTOR + 1
"""Frames of the shortest scene that is dubbed."""


@dataclass(frozen=True)
class VideoScene:
    """A part of a video without cuts.

    Attributes:
        first: Index of its first frame.
        num_frames: Number of its frames.
        faces: The tracked faces, from left to right by the centre where each is first found.
    """

    first: int
    num_frames: int
    faces: Sequence[FaceTrack]

    def __str__(self) -> str:
        return f"frames {self.first} to {self.first + self.num_frames - 1}"


@dataclass(frozen=True)
class Speaker:
    """Whose mouth is dubbed in a scene, and where.

    Attributes:
        first: Index of the scene's first frame in the video.
        square: The crop, the same in all frames of the scene.
        outlines: Outline of the mask in each frame of the scene, x and y in pixels of the crop; None where
            the face is not found, and the source is kept.
        points: Five points of the face (`landmarks.five_points`) in pixels of the crop, in frame `portrait`.
        portrait: The first frame of the scene in which the face is found.
    """

    first: int
    square: Square
    outlines: Sequence[Float[np.ndarray, "Q 2"] | None]
    points: Float[np.ndarray, "5 2"]
    portrait: int

    @property
    def num_frames(self) -> int:
        """Number of frames of the scene that are dubbed."""
        return len(self.outlines)

    def mask(self, index: int) -> Bool[np.ndarray, "side side"]:
        """The mask in a frame of the scene, in pixels of the crop."""
        return paint_mask(self.outlines[index], self.square.side)


def find_scenes(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    fps: float,
    detector: FaceDetector,
    config: LandmarkConfig,
    *,
    progress: bool = False,
) -> list[VideoScene]:
    """Cuts a video into scenes and tracks the faces of each; one frame is held at a time.

    Args:
        frames: RGB; iterated once.
        fps: Frames per second.
        detector: Detects faces in one frame.
        config: Settings of gaps and of false detections.
        progress: Whether to show a progress bar for each scene.

    Raises:
        ConfigError: PySceneDetect is not installed.
    """
    scenes, first = [], 0
    for _, scene in groupby(_numbered(frames, fps), key=lambda pair: pair[0]):
        counted = _Counted(frame for _, frame in scene)
        tracks = track_faces(detector, counted, config, progress=progress)
        tracks.sort(key=lambda track: float(box_center(track.boxes[track.present.argmax()])[0]))
        scenes.append(VideoScene(first, counted.count, tracks))
        first += counted.count
    return scenes


def choose_face(
    scene: VideoScene,
    *,
    person: int | None = None,
    box: Float[np.ndarray, "4"] | None = None,
    name: str = "video",
) -> FaceTrack | None:
    """The face that is dubbed in a scene.

    Args:
        scene: From `find_scenes`.
        person: Its number, from 1, from left to right; 0 leaves the scene as it is.
        box: Left, top, right, bottom in pixels; the face is the one whose centre, where it is first found,
            lies in it.
        name: Name of the video in messages.

    Returns:
        None if there is no such face.

    Raises:
        ConfigError: The scene shows fewer people than `person`.
        MediaError: The scene shows several people, and neither a number nor a box says who speaks.
    """
    if box is not None:
        centers = [box_center(track.boxes[track.present.argmax()]) for track in scene.faces]
        inside = [bool((box[:2] <= center).all() and (center <= box[2:]).all()) for center in centers]
        return scene.faces[inside.index(True)] if any(inside) else None
    if person == 0 or not scene.faces:
        return None
    count = len(scene.faces)
    if person is None:
        if count > 1:
            raise MediaError(
                f"{name}: {scene} show {count} people; say who speaks with --person=1 to {count}, counted "
                "from the left, or with --box"
            )
        return scene.faces[0]
    if person > count:
        raise ConfigError(
            f"--person={person}: {scene} of {name} show {count}; people are counted from 1, and --person=0 "
            "leaves a scene as it is"
        )
    return scene.faces[person - 1]


def track_speaker(scene: VideoScene, face: FaceTrack, size: tuple[int, int], mode: MaskMode) -> Speaker:
    """Crop and outlines of a tracked face.

    Args:
        scene: The scene.
        face: A face of it.
        size: Height and width of the frames.
        mode: What is generated.
    """
    square = square_around(face.boxes[face.present], *size)

    def outline(index: int) -> Float[np.ndarray, "Q 2"] | None:
        if mode == "none":
            return whole_square(square)
        if not face.present[index]:
            return None
        return square.local(landmark_outline(face.points[index], face.layout, mode))

    portrait = int(face.present.argmax())
    points = square.local(five_points(face.points[portrait], face.layout))
    return Speaker(scene.first, square, [outline(i) for i in range(scene.num_frames)], points, portrait)


def still_speaker(
    scene: VideoScene, box: Float[np.ndarray, "4"], size: tuple[int, int], mode: MaskMode
) -> Speaker:
    """Crop and outline of a head that no detector finds, which stays in its box.

    Args:
        scene: The scene.
        box: Left, top, right, bottom of the head, from hair to chin, in pixels.
        size: Height and width of the frames.
        mode: What is generated.
    """
    square = square_around(box[None], *size)
    outline = whole_square(square) if mode == "none" else square.local(box_outline(box, mode))
    points = square.local(points_in_box(box))
    return Speaker(scene.first, square, [outline] * scene.num_frames, points, 0)


def whole_square(square: Square) -> Float[np.ndarray, "4 2"]:
    """The outline of a mask that covers the crop."""
    return np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float64) * square.side


def check_mask(speaker: Speaker, name: str) -> None:
    """Raises a MediaError if the mask is empty in every frame."""
    if not any(speaker.mask(index).any() for index in range(speaker.num_frames)):
        raise MediaError(
            f"{name}: the mask is empty from frame {speaker.first} on; the face lies outside the frame"
        )


@dataclass(frozen=True)
class FrameRates:
    """Which frames the model generates for a scene, and where each is shown.

    Attributes:
        taken: Index in the scene of the source's frame that each generated frame takes the place of, 4k + 1
            of them; the last one is repeated.
        shown: Index of the generated frame that each frame of the source shows: the nearest in time.
    """

    taken: Int[np.ndarray, " T"]
    shown: Int[np.ndarray, " N"]


def match_rates(num_frames: int, source_fps: float, model_fps: float) -> FrameRates:
    """Matches the frames of a scene with those that the model generates.

    Args:
        num_frames: Frames of the scene.
        source_fps: Frame rate of the source.
        model_fps: Frame rate that is generated.
    """
    ratio = model_fps / source_fps
    shown = np.floor(np.arange(num_frames) * ratio + 0.5).astype(int)
    count = int(shown[-1]) + 1
    padded = max(video_frames(latent_frames(count) + (count % TEMPORAL_FACTOR != 1)), MIN_FRAMES)
    taken = np.minimum(np.floor(np.arange(padded) / ratio + 0.5).astype(int), num_frames - 1)
    return FrameRates(taken, shown)


def at_indices(frames: Iterable[Frame], indices: Int[np.ndarray, " n"]) -> Iterator[Frame]:
    """Yields the frames at indices that never decrease; each frame is read once, none after the last one."""
    numbered = enumerate(frames)
    position, frame = next(numbered)
    for index in indices.tolist():
        while position < index:
            position, frame = next(numbered)
        yield frame


def generated_masks(speaker: Speaker, rates: FrameRates) -> Iterator[Bool[np.ndarray, "side side"]]:
    """Yields the mask of each generated frame: all of the masks with which it is pasted into the source."""
    for generated, taken in enumerate(rates.taken.tolist()):
        first, end = np.searchsorted(rates.shown, (generated, generated + 1)).tolist()
        yield np.any([speaker.mask(index) for index in (taken, *range(first, end))], axis=0)


class _Counted:
    """Frames that are counted while they are iterated."""

    def __init__(self, frames: Iterable[UInt8[np.ndarray, "H W 3"]]):
        self.frames, self.count = frames, 0

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        for frame in self.frames:
            self.count += 1
            yield frame


def _numbered(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: float
) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """Frames, each with the number of its scene."""
    is_cut, scene = cut_detector(fps), 0
    for index, frame in enumerate(frames):
        scene += is_cut(index, frame)
        yield scene, frame
