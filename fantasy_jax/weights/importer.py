"""Import of published weights into the store of `fantasy_jax.weights.store`, one block at a time.

At most one block, or the parameters outside the blocks, is in memory at a time. Complete networks are
skipped, and an interrupted import continues with the first missing block.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from fantasy_jax.convert.files import has_variant, open_weights, source_files
from fantasy_jax.convert.rules import Plan, check, load, stored_dtype
from fantasy_jax.disk import check_space, free_bytes
from fantasy_jax.errors import WeightsError
from fantasy_jax.files import lock_folder
from fantasy_jax.models.eight_bit import (
    EXACT,
    EightBit,
    Layers,
    linear_layers,
    quantize_values,
    quantized_dtypes,
)
from fantasy_jax.system.networks import EIGHT_BIT_LAYERS
from fantasy_jax.system.registry import Component, components
from fantasy_jax.typing import DType
from fantasy_jax.weights.checksums import sha256
from fantasy_jax.weights.detect import Detected, detect
from fantasy_jax.weights.store import (
    RECORD,
    TOKENIZER,
    NetworkRecord,
    SourceFile,
    check_writable_store,
    item_name,
    read_record,
    write,
)
from fantasy_jax.weights.tokenizer import WriteTokenizer, find_tokenizer

_Kind = tuple[DType, EightBit | None]
"""Type of weights, and of those of 8 bits."""


@dataclass(frozen=True, eq=False)
class Job:
    """One network to import.

    Attributes:
        found: The network in its file.
        plan: How the file fills the module; without problems.
        dtype: Dtype of the stored parameters, except for integers.
        layers: Layers whose weights are stored in 8 bits.
        tokenizer: Writes the tokenizer that belongs to the network into a folder.
    """

    found: Detected
    plan: Plan
    dtype: np.dtype
    layers: Layers
    tokenizer: WriteTokenizer | None = None

    @property
    def slot(self) -> str:
        """The network's folder in the store."""
        return self.found.component.slot

    @property
    def file_bytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def bytes(self) -> int:
        """Size of the tensors that are read."""
        specs = self.found.weights.specs
        return sum(_size(specs[entry.key].shape, specs[entry.key].dtype) for entry in self.plan.entries)

    @property
    def stored_bytes(self) -> int:
        """Size of the parameters that are written, before compression."""
        shapes = {path: spec.shape for path, spec in self.plan.target.items()}
        eight_bit = [math.prod(shapes.pop(f"{layer}/kernel")) for layer in self.layers]
        return sum(eight_bit) + sum(
            _size(shape, stored_dtype(self.plan.target[path], self.dtype)) for path, shape in shapes.items()
        )

    @property
    def other_dtypes(self) -> dict[str, str]:
        """Dtypes of the parameters that are not stored as `dtype`, by path."""
        dtypes = {path: stored_dtype(spec, self.dtype) for path, spec in self.plan.target.items()}
        others = {path: str(dtype) for path, dtype in dtypes.items() if dtype != self.dtype}
        return quantized_dtypes(others, self.layers)

    @property
    def files(self) -> list[Path]:
        """The files that are read."""
        return source_files(self.found.weights.path)


def import_options() -> dict[str, Component]:
    """Returns the networks that are imported from a file of their own, by the name of their option."""
    rows = components().values()
    return {row.download.option: row for row in rows if row.download.option}


