"""Lip masks: position, area, and agreement with speech."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal
from real_people import FACE_MODEL, SHARED, need_mediapipe, tracked

from fantasy_jax import cli, media
from fantasy_jax.diffusion.losses import project_mask, velocity_loss
from fantasy_jax.evaluation.metrics import correlation, windowed_rms
from fantasy_jax.preprocessing import lip_mask as command
from fantasy_jax.preprocessing.landmarks import MEDIAPIPE_FACE, FaceTrack, five_points
from fantasy_jax.preprocessing.lip_mask import draw_overlay, lip_mask


def face(center, radii, frames=3, present=(True, True, True)):
    """A face with lips only, an ellipse."""
    points = np.zeros((frames, 468, 3), np.float32)
    angles = np.linspace(0, 2 * np.pi, len(MEDIAPIPE_FACE.outer_lips), endpoint=False)
    ellipse = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii + center
    points[:, list(MEDIAPIPE_FACE.outer_lips), :2] = ellipse
    present = np.array(present)
    points[~present] = np.nan
    return FaceTrack(points, present, present.astype(np.float32), MEDIAPIPE_FACE)


def area(count=20):
    """Area of a polygon with so many corners on the unit circle."""
    return count / 2 * np.sin(2 * np.pi / count)


@pytest.mark.parametrize("radii", [(2.3, 0.9), (5, 2), (30, 12)])
def test_the_mask_has_the_area_and_the_center_of_the_lips(radii):
    center = np.array([61.3, 40.6])
    mask = lip_mask(face(center, radii), 80, 120)[0] / 255
    assert mask.sum() == pytest.approx(area() * radii[0] * radii[1], rel=0.03)
    rows, columns = np.indices(mask.shape) + 0.5
    found = np.array([(mask * columns).sum(), (mask * rows).sum()]) / mask.sum()
    np.testing.assert_allclose(found, center, atol=0.15)


def test_the_mask_is_empty_without_a_face_and_outside_the_image():
    mask = lip_mask(face((60, 40), (9, 4), present=(True, False, True)), 80, 120)
    assert mask[[0, 2]].any(axis=(1, 2)).all()
    assert not mask[1].any()
    assert not lip_mask(face((200, 40), (9, 4)), 80, 120).any()
    cut = lip_mask(face((120, 40), (9, 4)), 80, 120)[0] / 255
    assert cut.sum() == pytest.approx(area() * 9 * 4 / 2, rel=0.1)


def test_a_clip_without_a_face_has_the_unmasked_loss():
    nobody = lip_mask(face((60, 40), (9, 4), frames=5, present=[False] * 5), 80, 120)
    lips = project_mask(jnp.asarray(nobody / 255, jnp.float32)[None], 10, 15)
    velocity = normal(1, 2, 10, 15, 4, seed=0)
    masked, unmasked = (
        velocity_loss(velocity, jnp.zeros_like(velocity), lips, jnp.array([which])) for which in (True, False)
    )
    np.testing.assert_array_equal(masked, unmasked)


def test_the_overlay_tints_lips_and_leaves_frames_without_a_face_alone():
    video = np.full((3, 80, 120, 3), 90, np.uint8)
    shown = draw_overlay(video, [face((60, 40), (12, 6), present=(True, False, True))])
    np.testing.assert_array_equal(shown[1], video[1])
    assert shown[0, 40, 60, 0] > 150 > 100 > shown[0, 40, 60, 2]


def test_in_real_speech_the_mask_follows_the_mouth_and_the_mouth_the_audio():
    video, fps, path, (speaker,) = tracked("talking.mp4")
    height, width = video.shape[1:3]
    areas = lip_mask(speaker, height, width).sum(axis=(1, 2)) / 255
    assert (areas > 0).all()
    upper, lower = (speaker.points[:, i, :2] for i in speaker.layout.lip_middles)
    eyes = five_points(speaker.points, speaker.layout)[:, :2]
    opening = np.linalg.norm(upper - lower, axis=1) / np.linalg.norm(eyes[:, 0] - eyes[:, 1], axis=1)
    assert areas.max() > 1.3 * areas.min()
    assert correlation(areas, opening) > 0.8
    energy = windowed_rms(media.read_audio(path), len(video), fps)
    count = len(video)
    lags = [
        correlation(opening[max(lag, 0) : count + min(lag, 0)], energy[max(-lag, 0) : count - max(lag, 0)])
        for lag in range(-4, 5)
    ]
    assert max(lags) > 0.4


@pytest.mark.slow
def test_the_command_draws_two_people(tmp_path, capsys):
    need_mediapipe()
    output = tmp_path / "lips.mp4"
    command.main([str(SHARED / "media/two_people.mp4"), f"--output={output}", f"--face_model={FACE_MODEL}"])
    output_text = capsys.readouterr().out
    assert "Face 1: in 1" in output_text
    assert "Face 2: in 146 of 146 frames" in output_text
    video, _ = media.read_video(output)
    assert video.shape == (146, 720, 1280, 3)


def test_the_command_has_help_and_one_line_errors(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    assert "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: command.main(["none.mp4", f"--output={tmp_path / 'x.mp4'}"]), "lip_mask")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("lip_mask: error: none.mp4: ")
    assert error.count("\n") == 1
