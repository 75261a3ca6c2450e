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
    np.testing.assert_allclose(shares(cleared)[:2], shares(features)[:2], atol=1e-3)
    assert shares(cleared)[2:].max() < 0.05
    np.testing.assert_allclose(projection @ projection, projection, atol=1e-6)


def test_constant_values_erase_and_keep_nothing():
    rng = np.random.default_rng(0)
    features, values, constant = rng.normal(size=(100, 4)), rng.normal(size=(100, 1)), np.ones((100, 2))
    np.testing.assert_allclose(erasing_projection(features, constant, kept=values), np.eye(4), atol=1e-6)
    erased = erasing_projection(features, values, kept=constant)
    assert np.linalg.matrix_rank(erased, tol=1e-6) == 3
    # The same column twice keeps one direction, as once.
    kept = features[:, :1] + 0.1 * rng.normal(size=(100, 1))
    once, twice = (erasing_projection(features, values, kept=np.tile(kept, (1, n))) for n in (1, 2))
    np.testing.assert_allclose(once, twice, atol=1e-6)
    assert np.isfinite(erasing_projection(np.ones((100, 4)), values, kept=kept)).all()
