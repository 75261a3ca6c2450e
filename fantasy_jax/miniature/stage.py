"""Settings that the trainings of the miniature's encoders have in common."""

from dataclasses import dataclass

from fantasy_jax.errors import ConfigError
from fantasy_jax.training.optim import OptimizerConfig


@dataclass(frozen=True)
class EncoderStageConfig:
    """Training of one encoder.

    Attributes:
        num_steps: Training steps.
        batch_size: Examples per step.
        optimizer: The optimizer.
    """

    num_steps: int
    batch_size: int
    optimizer: OptimizerConfig

    def __post_init__(self):
        if self.num_steps < 1:
            raise ConfigError(f"num_steps is {self.num_steps}; it must be at least 1")
        self.optimizer.check_batch_size(self.batch_size)
