"""Linear erasure: features from which a linear probe cannot read what it should not.

Source: LEACE (arXiv 2306.03819), with directions that are kept.
"""

import numpy as np

from fantasy_jax.typing import Float

_LEAST = 1e-6
"""Least variance of a direction that is treated as one, as a fraction of the largest."""


def erasing_projection(
    features: Float[np.ndarray, "N M"],
    erased: Float[np.ndarray, "N I"],
    *,
    kept: Float[np.ndarray, "N R"],
) -> Float[np.ndarray, "M M"]:
    """The projection of centered features that removes their covariance with `erased`.

    As in LEACE, it is orthogonal where features are white, so that it changes them least. Directions from
    which linear regression reads `kept` are spared: that regression is as good as before, and what is read of
    `erased` from the same directions remains.

    Args:
        features: Features of examples.
        erased: Values that are not to be read from the features.
        kept: Values that are.

    Returns:
        The projection P, for `(features - mean) @ P + mean`.
    """
    features, erased, kept = (x - x.mean(axis=0, dtype=np.float64) for x in (features, erased, kept))
    variances, directions = np.linalg.eigh(features.T @ features / len(features))
    scales = np.sqrt(np.maximum(variances, _LEAST * variances.max()))
    white = features @ directions / scales
    spared, _ = np.linalg.qr(white.T @ (kept / kept.std(axis=0)))
    told = white.T @ (erased / (erased.std(axis=0) + 1e-12))
    told -= spared @ (spared.T @ told)
    # Directions without any covariance are those of rounding.
    found, strengths, _ = np.linalg.svd(told, full_matrices=False)
    found = found[:, strengths > 1e-6 * strengths.max(initial=1e-6)]
    removed = found @ found.T
    return np.eye(len(directions)) - (directions / scales) @ removed @ (directions * scales).T
