"""Alignment and cropping of faces for ArcFace, and errors for images without a face."""

import cv2
import numpy as np
import pytest
from PIL import Image

from fantasy_jax.errors import MediaError
from fantasy_jax.preprocessing import face_crop
from fantasy_jax.preprocessing.alignment import fit_similarity
from fantasy_jax.preprocessing.face_crop import TEMPLATE, crop_face
from fantasy_jax.preprocessing.landmarks import MEDIAPIPE_FACE, DetectedFace, LandmarkConfig

RANDOM = np.random.default_rng(0)


def turned(points, degrees, scale, shift):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * points @ turn.T + shift


def umeyama(source, target):
    """Computes the transform as in the paper; insightface uses scikit-image's."""
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
        np.testing.assert_allclose(fit_similarity(points, TEMPLATE), umeyama(points, TEMPLATE), atol=1e-9)
    mirrored = TEMPLATE * (-1, 1)
    np.testing.assert_allclose(fit_similarity(mirrored, TEMPLATE), umeyama(mirrored, TEMPLATE), atol=1e-9)


@pytest.mark.parametrize("size", [112, 48])
@pytest.mark.parametrize(("degrees", "scale"), [(0, 2.0), (25, 1.5), (-40, 3.0)])
def test_a_crop_is_upright_with_all_points_in_place(size, degrees, scale):
    points = turned(TEMPLATE - 56, degrees, scale, (260, 240))
    image = np.full((480, 520, 3), 30, np.uint8)
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    for point, colour in zip(points, colours, strict=True):
        cv2.circle(image, [round(x) for x in point], round(4 * scale), colour, -1)
    crop = crop_face(Image.fromarray(image), points, size)
    assert crop.shape == (size, size, 3)
    for (x, y), colour in zip(TEMPLATE * size / 112, colours, strict=True):
        np.testing.assert_allclose(crop[round(y), round(x)], colour, atol=2)


def test_the_crop_is_black_outside_the_image():
    points = TEMPLATE - (30, 0)
    crop = crop_face(np.full((112, 112, 3), 200, np.uint8), points)
    assert not crop[:, :29].any()
    assert (crop[:, 31:] == 200).all()


@pytest.mark.parametrize(
    "points",
    [
        None,
        np.full((5, 2), np.nan),
        TEMPLATE - (45, 0),
        TEMPLATE - (0, -25),
        TEMPLATE * 0.001 + 50,
    ],
)
def test_an_image_without_a_whole_face_is_an_error(points):
    with pytest.raises(MediaError, match=r"woman\.png"):
        crop_face(np.zeros((112, 112, 3), np.uint8), points, name="woman.png")


class Detector:
    """Detects one face, or two, of which the smaller one is on the left."""

    layout = MEDIAPIPE_FACE

    def __init__(self, count):
        self.count = count

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def detect(self, image):
        if image.shape[1] < 300:
            return []  # the close-up detects nothing more
        points = np.random.default_rng(1).uniform(0, 60, (468, 3)).astype(np.float32)
        faces = [points + np.array([200, 100, 0]), points / 2 + np.array([20, 30, 0])][: self.count]
        return [
            DetectedFace(np.float32(x), 0.9, np.float32([*x.min(axis=0)[:2], *x.max(axis=0)[:2]]))
            for x in faces
        ]


def found(monkeypatch, count, **options):
    monkeypatch.setattr(face_crop, "MediaPipeFaces", lambda config: Detector(count))
    return face_crop.find_face(Image.new("RGB", (300, 300)), LandmarkConfig(), **options)


def test_the_largest_face_is_used_with_a_warning(monkeypatch, caplog):
    assert found(monkeypatch, 0) is None
    alone = found(monkeypatch, 1)
    assert alone.shape == (5, 2)
    assert not caplog.records
    np.testing.assert_array_equal(found(monkeypatch, 2), alone)
    assert "2 faces" in caplog.text


def test_a_face_is_selected_by_its_number(monkeypatch, caplog):
    left, right = (found(monkeypatch, 2, number=i) for i in (1, 2))
    assert left.max() < 100 < right[:, 0].min()
    assert not caplog.records
    with pytest.raises(MediaError, match=r"sample\.face"):
        found(monkeypatch, 2, number=3)
