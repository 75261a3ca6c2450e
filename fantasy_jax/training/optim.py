"""The optimizer: AdamW, with warm-up, cosine decay and clipping."""

from dataclasses import dataclass
from functools import partial

import jax
import optax

from fantasy_jax.config import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients.

    The paper gives a learning rate of 1e-4 and nothing else; the rest are the field's habits.

    Attributes:
        learning_rate: At its highest, after the warm-up.
        warmup: Steps over which it rises from zero.
        final: Share of it that is left at the last step, after a cosine.
        beta2: Decay of the second moment; below 0.999 it forgets within a short run.
        weight_decay: Decoupled from the gradient; matrices alone.
        clip_norm: Largest norm of all gradients together.
        average: Decay of the running mean of parameters, which is what is sampled from.
    """

    learning_rate: float = 1e-4
    warmup: int = 100
    final: float = 0.1
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    average: float = 0.995

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; a positive number is needed")
        if not 0 <= self.average < 1:
            raise ConfigError(f"average is {self.average}; it must be at least 0 and below 1")


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
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=partial(jax.tree.map, lambda x: x.ndim > 1),
        ),
    )
