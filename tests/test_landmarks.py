"""Tracking of faces and bodies with any detector, and MediaPipe's detectors."""

import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
from real_people import CONFIG, FACE_MODEL, POSE_MODEL, need_mediapipe, tracked

from fantasy_jax.config import build
from fantasy_jax.errors import ConfigError
from fantasy_jax.preprocessing.landmarks import (
    JOINTS,
    MEDIAPIPE_FACE,
    BodyDetector,
    DetectedBody,
    DetectedFace,
    FaceDetector,
    FaceTrack,
    LandmarkConfig,
    five_points,
)
from fantasy_jax.preprocessing.mediapipe_detectors import MediaPipeBodies, MediaPipeFaces
from fantasy_jax.preprocessing.tracking import find_faces, track_bodies, track_faces


class Squares:
    """Detects squares of one colour; landmarks are two corners, and red is the confidence."""

    layout = MEDIAPIPE_FACE

    def detect(self, image):
        faces = []
        for colour in np.unique(image[..., 1][image[..., 1] > 0]):
            rows, columns = np.nonzero(image[..., 1] == colour)
            box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
            corners = np.float32([[box[0], box[1], 0], [box[2], box[3], 0]])
            faces.append(DetectedFace(corners, float(image[rows[0], columns[0], 0]) / 255, box))
        return sorted(faces, key=lambda face: -float(face.box[2] - face.box[0]))


def clip(*people, frames=20):
    """Draws squares on black, given their colour, side, and corner in every frame, or None."""
    video = np.zeros((frames, 100, 200, 3), np.uint8)
    for colour, side, place in people:
        for index in range(frames):
            if place(index) is not None:
                x, y = place(index)
                video[index, y : y + side, x : x + side] = (200, colour, 0)
    return video


def lefts(track):
    return track.points[:, 0, 0]


def test_faces_keep_their_track_when_their_order_changes():
    video = clip((90, 20, lambda i: (8 * i, 10)), (40, 22, lambda i: (160 - 8 * i, 60)))
    assert isinstance(Squares(), FaceDetector)
    first, second = track_faces(Squares(), video, CONFIG)
    np.testing.assert_array_equal(lefts(first), 160 - 8 * np.arange(20))
    np.testing.assert_array_equal(lefts(second), 8 * np.arange(20))
    assert first.present.all()
    assert second.score == pytest.approx(200 / 255)
    assert (first.size, second.size) == (22, 20)


def test_a_short_gap_is_interpolated_and_a_long_one_is_not():
    video = clip((90, 20, lambda i: None if 3 <= i < 8 or 12 <= i < 18 else (2 * i, 10)), frames=25)
    (track,) = track_faces(Squares(), video, CONFIG)
    assert np.flatnonzero(~track.present).tolist() == [*range(12, 18)]
    np.testing.assert_allclose(lefts(track)[:12], 2 * np.arange(12), rtol=1e-6)
    assert np.isnan(track.points[12:18]).all()
    assert not track.score[12:18].any()
    (shorter,) = track_faces(Squares(), video, replace(CONFIG, max_gap=4))
    assert np.flatnonzero(~shorter.present).tolist() == [*range(3, 8), *range(12, 18)]


def test_nothing_is_extrapolated():
    video = clip((90, 20, lambda i: (50, 10) if 4 <= i < 15 else None))
    (track,) = track_faces(Squares(), video, CONFIG)
    assert np.flatnonzero(track.present).tolist() == [*range(4, 15)]


def test_false_detections_are_dropped_and_a_leap_starts_a_new_track():
    leaps = (90, 20, lambda i: (50, 10) if i < 10 else (150, 70))
    video = clip(leaps, (40, 30, lambda i: (100, 60) if i == 2 else None))
    first, second = track_faces(Squares(), video, CONFIG)
    assert (first.present.sum(), second.present.sum()) == (10, 10)
    assert track_faces(Squares(), np.zeros((5, 20, 20, 3), np.uint8), CONFIG) == []


class Noses:
    """Detects a body in every square, with the nose in its centre."""

    def detect(self, image):
        centers = [np.float32(face.box[:2] + face.box[2:]) / 2 for face in Squares().detect(image)]
        visible = np.ones(len(JOINTS), np.float32)
        return [DetectedBody(np.tile(center, (len(JOINTS), 1)), visible) for center in centers]


