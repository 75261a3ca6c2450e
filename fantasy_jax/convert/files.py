"""Weight files of all kinds behind one interface: all shapes and dtypes, and one tensor at a time."""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from fantasy_jax.convert.arcface import onnx_tensors
from fantasy_jax.convert.kinds import kind_of
from fantasy_jax.convert.pickles import import_torch, read_pickle, reason, to_numpy
from fantasy_jax.convert.quantised import ScaleOf, read_gguf, with_scales
from fantasy_jax.convert.rules import TensorSpec
from fantasy_jax.errors import WeightsError
from fantasy_jax.files import atomic_write, parse_json

_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_FLOAT8 = (jnp.float8_e4m3fn, jnp.float8_e5m2)
_INDEX = re.compile(r".*\.(safetensors|bin)\.index(\..*)?\.json")
"""Names of an index of shards; diffusers puts a variant before `.safetensors`, or behind `.index`."""
_FOLDER = (".safetensors", ".sft", ".gguf", ".pth", ".pt", ".ckpt", ".bin")
"""Suffixes of weights in a folder, the preferred ones first."""
_STANDARD = ("diffusion_pytorch_model", "model", "pytorch_model")
"""Names of weights in folders of diffusers and transformers; others may lie beside them."""


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file, a folder or a manifest.

    Attributes:
        path: The file.
        specs: Shape and dtype of every tensor by key.
        read: Reads one tensor by key; raises a WeightsError for a manifest.
        config: Content of the config.json beside it; empty if there is none.
        scale_of: The scale of a tensor that is held in 8 bits (`quantised.with_scales`).
    """

    path: Path
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], np.ndarray]
    config: Mapping[str, Any]
    scale_of: ScaleOf = lambda key, dtype: None

    def part(self, prefix: str) -> "WeightsFile":
        """The tensors whose keys start with a prefix, under keys without it."""
        specs = {k.removeprefix(prefix): spec for k, spec in self.specs.items() if k.startswith(prefix)}
        return replace(
            self,
            specs=specs,
            read=lambda key: self.read(prefix + key),
            scale_of=lambda key, dtype: self.scale_of(prefix + key, dtype),
        )


def open_weights(path: str | Path, *, variant: str = "") -> WeightsFile:
    """Opens weights of any kind; reads names and shapes only.

    The kind of a file is recognised by its content, whatever its suffix.

    Args:
        path: A safetensors file; a pickle of PyTorch (.pth, .pt, .ckpt, .bin), of which only tensors and
            plain values are unpickled; the index of several of either; a .gguf file; an .onnx file of
            ArcFace; a folder with one of these; or a JSON manifest of names and shapes.
        variant: Part of the file's name, such as `fp16`, where a folder holds several.

    Raises:
        WeightsError: The file is missing, damaged, incomplete or of an unknown kind.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    if path.is_dir():
        path = _find_in_folder(path, variant)
    if _INDEX.fullmatch(path.name):
        weights = _open_index(path)
    elif (kind := kind_of(path)) == "json":
        return _open_manifest(path)
    elif kind == "onnx":
        return _open_onnx(path)
    elif kind == "safetensors":
        weights = _open_safetensors(path)
    else:
        specs, read = read_gguf(path) if kind == "gguf" else read_pickle(path)
        weights = WeightsFile(path, specs, read, read_config(path.parent))
    specs, read, scale_of = with_scales(path, weights.specs, weights.read)
    return replace(weights, specs=specs, read=read, scale_of=scale_of)


def read_config(folder: Path) -> Mapping[str, Any]:
    """The content of the config.json in a folder, with that of its preprocessor; empty if there is none.

    The settings of the preprocessor, such as `do_normalize`, say which inputs the network takes. Those of
    transformers 5 are nested, in either of two files.
    """
    names = ("processor_config.json", "preprocessor_config.json", "config.json")
    merged: dict[str, Any] = {}
    for name in (name for name in names if (folder / name).is_file()):
        content = _read_json(folder / name)
        nested = content.get("feature_extractor")
        merged |= content | (nested if isinstance(nested, dict) else {})
    return merged


def source_files(path: Path) -> list[Path]:
    """The files that an opened path consists of: the file itself, or all shards of an index."""
    if not _INDEX.fullmatch(path.name):
        return [path]
    return [path.parent / name for name in sorted(set(_read_json(path)["weight_map"].values()))]


def _find_in_folder(folder: Path, variant: str) -> Path:
    """The weights of a folder: an index or a file, of standard name if there are others, of the variant.

    Raises:
        WeightsError: There is none, or more than one that could be meant.
    """
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    indices = [name for name in names if _INDEX.fullmatch(name)]
    shards = {shard for name in indices for shard in _shards(folder / name)}
    singles = [x for x in names if x.endswith(_FOLDER) and x != "activations.safetensors" and x not in shards]
    groups = [[name for name in indices if ".safetensors." in name]]
    groups += [[name for name in singles if name.endswith(suffix)] for suffix in _FOLDER[:3]]
    groups += [[x for x in indices if ".bin." in x], [x for x in singles if x.endswith(_FOLDER[3:])]]
    everything = [name for group in groups for name in group]
    if variant and len(everything) > 1:
        groups = [[name for name in group if has_variant(name, variant)] for group in groups]
    found = next((group for group in groups if group), [])
    plain = [x for x in found if x.partition(".")[0] in _STANDARD and (variant or not _named_variant(x))]
    found = plain if len(found) > 1 and plain else found
    if len(found) == 1:
        return folder / found[0]
    if not everything:
        raise WeightsError(f"{folder}: holds no weights file, or index of several")
    wanted = f"none or several are of --variant={variant}" if variant else "choose one with --variant"
    raise WeightsError(f"{folder}: must hold one weights file; found {', '.join(everything)}; {wanted}")


