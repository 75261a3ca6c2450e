"""Inspection of weights: the networks of a file and how they map, and where those of a store come from."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fantasy_jax.convert.files import WeightsFile, open_weights
from fantasy_jax.convert.lora import is_lora, read_lora
from fantasy_jax.convert.rules import Plan, flat_parameters
from fantasy_jax.models.eight_bit import eight_bit_layers
from fantasy_jax.system.registry import Layout, find_component, slots
from fantasy_jax.weights.detect import Detected, detect
from fantasy_jax.weights.store import LORA, RECORD, network_hash, read_record


@dataclass(frozen=True)
class Inspection:
    """One network of a file, and how it maps onto the module.

    Attributes:
        detected: The network.
        plan: Where its tensors belong.
        notes: Further lines about it.
    """

    detected: Detected
    plan: Plan
    notes: Sequence[str] = ()

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
            f"component   {found.component.name}, {found.layout.name} keys, sizes of {found.preset}"
            f"{f', after {found.prefix}' * bool(found.prefix)}",
            f"tensors     {len(specs)}",
            f"parameters  {parameters:,}",
            "bytes       "
            + ", ".join(f"{size:,} of {dtype}" for dtype, size in sizes.items())
            + f" ({sizes.total() / 2**30:.2f} GiB)",
            f"mapped      {len(self.plan.entries)}: "
            + ", ".join(f"{count} to {group}" for group, count in groups.items()),
            *self.notes,
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


def inspect(path: str | Path, *, preset: str | None = None, variant: str = "") -> list[Inspection]:
    """Inspects every network in a file, or the LoRA that it is; reads no weights.

    Args:
        path: The file or folder.
        preset: Name of the sizes; None: detected.
        variant: Part of the file's name, where a folder holds several.

    Raises:
        WeightsError: The file cannot be read, or no network is detected in it.
    """
    weights = open_weights(path, variant=variant)
    if is_lora(weights):
        return [_inspect_lora(weights)]
    return [Inspection(found, found.plan()[1]) for found in detect(weights, preset=preset)]


def _inspect_lora(weights: WeightsFile) -> Inspection:
    """Inspects a LoRA for the transformer of the config.json beside it, or for the published one."""
    transformer, component = find_component("wan2.1_i2v_dit"), find_component(LORA)
    preset, config = next(iter(transformer.presets.items()))
    if (beside := transformer.published_config(weights.config)) is not None:
        preset, config = "config.json", beside
    lora = read_lora(weights, config, flat_parameters(transformer.abstract(config)))
    layout = Layout(lora.spelling, (), component.layouts[0].rules)
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(lora.ranks.items()))
    alphas = sum(bool(change.alpha) for _, change in lora.changes)
    differences = sum(bool(change.difference) for _, change in lora.changes)
    notes = [f"products    {ranks or 'none'}; {alphas} with alpha", f"differences {differences}"]
    notes += [f"width       {lora.width}{lora.model}"] * (lora.width is not None)
    return Inspection(Detected(component, layout, weights, preset, config), lora.plan, notes)


def store_origins(directory: str | Path) -> dict[str, str]:
    """Where the networks of a store come from, by slot (`origin`).

    Raises:
        WeightsError: A network is damaged.
    """
    folders = {slot: Path(directory) / slot for slot in slots()}
    return {slot: origin(folder) for slot, folder in folders.items() if (folder / RECORD).is_file()}


def origin(folder: Path) -> str:
    """A stored network's format, type, source files, and a hash in eight letters, in one line.

    The hash is that of a single source file as `sha256sum` begins it, or of several (`network_hash`).
    """
    component, record = read_record(folder)
    names = [source["name"] for source in record["sources"]]
    made = "random weights" if record.get("random") else "trained here"
    if names:
        made = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    eight_bit = sorted(set(eight_bit_layers(record.get("other_dtypes", {})).values()))
    dtypes = " and ".join([record["dtype"], *eight_bit])
    return f"{component.name}, {dtypes}, {made}, {network_hash(folder)[:8]}"


def store_paths(directory: str | Path) -> list[Path]:
    """The folders of a store's networks, which a command that reads them must not write to."""
    return [folder for slot in slots() if directory and (folder := Path(directory) / slot).is_dir()]
