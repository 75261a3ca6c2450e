"""The miniature's face detector: what it makes of a heat map, its place among detectors, and its training."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_network

from fantasy_jax.convert.rules import TensorSpec, export, flat_parameters, load, make_plan
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature import face_detector
from fantasy_jax.miniature.components import face_detector_rules
from fantasy_jax.miniature.face_detector import FaceDetectorConfig, fit_height
from fantasy_jax.miniature.train_face_detector import (
    FaceDetectorStageConfig,
    _heat,
    _vary,
    detector_batches,
    detector_loss,
)
from fantasy_jax.preprocessing import driving
from fantasy_jax.preprocessing.driving import DrivingConfig, open_detector
from fantasy_jax.preprocessing.landmarks import FaceDetector, five_points
from fantasy_jax.preprocessing.one_euro import face_size
from fantasy_jax.sharding import make_mesh
from fantasy_jax.system.registry import component_of
from fantasy_jax.training.loop import LoopConfig, TrainingTask, train

SMALL = FaceDetectorConfig(image_size=64, stem=4, width=6, depth=1)


@pytest.fixture(scope="module")
def detector():
    return random_network(SMALL)


def head(left, scale=1.0):
    """Box and five points of a head, in heights of the image."""
    points = [(0, 0), (0.5, 0.7), (0.15, 0.25), (0.35, 0.25), (0.25, 0.4), (0.18, 0.5), (0.32, 0.5)]
    return np.float32([left, 0.15]) + scale * np.float32(points)


@pytest.mark.parametrize("height", [64, 128])
def test_peaks_of_the_heat_become_faces(detector, monkeypatch, height):
    """Also of people whose heads nearly touch."""
    people = np.stack([head(0.1), head(0.62, 0.9), head(1.7)])
    shape = (8, 20)
    heat, nearest = _heat(jnp.asarray(people[None]), *shape)
    logits = jnp.log(heat + 1e-6) - jnp.log1p(1e-6 - heat)
    points = jnp.asarray(people)[nearest]

    def network(given, pixels):
        assert given is detector
        assert pixels.shape == (1, 64, 160, 3)
        return logits, points

    monkeypatch.setattr(face_detector, "run", network)
    assert isinstance(detector, FaceDetector)
    faces = detector.detect(np.zeros((height, 20 * height // 8, 3), np.uint8))
    assert faces[-1].box[0] == pytest.approx(0.62 * height)  # the smallest
    faces = sorted(faces, key=lambda face: face.box[0])
    for face, person in zip(faces, people, strict=True):
        np.testing.assert_allclose(face.box, height * person[:2].reshape(4), rtol=1e-5)
        np.testing.assert_allclose(five_points(face.points, detector.layout), height * person[2:], rtol=1e-5)
        assert face_size(face, detector.layout) == pytest.approx(height * np.diff(person[:2, 0])[0], rel=1e-5)
        assert face.confidence > 0.7
    monkeypatch.setattr(face_detector, "run", lambda *_: (logits - 30, points))
    assert detector.detect(np.zeros((height, 20 * height // 8, 3), np.uint8)) == []


def test_a_picture_has_the_height_of_the_network_and_whole_cells():
    assert fit_height(np.zeros((100, 150, 3), np.uint8), 64).shape == (64, 96, 3)
    assert fit_height(np.zeros((32, 33, 3), np.uint8), 64).shape == (64, 72, 3)
    with pytest.raises(ConfigError, match="multiple of 8"):
        FaceDetectorConfig(image_size=60)


def test_parameters_have_names_in_files(detector):
    rules, values = face_detector_rules(SMALL), flat_parameters(detector)
    tensors = dict(export(rules, {path: np.asarray(x) for path, x in values.items()}))
    assert tensors["blocks.0.weight"].shape == (6, 6, 1, 3, 3)
    plan = make_plan(rules, {k: TensorSpec(x.shape, x.dtype) for k, x in tensors.items()}, values)
    for path, value in load(plan, tensors.__getitem__).items():
        np.testing.assert_array_equal(value, values[path])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "own"),
        ({"own_detector": False}, "mediapipe"),
        ({"detection_model": "a", "landmark_model": "b"}, "a"),
    ],
)
def test_the_models_own_detector_is_used_unless_another_is_configured(
    monkeypatch, detector, settings, expected
):
    monkeypatch.setattr(driving, "MediaPipeFaces", lambda config: nullcontext("mediapipe"))
    monkeypatch.setattr(driving, "OfficialFaces", lambda detection, landmarks: nullcontext(detection))
    with open_detector(DrivingConfig(**settings), detector) as opened:
        assert opened is (detector if expected == "own" else expected)
    with open_detector(DrivingConfig()) as opened:
        assert opened == "mediapipe"


def test_points_stay_on_what_they_mark():
    """Left stays left in a mirror: eyes and corners of the mouth change places."""
    picture, points = np.zeros((64, 128, 3), np.uint8), np.stack([head(0.2), head(1.2)])
    for x, y in np.round(64 * points[:, 2:].reshape(-1, 2) - 0.5).astype(int):
        picture[y - 1 : y + 2, x - 1 : x + 2] = 255
    config, turned = FaceDetectorStageConfig(jitter=0.03, light=0.0, noise=0.0), set()
    for seed in range(8):
        changed, moved = _vary(np.random.default_rng(seed), picture, points, config)
        places = np.round(64 * moved[:, 2:].reshape(-1, 2) - 0.5).astype(int)
        assert changed[places[:, 1], places[:, 0]].min() > 100
        assert (moved[:, 0] < moved[:, 2:].min(axis=1)).all()  # the box
        assert (moved[:, 1] > moved[:, 2:].max(axis=1)).all()
        assert (moved[:, [2, 5], 0] < moved[:, [3, 6], 0]).all()
        turned.add(bool(moved[0, 0, 0] > moved[1, 0, 0]))
    assert turned == {False, True}


@pytest.mark.slow
def test_a_short_training_lowers_the_loss_on_people_never_seen(tmp_path):
    sizes, config = FaceDetectorConfig(), FaceDetectorStageConfig(num_steps=40, batch_size=16)
    network = component_of(sizes).init(sizes, jnp.float32)
    assert sum(x.size for x in flat_parameters(network).values()) < 100_000
    batches = partial(detector_batches, 64, sizes.image_size, config)
    task = TrainingTask("detector", network, detector_loss, batches, 16, config.num_steps, config.optimizer)
    unseen = next(batches(batch_size=16, start=10**6, num_workers=0, seed=0))
    loss = nnx.jit(lambda model: detector_loss(model, unseen, jax.random.key(0))[0])
    before = float(loss(network))
    after = float(loss(train(task, LoopConfig(), tmp_path, make_mesh())))
    assert after < 0.6 * before
