"""MagCache: steps that add what the blocks added in an earlier step, in place of running them.

What the blocks add to the tokens, their residual, keeps its direction from step to step while its magnitude
decays, by ratios that depend on the model and the schedule and hardly on the clip. The ratios are measured
once (`Calibration`), and say beforehand which steps can be skipped for a bounded error.

Source: MagCache (arXiv 2506.09045; Zehong-Ma/MagCache, `MagCache4Wan2.1/magcache_generate.py`). There each
branch of guidance skips by its own ratios, which are nearly equal. Here all branches skip the same steps, so
that guidance does not multiply the difference between a residual of one step and that of another.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.config import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Settings,
    as_json,
    build,
)
from fantasy_jax.diffusion.guidance import GuidanceBranch
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import atomic_write, parse_json
from fantasy_jax.typing import Array, Bool, Float


@dataclass(frozen=True)
class MagnitudeCurve(Settings):
    """Ratio of residual norms between consecutive steps.

    Attributes:
        shift: Shift of the noise schedule.
        branches: Dropout groups that each branch of guidance leaves out.
        ratios: For each branch and step, the norm of the residual divided by that of the step before, the
            mean over tokens; 1 in the first step.
    """

    shift: PositiveFloat
    branches: tuple[tuple[str, ...], ...]
    ratios: tuple[tuple[PositiveFloat, ...], ...]

    def __post_init__(self):
        super().__post_init__()
        if len(self.ratios) != len(self.branches) or len(set(map(len, self.ratios))) != 1:
            raise ConfigError(
                f"ratios has rows of lengths {[len(row) for row in self.ratios]}; it must have one row, of "
                f"equal length, for each of the {len(self.branches)} branches"
            )


@dataclass(frozen=True)
class MagCacheConfig(Settings):
    """Which steps add a cached residual; an approximation.

    Attributes:
        curve: The magnitudes, or a JSON file of them that `sample.py --calibrate` wrote, which is read
            at once; None: nothing is skipped.
        error_bound: Bound of the summed error of steps that are skipped in a row.
        max_skips: Steps that are skipped in a row at most.
        retention: Fraction of the steps, the first ones, that are never skipped.
    """

    curve: str | MagnitudeCurve | None = None
    error_bound: NonNegativeFloat = 0.06
    max_skips: PositiveInt = 2
    retention: Fraction = 0.2

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.curve, str):  # once, not for each clip
            object.__setattr__(self, "curve", read_curve(self.curve))


def skipped_steps(
    ratios: Float[np.ndarray, "branches steps"], config: MagCacheConfig, first: int = 0
) -> Bool[np.ndarray, " steps"]:
    """The steps that add a cached residual.

    Args:
        ratios: From a `MagnitudeCurve`.
        config: Bounds of the error.
        first: The step to start from, which is computed.
    """
    branches, steps = ratios.shape
    skipped = np.zeros(steps, bool)
    magnitude, error, count = np.ones(branches), np.zeros(branches), 0
    for step in range(max(int(steps * config.retention), first + 1), steps):
        magnitude = magnitude * ratios[:, step]
        error, count = error + abs(1 - magnitude), count + 1
        skipped[step] = error.max() < config.error_bound and count <= config.max_skips
        if not skipped[step]:
            magnitude, error, count = np.ones(branches), np.zeros(branches), 0
    return skipped


def curve_of(config: MagCacheConfig, guidance: Sequence[GuidanceBranch], shift: float) -> MagnitudeCurve:
    """The curve of the settings.

    Args:
        config: With a curve.
        guidance: Branches, with a weight for each step.
        shift: Shift of the noise schedule.

    Raises:
        ConfigError: The curve is of another schedule or other branches.
    """
    curve = config.curve
    given = curve.shift, len(curve.ratios[0]), curve.branches
    wanted = shift, len(guidance[0].weights), tuple(branch.dropped for branch in guidance)
    if given != wanted:
        raise ConfigError(
            f"magcache.curve is of {_described(*given)}; the settings have {_described(*wanted)}; measure "
            "theirs with sample.py --calibrate=FILE"
        )
    return curve


def _described(shift: float, steps: int, branches: Sequence[Sequence[str]]) -> str:
    each = ["all" if not groups else "without " + " and ".join(groups) for groups in branches]
    return f"shift {shift:g}, {steps} steps and {len(branches)} branches ({', '.join(each)})"


def read_curve(path: str) -> MagnitudeCurve:
    """Reads the curve that `write_curve` wrote; ConfigError if it is missing or damaged."""
    try:
        return build(MagnitudeCurve, parse_json(Path(path).read_bytes()), "it")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"curve: {path} cannot be read ({reason}); write one with sample.py --calibrate={path}"
        ) from error


def write_curve(curve: MagnitudeCurve, path: str) -> None:
    """Writes a curve as JSON."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(as_json(curve), indent=1) + "\n")


class Calibration:
    """Measures a curve while clips are sampled; its call is the `residual_callback` of `sample`."""

    def __init__(self):
        """Starts with no clip."""
        self._last: tuple[int, Array] | None = None
        self._ratios: dict[int, list[np.ndarray]] = {}

    def __call__(self, step: int, residuals: Sequence[Float[Array, "*n D"]]) -> None:
        """Takes the residuals of each branch in a step; those of a clip come in the order of the steps."""
        norms = token_norms(residuals)
        if self._last is not None and self._last[0] == step - 1:
            ratios = mean_ratios(norms, self._last[1])
            self._ratios.setdefault(step, []).append(np.asarray(ratios))
        self._last = step, norms

    def curve(self, shift: float, guidance: Sequence[GuidanceBranch]) -> MagnitudeCurve:
        """The mean over all clips; ConfigError if none was sampled with all steps."""
        steps = len(guidance[0].weights)
        if sorted(self._ratios) != list(range(1, steps)):
            raise ConfigError("no clip was sampled from noise with all its steps, which a calibration needs")
        means = [np.ones(len(guidance)), *(np.mean(self._ratios[i], axis=0) for i in range(1, steps))]
        ratios = tuple(tuple(round(float(x), 5) for x in row) for row in np.transpose(means))
        return MagnitudeCurve(shift, tuple(branch.dropped for branch in guidance), ratios)


@jax.jit
def token_norms(residuals: Sequence[Float[Array, "*n D"]]) -> Float[Array, "branches tokens"]:
    """The norm of each token's residual, float32."""
    norms = [jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in residuals]
    return jnp.stack(norms).reshape(len(norms), -1)


@jax.jit
def mean_ratios(
    norms: Float[Array, "branches tokens"], before: Float[Array, "branches tokens"]
) -> Float[Array, " branches"]:
    """The mean over all tokens of the ratios of their norms."""
    return (norms / before).mean(axis=1)
