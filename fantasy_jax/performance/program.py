"""A program to compile or to time, and the memory that its arrays take."""

import math
from collections.abc import Callable, Mapping
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


def device_bytes(tree: Leaf, mesh: Mapping[str, int] | None = None, *, in_host: bool = False) -> int:
    """Bytes of arrays that one device has in its own memory, or in that of the host.

    Args:
        tree: The arrays, abstract ones too; one without a sharding lies on each device.
        mesh: Sizes of the axes in place of those of the arrays' mesh.
        in_host: Whether those in the host's memory (`pinned_host`) are counted, or the others.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if (getattr(sharding, "memory_kind", None) == "pinned_host") != in_host:
            continue
        entries = [entry for entry in getattr(sharding, "spec", ()) if entry is not None]
        axes = [axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry)]
        sizes = sharding.mesh.shape if axes and mesh is None else mesh
        shards = math.prod(sizes[axis] for axis in axes)
        total += -(-math.prod(leaf.shape) * leaf.dtype.itemsize // shards)
    return total
