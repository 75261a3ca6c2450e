"""Scenes: driving videos are tracked, and their people matched with those of the picture."""

import numpy as np
import pytest
from drawn_faces import SIDE, clip, open_squares
from PIL import Image
from real_people import CONFIG as LANDMARKS
from real_people import media_file, need_mediapipe

from fantasy_jax import media
from fantasy_jax.errors import ConfigError, MediaError
from fantasy_jax.pipelines import scene as scenes
from fantasy_jax.preprocessing.driving import DrivingConfig
from fantasy_jax.preprocessing.images import fit_image
from fantasy_jax.video import VideoConfig

VIDEO = VideoConfig(height=128, width=320, num_frames=9, fps=25)
CONFIG = DrivingConfig(smooth=False)
LEFT, RIGHT = np.array([0.05, 0.1, 0.3, 0.6]), np.array([0.6, 0.1, 0.9, 0.6])


@pytest.fixture(autouse=True)
def _squares(monkeypatch):
    monkeypatch.setattr(scenes, "open_detector", open_squares)


def picture(*lefts):
    """A picture of faces with these left edges."""
    people = [(20 * number, left) for number, left in enumerate(lefts, 1)]
    return Image.fromarray(clip(*people, frames=1, height=128)[0])


def driver(*lefts, frames=9, **options):
    """Frames of people with these left edges; the n-th is of level 100 + n."""
    people = [(100 + number, left) for number, left in enumerate(lefts, 1)]
    return clip(*people, frames=frames, **options)


def make(image, *drivers, **options):
    fitted = fit_image(image, VIDEO.longest_edge)
    return scenes.make_scene(image, drivers, fitted=fitted, video=VIDEO, config=CONFIG, **options)


def write(path, frames, fps=25):
    media.write_video(path, frames, fps, lossless=True)
    return path


def levels(scene):
    """The level of green of each driving face, at its nose in the first frame."""
    return [int(face[94, 113, 1]) for face in next(scene.faces())]


def faces_of(scene):
    """The driving faces, by person and frame."""
    return np.stack(list(scene.faces()), axis=1)


def tokens(scene):
    """The person of each token of the row through the faces, in the first latent frame."""
    labels = scene.labels()
    return labels.reshape(labels.shape[0], 8, 20)[0, 3].tolist()


def test_one_person_drives_the_whole_picture():
    scene = make(picture(100), driver(50))
    assert (scene.targets, scene.num_frames, scene.notes) == ((1,), 9, ())
    assert scene.labels() is None
    assert faces_of(scene).shape == (1, 9, 224, 224, 3)
    assert scene.picture.size == (320, 128)


def test_one_video_of_two_people_drives_two_faces_from_left_to_right():
    scene = make(picture(40, 220), driver(200, 10))
    assert (scene.targets, scene.notes) == ((1, 2), ())
    assert levels(scene) == [102, 101]
    np.testing.assert_allclose(scene.boxes[:, 0], [40, 220])
    labels = scene.labels()
    assert labels.shape == (3, 8 * 20)
    assert (labels == labels[0]).all()
    assert tokens(scene)[2:5] == [1, 1, 1]
    assert tokens(scene)[13:16] == [2, 2, 2]


def test_two_videos_drive_one_face_each():
    scene = make(picture(40, 220), driver(50), driver(200, frames=12))
    assert scene.targets == (1, 2)
    assert [driver.length for driver in scene.drivers] == [9, 9]
    assert len(scene.people) == len(faces_of(scene)) == 2


def test_the_largest_of_several_people_drives_one_person():
    several = driver(20, 200)
    several[:, 40:80, 160:200, 1] = 110
    for scene in (make(picture(40), several), make(picture(40, 220), driver(50), several)):
        assert levels(scene)[-1] == 110
        (note,) = scene.notes
        assert "3 people" in note


def test_of_more_people_than_faces_the_first_from_the_left_drive():
    scene = make(picture(40, 220), driver(250, 20, 130))
    assert levels(scene) == [102, 103]
    assert len(scene.notes) == 1


def test_a_face_without_a_driver_belongs_to_nobody():
    scene = make(picture(20, 120, 220), driver(50), driver(50))
    assert scene.targets == (1, 2)
    (note,) = scene.notes
    assert note.startswith("person 3")
    assert tokens(scene)[14:16] == [3, 3]  # a label that no driver has


def test_more_drivers_than_faces_are_an_error():
    for lefts in [(40,), (40, 220)]:
        with pytest.raises(MediaError, match="drive"):
            make(picture(*lefts), *[driver(50)] * (len(lefts) + 1))


