"""Motion intensities of faces and bodies in clips, and their normalisation over a dataset."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fantasy_jax.preprocessing.alignment import apply_affine, fit_similarity
from fantasy_jax.preprocessing.landmarks import JOINTS, MEDIAPIPE_FACE, BodyTrack, FaceTrack
from fantasy_jax.preprocessing.motion import MOTION_FILE, MotionNormaliser, body_intensity, face_intensity


def moving_face(expression, head=0.0, frames=24):
    """A mesh whose lips open and close, on a head that turns, nods, approaches and moves."""
    random = np.random.default_rng(0)
    shape = random.normal(size=(468, 3)) * (60, 80, 40)
    eyes = {33: (-45, -30, 0), 133: (-20, -30, 0), 362: (20, -30, 0), 263: (45, -30, 0)}
    for point, place in eyes.items():
        shape[point] = place
    points = []
    for time in np.linspace(0, 4 * np.pi, frames):
        frame = shape.copy()
        frame[list(MEDIAPIPE_FACE.outer_lips), 1] += expression * np.sin(time)
        turn = Rotation.from_euler("yxz", head * np.array([0.4, 0.2, 0.3]) * np.sin(time + np.arange(3)))
        scale = 1 + 0.2 * head * np.sin(time)
        points.append(scale * turn.apply(frame) + (200, 200, 0) + head * 50 * np.cos(time))
    present = np.ones(frames, bool)
    return FaceTrack(np.float32(points), present, present.astype(np.float32), MEDIAPIPE_FACE)


def swaying_body(distance, frames=24):
    joints = np.tile(np.random.default_rng(1).normal(size=(len(JOINTS), 2)) * 100, (frames, 1, 1))
    joints += distance * np.sin(np.linspace(0, 4 * np.pi, frames))[:, None, None]
    return BodyTrack(joints.astype(np.float32), np.ones((frames, len(JOINTS)), np.float32))


def test_similarity_recovers_batches_of_transforms_in_three_dimensions():
    random = np.random.default_rng(0)
    target = random.normal(size=(9, 3))
    rotations, scales = Rotation.random(5, random).as_matrix(), random.uniform(0.5, 3, 5)
    shifts = random.normal(size=(5, 1, 3))
    source = scales[:, None, None] * target @ rotations.transpose(0, 2, 1) + shifts
    matrices = fit_similarity(source, target)
    assert matrices.shape == (5, 3, 4)
    np.testing.assert_allclose(
        apply_affine(matrices, source), np.broadcast_to(target, source.shape), atol=1e-12
    )
    reflected = fit_similarity(source * (-1, 1, 1), target)
    assert (np.linalg.det(reflected[..., :3]) > 0).all()


def test_face_intensity_grows_with_expression_and_ignores_the_head():
    values = [face_intensity(moving_face(expression)) for expression in (0, 2, 5, 10)]
    assert values[0] < 1e-8
    assert values == sorted(values)
    assert values[3] == pytest.approx(25 * values[1], rel=1e-3)
    assert face_intensity(moving_face(0, head=1.0)) < 1e-6
    assert face_intensity(moving_face(5, head=1.0)) == pytest.approx(values[2], rel=0.25)


def test_intensities_do_not_depend_on_the_size_of_the_image():
    face = moving_face(5)
    larger = replace(face, points=3 * face.points)
    assert face_intensity(larger) == pytest.approx(face_intensity(face), rel=1e-4)
    body = swaying_body(10)
    grown = replace(body, joints=3 * body.joints)
    assert body_intensity(grown, larger) == pytest.approx(body_intensity(body, face), rel=1e-4)


def test_body_intensity_grows_with_swaying_and_ignores_hidden_joints():
    face = moving_face(0)
    calm, lively = (body_intensity(swaying_body(distance), face) for distance in (5, 10))
    assert lively == pytest.approx(4 * calm, rel=1e-3)
    body = swaying_body(5)
    joints, visibility = body.joints.copy(), body.visibility.copy()
    joints[:, 9] += 500 * np.random.default_rng(2).normal(size=(24, 2))
    visibility[:, 9] = 0.1
    joints[1::3], visibility[1::3] = np.nan, 0  # not searched
    assert body_intensity(BodyTrack(joints, visibility), face) == pytest.approx(calm, rel=0.1)


def test_absent_faces_and_bodies_have_no_intensity():
    face, body = moving_face(5), swaying_body(5)
    absent = replace(face, present=np.zeros(24, bool))
    assert np.isnan(face_intensity(absent))
    assert np.isnan(body_intensity(replace(body, visibility=np.zeros_like(body.visibility)), face))


def test_normaliser_maps_the_median_to_neutral_and_clips_the_extremes(tmp_path):
    random = np.random.default_rng(0)
    intensities = [(float(face), float(body)) for face, body in random.lognormal(size=(1001, 2))]
    intensities += [(1e6, float("nan"))]
    normaliser = MotionNormaliser.fit(intensities)
    normalised = np.array([normaliser(pair) for pair in intensities])
    assert np.median(normalised, axis=0) == pytest.approx([0.5, 0.5], abs=0.01)
    assert normalised[-1].tolist() == [1, 0.5]
    assert 0.04 < (normalised[:, 0] == 0).mean() < 0.06
    assert np.all(np.diff(normalised[np.argsort([face for face, _ in intensities]), 0]) >= 0)
    normaliser.save(tmp_path / MOTION_FILE)
    assert MotionNormaliser.load(tmp_path / MOTION_FILE) == normaliser
    wider = MotionNormaliser.fit(intensities, percentiles=(0.0, 50.0, 100.0))
    assert wider.high[0] == 1e6
    with pytest.raises(ValueError, match="body"):
        MotionNormaliser.fit([(1.0, float("nan"))])


def test_equal_clips_are_neutral():
    assert MotionNormaliser.fit([(1.0, 2.0)] * 3)((1.0, 2.0)) == (0.5, 0.5)
