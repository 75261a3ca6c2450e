"""Faces of driving videos, tracked, smoothed and aligned as FantasyPortrait's motion encoder takes them.

A driving video is read twice, once to track the faces and once to align them, so that only one of its frames
is held at a time. Source: fantasy-portrait, `infer.py`, `diffsynth/models/pdf.py`. Unlike there, frames
without a face repeat the last landmarks, a person keeps its identity, and smoothing never starts over.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from fantasy_jax import media
from fantasy_jax.config import Fraction, Settings
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.preprocessing.alignment import apply_affine, fit_similarity
from fantasy_jax.preprocessing.boxes import box_center
from fantasy_jax.preprocessing.landmarks import (
    DetectedFace,
    FaceDetector,
    FaceLayout,
    LandmarkConfig,
    five_points,
)
from fantasy_jax.preprocessing.mediapipe_detectors import MediaPipeFaces
from fantasy_jax.preprocessing.official_detectors import OFFICIAL_FACE, OfficialFaces
from fantasy_jax.preprocessing.one_euro import (
    FIVE_POINT_GROUPS,
    OFFICIAL_GROUPS,
    face_size,
    smooth_landmarks,
)
from fantasy_jax.preprocessing.tracking import detect_tracks
from fantasy_jax.typing import Bool, Float, UInt8
from fantasy_jax.video import latent_frames, video_frames

ALIGNED_SIZE = 224
"""Side of an aligned face of the released motion encoder, in pixels."""

ALIGNED_POINTS = ALIGNED_SIZE * np.array(
    [[0.3843, 0.2700], [0.6200, 0.2668], [0.5030, 0.4185], [0.4060, 0.5273], [0.5977, 0.5250]]
)
"""Positions of `landmarks.five_points` in an aligned face of this size, x and y in pixels.

Source: fantasy-portrait, `diffsynth/models/pdf.py`, `warp_face_pd_fgc`.
"""


@dataclass(frozen=True)
class DrivingConfig(Settings):
    """Settings of the preparation of driving videos.

    Attributes:
        detection_model: FantasyPortrait's `face_det.onnx`; empty: another detector is used.
        landmark_model: FantasyPortrait's `face_landmark.onnx`; given if and only if `detection_model` is.
        own_detector: Whether a model that has a face detector of its own uses it, without `detection_model`;
            MediaPipe is used otherwise. The miniature's own finds synthetic faces only.
        smooth: Whether landmarks are smoothed over time before alignment.
        min_found: People who are found in fewer frames than this fraction of those of the person found most
            often are dropped as false detections, in [0, 1].
        landmarks: Settings of MediaPipe's detector, and, for both detectors, `min_frames`.
    """

    detection_model: str = ""
    landmark_model: str = ""
    own_detector: bool = True
    smooth: bool = True
    min_found: Fraction = 0.1
    landmarks: LandmarkConfig = field(default_factory=LandmarkConfig)

    def __post_init__(self):
        super().__post_init__()
        if bool(self.detection_model) != bool(self.landmark_model):
            given, missing = ("detection_model", "landmark_model")[:: 1 if self.detection_model else -1]
            raise ConfigError(f"{missing} is empty, but {given} is given; give both files or none")


@dataclass(frozen=True)
class DrivingFace:
    """The face of one person in all frames of a driving video.

    Frames where the person is not found repeat the last landmarks before them; those before the first
    detection repeat its landmarks.

    Attributes:
        boxes: Left, top, right, bottom of the landmarks, in pixels, float64.
        points: Alignment points in the order of `landmarks.five_points`, x and y in pixels, float64.
        found: Whether the person is found in the frame.
    """

    boxes: Float[np.ndarray, "T 4"]
    points: Float[np.ndarray, "T 5 2"]
    found: Bool[np.ndarray, " T"]

    @property
    def lost(self) -> int:
        """Number of frames where the person is not found."""
        return int((~self.found).sum())


@dataclass(frozen=True)
class DrivingVideo:
    """The frames of a driving video, which can be iterated repeatedly; every pass reads the file again.

    Attributes:
        path: A video, or an image, which is a driving video of one frame.
        fps: Frame rate of the frames, in Hz; each is the frame of the file whose time is nearest.
        num_frames: Maximum number of frames.
        start: Seconds of a video that are left out.
    """

    path: str | Path
    fps: int | float
    num_frames: int
    start: float = 0.0

    def __post_init__(self):
        if self.fps <= 0:
            raise ConfigError(f"fps is {self.fps}; it must be positive")
        if self.num_frames < 1:
            raise ConfigError(f"num_frames is {self.num_frames}; it must be at least 1")

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Yields the frames, RGB.

        Raises:
            MediaError: The file is missing, neither a video nor an image, or damaged.
        """
        return itertools.islice(media.stream_frames(self.path, self.fps, self.start), self.num_frames)


def kept_frames(num_frames: int) -> int:
    """Returns the largest number 4k + 1 that is at most `num_frames`, 0 if there is none.

    Source: fantasy-portrait, `infer.py`, `find_replacement`.
    """
    return video_frames(latent_frames(num_frames)) if num_frames > 0 else 0


def open_detector(
    config: DrivingConfig, own: FaceDetector | None = None
) -> AbstractContextManager[FaceDetector]:
    """Returns the configured detector, to be used in a `with` statement.

    Args:
        config: Says which one.
        own: The model's own detector, if it has one.

    Raises:
        ConfigError: A package or a file of the detector is missing, or a file is not the expected model.
    """
    if config.detection_model:
        return OfficialFaces(config.detection_model, config.landmark_model)
    if own is not None and config.own_detector:
        return nullcontext(own)
    return MediaPipeFaces(config.landmarks)


