"""Values cached between the steps of the sampler, and the steps that use them.

Guidance gating (`diffusion/guidance.py`) and MagCache (`diffusion/magcache.py`) follow schedules that are
known before the first step. A program is compiled for each set of branches that are evaluated, with and
without the blocks as steps need it. Without the two methods there is one program, and nothing is kept.
"""

from dataclasses import dataclass

import jax
import numpy as np

from fantasy_jax.typing import Bool, Leaf


@dataclass(frozen=True)
class EvaluationPlan:
    """What each step computes.

    Attributes:
        needed: Branches whose velocity a step needs, from some branch on to the last. For the others it uses
            the last differences.
        skipped: Steps that add the last residual of each branch in place of running the blocks.
    """

    needed: Bool[np.ndarray, "steps branches"]
    skipped: Bool[np.ndarray, " steps"]

    @property
    def evaluations(self) -> Bool[np.ndarray, "steps branches"]:
        """Where the transformer runs as a whole."""
        return self.needed & ~self.skipped[:, None]

    def at(self, step: int) -> tuple[int, bool]:
        """The number of (last) branches that a step needs, and whether it skips their blocks."""
        return int(self.needed[step].sum()), bool(self.skipped[step])

    @property
    def kinds(self) -> list[tuple[int, bool]]:
        """Distinct step programs, in order of first use."""
        return list(dict.fromkeys(map(self.at, range(len(self.needed)))))

    @property
    def gates(self) -> bool:
        """Whether a step uses differences of an earlier one, so that they are kept."""
        return not self.needed.all()

    @property
    def skips(self) -> bool:
        """Whether a step uses residuals of an earlier one, so that they are kept."""
        return bool(self.skipped.any())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepCache:
    """Values cached between steps.

    A step is given what it uses and returns what it has computed, so that nothing is copied, and what is
    computed again is not in memory meanwhile.

    Attributes:
        differences: Velocity differences between consecutive branches (the next one minus this one),
            `[B, F, h, w, C]` each: those of branches that are not evaluated, or those that are. They are of
            the whole track where a clip consists of windows, which may move.
        residuals: Values that the blocks add to the tokens, for each branch, `[B, S, F, D]` each, or
            `[groups, B, S, F, D]` with windows: those that are added again, or those that are computed.
    """

    differences: tuple[Leaf, ...] = ()
    residuals: tuple[Leaf, ...] = ()

    def given(self, needed: int, skipped: bool) -> "StepCache":
        """The values that a step uses; it needs the last `needed` branches, and may skip their blocks."""
        kept = len(self.differences) + 1 - needed
        return StepCache(self.differences[: max(kept, 0)], self.residuals[-needed:] if skipped else ())

    def updated(self, computed: "StepCache") -> "StepCache":
        """These values, replaced by those that a step has computed."""
        differences = self.differences + computed.differences
        return StepCache(differences, computed.residuals or self.residuals)
