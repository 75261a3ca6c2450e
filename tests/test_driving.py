"""Preparation of driving videos: tracking, lost frames, smoothing, alignment, and faces of the picture."""

import numpy as np
import pytest
from drawn_faces import Squares, clip
from helpers import DATA
from PIL import Image
from real_people import CONFIG, media_file, need_mediapipe
from safetensors.numpy import load_file

from fantasy_jax import media
from fantasy_jax.config import build
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.preprocessing import driving
from fantasy_jax.preprocessing.boxes import parse_box, place_boxes
from fantasy_jax.preprocessing.driving import (
    ALIGNED_POINTS,
    DrivingConfig,
    DrivingVideo,
    align_people,
    alignment_matrices,
    alignment_residuals,
    open_detector,
    track_people,
)
from fantasy_jax.preprocessing.landmarks import MEDIAPIPE_FACE, DetectedFace
from fantasy_jax.preprocessing.one_euro import (
    FIVE_POINT_GROUPS,
    SmoothingGroup,
    face_size,
    smooth_landmarks,
)
from fantasy_jax.preprocessing.picture_faces import find_people

REFERENCE = load_file(DATA / "fantasyportrait_preprocessing" / "activations.safetensors")
RAW = DrivingConfig(smooth=False)


def track(video, config=RAW, **options):
    return track_people(iter(video), Squares(), config, **options)


def test_the_alignment_is_the_official_one():
    points, image = REFERENCE["input.alignment_points"], REFERENCE["input.picture_rgb"]
    expected = REFERENCE["output.alignment_matrices"]
    np.testing.assert_allclose(alignment_matrices(points), expected, rtol=1e-12, atol=1e-10)
    for face, aligned in zip(points, REFERENCE["output.aligned_rgb"], strict=True):
        difference = np.abs(driving.align_face(image, face).astype(int) - aligned)
        # Versions of OpenCV differ in single pixels.
        assert difference.max() <= 4
        assert (difference > 0).mean() < 0.01


def test_aligned_points_have_no_residual():
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    points = 3 * ALIGNED_POINTS @ turn.T + (70, -20)
    assert alignment_residuals(points[None]) < 1e-9
    shifted = ALIGNED_POINTS + np.array([[3, 0], [-3, 0], [0, 0], [3, 0], [-3, 0]])
    assert 0.1 < alignment_residuals(shifted[None]) < 3


def test_people_are_ordered_from_left_to_right_and_never_swap():
    # The first two meet; the third comes last, on the far left.
    video = clip(
        (40, lambda i: 150 + 2 * i),
        (80, lambda i: 280 - 3 * i if i < 18 else None),
        (120, lambda i: 5 if i >= 10 else None),
    )
    video[:, 80:110, 100:130, 1] = 160  # below them
    people = track(video)
    lefts = [int(person.boxes[0, 0]) for person in people]
    assert lefts == [5, 100, 150, 280]
    assert people[1].found.all()
    assert [person.lost for person in people] == [10, 0, 0, 2]
    np.testing.assert_array_equal(people[2].boxes[:, 0], 150 + 2 * np.arange(20))


def test_crossing_people_keep_their_identity():
    video = np.zeros((20, 200, 320, 3), np.uint8)
    for index in range(20):
        video[index, 30:60, 10 + 14 * index : 40 + 14 * index, 1] = 40
        video[index, 66:96, 276 - 14 * index : 306 - 14 * index, 1] = 80
    left, right = track(video)
    np.testing.assert_array_equal(left.boxes[:, 0], 10 + 14 * np.arange(20))
    np.testing.assert_array_equal(right.boxes[:, 0], 276 - 14 * np.arange(20))


def test_lost_frames_repeat_the_last_landmarks_and_are_counted():
    video = clip((40, lambda i: None if i < 3 or 8 <= i < 12 else 100 + i))
    (person,) = track(video)
    assert person.lost == 7
    assert np.flatnonzero(~person.found).tolist() == [0, 1, 2, 8, 9, 10, 11]
    seen = [3, 3, 3, 3, 4, 5, 6, 7, 7, 7, 7, 7, *range(12, 20)]
    np.testing.assert_array_equal(person.boxes[:, 0], 100 + np.array(seen))
    np.testing.assert_array_equal(person.points, person.points[seen])
    (smoothed,) = track(video, DrivingConfig())
    np.testing.assert_array_equal(smoothed.points, smoothed.points[seen])
    assert np.isfinite(smoothed.points).all()