def track_people(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    detector: FaceDetector,
    config: DrivingConfig,
    *,
    name: str | Path = "video",
    progress: bool = False,
) -> list[DrivingFace]:
    """Tracks the face of every person of a driving video, smoothed and in all frames.

    Arguments and errors are those of `find_people`.

    Returns:
        The people from left to right, by the centre of the face in the first frame where it is found.
    """
    tracks, count = find_people(frames, detector, config, name=name, progress=progress)
    return [driving_face(track, count, detector.layout, smooth=config.smooth) for track in tracks]


def find_people(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    detector: FaceDetector,
    config: DrivingConfig,
    *,
    name: str | Path = "video",
    progress: bool = False,
) -> tuple[list[dict[int, DetectedFace]], int]:
    """Finds the face of every person of a video.

    Faces are also searched closely around their last place, which finds small ones that are missed in the
    whole frame, and are assigned to people by position (`tracking.detect_tracks`).

    Args:
        frames: RGB, without scene cuts; iterated once.
        detector: Detects faces in one frame.
        config: Settings of false detections.
        name: Name of the video in messages.
        progress: Whether to show a progress bar.

    Returns:
        The detections of each person by the number of the frame, people from left to right, by the centre of
        the face in the first frame where it is found; and the number of frames.

    Raises:
        MediaError: There is no frame, or no face in enough of them.
    """
    tracks, count = detect_tracks(detector, frames, progress=progress)
    if not count:
        raise MediaError(f"{name}: the video has no frames")
    longest = max(map(len, tracks), default=0)
    enough = max(min(config.landmarks.min_frames, count), config.min_found * longest)
    tracks = [track for track in tracks if len(track) >= enough]
    if not tracks:
        raise MediaError(
            f"{name}: no face found in {count} frames; use a file that shows a face from the front"
        )
    return sorted(tracks, key=lambda track: float(box_center(track[min(track)].box)[0])), count


def driving_face(
    track: dict[int, DetectedFace], count: int, layout: FaceLayout, *, smooth: bool
) -> DrivingFace:
    """Smooths a person's detections, as of `find_people`, and extends them to all `count` frames."""
    found = np.array(sorted(track))
    faces = [track[index] for index in found]
    points = np.stack([face.points[:, :2] for face in faces]).astype(np.float64)
    boxes = np.stack([face.box for face in faces]).astype(np.float64)
    # As in the official code, motion is measured in sizes of the face in the frame before.
    sizes = np.array([face_size(face, layout) for face in [faces[0], *faces[:-1]]])
    if layout == OFFICIAL_FACE and smooth:
        points = smooth_landmarks(points, sizes, OFFICIAL_GROUPS)
        boxes = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
    aligned = five_points(points, layout)
    if layout != OFFICIAL_FACE and smooth:
        aligned = smooth_landmarks(aligned, sizes, FIVE_POINT_GROUPS)
    last = np.maximum(np.searchsorted(found, np.arange(count), side="right") - 1, 0)
    return DrivingFace(boxes[last], aligned[last], np.isin(np.arange(count), found))


def alignment_matrices(
    points: Float[np.ndarray, "*n 5 2"], size: int = ALIGNED_SIZE
) -> Float[np.ndarray, "*n 2 3"]:
    """Returns the similarity transforms from frames to aligned faces, in pixels.

    Args:
        points: As in `DrivingFace`.
        size: Side of an aligned face, in pixels.
    """
    return fit_similarity(points, ALIGNED_POINTS * (size / ALIGNED_SIZE))


def alignment_residuals(points: Float[np.ndarray, "T 5 2"]) -> Float[np.ndarray, " T"]:
    """Returns the root mean square distance of a frame's aligned points from the template, in pixels of 224.

    It is 3 to 4 for faces seen from the front and above 10 for profiles.
    """
    placed = apply_affine(alignment_matrices(points), points)
    return np.sqrt(np.square(placed - ALIGNED_POINTS).sum(axis=-1).mean(axis=-1))


def align_face(
    frame: UInt8[np.ndarray, "H W 3"], points: Float[np.ndarray, "5 2"], size: int = ALIGNED_SIZE
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Aligns a face by cubic interpolation; areas outside of the frame are black.

    Args:
        frame: RGB.
        points: As in `DrivingFace`, for this frame.
        size: Side of an aligned face, in pixels.
    """
    matrix = alignment_matrices(points, size)
    return cv2.warpAffine(frame, matrix, (size, size), flags=cv2.INTER_CUBIC)


def align_people(
    frames: Iterable[UInt8[np.ndarray, "H W 3"]],
    people: Sequence[DrivingFace],
    *,
    size: int = ALIGNED_SIZE,
    name: str | Path = "video",
) -> Iterator[UInt8[np.ndarray, "N {size} {size} 3"]]:
    """Yields the aligned faces of all people, frame by frame, given the frames that `track_people` was given.

    Args:
        frames: RGB.
        people: The result of `track_people`, or some of the people of it.
        size: Side of an aligned face, in pixels.
        name: Name of the video in messages.

    Raises:
        MediaError: There are fewer or more frames than were tracked.
    """
    count, index = len(people[0].points), -1
    for index, frame in enumerate(frames):
        if index == count:
            break
        yield np.stack([align_face(frame, person.points[index], size) for person in people])
    if index != count - 1:
        raise MediaError(f"{name}: the file changed while it was read; try again")
