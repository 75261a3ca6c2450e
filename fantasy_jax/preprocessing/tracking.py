"""Tracking of faces and bodies over the frames of a video, for any detector."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from fantasy_jax.preprocessing.boxes import box_center, box_distance, box_iou, box_side, crop_square
from fantasy_jax.preprocessing.landmarks import (
    JOINTS,
    BodyDetector,
    BodyTrack,
    DetectedFace,
    FaceDetector,
    FaceLayout,
    FaceTrack,
    LandmarkConfig,
)
from fantasy_jax.typing import Float, UInt8

_CLOSE_UP = 3.0
"""Side of the square that is searched for a face a second time, in sides of the face."""
_CLOSER_UP = 2.0
"""The same for a face of an earlier frame that is found neither there nor in the whole image."""
_MEMORY = 25
"""Number of frames for which a lost face is searched at its last position."""


def track_faces(
    detector: FaceDetector,
    video: Iterable[UInt8[np.ndarray, "H W 3"]],
    config: LandmarkConfig,
    *,
    progress: bool = False,
) -> list[FaceTrack]:
    """Tracks every face of a clip that has no scene cuts.

    The faces of a frame are assigned to the known tracks so that the total distance is least; a face never
    moves by more than its own size between detections.

    Args:
        detector: Detects faces in one frame.
        video: RGB frames; one is held at a time.
        config: Settings of gaps and of false detections.
        progress: Whether to show a progress bar.

    Returns:
        The tracks, the largest face first.
    """
    tracks, count = detect_tracks(detector, video, progress=progress)
    tracks = [track for track in tracks if len(track) >= min(config.min_frames, count)]
    filled = [_fill_gaps(track, count, config.max_gap, detector.layout) for track in tracks]
    return sorted(filled, key=lambda track: -track.size * track.present.mean())


def detect_tracks(
    detector: FaceDetector, frames: Iterable[UInt8[np.ndarray, "H W 3"]], *, progress: bool = False
) -> tuple[list[dict[int, DetectedFace]], int]:
    """Detects the faces of every frame and assigns them to persons; one frame is held at a time.

    Args:
        detector: Detects faces in one frame.
        frames: RGB, of a clip that has no scene cuts.
        progress: Whether to show a progress bar.

    Returns:
        The detections of each person by the number of the frame, false detections included, and the number
        of frames.
    """
    tracks: list[dict[int, DetectedFace]] = []
    index = -1
    for index, frame in enumerate(tqdm(frames, desc="Faces", unit="frame", disable=not progress)):
        last = [track[max(track)] for track in tracks]
        recent = [face.box for face, track in zip(last, tracks, strict=True) if index - max(track) <= _MEMORY]
        found = find_faces(detector, frame, around=recent)
        distances = np.array(
            [[box_distance(face.box, other.box) for other in found] for face in last]
        ).reshape(len(last), len(found))
        rows, columns = linear_sum_assignment(np.minimum(distances, 1))
        same = {column: row for row, column in zip(rows, columns, strict=True) if distances[row, column] < 1}
        for number, face in enumerate(found):
            if number in same:
                tracks[same[number]][index] = face
            else:
                tracks.append({index: face})
    return tracks, index + 1


def track_bodies(
    detector: BodyDetector,
    video: UInt8[np.ndarray, "T H W 3"],
    faces: Sequence[FaceTrack],
    config: LandmarkConfig,
    *,
    progress: bool = False,
) -> list[BodyTrack]:
    """Tracks the body of every face: searched below and beside it, and accepted if its nose is in the face.

    Args:
        detector: Detects bodies in one frame.
        video: RGB.
        faces: A body is searched only in frames where its face is present.
        config: Settings of how often a body is searched.
        progress: Whether to show a progress bar.
    """
    joints = np.full((len(faces), len(video), len(JOINTS), 2), np.nan, np.float32)
    visibility = np.zeros(joints.shape[:-1], np.float32)
    for index, frame in enumerate(tqdm(video, desc="Bodies", unit="frame", disable=not progress)):
        for number, face in enumerate(faces):
            if index % config.body_step or not face.present[index]:
                continue
            center, side = box_center(face.boxes[index]), box_side(face.boxes[index])
            crop, corner = crop_square(frame, center + np.array([0, 1.5 * side]), 3 * side)
            bodies = detector.detect(crop) if crop.size else []
            distances = [float(np.abs(body.joints[0] + corner - center).max()) / side for body in bodies]
            if distances and min(distances) < 0.6:
                body = bodies[int(np.argmin(distances))]
                joints[number, index], visibility[number, index] = body.joints + corner, body.visibility
    return [BodyTrack(*arrays) for arrays in zip(joints, visibility, strict=True)]


def find_faces(
    detector: FaceDetector, image: UInt8[np.ndarray, "H W 3"], *, around: Sequence[np.ndarray] = ()
) -> list[DetectedFace]:
    """Finds all faces of an image, with a second detection in a close-up of each.

    In the whole image small or turned faces are often missed, or their landmarks are inaccurate; a detection
    in the surroundings of the face's box is accurate. A face that fills the image needs no second one.

    Args:
        detector: Detects faces.
        image: RGB.
        around: More boxes `[4]` whose surroundings are searched, a second time more closely if nothing is
            found.

    Returns:
        The faces, the largest first.
    """
    far = detector.detect(image)
    boxes = [*around, *(face.box for face in far if all(box_distance(face.box, box) >= 1 for box in around))]
    near = []
    for box in boxes:
        fills_image = _CLOSE_UP * box_side(box) >= min(image.shape[:2])
        if not (fills_image and _near(box, far)):
            near += _detect_around(detector, image, box, _CLOSE_UP)
    for box in around:
        if not _near(box, [*near, *far]):
            near += _detect_around(detector, image, box, _CLOSER_UP)
    near.sort(key=lambda face: -face.confidence)
    kept: list[DetectedFace] = []
    for face in [*near, *far]:
        if all(box_iou(face.box, other.box) < 0.4 for other in kept):
            kept.append(face)
    return sorted(kept, key=lambda face: -box_side(face.box))


def _near(box: Float[np.ndarray, "4"], faces: Sequence[DetectedFace]) -> bool:
    return any(box_distance(face.box, box) < 1 for face in faces)


def _detect_around(
    detector: FaceDetector, image: UInt8[np.ndarray, "H W 3"], box: Float[np.ndarray, "4"], sides: float
) -> list[DetectedFace]:
    """Detects faces in a square around a box, whose side is given in sides of the box."""
    crop, corner = crop_square(image, box_center(box), sides / 2 * box_side(box))
    shift = np.array([*corner, 0], np.float32)
    return [
        replace(face, points=face.points + shift, box=face.box + np.tile(corner, 2))
        for face in (detector.detect(crop) if crop.size else [])
    ]


def _fill_gaps(track: dict[int, DetectedFace], count: int, max_gap: int, layout: FaceLayout) -> FaceTrack:
    """Extends a track to all frames; short gaps are interpolated linearly."""
    found = np.array(sorted(track))
    shape = track[found[0]].points.shape
    points, score = np.full((count, *shape), np.nan, np.float32), np.zeros(count, np.float32)
    present = np.zeros(count, bool)
    for first, last in zip(found, [*found[1:], found[-1]], strict=True):
        inside = range(first, last) if last - first - 1 <= max_gap and last > first else [first]
        for index in inside:
            fraction = (index - first) / max(last - first, 1)
            one, other = track[first], track[last]
            points[index] = (1 - fraction) * one.points + fraction * other.points
            score[index] = (1 - fraction) * one.confidence + fraction * other.confidence
            present[index] = True
    return FaceTrack(points, present, score, layout)
