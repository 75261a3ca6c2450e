"""Least-squares alignment of point sets."""

import numpy as np

from fantasy_jax.typing import Float


def fit_similarity(
    source: Float[np.ndarray, "*n P D"], target: Float[np.ndarray, "P D"]
) -> Float[np.ndarray, "*n D D+1"]:
    """Fits the similarity transforms that map points closest to `target` in the least-squares sense.

    Reflections are excluded. Source: Umeyama (1991), "Least-squares estimation of transformation parameters
    between two point patterns", IEEE TPAMI 13(4).

    Args:
        source: Batches of P points with D coordinates.
        target: The points that correspond to them.

    Returns:
        Affine matrices `[scale * rotation | translation]`.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    source_mean, target_mean = source.mean(axis=-2, keepdims=True), target.mean(axis=-2)
    centred = source - source_mean
    left, singular_values, right = np.linalg.svd((target - target_mean).T @ centred)
    # Where the best orthogonal map is a reflection, the direction of the least singular value is flipped.
    sign = np.sign(np.linalg.det(left @ right))
    singular_values[..., -1] *= sign
    left[..., -1] *= sign[..., None]
    scale = singular_values.sum(axis=-1) / np.square(centred).sum(axis=(-2, -1))
    linear = scale[..., None, None] * (left @ right)
    translation = target_mean[:, None] - linear @ np.swapaxes(source_mean, -1, -2)
    return np.concatenate([linear, translation], axis=-1)


def apply_affine(
    matrix: Float[np.ndarray, "*n D D+1"], points: Float[np.ndarray, "*n P D"]
) -> Float[np.ndarray, "*n P D"]:
    """Maps points by affine matrices."""
    return points @ np.swapaxes(matrix[..., :-1], -1, -2) + matrix[..., None, :, -1]
