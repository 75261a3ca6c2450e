"""Settings that the trainings of the miniature's encoders have in common."""

from dataclasses import dataclass

from fantasy_jax.config import PositiveInt, Settings
from fantasy_jax.training.optim import OptimizerConfig


@dataclass(frozen=True)
class EncoderStageConfig(Settings):
    """Training of one encoder.

    Attributes:
        num_steps: Training steps.
        batch_size: Examples per step.
        optimizer: The optimizer.
    """

    num_steps: PositiveInt
    batch_size: PositiveInt
    optimizer: OptimizerConfig

    def __post_init__(self):
        super().__post_init__()
        self.optimizer.check_batch_size(self.batch_size)
