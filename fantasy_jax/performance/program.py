"""A program to compile or to time."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from fantasy_jax.typing import Leaf


@dataclass(frozen=True)
class Program:
    """A jitted function with abstract arguments.

    Attributes:
        name: Name for tables.
        lower: Lowers the function for the arguments.
        arguments: Pytree of `jax.ShapeDtypeStruct`s with shardings, one entry per argument of `call`.
        flops: Model operations of a call, on all devices together (`performance.flops`).
        hardware_flops: Operations of a call as the program runs, on all devices together.
        call: The function, of arrays like the arguments.
        batch_size: Clips of a training step, which can be computed in parts; None for other programs.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    arguments: Leaf
    flops: int
    hardware_flops: int
    call: Callable[..., Leaf]
    batch_size: int | None = None
