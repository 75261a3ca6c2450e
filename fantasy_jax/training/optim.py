"""The optimizer: AdamW with warm-up, cosine decay and clipping of gradients."""

import re
from dataclasses import dataclass

import jax
import optax

from fantasy_jax.config import (
    Decay,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
)
from fantasy_jax.errors import ConfigError
from fantasy_jax.typing import Leaf

_DECAYED = r"\b(kernel|embedding|lora_[ab])\b"
"""Paths of matrices. The number of dimensions does not tell: stacked layers have one more."""


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """Settings of the optimizer, of gradient accumulation and of the moving average of parameters.

    The paper gives a learning rate of 1e-4 and nothing else; the rest are common values.

    Attributes:
        learning_rate: Peak learning rate, reached after the warm-up.
        warmup_steps: Steps of linear warm-up from zero; before, Adam's second moment is unreliable.
        final_fraction: Fraction of the learning rate that cosine decay leaves at the last step; 1 keeps it
            constant, for a run without a fixed end.
        beta1: Decay of the first moment; Adam's default.
        beta2: Decay of the second moment; below 0.999 it adapts within a short run.
        epsilon: Added to the root of the second moment; Adam's default.
        weight_decay: Decoupled weight decay, of matrices only.
        clip_norm: Maximum global norm of the gradients.
        grad_accum_steps: Number of equal parts into which a batch is split, if all of it does not fit into
            memory. Gradients of the parts are averaged before one update, so that the step is that of the
            whole batch. Each part is sharded over all devices.
        ema_decay: Decay of the exponential moving average (EMA) of the parameters, with which models are
            sampled from and stored. 0 keeps none, which saves a copy of the parameters; then the parameters
            themselves are used.
    """

    learning_rate: PositiveFloat = 1e-4
    warmup_steps: NonNegativeInt = 100
    final_fraction: Fraction = 0.1
    beta1: Decay = 0.9
    beta2: Decay = 0.99
    epsilon: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    grad_accum_steps: PositiveInt = 1
    ema_decay: Decay = 0.995

    def check_batch_size(self, batch_size: int) -> None:
        """Raises a ConfigError unless `batch_size` is a positive multiple of `grad_accum_steps`."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        if batch_size % self.grad_accum_steps:
            raise ConfigError(
                f"batch_size ({batch_size}) must be a multiple of grad_accum_steps ({self.grad_accum_steps})"
            )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of a run of `num_steps` steps."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup_steps, num_steps),
        max(num_steps, config.warmup_steps + 1),
        config.learning_rate * config.final_fraction,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_weight_decay_mask,
        ),
    )


def _weight_decay_mask(params: Leaf) -> Leaf:
    """True for the parameters that weight decay applies to."""

    def is_matrix(path: tuple, _: Leaf) -> bool:
        return bool(re.search(_DECAYED, jax.tree_util.keystr(path, simple=True, separator="/")))

    return jax.tree.map_with_path(is_matrix, params)
