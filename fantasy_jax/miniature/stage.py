"""What the trainings of the miniature's encoders have in common."""

from dataclasses import dataclass

import numpy as np
from flax import nnx

from fantasy_jax.config import PositiveInt, Settings
from fantasy_jax.preprocessing.images import from_uint8
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.typing import UInt8


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


def initialise_norms(encoder: nnx.Module, faces: UInt8[np.ndarray, "N S S 3"]) -> None:
    """Sets the running statistics of all batch norms of an encoder to those of `faces`."""
    norms = [module for _, module in nnx.iter_modules(encoder) if isinstance(module, nnx.BatchNorm)]
    momentums = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # nothing of earlier statistics remains
    encoder.train()
    nnx.jit(lambda encoder, pixels: encoder(pixels))(encoder, from_uint8(faces))
    encoder.eval()
    for norm, momentum in zip(norms, momentums, strict=True):
        norm.momentum = momentum