def _shards(index: Path) -> set[str]:
    names = _read_json(index).get("weight_map")
    return {x for x in names.values() if isinstance(x, str)} if isinstance(names, dict) else set()


def has_variant(name: str, variant: str) -> bool:
    """Whether a file's name has a variant between dots, hyphens or underscores."""
    return re.search(rf"(^|[._-]){re.escape(variant)}([._-]|$)", name) is not None


def _named_variant(name: str) -> bool:
    """Whether a name of diffusers says which variant it is: `model.fp16.safetensors`."""
    return len([part for part in name.split(".") if part not in ("index", "json")]) > 2


def _open_index(path: Path) -> WeightsFile:
    """Opens several files as one; each must hold exactly the tensors that the index names."""
    index = _read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise WeightsError(f"{path}: is not an index; it has no entry 'weight_map' of file names")
    shards = {}
    for name in sorted(set(index.values())):
        if not (path.parent / name).is_file():
            raise WeightsError(f"{path}: names {name}, which is missing; download it again")
        shards[name] = _open_shard(path.parent / name)
        named = {key for key in index if index[key] == name}
        if wrong := sorted(named ^ set(shards[name].specs)):
            fault = "lacks" if wrong[0] in named else "holds a tensor that is not in the index,"
            more = f" and {len(wrong) - 1} more differ" * (len(wrong) > 1)
            raise WeightsError(f"{path}: {name} {fault} {wrong[0]}{more}; download both again")
    specs = {key: shards[name].specs[key] for key, name in index.items()}
    return WeightsFile(path, specs, lambda key: shards[index[key]].read(key), read_config(path.parent))


def _open_shard(path: Path) -> WeightsFile:
    if kind_of(path) == "safetensors":
        return _open_safetensors(path)
    return WeightsFile(path, *read_pickle(path), {})


def _open_safetensors(path: Path) -> WeightsFile:
    try:
        # Opening checks that the header is valid and that the file has the size that follows from it.
        file = safe_open(path, framework="numpy")
        slices = {key: file.get_slice(key) for key in file.offset_keys()}
        header = {key: (slice_.get_dtype(), tuple(slice_.get_shape())) for key, slice_ in slices.items()}
    except (SafetensorError, ValueError) as error:
        raise WeightsError(f"{path}: damaged or truncated ({error}); download it again") from error
    specs = {}
    for key, (dtype, shape) in header.items():
        if dtype not in _SAFETENSORS_DTYPES:
            raise WeightsError(f"{path}: {key} has dtype {dtype}, which is not supported")
        specs[key] = TensorSpec(shape, np.dtype(_SAFETENSORS_DTYPES[dtype]))

    def read(key: str) -> np.ndarray:
        if specs[key].dtype in _FLOAT8:  # which safetensors does not convert to NumPy
            import_torch(path)
            with safe_open(path, framework="pt") as torch_file:
                return to_numpy(torch_file.get_tensor(key))
        return file.get_tensor(key)

    return WeightsFile(path, specs, read, read_config(path.parent))


def write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a file one tensor at a time, whole or not at all.

    (safetensors' own functions need all tensors in memory.)

    Args:
        path: The file.
        specs: Shape and dtype of every tensor.
        tensors: Keys and values of all tensors, in that order.

    Raises:
        MediaError: The file cannot be written.
    """
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    end = 0
    for key, spec in specs.items():
        start, end = end, end + math.prod(spec.shape) * spec.dtype.itemsize
        header[key] = {"dtype": names[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for (key, value), expected in zip(tensors, specs, strict=True):
            if key != expected or TensorSpec(value.shape, value.dtype) != specs[key]:
                raise ValueError(f"{key} does not match the spec of {expected}")
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _open_onnx(path: Path) -> WeightsFile:
    try:
        tensors = onnx_tensors(path)
    except ModuleNotFoundError as error:
        raise WeightsError(f"{path}: needs onnx; pip install 'fantasy_jax[convert]'") from error
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # protobuf's errors have no common base class
        raise WeightsError(f"{path}: damaged, or not ONNX ({reason(error)}); download it again") from error
    specs = {key: TensorSpec(value.shape, value.dtype) for key, value in tensors.items()}
    return WeightsFile(path, specs, tensors.__getitem__, read_config(path.parent))


def _open_manifest(path: Path) -> WeightsFile:
    manifest = _read_json(path)
    try:
        # A remark may follow the dtype: "float16 (.pth)".
        dtype = np.dtype(manifest.get("dtype", "float32").split()[0])
        specs = {key: TensorSpec(tuple(map(int, x)), dtype) for key, x in manifest["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, SyntaxError) as error:
        message = f"{path}: is not a manifest, which has an entry 'tensors' of names and shapes ({error!r})"
        raise WeightsError(message) from error

    def read(key: str) -> np.ndarray:
        raise WeightsError(f"{path}: a manifest has no values ({key}); give the file itself")

    return WeightsFile(path, specs, read, {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(path.read_text())
    except ValueError as error:  # UnicodeDecodeError, too
        raise WeightsError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: is a JSON {type(value).__name__}, not an object")
    return value