def test_false_detections_are_dropped():
    video = clip((40, lambda i: 100), (80, lambda i: 220 if i < 4 else None))
    assert len(track(video)) == 1
    longer = clip((40, lambda i: 100), (80, lambda i: 220 if i < 6 else None), frames=80)
    assert len(track(longer)) == 1
    assert len(track(longer, DrivingConfig(min_found=0.05))) == 2


@pytest.mark.parametrize("frames", [0, 1, 20])
def test_a_video_without_a_face_is_an_error(frames):
    with pytest.raises(MediaError, match=r"^dark\.mp4"):
        track(clip(frames=frames), name="dark.mp4")


def test_alignment_takes_the_frames_that_were_tracked():
    video = clip((40, lambda i: 50 + 5 * i), (80, lambda i: 250))
    people = track(video)
    aligned = np.stack(list(align_people(iter(video), people)), axis=1)
    assert aligned.shape == (2, 20, 224, 224, 3)
    # The corners of the mouth lie in the square, which has a level of its own.
    assert (aligned[0, :, 117, 91, 1] == 40).all()
    assert (aligned[1, :, 117, 91, 1] == 80).all()
    for changed in (video[:-1], np.concatenate([video, video[:1]]), []):
        with pytest.raises(MediaError, match="changed"):
            list(align_people(iter(changed), people, name="v.mp4"))


def test_smoothing_removes_jitter_and_follows_motion():
    noise = np.random.default_rng(0).normal(0, 0.3, (60, 5, 2))
    still = ALIGNED_POINTS + noise
    sizes = np.full(60, 150.0)
    smoothed = smooth_landmarks(still, sizes, FIVE_POINT_GROUPS)
    np.testing.assert_array_equal(smoothed[0], still[0])
    jitter = [np.abs(np.diff(x[20:], 2, axis=0)).mean() for x in (still, smoothed)]
    assert jitter[1] < jitter[0] / 4
    moving = still + np.arange(60)[:, None, None] * 6.0
    assert np.abs(smooth_landmarks(moving, sizes, FIVE_POINT_GROUPS) - moving).max() < 3


def test_a_still_video_is_not_changed_by_smoothing():
    # The official filter divides by the motion.
    still = np.tile(ALIGNED_POINTS, (5, 1, 1))
    smoothed = smooth_landmarks(still, np.full(5, 150.0), FIVE_POINT_GROUPS)
    np.testing.assert_array_equal(smoothed, still)


def test_landmarks_of_no_group_are_kept():
    points = np.random.default_rng(0).normal(size=(4, 3, 2))
    smoothed = smooth_landmarks(points, np.ones(4), [SmoothingGroup([1])])
    np.testing.assert_array_equal(smoothed[:, [0, 2]], points[:, [0, 2]])
    assert not np.array_equal(smoothed[:, 1], points[:, 1])


def test_the_size_of_a_turned_face_is_enlarged():
    points = np.zeros((468, 3), np.float32)
    points[[234, 454]] = (0, 0, 0), (100, 0, 0)
    points[[10, 152]] = (50, 0, 0), (50, 120, 0)
    box = np.float32([0, 0, 100, 120])
    assert face_size(DetectedFace(points, 1.0, box), MEDIAPIPE_FACE) == pytest.approx(100)
    angles = np.float32([-9, 15])
    assert face_size(DetectedFace(points, 1.0, box, angles), MEDIAPIPE_FACE) == pytest.approx(200)
    points[454, 2] = 100 * np.tan(np.deg2rad(30))
    assert face_size(DetectedFace(points, 1.0, box), MEDIAPIPE_FACE) == pytest.approx(200)


def write(path, frames, fps):
    media.write_video(path, frames, fps, lossless=True)
    return path


def test_a_video_is_resampled_and_cut(tmp_path):
    video = np.stack([np.full((32, 48, 3), 10 * i, np.uint8) for i in range(20)])
    path = write(tmp_path / "v.mp4", video, 20)
    frames = DrivingVideo(path, 10, 6)
    for _ in range(2):  # it can be iterated twice
        levels = [int(frame[0, 0, 0]) for frame in frames]
        assert levels == [0, 20, 40, 60, 80, 100]
    assert len(list(DrivingVideo(path, 20, 99))) == 20
    assert next(iter(frames)).shape == (32, 48, 3)


