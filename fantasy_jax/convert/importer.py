"""The downloads of all networks into the store of `fantasy_jax.weights`, block by block.

No more than one block, or what lies outside the blocks, is in memory at a time. What is complete is
skipped, and an interrupted import goes on with the first block that is missing.
"""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from fantasy_jax import weights
from fantasy_jax.convert.components import Recognised, recognise
from fantasy_jax.convert.files import WeightsError, open_weights, source_files
from fantasy_jax.convert.rules import Plan, check, load
from fantasy_jax.typing import DType
from fantasy_jax.weights import FOLDERS, TOKENIZER, Record, Source

_OFFICIAL = {
    "wan2.1_i2v_dit": "diffusion_pytorch_model.safetensors.index.json",
    "wan_vae": "Wan2.1_VAE.pth",
    "umt5_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "clip_vision": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    TOKENIZER: "google/umt5-xxl",
}
_DIFFUSERS = {
    "wan2.1_i2v_dit": "transformer",
    "wan_vae": "vae",
    "umt5_encoder": "text_encoder",
    "clip_vision": "image_encoder",
    TOKENIZER: "tokenizer",
}
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Job:
    """One network to import.

    Attributes:
        found: It, as it lies in its file.
        plan: How it fills ours; without problems.
        dtype: Type to store it as.
        tokenizer: The folder of the tokenizer that belongs to it.
    """

    found: Recognised
    plan: Plan
    dtype: np.dtype
    tokenizer: Path | None = None

    @property
    def bytes(self) -> int:
        """Of the tensors that are read."""
        specs = self.found.weights.specs
        return sum(_size(specs[entry.key].shape, specs[entry.key].dtype) for entry in self.plan.entries)

    @property
    def stored_bytes(self) -> int:
        """Of the parameters that are written, before compression."""
        return sum(_size(spec.shape, self.dtype) for spec in self.plan.target.values())


def import_weights(
    output: str | Path,
    *,
    wan: str | Path | None = None,
    fantasytalking: str | Path | None = None,
    wav2vec2: str | Path | None = None,
    arcface: str | Path | None = None,
    dtype: DType,
    progress: bool = True,
) -> list[str]:
    """Imports all networks of the given downloads; every fault that can be is found before a byte is written.

    Args:
        output: The store.
        wan: Folder of Wan2.1 I2V 14B, in the official layout or in diffusers'.
        fantasytalking: The adapter's file.
        wav2vec2: Folder of a wav2vec2 as transformers has it.
        arcface: File of an IResNet, PyTorch's or ONNX.
        dtype: Type of the stored parameters; ArcFace's are float32 whatever it is.
        progress: Show bytes done and time left.

    Returns:
        What was done, a line for each network.

    Raises:
        WeightsError: A file is missing, damaged, or of another model; or there is no room on the disk.
        ConversionError: A file does not fit its network.
    """
    paths: list[tuple[str, Path]] = []
    tokenizer = None
    if wan is not None:
        files = _wan_files(Path(wan))
        tokenizer = files.pop(TOKENIZER)
        paths += files.items()
    paths += [("fantasytalking", Path(fantasytalking))] if fantasytalking is not None else []
    paths += [("wav2vec2", Path(wav2vec2))] if wav2vec2 is not None else []
    paths += [("arcface", Path(arcface))] if arcface is not None else []
    jobs = [
        _job(
            name,
            path,
            np.dtype(np.float32 if name == "arcface" else dtype),
            tokenizer if name == "umt5_encoder" else None,
        )
        for name, path in paths
    ]
    folders = [Path(output) / FOLDERS[job.found.component.name] for job in jobs]
    done = [_is_done(job, folder) for job, folder in zip(jobs, folders, strict=True)]
    lines = [f"{folder}: complete already" for folder, ready in zip(folders, done, strict=True) if ready]
    todo = [(job, folder) for job, folder, ready in zip(jobs, folders, done, strict=True) if not ready]
    _check_room(Path(output), todo)
    # Twice, for the checksums are taken first.
    total = sum(job.bytes + _source_bytes(job) for job, _ in todo)
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress or not todo) as bar:
        for job, folder in todo:
            bar.set_description(folder.name)
            _import(job, folder, bar)
            lines.append(f"{folder}: {job.stored_bytes / 2**30:.2f} GiB of {job.dtype}")
    return lines


