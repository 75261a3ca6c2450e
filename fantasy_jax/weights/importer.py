"""Import of published weights into the store of `fantasy_jax.weights.store`, one block at a time.

At most one block, or the parameters outside the blocks, is in memory at a time. Complete networks are
skipped, and an interrupted import continues with the first missing block.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from fantasy_jax.convert.files import open_weights, source_files
from fantasy_jax.convert.rules import Plan, check, load, stored_dtype
from fantasy_jax.errors import WeightsError
from fantasy_jax.files import lock_folder
from fantasy_jax.system.registry import Component, components
from fantasy_jax.typing import DType
from fantasy_jax.weights.detect import Detected, detect
from fantasy_jax.weights.disk import check_space, free_bytes
from fantasy_jax.weights.store import (
    RECORD,
    TOKENIZER,
    NetworkRecord,
    SourceFile,
    item_name,
    read_record,
    write,
)

_CHUNK = 1 << 24


@dataclass(frozen=True)
class Job:
    """One network to import.

    Attributes:
        found: The network in its file.
        plan: How the file fills the module; without problems.
        dtype: Dtype of the stored parameters, except for integers.
        tokenizer: Folder of the tokenizer that belongs to the network.
    """

    found: Detected
    plan: Plan
    dtype: np.dtype
    tokenizer: Path | None = None

    @property
    def bytes(self) -> int:
        """Size of the tensors that are read."""
        specs = self.found.weights.specs
        return sum(_size(specs[entry.key].shape, specs[entry.key].dtype) for entry in self.plan.entries)

    @property
    def stored_bytes(self) -> int:
        """Size of the parameters that are written, before compression."""
        return sum(_size(spec.shape, stored_dtype(spec, self.dtype)) for spec in self.plan.target.values())

    @property
    def other_dtypes(self) -> dict[str, str]:
        """Dtypes of the parameters that are not stored as `dtype`, by path."""
        dtypes = {path: stored_dtype(spec, self.dtype) for path, spec in self.plan.target.items()}
        return {path: str(dtype) for path, dtype in dtypes.items() if dtype != self.dtype}

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
    progress: bool = True,
) -> list[str]:
    """Imports networks; all files are checked before anything is written.

    A file that several networks share is imported as a whole, whichever of their options it is given by.

    Args:
        output: The store.
        wan: Folder of Wan2.1 I2V 14B, in the official or in diffusers' layout.
        sources: Files or folders of other networks, by option (`import_options`).
        dtype: Dtype of the stored parameters, except for networks with a fixed dtype.
        progress: Whether to show a progress bar.

    Returns:
        A summary of each network, one line each.

    Raises:
        WeightsError: A file is missing, damaged or of another model; two files hold the same network; or the
            disk has not enough space.
        ConversionError: A file does not fit its network.
        ConfigError: Another import writes to the store.
    """
    jobs = _wan_jobs(Path(wan), dtype) if wan is not None else []
    options = import_options()
    for option, path in (sources or {}).items():
        jobs += _jobs(options[option], Path(path), dtype)
    _check_distinct(jobs)
    folders = [Path(output) / job.found.component.slot for job in jobs]
    done = [_is_done(job, folder) for job, folder in zip(jobs, folders, strict=True)]
    lines = [f"{folder}: already complete" for folder, ready in zip(folders, done, strict=True) if ready]
    todo = [(job, folder) for job, folder, ready in zip(jobs, folders, done, strict=True) if not ready]
    _check_space(Path(output), todo)
    # Files are read twice: first for their checksums.
    total = sum(job.bytes + sum(path.stat().st_size for path in job.files) for job, _ in todo)
    hidden = not progress or not todo
    with lock_folder(output), tqdm(total=total, unit="B", unit_scale=True, disable=hidden) as bar:
        for job, folder in todo:
            bar.set_description(folder.name)
            _import(job, folder, bar)
            lines.append(f"{folder}: {job.stored_bytes / 2**30:.2f} GiB of {job.dtype}")
    return lines


def _wan_jobs(folder: Path, dtype: DType) -> list[Job]:
    """The networks of a folder of Wan2.1, in the layout of which it holds more files."""
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    rows = [row for row in components().values() if row.download.wan_files]
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
        tokenizer = row.download.wan_tokenizer
        jobs += _jobs(
            row,
            folder / row.download.wan_files[layout],
            dtype,
            folder / tokenizer[layout] if tokenizer else None,
        )
    return jobs


def _jobs(component: Component, path: Path, dtype: DType, tokenizer: Path | None = None) -> list[Job]:
    """All networks of a file, the wanted one first; the tokenizer belongs to that."""
    found = detect(open_weights(path))
    wanted = [x for x in found if x.component.name == component.name]
    if not wanted:
        names = " and ".join(x.component.name for x in found)
        raise WeightsError(f"{path}: holds {names}, not {component.name}")
    others = [x for x in found if x.component.name != component.name]
    return [_job(wanted[0], path, dtype, tokenizer), *(_job(x, path, dtype) for x in others)]


def _job(found: Detected, path: Path, dtype: DType, tokenizer: Path | None = None) -> Job:
    dtype = np.dtype(found.component.dtype or dtype)
    return Job(found, check(found.plan(dtype)[1], path), dtype, tokenizer)


def _check_distinct(jobs: list[Job]) -> None:
    """Raises a WeightsError if two networks belong into the same folder of the store."""
    paths: dict[str, Path] = {}
    for job in jobs:
        slot, path = job.found.component.slot, job.found.weights.path
        if slot in paths:
            raise WeightsError(f"{path}: holds the {slot}, as does {paths[slot]}; give only one of the two")
        paths[slot] = path


def _is_done(job: Job, folder: Path) -> bool:
    """Whether the store holds this network; raises a WeightsError if it holds another one in its place."""
    if not (folder / RECORD).is_file():
        return False
    _, stored = read_record(folder)
    sources = [{"name": path.name, "bytes": path.stat().st_size} for path in job.files]
    same = [{k: x[k] for k in ("name", "bytes")} for x in stored["sources"]] == sources
    if same and stored["dtype"] == str(job.dtype) and stored["component"] == job.found.component.name:
        return True
    raise WeightsError(
        f"{folder}: holds {stored['dtype']} weights of other files; delete it, or choose another --output"
    )


def _check_space(output: Path, todo: list[tuple[Job, Path]]) -> None:
    needed = sum(job.stored_bytes for job, _ in todo)
    for _, folder in todo:
        partial = folder.with_name(f"{folder.name}.partial")
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
            shutil.copytree(job.tokenizer, partial / TOKENIZER, dirs_exist_ok=True)

    write(folder, record, sorted(parts), lambda item: load(parts[item], read, dtype=job.dtype), extra=extra)


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
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
        bar.update(len(chunk))
    return SourceFile(path.name, path.stat().st_size, digest.hexdigest())


def _chunks(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
