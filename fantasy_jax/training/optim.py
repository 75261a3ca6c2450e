"""The optimizer: AdamW, with warm-up, a schedule, clipping, and batches taken in parts."""

import re
from dataclasses import dataclass

import jax
import optax

from fantasy_jax.config import ConfigError
from fantasy_jax.typing import Leaf

_DECAYED = r"\b(kernel|embedding|lora_[ab])\b"
"""Of a path: matrices. By name, since what is stacked has one dimension more."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients.

    The paper gives a learning rate of 1e-4 and nothing else; the rest are the field's habits.

    Attributes:
        learning_rate: At its highest, after the warm-up.
        warmup: Steps over which it rises from zero; Adam's second moment is not to be trusted before.
        final: Share of it that is left at the last step, after a cosine; with 1 it stays constant, for a run
            that goes on until it is good.
        beta1: Decay of the first moment; Adam's own default.
        beta2: Decay of the second moment; below 0.999 it forgets within a short run.
        epsilon: Added to the root of the second moment; Adam's own default.
        weight_decay: Decoupled from the gradient; matrices alone.
        clip_norm: Largest norm of all gradients together.
        accumulate: Parts of equal size that a batch is taken in, one after another, where all of it does not
            fit; their gradients are summed up, and the step is the whole batch's. Devices share each part.
        average: Decay of the running mean of parameters, which is what is sampled from. 0 keeps none: half
            as much is kept beside Adam's moments, and the parameters themselves are sampled from.
    """

    learning_rate: float = 1e-4
    warmup: int = 100
    final: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    accumulate: int = 1
    average: float = 0.995

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; a positive number is needed")
        if self.accumulate < 1:
            raise ConfigError(f"accumulate is {self.accumulate}; at least 1 is needed")
        for name in ("beta1", "beta2", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of that many steps."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup, steps),
        max(steps, config.warmup + 1),
        config.learning_rate * config.final,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: Leaf) -> Leaf:
    """Which parameters weight decay pulls to zero."""

    def is_matrix(path: tuple, _: Leaf) -> bool:
        return bool(re.search(_DECAYED, jax.tree_util.keystr(path, simple=True, separator="/")))

    return jax.tree.map_with_path(is_matrix, params)
