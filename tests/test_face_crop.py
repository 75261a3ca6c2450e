"""Faces are cut where ArcFace expects them, and pictures that show none are told of."""

import cv2
import numpy as np
import pytest
from PIL import Image

from fantasy_jax.data import face_crop
from fantasy_jax.data.face_crop import TEMPLATE, crop_face, similarity
from fantasy_jax.data.landmarks import MEDIAPIPE_FACE, Face, LandmarkConfig
from fantasy_jax.media import MediaError

RANDOM = np.random.default_rng(0)


def turned(points, degrees, scale, shift):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * points @ turn.T + shift


def umeyama(source, target):
    """By singular values, as in the paper; insightface takes scikit-image's."""
    x, y = source - source.mean(axis=0), target - target.mean(axis=0)
    u, d, vt = np.linalg.svd(y.T @ x / len(x))
    sign = np.array([1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    turn = u @ np.diag(sign) @ vt
    scale = (d * sign).sum() / x.var(axis=0).sum()
    shift = target.mean(axis=0) - scale * turn @ source.mean(axis=0)
    return np.hstack([scale * turn, shift[:, None]])


def test_the_transform_is_umeyamas():
    for _ in range(20):
        points = turned(TEMPLATE, RANDOM.uniform(-180, 180), RANDOM.uniform(0.2, 9), RANDOM.normal(0, 99, 2))
        points += RANDOM.normal(0, 5, points.shape)
        np.testing.assert_allclose(similarity(points, TEMPLATE), umeyama(points, TEMPLATE), atol=1e-9)
    mirrored = TEMPLATE * (-1, 1)
    np.testing.assert_allclose(similarity(mirrored, TEMPLATE), umeyama(mirrored, TEMPLATE), atol=1e-9)


@pytest.mark.parametrize("size", [112, 48])
@pytest.mark.parametrize(("degrees", "scale"), [(0, 2.0), (25, 1.5), (-40, 3.0)])
def test_a_face_comes_out_upright_and_in_its_place(size, degrees, scale):
    points = turned(TEMPLATE - 56, degrees, scale, (260, 240))
    picture = np.full((480, 520, 3), 30, np.uint8)
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    for point, colour in zip(points, colours, strict=True):
        cv2.circle(picture, [round(x) for x in point], round(4 * scale), colour, -1)
    crop = crop_face(Image.fromarray(picture), points, size)
    assert crop.shape == (size, size, 3)
    for (x, y), colour in zip(TEMPLATE * size / 112, colours, strict=True):
        np.testing.assert_allclose(crop[round(y), round(x)], colour, atol=2)


def test_beyond_the_picture_it_is_black():
    points = TEMPLATE - (30, 0)
    crop = crop_face(np.full((112, 112, 3), 200, np.uint8), points)
    assert not crop[:, :29].any()
    assert (crop[:, 31:] == 200).all()


@pytest.mark.parametrize(
    ("points", "told"),
    [
        (None, "woman.png: no face is found"),
        (np.full((5, 2), np.nan), "woman.png: no face is found"),
        (TEMPLATE - (45, 0), "woman.png: the face is partly outside the picture"),
        (TEMPLATE - (0, -25), "woman.png: the face is partly outside the picture"),
        (TEMPLATE * 0.001 + 50, "woman.png: the face is smaller than a pixel"),
    ],
)
def test_a_picture_without_a_whole_face_is_refused(points, told):
    with pytest.raises(MediaError, match=told):
        crop_face(np.zeros((112, 112, 3), np.uint8), points, name="woman.png")


class Detector:
    """Finds one face, or two: the smaller one is on the left."""

    layout = MEDIAPIPE_FACE

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def detect(self, picture):
        if picture.shape[1] < 300:
            return []  # the second, closer look finds nothing new
        points = np.random.default_rng(1).uniform(0, 60, (468, 3)).astype(np.float32)
        faces = [points + np.array([200, 100, 0]), points / 2 + np.array([20, 30, 0])][: self.count]
        return [Face(np.float32(x), 0.9, np.float32([*x.min(axis=0)[:2], *x.max(axis=0)[:2]])) for x in faces]


def found(monkeypatch, count, **options):
    monkeypatch.setattr(face_crop, "MediaPipeFaces", lambda config: Detector(count))
    return face_crop.find_face(Image.new("RGB", (300, 300)), LandmarkConfig(), **options)


def test_the_largest_face_is_meant_and_that_is_said(monkeypatch, caplog):
    assert found(monkeypatch, 0) is None
    alone = found(monkeypatch, 1)
    assert alone.shape == (5, 2)
    assert not caplog.records
    np.testing.assert_array_equal(found(monkeypatch, 2), alone)
    assert "picture: shows 2 faces; the largest is taken" in caplog.text


def test_a_face_is_chosen_by_its_number(monkeypatch, caplog):
    left, right = (found(monkeypatch, 2, number=i) for i in (1, 2))
    assert left.max() < 100 < right[:, 0].min()
    assert not caplog.records
    with pytest.raises(MediaError, match="shows 2 faces, and number 3 is wanted"):
        found(monkeypatch, 2, number=3)
