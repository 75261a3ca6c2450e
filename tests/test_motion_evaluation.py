"""The instruments that read motion from pixels follow the truth, and each its own."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from fantasy_jax.data.synthetic import SyntheticConfig, draw_clips, plan_clip
from fantasy_jax.evaluation.motion import motion

CONFIG = SyntheticConfig()
SETTINGS = (0.0, 0.3, 0.6, 1.0)
CLIPS = 8


def measured(**motions):
    clips = [plan_clip(CONFIG, "test", i, **motions) for i in range(CLIPS)]
    return np.mean(
        [motion(record["video"], record["face_box"][0]) for record in draw_clips(CONFIG, clips)], axis=0
    )


@pytest.mark.slow
def test_each_follows_its_own_intensity():
    faces = np.array([measured(face_motion=x, body_motion=0.2) for x in SETTINGS])
    bodies = np.array([measured(face_motion=0.2, body_motion=x) for x in SETTINGS])
    assert spearmanr(SETTINGS, faces[:, 0])[0] > 0.9
    assert spearmanr(SETTINGS, bodies[:, 1])[0] > 0.9
    assert np.ptp(faces[:, 1]) < 0.1 * np.ptp(bodies[:, 1]), "the head stays where it is, whatever eyes do"


def test_a_still_picture_does_not_move():
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    found = motion(np.stack([frame] * 5), np.array([12.0, 8.0, 52.0, 60.0]))
    assert found == pytest.approx((0.0, 0.0), abs=1e-3)