def test_every_face_gets_the_body_whose_nose_is_in_it():
    video = clip((90, 20, lambda i: (8 * i, 10)), (40, 22, lambda i: (160 - 8 * i, 60)))
    faces = track_faces(Squares(), video, CONFIG)
    assert isinstance(Noses(), BodyDetector)
    for face, body in zip(faces, track_bodies(Noses(), video, faces, CONFIG), strict=True):
        seen = np.flatnonzero(body.visibility[:, 0])
        assert seen.tolist() == [0, 3, 6, 9, 12, 15, 18]
        centers = (face.boxes[:, :2] + face.boxes[:, 2:]) / 2
        np.testing.assert_allclose(body.joints[seen, 0], centers[seen])
        assert np.isnan(body.joints[1]).all()


@pytest.mark.parametrize("kind", [MediaPipeFaces, MediaPipeBodies])
def test_a_missing_model_is_an_error_with_its_url(kind):
    need_mediapipe()
    with pytest.raises(ConfigError, match=r"https://\S+\.task$"):
        kind(LandmarkConfig())
    swapped = LandmarkConfig(face_model=str(POSE_MODEL), pose_model=str(FACE_MODEL))
    with pytest.raises(ConfigError, match="https"):
        kind(swapped)


def test_a_missing_package_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe.tasks.python", None)
    with pytest.raises(ConfigError, match="mediapipe"):
        MediaPipeFaces(CONFIG)


@pytest.mark.parametrize(("setting", "value"), [("max_gap", -1), ("min_side", 0), ("min_confidence", 1.5)])
def test_invalid_settings_are_errors(setting, value):
    with pytest.raises(ConfigError, match=rf"^landmarks\.{setting}"):
        build(LandmarkConfig, {setting: value}, "landmarks")


def test_landmarks_in_a_small_image_equal_those_in_a_large_one():
    video, _, _, (face,) = tracked("talking.mp4")
    large = face.points[0, :, :2]
    height, width = video.shape[1:3]
    small = cv2.resize(video[0], (64, round(64 * height / width)), interpolation=cv2.INTER_AREA)
    with MediaPipeFaces(CONFIG) as detector:
        (found,) = find_faces(detector, small)
    assert found.points.shape == (468, 3)
    away = np.linalg.norm(found.points[:, :2] * width / 64 - large, axis=1).mean()
    assert away < 0.05 * face.size


def test_the_five_points_of_an_upright_face_are_in_order():
    _, _, _, (face,) = tracked("talking.mp4")
    right_eye, left_eye, nose, right_corner, left_corner = five_points(face.points, face.layout)[0]
    assert right_eye[0] < nose[0] < left_eye[0]
    assert right_corner[0] < left_corner[0]
    assert max(right_eye[1], left_eye[1]) < nose[1] < min(right_corner[1], left_corner[1])


def test_a_real_clip_has_one_face_in_every_frame_and_a_body():
    video, _, _, faces = tracked("talking.mp4")
    assert len(faces) == 1
    assert faces[0].present.all()
    assert faces[0].score.min() > 0.9
    with MediaPipeBodies(CONFIG) as detector:
        (body,) = track_bodies(detector, video[:10], [_first(faces[0], 10)], CONFIG)
    shoulders = body.joints[0, [JOINTS.index("right_shoulder"), JOINTS.index("left_shoulder")]]
    chin = faces[0].boxes[0, 3]
    assert (shoulders[:, 1] > chin).all()
    assert shoulders[0, 0] < shoulders[1, 0]


@pytest.mark.slow
def test_two_people_are_two_tracks_that_are_never_swapped():
    _, _, _, faces = tracked("two_people.mp4")
    assert len(faces) == 2
    assert all(face.present.mean() > 0.95 for face in faces)
    lefts, rights = ((face.boxes[:, 0] + face.boxes[:, 2]) / 2 for face in faces)
    assert np.nanmax(lefts) < np.nanmin(rights)
    # Neither moves by more than a third of its size between two frames.
    for face in faces:
        steps = np.linalg.norm(np.diff(face.points[..., :2].mean(axis=1), axis=0), axis=1)
        assert np.nanmax(steps) < face.size / 3


def _first(face, count):
    return FaceTrack(face.points[:count], face.present[:count], face.score[:count], face.layout)
