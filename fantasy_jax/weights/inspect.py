"""Inspection of weights: the networks of a file and how they map, and where those of a store come from."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import Plan
from fantasy_jax.system.registry import slots
from fantasy_jax.weights.detect import Detected, detect
from fantasy_jax.weights.store import RECORD, read_record


@dataclass(frozen=True)
class Inspection:
    """One network of a file, and how it maps onto the module."""

    detected: Detected
    plan: Plan

    def lines(self, *, every_key: bool = False) -> list[str]:
        """The result as text.

        Args:
            every_key: Whether to list the parameter of each tensor.
        """
        found, specs = self.detected, self.detected.weights.specs
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
            lines.append(f"ignored     {count} that match {pattern}")
        if every_key:
            lines += [
                f"  {entry.key} {list(specs[entry.key].shape)} -> {entry.path}"
                f"{'' if entry.layer is None else f'[{entry.layer}]'} by {entry.transform.name}"
                for entry in self.plan.entries
            ]
        lines += [f"  {problem}" for problem in self.plan.problems]
        lines.append(f"INCOMPLETE  {len(self.plan.problems)} problems" if self.plan.problems else "complete")
        return lines


def inspect(path: str | Path, *, preset: str | None = None) -> list[Inspection]:
    """Inspects every network in a file; reads no weights.

    Raises:
        WeightsError: The file cannot be read, or no network is detected in it.
    """
    return [Inspection(found, found.plan()[1]) for found in detect(open_weights(path), preset=preset)]


def store_origins(directory: str | Path) -> dict[str, str]:
    """Where the networks of a store come from, by slot: format, dtype, source files, and a hash of these.

    The hash has eight letters: the beginning of the SHA-256 of a single source file, or of the hashes of
    several. A network that was trained here has no source, and the hash is that of its record.

    Raises:
        WeightsError: A network is damaged.
    """
    found = {}
    for slot in slots():
        folder = Path(directory) / slot
        if not (folder / RECORD).is_file():
            continue
        component, record = read_record(folder)
        sources = record["sources"]
        names = sources[0]["name"] if sources else "trained here"
        if len(sources) > 1:
            names += f" and {len(sources) - 1} more"
        digest = sources[0]["sha256"] if len(sources) == 1 else _sha256(folder, sources)
        found[slot] = f"{component.name}, {record['dtype']}, {names}, {digest[:8]}"
    return found


def _sha256(folder: Path, sources: Sequence[Mapping[str, Any]]) -> str:
    """A hash of the hashes of sources; without sources that of a network's record."""
    hashes = "".join(source["sha256"] for source in sources).encode()
    return hashlib.sha256(hashes or (folder / RECORD).read_bytes()).hexdigest()


def store_paths(directory: str | Path) -> list[Path]:
    """The folders of a store's networks, which a command that reads them must not write to."""
    return [folder for slot in slots() if directory and (folder := Path(directory) / slot).is_dir()]
