"""Weights files of every kind behind one interface: what a file holds, and one tensor at a time."""

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from fantasy_jax.convert.arcface import onnx_tensors
from fantasy_jax.convert.rules import TensorSpec

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


_PICKLES = (".pth", ".pt", ".ckpt", ".bin")
_INDEX = ".safetensors.index.json"


class WeightsError(ValueError):
    """A weights file that cannot be read; one line says which, what is wrong and what to do."""


@dataclass(frozen=True)
class WeightsFile:
    """What a file, a folder or a manifest holds.

    Attributes:
        path: Where it lies.
        specs: Shape and type of every tensor.
        read: Gives one tensor by key; a manifest has none to give.
        config: The config.json beside it, empty where there is none.
    """

    path: Path
    specs: Mapping[str, TensorSpec]
    read: Callable[[str], np.ndarray]
    config: Mapping[str, Any]

    def part(self, prefix: str) -> "WeightsFile":
        """The tensors whose keys start with a prefix, under keys without it."""
        specs = {k.removeprefix(prefix): spec for k, spec in self.specs.items() if k.startswith(prefix)}
        return replace(self, specs=specs, read=lambda key: self.read(prefix + key))


def open_weights(path: str | Path) -> WeightsFile:
    """Opens weights of any kind; reads names and shapes only.

    Args:
        path: A .safetensors file, or the index of several; a .pth, .pt, .ckpt or .bin file, of which nothing
            but tensors is ever unpickled; an .onnx file of ArcFace; a folder of one of these; or a JSON
            manifest of names and shapes.

    Raises:
        WeightsError: It is missing, damaged, of no known kind, or not complete.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in _PICKLES:
        return _open_pickle(path)
    if path.suffix == ".onnx":
        return _open_onnx(path)
    if path.name.endswith(_INDEX):
        return _open_index(path)
    if path.suffix == ".json":
        return _open_manifest(path)
    raise WeightsError(f"{path}: no known kind of weights; give .safetensors, .pth, .ckpt, .onnx or .json")


def source_files(path: Path) -> list[Path]:
    """The files of weights behind what was opened: the file itself, or all shards of an index."""
    if not path.name.endswith(_INDEX):
        return [path]
    return [path.parent / name for name in sorted(set(_read_json(path)["weight_map"].values()))]


def _open_folder(folder: Path) -> WeightsFile:
    candidates = sorted(folder.glob(f"*{_INDEX}")) or sorted(folder.glob("*.safetensors"))
    candidates = candidates or sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
    weights = [file for file in candidates if file.name != "activations.safetensors"]
    if len(weights) != 1:
        names = ", ".join(file.name for file in weights) or "none"
        raise WeightsError(f"{folder}: wants one weights file or an index of several, and holds {names}")
    return open_weights(weights[0])


def _open_index(path: Path) -> WeightsFile:
    """Several files as one; each must hold exactly the tensors that the index says."""
    index = _read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise WeightsError(f"{path}: is no index; it has no entry 'weight_map' of file names")
    shards = {}
    for name in sorted(set(index.values())):
        if not (path.parent / name).is_file():
            raise WeightsError(f"{path}: names {name}, which is not there; fetch it again")
        shards[name] = _open_safetensors(path.parent / name)
        named = {key for key in index if index[key] == name}
        if wrong := sorted(named ^ set(shards[name].specs)):
            verb = "lacks" if wrong[0] in named else "holds, unnamed by the index,"
            more = f" and {len(wrong) - 1} more differ" * (len(wrong) > 1)
            raise WeightsError(f"{path}: {name} {verb} {wrong[0]}{more}; fetch both again")
    specs = {key: shards[name].specs[key] for key, name in index.items()}
    return WeightsFile(path, specs, lambda key: shards[index[key]].read(key), _config_beside(path))


def _open_safetensors(path: Path) -> WeightsFile:
    try:
        # Opening checks that the header is sound and that the file is as long as it says.
        with safe_open(path, framework="numpy"):
            pass
        header, start = _safetensors_header(path)
    except (SafetensorError, ValueError, struct.error) as error:
        raise WeightsError(f"{path}: damaged or cut off ({error}); fetch it again") from error
    specs = {}
    for key, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise WeightsError(f"{path}: {key} is of type {entry['dtype']}, which cannot be read here")
        specs[key] = TensorSpec(tuple(entry["shape"]), np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]]))

    def read(key: str) -> np.ndarray:
        # Mapped by NumPy, for safetensors gives bfloat16 only to frameworks that have it.
        spec, offset = specs[key], start + header[key]["data_offsets"][0]
        return np.memmap(path, spec.dtype, "r", offset, spec.shape or (1,)).reshape(spec.shape)

    return WeightsFile(path, specs, read, _config_beside(path))


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Names, types and places of a file's tensors, and where its data begin."""
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Writes a file tensor by tensor; it is there when it is complete, and not before.

    Args:
        path: The file.
        specs: Shape and type of every tensor.
        tensors: All of them, in that order.

    Raises:
        WeightsError: It cannot be written.
    """
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which PyTorch's loaders ask for
    end = 0
    for key, spec in specs.items():
        start, end = end, end + math.prod(spec.shape) * spec.dtype.itemsize
        header[key] = {"dtype": names[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            for (key, value), wanted in zip(tensors, specs, strict=True):
                if key != wanted or TensorSpec(value.shape, value.dtype) != specs[key]:
                    raise ValueError(f"{key} is not the {wanted} that was announced")
                file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _open_pickle(path: Path) -> WeightsFile:
    try:
        import torch
    except ModuleNotFoundError as error:
        message = f"{path}: reading it needs PyTorch; pip install 'fantasy_jax[convert]', or use safetensors"
        raise WeightsError(message) from error
    try:
        # Tensors only: anything else in the pickle is refused before it could run. Files of before
        # PyTorch 1.6 are no zip archives, and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        tensors = _flatten(loaded)
        specs = {
            key: TensorSpec(tuple(tensor.shape), _numpy(torch.empty(0, dtype=tensor.dtype)).dtype)
            for key, tensor in tensors.items()
        }
    except Exception as error:  # torch raises whatever the zip, the pickle or the system does
        raise WeightsError(f"{path}: not a file of tensors alone, or damaged ({_reason(error)})") from error
    return WeightsFile(path, specs, lambda key: _numpy(tensors[key]), _config_beside(path))


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _flatten(loaded: Any) -> dict[str, Any]:
    """Tensors of nested dictionaries under dotted keys; a wrapper called `model_state` is taken off."""
    import torch

    tensors: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        elif not isinstance(value, torch.Tensor) or value.layout != torch.strided or not key:
            raise TypeError(f"holds {type(value).__name__} at {key or 'the top'}, not named plain tensors")
        elif key in tensors:
            raise ValueError(f"{key} is there twice")
        else:
            tensors[key] = value

    walk(loaded.get("model_state", loaded) if isinstance(loaded, Mapping) else loaded, "")
    return tensors


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    # NumPy gets these through an integer of their width, for PyTorch does not hand them over.
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        name = str(tensor.dtype).removeprefix("torch.")
        return tensor.view(torch.uint8).numpy().view(np.dtype(name))
    return tensor.numpy()


def _open_onnx(path: Path) -> WeightsFile:
    try:
        tensors = onnx_tensors(path)
    except ModuleNotFoundError as error:
        raise WeightsError(f"{path}: reading it needs onnx; pip install 'fantasy_jax[convert]'") from error
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # protobuf raises what it likes
        raise WeightsError(f"{path}: damaged, or not ONNX ({_reason(error)}); fetch it again") from error
    specs = {key: TensorSpec(value.shape, value.dtype) for key, value in tensors.items()}
    return WeightsFile(path, specs, tensors.__getitem__, _config_beside(path))


def _open_manifest(path: Path) -> WeightsFile:
    manifest = _read_json(path)
    try:
        # The type may be followed by a remark: "float16 (.pth)".
        dtype = np.dtype(manifest.get("dtype", "float32").split()[0])
        specs = {key: TensorSpec(tuple(map(int, x)), dtype) for key, x in manifest["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        message = f"{path}: is no manifest, which has an entry 'tensors' of names and shapes ({error!r})"
        raise WeightsError(message) from error

    def read(key: str) -> np.ndarray:
        raise WeightsError(f"{path}: a manifest holds names and shapes, no values such as {key}")

    return WeightsFile(path, specs, read, {})


def _config_beside(path: Path) -> Mapping[str, Any]:
    config = path.parent / "config.json"
    return _read_json(config) if config.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: holds {type(value).__name__}, not an object of names and values")
    return value
