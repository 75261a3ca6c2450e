"""What a weights file is, and whether all of it has a place in the module that samples."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fantasy_jax.convert.components import Recognised, recognise
from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import Plan


@dataclass(frozen=True)
class Report:
    """One network of a file, and how it maps."""

    recognised: Recognised
    plan: Plan

    def lines(self, *, every_key: bool = False) -> list[str]:
        """The report as text.

        Args:
            every_key: List where each tensor goes.
        """
        found, specs = self.recognised, self.recognised.weights.specs
        parameters = sum(math.prod(spec.shape) for spec in specs.values())
        sizes: Counter[str] = Counter()
        for spec in specs.values():
            sizes[str(spec.dtype)] += math.prod(spec.shape) * spec.dtype.itemsize
        groups = Counter(entry.path.split("/")[0] for entry in self.plan.entries)
        lines = [
            f"component   {found.component.name}, {found.layout.name} keys, sizes of {found.preset}",
            f"tensors     {len(specs)}",
            f"parameters  {parameters:,}",
            "bytes       "
            + ", ".join(f"{size:,} of {dtype}" for dtype, size in sizes.items())
            + f" ({sizes.total() / 2**30:.2f} GiB)",
            f"mapped      {len(self.plan.entries)}: "
            + ", ".join(f"{count} to {group}" for group, count in groups.items()),
        ]
        for pattern, count in Counter(self.plan.ignored.values()).items():
            lines.append(f"not needed  {count} by the pattern {pattern}")
        if every_key:
            lines += [
                f"  {entry.key} {list(specs[entry.key].shape)} -> {entry.path}"
                f"{'' if entry.layer is None else f'[{entry.layer}]'} by {entry.transform.name}"
                for entry in self.plan.entries
            ]
        lines += [f"  {problem}" for problem in self.plan.problems]
        lines.append(f"INCOMPLETE  {len(self.plan.problems)} problems" if self.plan.problems else "complete")
        return lines


def inspect(path: str | Path, *, preset: str | None = None) -> list[Report]:
    """Reports on every network in a file; reads no weights.

    Raises:
        WeightsError: The file cannot be read, or holds nothing that is known.
    """
    return [Report(found, found.plan()[1]) for found in recognise(open_weights(path), preset=preset)]