def _wan_files(folder: Path) -> dict[str, Path]:
    """Where each network of a Wan2.1 folder lies, and the tokenizer."""
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder")
    names = _DIFFUSERS if (folder / _DIFFUSERS["wan2.1_i2v_dit"]).is_dir() else _OFFICIAL
    for name in names.values():
        if not (folder / name).exists():
            raise WeightsError(f"{folder}: lacks {name}; fetch it again")
    return {component: folder / name for component, name in names.items()}


def _job(name: str, path: Path, dtype: np.dtype, tokenizer: Path | None) -> Job:
    found = recognise(open_weights(path))
    wanted = [x for x in found if x.component.name == name]
    if len(found) != 1 or not wanted:
        names = " and ".join(x.component.name for x in found)
        raise WeightsError(f"{path}: holds {names}, where {name} is meant")
    return Job(wanted[0], check(wanted[0].plan(dtype)[1]), dtype, tokenizer)


def _is_done(job: Job, folder: Path) -> bool:
    """Whether the store holds this very network; raises if it holds another in its place."""
    if not (folder / weights.RECORD).is_file():
        return False
    _, stored = weights.read_record(folder)
    sources = [{"name": path.name, "bytes": path.stat().st_size} for path in _files(job)]
    same = [{k: x[k] for k in ("name", "bytes")} for x in stored["sources"]] == sources
    if same and stored["dtype"] == str(job.dtype) and stored["component"] == job.found.component.name:
        return True
    raise WeightsError(
        f"{folder}: holds {stored['dtype']} weights of other files; delete it, or give another --output"
    )


def _check_room(output: Path, todo: list[tuple[Job, Path]]) -> None:
    needed = sum(job.stored_bytes for job, _ in todo)
    for _, folder in todo:
        partial = folder.with_name(f"{folder.name}.partial")
        needed -= sum(x.stat().st_size for x in partial.rglob("*") if x.is_file())
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        gib = f"{needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free"
        raise WeightsError(f"{output}: no room; {gib}")


def _import(job: Job, folder: Path, bar: tqdm) -> None:
    found = job.found
    sources = tuple(_checksum(path, bar) for path in _files(job))
    record = Record(found.component.name, found.preset, asdict(found.config), str(job.dtype), sources)
    parts = _split(job.plan)

    def read(key: str) -> np.ndarray:
        value = found.weights.read(key)
        bar.update(value.nbytes)
        return value

    def extra(partial: Path) -> None:
        if job.tokenizer is not None:
            shutil.copytree(job.tokenizer, partial / TOKENIZER, dirs_exist_ok=True)

    weights.write(
        folder, record, sorted(parts), lambda item: load(parts[item], read, dtype=job.dtype), extra=extra
    )


def _split(plan: Plan) -> dict[str, Plan]:
    """A plan for each item of the store; in those of blocks no parameter is a stack."""
    parts: dict[str, Plan] = {}
    for entry in plan.entries:
        spec = plan.target[entry.path]
        part = parts.setdefault(weights.item_name(entry.layer), Plan([], {}, {}, []))
        part.entries.append(replace(entry, layer=None))
        shape = spec.shape if entry.layer is None else spec.shape[1:]
        part.target[entry.path] = jax.ShapeDtypeStruct(shape, spec.dtype)
    return parts


def _files(job: Job) -> list[Path]:
    return source_files(job.found.weights.path)


def _source_bytes(job: Job) -> int:
    return sum(path.stat().st_size for path in _files(job))


def _checksum(path: Path, bar: tqdm) -> Source:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
        bar.update(len(chunk))
    return Source(path.name, path.stat().st_size, digest.hexdigest())


def _chunks(path: Path) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
