"""Stores whose networks have 8-bit weights (`models/eight_bit.py`), made from stores of 16 or 32 bits."""

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fantasy_jax.config import as_json
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.disk import check_space, free_bytes
from fantasy_jax.errors import WeightsError
from fantasy_jax.files import lock_folder
from fantasy_jax.models.eight_bit import (
    EightBit,
    Layers,
    eight_bit_layers,
    linear_layers,
    quantize_values,
    quantized_dtypes,
)
from fantasy_jax.system.networks import EIGHT_BIT_LAYERS
from fantasy_jax.system.registry import slots
from fantasy_jax.weights.store import (
    NetworkRecord,
    Places,
    SourceFile,
    files_beside_items,
    items,
    read_item,
    read_record,
    write,
)


@dataclass(frozen=True, eq=False)
class _Job:
    """A network of the store.

    Attributes:
        source: Its folder.
        record: What is written.
        layers: Layers to quantise; empty for a network that stays as it is.
        sizes: Bytes of the items that are read.
        places: Parameters of these items.
        stored_bytes: Size of the parameters that are written, before compression.
    """

    source: Path
    record: NetworkRecord
    layers: Layers
    sizes: dict[str, int]
    places: Places
    stored_bytes: int


def quantize_store(
    source: str | Path,
    output: str | Path,
    dtype: EightBit,
    *,
    layers: str = EIGHT_BIT_LAYERS,
    progress: bool = True,
) -> list[str]:
    """Writes a store with 8-bit weights, one block at a time; networks that stay as they are become links.

    Complete networks are skipped, and an interrupted call continues with the first missing block.

    Args:
        source: A store.
        output: The new store.
        dtype: Type of the weights.
        layers: Regular expression of the linear layers, found in paths such as `transformer/blocks/mlp_in`.
        progress: Whether to show a progress bar.

    Returns:
        A summary of each network, one line each.

    Raises:
        ConfigError: Another process writes to the store.
        WeightsError: A network is missing or damaged, has 8-bit weights already, or the output holds another
            one; no layer matches; or the disk has not enough space.
    """
    source, output = Path(source), Path(output)
    jobs = _jobs(source, layers, dtype)
    todo = [slot for slot, job in jobs.items() if job.layers and not _is_done(job, output / slot)]
    check_space(output, sum(jobs[slot].stored_bytes for slot in todo), free_bytes(output))
    total = sum(sum(jobs[slot].sizes.values()) for slot in todo)
    lines = []
    with lock_folder(output), tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for slot, job in jobs.items():
            if slot in todo:
                bar.set_description(slot)
                _write(job, output / slot, bar)
            elif not job.layers:
                _link(job.source, output / slot)
            size = f"{len(job.layers)} layers of {dtype}, {job.stored_bytes / 2**20:.1f} MiB"
            lines.append(f"{output / slot}: {size if job.layers else 'as it is, a link'}")
        for file in source.iterdir():  # pipeline.json, and its checksum
            if file.is_file() and not file.name.startswith(".") and not (output / file.name).exists():
                shutil.copy(file, output)
    return lines


def _jobs(source: Path, pattern: str, dtype: EightBit) -> dict[str, _Job]:
    """The networks of a store by slot."""
    if not source.is_dir():
        raise WeightsError(f"{source}: no such folder; convert_weights.py import makes it")
    try:
        re.compile(pattern)
    except re.error as error:
        raise WeightsError(f"--layers={pattern}: is no regular expression ({error})") from None
    jobs = {slot: _job(source / slot, pattern, dtype) for slot in slots() if (source / slot).exists()}
    if not any(job.layers for job in jobs.values()):
        raise WeightsError(f"{source}: no linear layer matches --layers={pattern}")
    return jobs


def _job(folder: Path, pattern: str, dtype: EightBit) -> _Job:
    component, content = read_record(folder)
    config = component.read_config(content["config"], folder)
    others = content.get("other_dtypes", {})
    if eight_bit_layers(others):
        raise WeightsError(f"{folder}: has 8-bit weights already; give the store that it was made from")
    layers = linear_layers(component.abstract(config), pattern, dtype, prefix=f"{folder.name}/")
    fields: dict[str, Any] = {name: x for name, x in content.items() if name != "items"}
    fields["sources"] = tuple(SourceFile(**file) for file in content["sources"])
    record = NetworkRecord(**fields | {"other_dtypes": quantized_dtypes(others, layers)})
    parameters = flat_parameters(component.abstract(config, eight_bit=layers))
    dtypes = {path: np.dtype(record.other_dtypes.get(path, record.dtype)) for path in parameters}
    stored = sum(math.prod(spec.shape) * dtypes[path].itemsize for path, spec in parameters.items())
    return _Job(folder, record, layers, content["items"], items(component, config), stored)


def _is_done(job: _Job, folder: Path) -> bool:
    """Whether the network is complete; raises a WeightsError if the folder holds another one."""
    if not folder.exists():
        return False
    found = {name: x for name, x in read_record(folder)[1].items() if name != "items"}
    wanted = {name: x for name, x in as_json(job.record).items() if name in found or x}
    if folder.is_symlink() or found != wanted:
        raise WeightsError(f"{folder}: holds other weights; delete it, or choose another --output")
    return True


def _write(job: _Job, folder: Path, bar: tqdm) -> None:
    def make(item: str) -> dict[str, np.ndarray]:
        values = quantize_values(read_item(job.source, item, job.places[item]), job.layers)
        bar.update(job.sizes[item])
        return values

    def extra(partial: Path) -> None:
        for path in files_beside_items(job.source, job.sizes):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, partial / path.name)

    write(folder, job.record, list(job.places), make, extra=extra)


def _link(source: Path, folder: Path) -> None:
    if folder.is_symlink() and folder.resolve() == source.resolve():
        return
    if folder.exists():
        raise WeightsError(f"{folder}: holds other weights; delete it, or choose another --output")
    folder.symlink_to(source.resolve(), target_is_directory=True)