def test_a_picture_without_a_face_has_one_driver():
    scene = make(picture(), driver(50))
    assert (scene.targets, scene.notes, scene.labels()) == ((1,), (), None)
    with pytest.raises(MediaError, match="no face"):
        make(picture(), driver(50), driver(50))
    assert levels(make(picture(), driver(50, 250))) == [101]


def test_boxes_take_the_place_of_detection_in_the_order_of_the_drivers():
    scene = make(picture(100), driver(50), driver(20, 200, side=34), boxes=[RIGHT, LEFT])
    np.testing.assert_allclose(scene.boxes, [[192, 12.8, 288, 76.8], [16, 12.8, 96, 76.8]])
    assert scene.targets == (1, 2)
    assert tokens(scene)[12:18] == [1] * 6
    assert tokens(scene)[1:6] == [2] * 5
    alone = make(picture(100, 200), driver(50), boxes=[LEFT])
    assert alone.labels() is None


@pytest.mark.parametrize(
    "boxes",
    [
        [LEFT, LEFT],
        [LEFT, np.array([0.2, 0.0, 0.8, 0.2])],
        [LEFT, RIGHT + 0.2],
        [LEFT, RIGHT[[2, 1, 0, 3]]],
        [LEFT, RIGHT * np.nan],
    ],
    ids=["equal", "overlapping", "outside", "turned", "nan"],
)
def test_boxes_that_cannot_be_are_refused(boxes):
    with pytest.raises(ConfigError, match="--box"):
        make(picture(), driver(50), driver(50), boxes=boxes)


def test_targets_choose_whom_a_driver_drives():
    scene = make(picture(40, 220), driver(50), driver(200), targets=[2, 1])
    assert (scene.targets, scene.notes) == ((2, 1), ())
    one = make(picture(40, 220), driver(50), targets=[2])
    assert one.targets == (2,)
    assert "person 1" in one.notes[0]
    both = make(picture(40, 220), driver(50, 200), targets=[2, 1])
    assert levels(both) == [101, 102]


@pytest.mark.parametrize("targets", [[0, 1], [1, 3], [-1, 2], [1, 1], [1], [1, 2, 3]], ids=str)
def test_targets_that_cannot_be_are_refused(targets):
    with pytest.raises(ConfigError, match="--person"):
        make(picture(40, 220), driver(50), driver(200), targets=targets)


def test_a_scene_needs_a_driver():
    with pytest.raises(ConfigError, match="driver"):
        make(picture(40))


@pytest.mark.parametrize("kind", ["png", "mp4", "array"])
def test_a_single_frame_is_held(tmp_path, kind):
    still = driver(50, frames=1)
    if kind == "png":
        Image.fromarray(still[0]).save(tmp_path / "p.png")
    if kind == "mp4":
        write(tmp_path / "p.mp4", still)
    given = still if kind == "array" else tmp_path / f"p.{kind}"
    scene = make(picture(100), given)
    assert scene.num_frames == VIDEO.num_frames
    assert len(scene.notes) == 1
    faces = faces_of(scene)
    assert faces.shape == (1, 9, 224, 224, 3)
    assert (faces == faces[:, :1]).all()
    together = make(picture(40, 220), given, driver(lambda i: 50 + 2 * i, frames=6))
    assert together.num_frames == 5
    first, second = faces_of(together)
    assert (first == first[0]).all()
    assert len(first) == len(second) == 5


def test_an_animated_picture_is_a_video(tmp_path):
    first, *others = map(Image.fromarray, driver(lambda i: 50 + 5 * i))
    first.save(tmp_path / "v.gif", save_all=True, append_images=others, duration=40)
    scene = make(picture(100), tmp_path / "v.gif")
    assert (scene.num_frames, scene.notes) == (9, ())
    assert not np.array_equal(scene.people[0].boxes[0], scene.people[0].boxes[-1])


@pytest.mark.parametrize("size", [(1, 1), (3, 999), (999, 3), (17, 33)], ids=str)
def test_pictures_have_any_size(size):
    scene = make(Image.new("RGB", size), driver(50), driver(200), boxes=[LEFT, RIGHT])
    assert max(scene.picture.size) == 320
    assert scene.labels().shape[1] == np.prod(scene.picture.size) // 256
    assert len(list(scene.overlay())) == 9


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_a_driver_that_is_too_short_is_an_error(frames):
    with pytest.raises(MediaError, match="at least 5"):
        make(picture(100), driver(50, frames=frames))


