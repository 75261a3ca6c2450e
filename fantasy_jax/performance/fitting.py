"""What would fit, where a program does not fit the memory of a slice's chips."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fantasy_jax.performance.chips import GIB
from fantasy_jax.performance.program import Program, device_bytes
from fantasy_jax.sharding import RULES

_MARGIN = 0.9
"""Fraction of a chip's memory that an estimate may take; estimates are up to a tenth too low."""

_STEPS = (1, 2, 4, 8, 16)
"""Numbers of parts of a batch, and multiples of the chips, that are tried."""


@dataclass(frozen=True)
class Setup:
    """Chips, a mesh and the parts of a batch, with estimated bytes per chip.

    Attributes:
        mesh: Mesh axis sizes.
        parts: Parts in which a batch is computed, beside those of the config (`grad_accum_steps`).
        argument_bytes: Bytes of the arguments.
        temporary_bytes: Bytes of everything else.
    """

    mesh: Mapping[str, int]
    parts: int
    argument_bytes: int
    temporary_bytes: int

    def __str__(self) -> str:
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1) or "1"
        parts = f" and {self.parts} times the grad_accum_steps" if self.parts > 1 else ""
        needed = f"{self.argument_bytes / GIB:.1f} + {self.temporary_bytes / GIB:.1f} GiB"
        return f"{math.prod(self.mesh.values())} chips with mesh {mesh}{parts}: {needed}"


def setups_that_fit(
    program: Program, mesh: Mapping[str, int], argument_bytes: int, temporary_bytes: int, memory: int
) -> list[Setup]:
    """Estimates which setups fit: on these chips, and on the fewest more of them.

    Arguments are sharded as on the present mesh. Other memory is in proportion to the clips of a chip, and to
    the part of a clip that it has.

    Args:
        program: The program.
        mesh: Axis sizes of the present mesh.
        argument_bytes: Bytes of its arguments on a chip there.
        temporary_bytes: Bytes of everything else.
        memory: Bytes of a chip.
    """
    present, batch = dict(mesh), program.batch_size
    scale = argument_bytes / device_bytes(program.arguments, present)
    per_clip = temporary_bytes / _clips_of_a_chip(present, 1, batch)

    def estimate(candidate: dict[str, int], parts: int) -> Setup:
        arguments = scale * device_bytes(program.arguments, candidate)
        return Setup(
            candidate, parts, int(arguments), int(per_clip * _clips_of_a_chip(candidate, parts, batch))
        )

    def first(chips: int, part_counts: tuple[int, ...]) -> Setup | None:
        for parts in part_counts:
            found = [estimate(candidate, parts) for candidate in _meshes(present, chips, parts, batch)]
            found = [x for x in found if x.argument_bytes + x.temporary_bytes <= _MARGIN * memory]
            if found:
                return min(found, key=lambda x: x.argument_bytes + x.temporary_bytes)
        return None

    chips = math.prod(present.values())
    here = first(chips, _STEPS if batch else (1,))
    more = (first(chips * times, (1,)) for times in _STEPS[1:])
    return [setup for setup in (here, next(filter(None, more), None)) if setup]


def _clips_of_a_chip(mesh: Mapping[str, int], parts: int, batch: int | None) -> float:
    """Clips that a chip computes at once: whole ones, divided by the number of chips that share them."""
    groups = math.prod(mesh[axis] for axis in RULES["batch"])
    return max((batch or 1) / parts / groups, 1) * groups / math.prod(mesh.values())


def _meshes(mesh: Mapping[str, int], chips: int, parts: int, batch: int | None) -> Iterator[dict[str, int]]:
    """Meshes of a number of chips that shard a batch's part evenly. Training keeps `tensor`."""
    tensors = (mesh["tensor"],) if batch else _STEPS[:4]
    for fsdp, tensor in itertools.product(range(1, chips + 1), tensors):
        within = mesh["data"] * fsdp * tensor
        if chips % within == 0 and (not batch or batch % (parts * mesh["data"] * fsdp) == 0):
            yield {**mesh, "fsdp": fsdp, "context": chips // within, "tensor": tensor}
