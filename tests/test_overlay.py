"""Drawings of driving faces and of the picture's people."""

import numpy as np

from fantasy_jax import media
from fantasy_jax.preprocessing.driving import DrivingFace
from fantasy_jax.preprocessing.overlay import draw_boxes, draw_people, overlay_frames

BOX = np.array([20.0, 40.0, 60.0, 90.0])


def person(left, frames=4):
    boxes = np.tile(BOX + np.array([left, 0, left, 0]), (frames, 1))
    points = np.tile([[left + 30 + 5 * i, 60 + 3 * i] for i in range(5)], (frames, 1, 1)).astype(np.float64)
    return DrivingFace(boxes, points, np.arange(frames) != 2)


def test_boxes_are_drawn_on_a_copy_in_different_colours():
    image = np.zeros((120, 200, 3), np.uint8)
    drawn = draw_boxes(image, np.stack([BOX, BOX + np.array([80, 0, 80, 0])]), ["1", "2"], [1, 2])
    assert not image.any()
    assert not drawn[60, 30].any()
    assert not np.array_equal(drawn[60, 20], drawn[60, 100])
    assert drawn[60, 20].any()
    assert drawn[60, 100].any()
    # A box that is partly outside is drawn as far as it is inside, its label wholly.
    outside = draw_boxes(image, np.array([[-30.0, -20.0, 50.0, 50.0]]), ["1 undriven"], [1])
    assert outside[30, 50].any()
    assert outside[3, 3].any()


def test_points_are_drawn_and_lost_frames_are_labelled():
    frame = np.zeros((120, 200, 3), np.uint8)
    people = [person(0), person(80)]
    shown, lost = (draw_people(frame, people, index, [1, 2]) for index in (1, 2))
    assert shown[60, 30].any()
    assert not np.array_equal(shown, lost)
    np.testing.assert_array_equal(shown, draw_people(frame, people, 3, [1, 2]))
    assert np.array_equal(draw_people(frame, [], 0, []), frame)


def test_drivers_stand_beside_the_picture_at_equal_height(tmp_path):
    frames = np.zeros((4, 120, 200, 3), np.uint8)
    tall = np.zeros((3, 240, 100, 3), np.uint8)
    picture = np.full((200, 300, 3), 90, np.uint8)
    drivers = [(frames, [person(0), person(80)]), (tall, [person(10)])]
    boxes = np.array([[10.0, 50.0, 60.0, 90.0], [80.0, 50.0, 130.0, 90.0], [150.0, 50.0, 200.0, 90.0]])
    made = list(overlay_frames(drivers, picture, boxes, [1, 2, 3], height=240))
    assert len(made) == 3  # as many as the shortest driver
    assert {frame.shape for frame in made} == {(240, 400 + 100 + 360, 3)}
    # A person's boxes have the same colour on both sides.
    for driver, place in [((140, 41), (90, 12)), ((140, 201), (90, 96)), ((70, 430), (90, 180))]:
        right = made[0][place[0], 500 + place[1]].astype(int)
        assert np.abs(made[0][driver].astype(int) - right).max() < 40, driver
    more = np.concatenate([boxes, [[220.0, 50.0, 280.0, 90.0]]])
    (frame, *_) = overlay_frames(drivers, picture, more, [1, 2, 3], height=240)
    assert (frame != made[0]).any()
    media.write_video(tmp_path / "o.mp4", overlay_frames(drivers, picture, boxes, [1, 2, 3], height=239), 25)
    assert len(media.read_video(tmp_path / "o.mp4")[0]) == 3


def test_the_tokens_of_people_are_tinted_and_targets_choose_the_colour():
    frames, picture = np.zeros((2, 120, 200, 3), np.uint8), np.full((192, 288, 3), 90, np.uint8)
    labels = np.zeros((12, 18), np.uint8)
    labels[6:9, 3:6], labels[6:9, 12:15] = 1, 2
    boxes = np.array([[50.0, 100.0, 90.0, 140.0], [196.0, 100.0, 236.0, 140.0]])
    made = [
        next(overlay_frames([(frames, [person(0, 2)])], picture, boxes, [target], labels=labels, height=192))
        for target in (1, 2)
    ]
    right = made[0][:, -288:]
    assert not np.array_equal(right[120, 70], right[120, 216])  # in the boxes of both people
    assert (right[180, 10] == 90).all()
    driver = [frame[96, 33].astype(int) for frame in made]  # the left side of the box
    assert np.abs(driver[0] - driver[1]).max() > 40
    still = [(np.zeros((1, 120, 200, 3), np.uint8), [person(0, 1)]), (frames, [person(0, 2)])]
    assert len(list(overlay_frames(still, picture, boxes, [1, 2]))) == 2
