"""Linear erasure: features from which linear regression hardly reads what they are not meant to hold.

Source: LEACE (arXiv 2306.03819), with directions that are kept.
"""

import numpy as np

from fantasy_jax.typing import Float

_LEAST_VARIANCE = 1e-6
"""Variances below this fraction of the largest are raised to it before whitening."""
_LEAST_STRENGTH = 1e-6
"""Singular values below this fraction of the largest belong to rounding."""


def erasing_projection(
    features: Float[np.ndarray, "N M"],
    erased: Float[np.ndarray, "N I"],
    *,
    kept: Float[np.ndarray, "N R"],
) -> Float[np.ndarray, "M M"]:
    """The projection of centered features that removes their covariance with `erased`.

    As in LEACE, it is orthogonal where features are white, so that it changes them least. The directions from
    which linear regression reads `kept` are not removed, nor what is read of `erased` from the same
    directions.

    Args:
        features: Features of examples.
        erased: Values that are not to be read from the features. Constant columns have no effect.
        kept: Values that are. Likewise.

    Returns:
        The projection P, for `(features - mean) @ P + mean`.
    """
    features = features - features.mean(axis=0, dtype=np.float64)
    variances, directions = np.linalg.eigh(features.T @ features / len(features))
    scales = np.sqrt(np.maximum(variances, _LEAST_VARIANCE * max(variances.max(), 1e-12)))
    white = features @ directions / scales
    spared = _span(_covariance(white, kept))
    removed = _covariance(white, erased)
    removed = _span(removed - spared @ (spared.T @ removed))
    return np.eye(len(directions)) - (directions / scales) @ removed @ removed.T @ (directions * scales).T


def _covariance(
    white: Float[np.ndarray, "N M"], values: Float[np.ndarray, "N I"]
) -> Float[np.ndarray, "M I"]:
    """Covariance of features with values in standard deviations."""
    centered = values - values.mean(axis=0, dtype=np.float64)
    return white.T @ (centered / (centered.std(axis=0) + 1e-12)) / len(white)


def _span(vectors: Float[np.ndarray, "M I"]) -> Float[np.ndarray, "M K"]:
    """An orthonormal basis of what the columns span."""
    basis, strengths, _ = np.linalg.svd(vectors, full_matrices=False)
    return basis[:, strengths > max(_LEAST_STRENGTH * strengths.max(), 1e-9)]