def test_the_shortest_driver_gives_the_length():
    scene = make(picture(40, 220), driver(50, frames=8), driver(200))
    assert scene.num_frames == 5
    assert [driver.length for driver in scene.drivers] == [5, 5]
    (note,) = scene.notes
    assert "8 frames" in note
    assert scene.labels().shape[0] == 2


def test_lost_frames_are_counted():
    lost = driver(lambda i: None if i in (2, 3, 6) else 50)
    (note,) = make(picture(100), lost).notes
    assert "3 of 9" in note


def test_a_driver_without_a_face_is_an_error(tmp_path):
    write(tmp_path / "dark.mp4", driver())
    with pytest.raises(MediaError, match=r"dark\.mp4"):
        make(picture(100), tmp_path / "dark.mp4")


def test_one_file_can_drive_two_people(tmp_path):
    path = write(tmp_path / "v.mp4", driver(lambda i: 50 + i))
    scene = make(picture(40, 220), path, path)
    first, second = faces_of(scene)
    assert np.array_equal(first, second)
    assert scene.targets == (1, 2)


@pytest.mark.parametrize(("fps", "frames", "kept"), [(50, 17, 9), (50, 12, 5), (12.5, 4, 5), (10, 9, 9)])
def test_drivers_of_another_frame_rate_keep_their_pace(tmp_path, fps, frames, kept):
    video = driver(lambda i: 50 + round(100 * i / fps), frames=frames)
    if fps == 12.5:
        fps, video = 25, np.repeat(video, 2, axis=0)
    scene = make(picture(100), write(tmp_path / "v.mp4", video, fps))
    assert scene.num_frames == kept
    seconds = (kept - 1) / VIDEO.fps
    moved = scene.people[0].boxes[-1, 0] - scene.people[0].boxes[0, 0]
    assert abs(moved - 100 * seconds) <= 100 / fps


def test_a_persons_tokens_grow_by_their_drivers_motion_up_to_a_quarter():
    still = make(picture(96, 224), driver(100), driver(100))
    assert [i for i, label in enumerate(tokens(still)) if label] == [6, 7, 14, 15]
    for step in (1, 8):  # 8 and 64 pixels, of a face of 30
        moving = make(picture(96, 224), driver(lambda i, step=step: 100 - step * i), driver(100))
        assert [i for i, label in enumerate(tokens(moving)) if label] == [5, 6, 7, 14, 15]
        assert tokens(moving)[5] == 1


def test_where_grown_boxes_meet_the_later_one_wins():
    towards = driver(lambda i: 100 + 2 * i), driver(lambda i: 100 - 2 * i)
    scene = make(picture(96, 130), *towards)
    assert tokens(scene)[6:11] == [1, 2, 2, 2, 0]
    swapped = make(
        picture(),
        *towards[::-1],
        boxes=[np.array([x, 40, x + SIDE, 70]) / [320, 128, 320, 128] for x in (130, 96)],
    )
    assert tokens(swapped)[6:11] == [2, 2, 2, 1, 0]


def test_a_person_without_a_token_is_named():
    small, shift = np.array([[0.61, 0.41, 0.62, 0.45], [0.015, 0, 0.015, 0]])
    scene = make(picture(), driver(50), driver(200), boxes=[small, small + shift])
    assert set(np.unique(scene.labels())) == {0, 2}
    (note,) = scene.notes
    assert note.startswith("person 1")


def test_the_overlay_has_every_frame_of_the_clip():
    scene = make(picture(40, 220), driver(50), driver(200, frames=1))
    shown = list(scene.overlay())
    assert len(shown) == 9
    assert {frame.shape for frame in shown} == {(480, 1280 + 1280 + 1200, 3)}
    assert not np.array_equal(shown[0], np.zeros_like(shown[0]))
    alone = make(picture(), driver(50, frames=1))
    assert len(list(alone.overlay())) == 1


def test_a_real_video_of_two_people_drives_a_real_picture(monkeypatch):
    need_mediapipe()
    monkeypatch.undo()  # the detector of squares
    config = DrivingConfig(landmarks=LANDMARKS)
    image = media.read_image(media_file("two_people.png"))
    fitted = fit_image(image, VIDEO.longest_edge)
    made = scenes.make_scene(image, [media_file("two_people.mp4")], fitted=fitted, video=VIDEO, config=config)
    assert (made.targets, made.num_frames, made.notes) == ((1, 2), 9, ())
    assert made.boxes[0, 2] < made.boxes[1, 0]
    assert set(np.unique(made.labels())) == {0, 1, 2}
    assert faces_of(made).shape == (2, 9, 224, 224, 3)
