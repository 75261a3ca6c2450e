"""Linear erasure."""

import numpy as np

from fantasy_jax.miniature.erasure import erasing_projection
from fantasy_jax.miniature.motion_probe import linear_r2


def test_what_is_erased_cannot_be_read_and_what_is_kept_can():
    rng = np.random.default_rng(0)
    kept, erased = rng.normal(size=(4000, 2)), rng.normal(size=(4000, 3))
    features = np.concatenate([kept, erased], axis=1) @ rng.normal(size=(5, 12)) + 5
    features += 0.1 * rng.normal(size=features.shape)
    mean, projection = features.mean(axis=0), erasing_projection(features, erased, kept=kept)
    cleared = (features - mean) @ projection + mean

    def shares(x):
        values = np.concatenate([kept, erased], axis=1)
        return linear_r2(x[:2000], values[:2000], x[2000:], values[2000:])

    assert shares(features).min() > 0.9
    assert shares(cleared)[:2].min() > 0.9
    assert shares(cleared)[2:].max() < 0.05
    np.testing.assert_allclose(projection @ projection, projection, atol=1e-6)


def test_features_that_tell_nothing_stay_as_they_are():
    rng = np.random.default_rng(0)
    features, kept = rng.normal(size=(100, 4)), rng.normal(size=(100, 1))
    constant = np.ones((100, 2))
    np.testing.assert_allclose(erasing_projection(features, constant, kept=kept), np.eye(4), atol=1e-6)
