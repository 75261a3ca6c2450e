"""Verification of networks against references: the same weights and inputs must give the same outputs.

Integers must be equal; other outputs must agree to nearly the rounding errors of float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.errors import FantasyError, WeightsError
from fantasy_jax.parity.reference import Outputs, Reference
from fantasy_jax.parity.runners import RUNNERS
from fantasy_jax.typing import DType

_MISFITS = (ArithmeticError, AssertionError, AttributeError, IndexError, TypeError, ValueError, cv2.error)
"""Errors of JAX, NumPy and OpenCV about arrays of wrong sizes."""


@dataclass(frozen=True)
class Row:
    """Comparison of one output.

    Attributes:
        reference: Name of the reference folder.
        output: Name of the output.
        shape: Its shape.
        largest: Largest absolute difference.
        relative: Norm of the difference over norm of the reference.
        limit: Largest allowed `relative`, 0 for outputs that must be equal; None: there is no limit.
    """

    reference: str
    output: str
    shape: tuple[int, ...]
    largest: float
    relative: float
    limit: float | None

    @property
    def verdict(self) -> str:
        """`pass`, `fail`, or `reported` where there is no limit."""
        if self.limit is None:
            return "reported"
        return "pass" if self.relative <= self.limit else "fail"


def verify(folder: str | Path, *, dtype: DType = jnp.float32) -> list[Row]:
    """Compares every output of a reference.

    Args:
        folder: The reference.
        dtype: Dtype of matrix products and weights; there are limits for float32 only.

    Raises:
        WeightsError: The folder is not a reference, or of an unknown network.
        ConversionError: Its weights do not fit the network.
    """
    reference = Reference(folder, dtype)
    name, expected = reference.config["component"], reference.expected
    if name not in RUNNERS:
        known = ", ".join(RUNNERS)
        raise WeightsError(f"{folder}: component {name!r} of config.json is not one of {known}")
    if not expected:
        raise WeightsError(f"{folder}: activations.safetensors holds no output.* to compare with")
    rows = []
    with jax.default_matmul_precision("highest"):
        for output, value in _outputs(reference, RUNNERS[name](reference)):
            if output in expected:  # a reference need not hold every output
                limit = _limit(name, output, expected[output]) if dtype == jnp.float32 else None
                rows.append(
                    _compare(reference.folder.name, output, np.asarray(value), expected[output], limit)
                )
    if missed := expected.keys() - {row.output for row in rows}:
        raise WeightsError(f"{folder}: nothing computes {', '.join(sorted(missed))}")
    return rows


def _outputs(reference: Reference, computed: Outputs) -> Iterator[tuple[str, Any]]:
    """Yields the outputs of a runner; inputs and settings that are missing or wrong become a WeightsError."""
    try:
        yield from computed
    except FantasyError:
        raise
    except _MISFITS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{reference.folder}: its inputs or settings do not fit its network ({reason})"
        ) from error
    except KeyError as error:
        raise WeightsError(
            f"{reference.folder}: lacks {error.args[0]!r}, which its outputs depend on"
        ) from error


def _limit(component: str, output: str, expected: np.ndarray) -> float:
    """Limit close to the rounding errors of float32; looser limits have hidden real errors."""
    if output == "aligned_rgb":  # versions of OpenCV differ by a few levels in single pixels
        return 1e-3
    if expected.dtype.kind in "iu":
        return 0.0
    return 5e-6 if component == "umt5_encoder" or output.startswith("sample_latents") else 2e-6


def _compare(
    reference: str, output: str, value: np.ndarray, expected: np.ndarray, limit: float | None
) -> Row:
    if value.shape != expected.shape:
        raise WeightsError(f"{reference}: {output} has shape {value.shape}, not {expected.shape}")
    difference = value.astype(np.float64) - expected.astype(np.float64)
    norm = np.linalg.norm(expected.astype(np.float64))
    relative = float(np.linalg.norm(difference) / norm) if norm else float(np.linalg.norm(difference))
    return Row(reference, output, expected.shape, float(np.abs(difference).max(initial=0)), relative, limit)