def test_a_picture_is_a_driver_of_one_frame(tmp_path):
    video = clip((40, lambda i: 50), frames=1)
    Image.fromarray(video[0]).save(tmp_path / "p.png")
    frames = DrivingVideo(tmp_path / "p.png", 25, 81)
    people = track_people(frames, Squares(), DrivingConfig())
    assert people[0].points.shape == (1, 5, 2)
    (aligned,) = align_people(frames, people)
    assert aligned.shape == (1, 224, 224, 3)
    one = DrivingVideo(write(tmp_path / "v.mp4", video, 25), 25, 81)
    assert len(list(one)) == 1


def test_files_that_are_no_drivers_are_errors(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("missing.mp4", "text.mp4"):
        with pytest.raises(MediaError, match=name):
            list(DrivingVideo(tmp_path / name, 25, 81))
    for settings in [(0, 81), (25, 0)]:
        with pytest.raises(ConfigError):
            DrivingVideo("v.mp4", *settings)


@pytest.mark.parametrize(("setting", "value"), [("min_found", -0.1), ("min_found", 1.5)])
def test_invalid_settings_are_errors(setting, value):
    with pytest.raises(ConfigError, match=rf"^driving\.{setting}"):
        build(DrivingConfig, {setting: value}, "driving")


def test_the_people_of_a_picture_are_found_from_left_to_right():
    image = clip((80, lambda i: 30), (40, lambda i: 200), frames=1)[0]
    boxes, points = find_people(image, Squares())
    np.testing.assert_array_equal(boxes, [[30, 40, 60, 70], [200, 40, 230, 70]])
    assert points.shape == (2, 5, 2)
    np.testing.assert_allclose(points[0, 2], (45, 55))
    boxes, points = find_people(np.zeros((64, 64, 3), np.uint8), Squares())
    assert (boxes.shape, points.shape) == ((0, 4), (0, 5, 2))


def test_boxes_are_fractions_inside_the_picture_without_overlap():
    boxes = [parse_box(text, option="--box") for text in ("0.5,0.1,0.9,0.6", "0,0,0.5,1")]
    placed = place_boxes(boxes, 100, 200, option="--box")
    np.testing.assert_allclose(placed, [[100, 10, 180, 60], [0, 0, 100, 100]])
    numbers = ("0.1,0.1,0.5", "a,b,c,d", "nan,0,1,1")
    places = ("-0.1,0,1,1", "0,0,1,1.1", "0.5,0,0.5,1", "0,0.9,1,0.1")
    for text in numbers + places:
        with pytest.raises(ConfigError, match=r"^--box"):
            parse_box(text, option="--box")
    with pytest.raises(ConfigError, match="overlap"):
        place_boxes([*boxes, np.array([0.4, 0.5, 0.6, 0.9])], 100, 200, option="--box")


@pytest.fixture(scope="module")
def mediapipe():
    need_mediapipe()
    with open_detector(DrivingConfig(landmarks=CONFIG)) as detector:
        yield detector


@pytest.mark.parametrize(
    ("name", "lost", "residuals"),
    [
        ("portrait.png", [0], [3.9]),
        ("two_people.png", [0, 0], [13.0, 6.7]),
        ("talking.mp4", [0], [3.3]),
        ("two_people.mp4", [2, 0], [8.4, 7.4]),
    ],
)
def test_real_people_are_found_and_fit_the_template(mediapipe, name, lost, residuals):
    frames = DrivingVideo(media_file(name), 23, 201)
    people = track_people(frames, mediapipe, RAW, name=name)
    assert [person.lost <= most for person, most in zip(people, lost, strict=True)] == [True] * len(lost)
    fits = [alignment_residuals(person.points).mean() for person in people]
    np.testing.assert_allclose(fits, residuals, atol=0.4)
    if len(people) == 2:
        assert (people[0].points[..., 0].max(axis=1) < people[1].points[..., 0].min(axis=1)).all()


def test_smoothing_halves_the_jitter_of_a_real_face(mediapipe):
    frames = DrivingVideo(media_file("talking.mp4"), 23, 81)
    jitter = [
        np.abs(np.diff(track_people(frames, mediapipe, config)[0].points, 2, axis=0)).mean()
        for config in (RAW, DrivingConfig())
    ]
    assert jitter[1] < 0.7 * jitter[0]
