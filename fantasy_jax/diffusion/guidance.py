"""Classifier-free guidance as data: a tuple of branches with weights.

The guided velocity is `v = sum_b w_b v_b`, where each branch drops some conditions. FantasyTalking guides by
prompt and by audio (fantasy-talking, `diffsynth/pipelines/wan_video.py`):

    v = v(neg, -) + s_text (v(pos, -) - v(neg, -)) + s_audio (v(pos, audio) - v(pos, -))

where `-` is no audio, and image, face and motion are kept everywhere. The weights are therefore `1 - s_text`,
`s_text - s_audio` and `s_audio`; a branch whose weight is zero at every step is not computed.

Gating, an approximation, keeps the differences of later steps: `v(pos, -) - v(neg, -)` hardly changes from
some step on, and its last value then takes the place of an evaluation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from fantasy_jax.config import Factor, Fraction, Settings
from fantasy_jax.errors import ConfigError
from fantasy_jax.typing import Array, Bool, Float, Float32


@dataclass(frozen=True)
class ScaleSchedule(Settings):
    """A guidance scale that changes over the steps.

    Attributes:
        start: Scale at the first step.
        end: Scale at the last step.
        shape: `linear`, or `cosine`, which changes slowly at both ends.
    """

    start: Factor
    end: Factor
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self):
        super().__post_init__()
        if self.shape not in ("linear", "cosine"):
            raise ConfigError(f"shape is {self.shape!r}; it must be 'linear' or 'cosine'")


Scale = Factor | ScaleSchedule


@dataclass(frozen=True)
class GatingConfig(Settings):
    """From where on the steps use the last differences of guidance in place of new ones; an approximation.

    Source: LinearAG (arXiv 2312.12487), whose estimate is the last difference, as in FastVideo (pull request
    1372). There are two branches there, and here any number.

    Attributes:
        enabled: Whether guidance is gated.
        text: Fraction of the steps in which the difference that the prompt makes is computed.
        adapter: Fraction for the difference that audio or expression makes. Lip sync needs it longer.
    """

    enabled: bool = False
    text: Fraction = 0.4
    adapter: Fraction = 0.7


@dataclass(frozen=True)
class GuidanceBranch:
    """One evaluation of the velocity in each step.

    Attributes:
        dropped: Dropout groups that it leaves out; where `text` is one, the negative prompt takes its place.
        weights: Weight of its velocity at each step; those of all branches sum to one.
    """

    dropped: tuple[str, ...]
    weights: tuple[float, ...]


def scale_values(scale: Scale, num_steps: int) -> Float32[np.ndarray, " {num_steps}"]:
    """The scale at every step."""
    if not isinstance(scale, ScaleSchedule):
        return np.full(num_steps, scale, np.float32)
    progress = np.linspace(0, 1, num_steps)
    if scale.shape == "cosine":
        progress = (1 - np.cos(np.pi * progress)) / 2
    return (scale.start + (scale.end - scale.start) * progress).astype(np.float32)


def guidance_branches(
    num_steps: int, text_scale: Scale, scale: Scale = 1.0, group: str = "audio"
) -> tuple[GuidanceBranch, ...]:
    """The branches of guidance by prompt and by one adapter, the fully conditioned one last.

    Args:
        num_steps: Steps of the sampler.
        text_scale: s_text, the guidance scale of the prompt.
        scale: Guidance scale of the adapter.
        group: Dropout group of the adapter.

    Returns:
        Three branches in general; two where `text_scale` is 1 or equals `scale` at every step; one where both
        are 1.
    """
    text, other = (scale_values(x, num_steps).astype(np.float64) for x in (text_scale, scale))
    weights = {("text", group): 1 - text, (group,): text - other, (): other}
    return tuple(
        GuidanceBranch(dropped, tuple(values.tolist())) for dropped, values in weights.items() if values.any()
    )


def difference_scales(branches: Sequence[GuidanceBranch]) -> Float32[np.ndarray, "steps differences"]:
    """The scales of `combine` at each step, from the branches' weights.

    Raises:
        ValueError: The weights of a step do not sum to one.
    """
    weights = np.array([branch.weights for branch in branches], np.float64)
    if not np.allclose(weights.sum(axis=0), 1, atol=1e-5):
        raise ValueError("the weights of the guidance branches do not sum to one")
    return np.cumsum(weights[::-1], axis=0)[::-1][1:].T.astype(np.float32)


def needed_branches(
    branches: Sequence[GuidanceBranch], gating: GatingConfig, num_steps: int, first: int = 0
) -> Bool[np.ndarray, "{num_steps} branches"]:
    """The branches whose velocity each step needs: those from some branch on.

    The difference between neighbouring branches is that of the dropout groups in which they differ, and is
    needed until the last of their gates. The last branch is always needed.

    Args:
        branches: From `guidance_branches`.
        gating: Where differences are no longer computed.
        num_steps: Steps of the sampler.
        first: The step to start from, which computes all differences.
    """
    needed = np.ones((num_steps, len(branches)), bool)
    if gating.enabled:
        for i, (one, other) in enumerate(pairwise(branches)):
            groups = set(one.dropped) ^ set(other.dropped)
            gate = max(gating.text if group == "text" else gating.adapter for group in groups)
            # The product may be a hair above an integer.
            needed[max(math.ceil(gate * num_steps - 1e-9), first + 1) :, i] = False
    # A later difference is one of branches that follow each other.
    return np.logical_or.accumulate(needed, axis=1)


def combine(
    velocities: Sequence[Float[Array, "*n"]], scales: Float[Array | np.ndarray, " differences"]
) -> Float[Array, "*n"]:
    """The weighted sum of the branches' velocities.

    It is summed over the differences between neighbouring branches, `v_0 + sum_i s_i (v_i - v_(i-1))`, where
    s_i is the sum of the weights from branch i on: velocities are alike, so that their differences are small
    and little is rounded.
    """
    guided = velocities[0]
    for i in range(1, len(velocities)):
        guided = guided + scales[i - 1] * (velocities[i] - velocities[i - 1])
    return guided


def add_differences(
    velocity: Float[Array, "*n"],
    scales: Float[Array | np.ndarray, " differences"],
    differences: Sequence[Float[Array, "*n"]],
) -> Float[Array, "*n"]:
    """The guided velocity from that of the later branches and the differences of the branches before them.

    With all differences `combine` gives `v_0 + sum_i s_i d_i`; `v_0` is that of a later branch less the
    differences in between, so that each of those has the scale `s_i - 1`.

    Args:
        velocity: From `combine`, of the branches that are computed.
        scales: The first scales of the step, one for each of the differences.
        differences: Of each branch that is not computed: the velocity of the next branch minus its own.
    """
    for scale, difference in zip(scales, differences, strict=True):
        velocity = velocity + (scale - 1) * difference
    return velocity
