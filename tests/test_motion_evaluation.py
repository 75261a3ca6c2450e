"""Measured motion of face and head follows the intensities of the synthetic clips."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from fantasy_jax.evaluation.motion import motion
from fantasy_jax.miniature.synthetic import SyntheticConfig, plan_clip, render_clips
from fantasy_jax.video import VideoConfig

VIDEO = VideoConfig(height=64, width=64, num_frames=17, fps=25)
INTENSITIES = (0.0, 0.3, 0.6, 1.0)
CLIPS = 8


def mean_motion(**intensities):
    clips = [plan_clip(SyntheticConfig(), VIDEO, "test", i, **intensities) for i in range(CLIPS)]
    return np.mean([motion(x["video"], x["face_box"][0]) for x in render_clips(VIDEO, clips)], axis=0)


@pytest.mark.slow
def test_measured_motion_follows_its_own_intensity():
    faces = np.array([mean_motion(face_motion=x, body_motion=0.2) for x in INTENSITIES])
    bodies = np.array([mean_motion(face_motion=0.2, body_motion=x) for x in INTENSITIES])
    assert spearmanr(INTENSITIES, faces[:, 0])[0] > 0.9
    assert spearmanr(INTENSITIES, bodies[:, 1])[0] > 0.9
    assert np.ptp(faces[:, 1]) < 0.1 * np.ptp(bodies[:, 1])  # facial motion does not count as head motion


def test_still_video_has_no_motion():
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    found = motion(np.stack([frame] * 5), np.array([12.0, 8.0, 52.0, 60.0]))
    assert found == pytest.approx((0.0, 0.0), abs=1e-3)