def import_weights(
    output: str | Path,
    *,
    wan: str | Path | None = None,
    sources: Mapping[str, str | Path] | None = None,
    dtype: DType,
    eight_bit: EightBit | None = None,
    variant: str = "",
    tokenizer: str | Path | None = None,
    progress: bool = True,
) -> list[str]:
    """Imports networks; all files are checked before anything is written.

    A file that several networks share is imported as a whole, whichever of their options it is given by.

    Args:
        output: The store.
        wan: Folder of Wan2.1 I2V 14B, in the official or in diffusers' layout.
        sources: Files or folders of networks, by option (`import_options`); they replace those in `wan`.
        dtype: Dtype of the stored parameters, except for networks with a fixed dtype.
        eight_bit: Type of the weights of the layers that `convert_weights.py quantize` would choose, which
            have the file's bits and scales if they have this type there; None: they have the dtype, too.
        variant: Part of the name of the files to use where a folder holds several, such as `fp16`.
        tokenizer: Folder of the text encoder's tokenizer; None: the one in its file or beside it.
        progress: Whether to show a progress bar.

    Returns:
        A summary of each network, one line each.

    Raises:
        ConfigError: Another process writes to the store.
        WeightsError: A file is missing, damaged or of another model; two files hold the same network; or the
            disk has not enough space.
        ConversionError: A file does not fit its network.
    """
    options, tokenizer = import_options(), None if tokenizer is None else Path(tokenizer)
    jobs, kind = [], (dtype, eight_bit)
    for option, path in (sources or {}).items():
        jobs += _jobs(options[option], Path(path), kind, variant, partial(find_tokenizer, given=tokenizer))
    if wan is not None:
        given = {job.found.component.slot for job in jobs}
        jobs = _wan_jobs(Path(wan), kind, variant, given) + jobs
    _check_distinct(jobs)
    _check_variant(jobs, variant)
    output = Path(output)
    with ExitStack() as stack:
        existed = output.is_dir()
        if existed:
            stack.enter_context(lock_folder(output))
        todo = _todo(jobs, output, progress)
        lines = [f"{output / job.slot}: already complete" for job in jobs if job not in todo]
        if todo and not existed:
            stack.enter_context(lock_folder(output))
        # Files are read twice: first for their checksums.
        total = sum(job.bytes + job.file_bytes for job in todo)
        with tqdm(total=total, unit="B", unit_scale=True, disable=not progress or not todo) as bar:
            for job in todo:
                bar.set_description(job.slot)
                _import(job, output / job.slot, bar)
                dtypes = " and ".join([str(job.dtype), *sorted(set(job.layers.values()))])
                lines.append(f"{output / job.slot}: {job.stored_bytes / 2**30:.2f} GiB of {dtypes}")
    return lines


def _todo(jobs: list[Job], output: Path, progress: bool) -> list[Job]:
    """The networks that the store does not hold yet; checks those that it holds, and the disk's space."""
    check_writable_store(output, {job.slot for job in jobs})
    stored = [job for job in jobs if (output / job.slot / RECORD).is_file()]
    for job in stored:
        _check_same(job, output / job.slot, [(path.name, path.stat().st_size) for path in job.files])
    total = sum(job.file_bytes for job in stored)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress or not stored) as bar:
        for job in stored:
            bar.set_description(f"{job.slot}: comparing")
            sources = [_checksum(path, bar) for path in job.files]
            _check_same(job, output / job.slot, [(x.name, x.bytes, x.sha256) for x in sources])
    todo = [job for job in jobs if job not in stored]
    _check_space(output, todo)
    return todo


