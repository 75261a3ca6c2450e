"""Guidance by prompt and by audio, with up to three evaluations of the transformer a step.

`v = v(neg, -) + s_prompt (v(pos, -) - v(neg, -)) + s_audio (v(pos, audio) - v(pos, -))`,
where `-` is no audio; the picture stays everywhere (fantasy-talking, `diffsynth/pipelines/wan_video.py`), and
so does what adapters tell of its face and its motion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fantasy_jax.config import ConfigError
from fantasy_jax.typing import Array, Float, Float32


@dataclass(frozen=True)
class ScaleSchedule:
    """A guidance scale that changes over the steps.

    Attributes:
        start: At the first step.
        end: At the last step.
        shape: `linear`, or `cosine`: slow at both ends.
    """

    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self):
        if self.shape not in ("linear", "cosine"):
            raise ConfigError(f"shape is {self.shape!r}; use 'linear' or 'cosine'")


@dataclass(frozen=True)
class Branch:
    """One evaluation of the transformer: with which text, and how loud the audio."""

    negative_text: bool
    audio_scale: float


def scale_values(scale: float | ScaleSchedule, steps: int) -> Float32[np.ndarray, " {steps}"]:
    """The scale at every step."""
    if not isinstance(scale, ScaleSchedule):
        return np.full(steps, scale, np.float32)
    progress = np.linspace(0, 1, steps)
    if scale.shape == "cosine":
        progress = (1 - np.cos(np.pi * progress)) / 2
    return (scale.start + (scale.end - scale.start) * progress).astype(np.float32)


def branches(
    prompt_scale: float | ScaleSchedule, audio_scale: float | ScaleSchedule, *, loudness: float = 1.0
) -> tuple[Branch, ...]:
    """The evaluations that a step needs, fully conditioned last.

    Three in general, two where the prompt's scale is 1 throughout, one where both are.

    Args:
        prompt_scale: s_prompt.
        audio_scale: s_audio.
        loudness: Weight of the attended audio where it is heard (`audio_scale` of the official script).
    """
    full = (Branch(True, 0.0), Branch(False, 0.0), Branch(False, loudness))
    if not _is_one(prompt_scale):
        return full
    return full[2:] if _is_one(audio_scale) else full[1:]


def combine(
    velocities: Sequence[Float[Array, "*n"]], prompt_scale: float | Array, audio_scale: float | Array
) -> Float[Array, "*n"]:
    """Guides: the formula above, for what `branches` asked for, in its order."""
    if len(velocities) == 1:
        return velocities[0]
    *negative, silent, heard = velocities
    guided = audio_scale * (heard - silent)
    if not negative:
        return silent + guided
    return negative[0] + prompt_scale * (silent - negative[0]) + guided


def _is_one(scale: float | ScaleSchedule) -> bool:
    return bool(np.all(scale_values(scale, 2) == 1))