def _wan_jobs(folder: Path, kind: _Kind, variant: str, given: set[str]) -> list[Job]:
    """The networks of a folder of Wan2.1, in the layout of which it holds more files.

    Args:
        folder: The folder.
        kind: As for `import_weights`, dtype and 8-bit type.
        variant: Likewise.
        given: Slots of the networks that are imported from elsewhere.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    rows = [row for row in components().values() if row.download.wan_files and row.slot not in given]
    if not rows:
        raise WeightsError(f"{folder}: all of its networks are given by other options; leave --wan out")
    files = {
        layout: [row.download.wan_files[layout] for row in rows]
        + [row.download.wan_tokenizer[layout] for row in rows if row.download.wan_tokenizer]
        for layout in rows[0].download.wan_files
    }
    layout = max(files, key=lambda name: sum((folder / file).exists() for file in files[name]))
    for name in files[layout]:
        if not (folder / name).exists():
            raise WeightsError(f"{folder}: lacks {name}; download it again")
    jobs = []
    for row in rows:
        given_by = row.download.wan_tokenizer
        tokenizer = partial(find_tokenizer, given=folder / given_by[layout] if given_by else None)
        jobs += _jobs(row, folder / row.download.wan_files[layout], kind, variant, tokenizer)
    return jobs


def _jobs(
    component: Component,
    path: Path,
    kind: _Kind,
    variant: str,
    tokenizer: Callable[[Detected, Path], WriteTokenizer | None],
) -> list[Job]:
    """All networks of a file, the wanted one first, each with its tokenizer."""
    weights = open_weights(path, variant=variant)
    found = detect(weights)
    if not any(x.component.name == component.name for x in found):
        names = " and ".join(x.component.name for x in found)
        raise WeightsError(f"{path}: holds {names}, not {component.name}")
    found.sort(key=lambda x: x.component.name != component.name)
    return [_job(x, path, kind, tokenizer(x, path)) for x in found]


def _job(found: Detected, path: Path, kind: _Kind, tokenizer: WriteTokenizer | None) -> Job:
    dtype = np.dtype(found.component.dtype or kind[0])
    module, plan = found.plan(dtype)
    layers = EXACT
    if kind[1] is not None:
        layers = linear_layers(module, EIGHT_BIT_LAYERS, kind[1], prefix=f"{found.component.slot}/")
    return Job(found, check(plan, path), dtype, layers, tokenizer)


def _check_distinct(jobs: list[Job]) -> None:
    """Raises a WeightsError if two networks belong into the same folder of the store."""
    paths: dict[str, Path] = {}
    for job in jobs:
        slot, path = job.found.component.slot, job.found.weights.path
        if slot in paths:
            raise WeightsError(f"{path}: holds the {slot}, as does {paths[slot]}; give only one of the two")
        paths[slot] = path


def _check_variant(jobs: list[Job], variant: str) -> None:
    names = [path.name for job in jobs for path in (job.found.weights.path, *job.files)]
    if variant and not any(has_variant(name, variant) for name in names):
        raise WeightsError(f"--variant={variant}: no file has this in its name; there are {', '.join(names)}")


def _check_same(job: Job, folder: Path, sources: list[tuple]) -> None:
    """Raises a WeightsError if the store holds another network in this one's place.

    Args:
        job: The network.
        folder: Its folder in the store.
        sources: Name, size and, if it is known, checksum of its files.
    """
    _, stored = read_record(folder)
    kept = [(x["name"], x["bytes"], x["sha256"]) for x in stored["sources"]]
    same_files = [x[: len(y)] for x, y in zip(kept, sources, strict=False)] == sources
    kind = (stored["dtype"], stored.get("other_dtypes", {}), stored["component"])
    same_kind = kind == (str(job.dtype), job.other_dtypes, job.found.component.name)
    if same_files and same_kind and len(kept) == len(sources):
        return
    raise WeightsError(
        f"{folder}: holds {stored['dtype']} weights of other files, or of these before they were changed; "
        "delete it, or choose another --output"
    )


def _check_space(output: Path, todo: list[Job]) -> None:
    needed = sum(job.stored_bytes for job in todo)
    for job in todo:
        partial = output / f"{job.slot}.partial"
        needed -= sum(x.stat().st_size for x in partial.rglob("*") if x.is_file())
    check_space(output, needed, free_bytes(output))


def _import(job: Job, folder: Path, bar: tqdm) -> None:
    found = job.found
    sources = tuple(_checksum(path, bar) for path in job.files)
    sizes = asdict(found.config)
    record = NetworkRecord(
        found.component.name, found.preset, sizes, str(job.dtype), sources, job.other_dtypes
    )
    parts = _split(job.plan)

    def read(key: str) -> np.ndarray:
        value = found.weights.read(key)
        bar.update(value.nbytes)
        return value

    def extra(partial: Path) -> None:
        if job.tokenizer is not None:
            job.tokenizer(partial / TOKENIZER)

    def make(item: str) -> dict[str, np.ndarray]:
        if not (layers := _layers_of(parts[item], job.layers)):
            return load(parts[item], read, dtype=job.dtype)
        # Rounded once, not to 16 bits first.
        values = load(parts[item], read, dtype=np.float32)
        scales = {
            layer: found.weights.scale_of(key, job.layers[layer]) for layer, key in layers.items() if key
        }
        values = quantize_values(values, job.layers, scales)
        dtypes = {path: np.dtype(job.other_dtypes.get(path, job.dtype)) for path in values}
        return {path: x.astype(dtypes[path], copy=False) for path, x in values.items()}

    write(folder, record, sorted(parts), make, extra=extra)


def _layers_of(plan: Plan, layers: Layers) -> dict[str, str | None]:
    """The keys of kernels by the path of their layer, for those of the given layers that a plan fills.

    None for a kernel of several keys (`Entry.part`): a scale that the file has is that of a part.
    """
    keys = {x.path.removesuffix("/kernel"): x.key if x.part is None else None for x in plan.entries}
    return {layer: keys[layer] for layer in layers if layer in keys}


def _split(plan: Plan) -> dict[str, Plan]:
    """Returns a plan for each item of the store; parameters of a block have no stack axis."""
    parts: dict[str, Plan] = {}
    for entry in plan.entries:
        spec = plan.target[entry.path]
        part = parts.setdefault(item_name(entry.layer), Plan([], {}, {}, []))
        part.entries.append(replace(entry, layer=None))
        shape = spec.shape if entry.layer is None else spec.shape[1:]
        part.target[entry.path] = jax.ShapeDtypeStruct(shape, spec.dtype)
    return parts


def _checksum(path: Path, bar: tqdm) -> SourceFile:
    return SourceFile(path.name, path.stat().st_size, sha256(path, bar.update))


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
