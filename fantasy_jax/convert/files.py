"""Weight files of all kinds behind one interface: all shapes and dtypes, and one tensor at a time."""

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
from fantasy_jax.errors import WeightsError
from fantasy_jax.files import atomic_write

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
_PICKLES = (".pth", ".pt", ".ckpt", ".bin")
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class WeightsFile:
    """The tensors of a file, a folder or a manifest.

    Attributes:
        path: The file.
        specs: Shape and dtype of every tensor by key.
        read: Reads one tensor by key; raises a WeightsError for a manifest.
        config: Content of the config.json beside it; empty if there is none.
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
        path: A .safetensors file or the index of several; a .pth, .pt, .ckpt or .bin file, of which only
            tensors are unpickled; an .onnx file of ArcFace; a folder with one of these; or a JSON manifest of
            names and shapes.

    Raises:
        WeightsError: The file is missing, damaged, incomplete or of an unknown kind.
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
    raise WeightsError(f"{path}: unknown kind of file; give .safetensors, .pth, .ckpt, .onnx or .json")


def read_config(folder: Path) -> Mapping[str, Any]:
    """The content of the config.json in a folder; empty if there is none."""
    config = folder / "config.json"
    return _read_json(config) if config.is_file() else {}


def source_files(path: Path) -> list[Path]:
    """The files that an opened path consists of: the file itself, or all shards of an index."""
    if not path.name.endswith(_INDEX):
        return [path]
    return [path.parent / name for name in sorted(set(_read_json(path)["weight_map"].values()))]


def _open_folder(folder: Path) -> WeightsFile:
    candidates = sorted(folder.glob(f"*{_INDEX}")) or sorted(folder.glob("*.safetensors"))
    candidates = candidates or sorted(file for file in folder.iterdir() if file.suffix in _PICKLES)
    weights = [file for file in candidates if file.name != "activations.safetensors"]
    if len(weights) != 1:
        names = ", ".join(file.name for file in weights) or "none"
        raise WeightsError(f"{folder}: must hold one weights file, or an index of several; found {names}")
    return open_weights(weights[0])


def _open_index(path: Path) -> WeightsFile:
    """Opens several files as one; each must hold exactly the tensors that the index names."""
    index = _read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise WeightsError(f"{path}: is not an index; it has no entry 'weight_map' of file names")
    shards = {}
    for name in sorted(set(index.values())):
        if not (path.parent / name).is_file():
            raise WeightsError(f"{path}: names {name}, which is missing; download it again")
        shards[name] = _open_safetensors(path.parent / name)
        named = {key for key in index if index[key] == name}
        if wrong := sorted(named ^ set(shards[name].specs)):
            fault = "lacks" if wrong[0] in named else "holds a tensor that is not in the index,"
            more = f" and {len(wrong) - 1} more differ" * (len(wrong) > 1)
            raise WeightsError(f"{path}: {name} {fault} {wrong[0]}{more}; download both again")
    specs = {key: shards[name].specs[key] for key, name in index.items()}
    return WeightsFile(path, specs, lambda key: shards[index[key]].read(key), read_config(path.parent))


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
            _import_torch(path)
            with safe_open(path, framework="pt") as torch_file:
                return _numpy(torch_file.get_tensor(key))
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


def _open_pickle(path: Path) -> WeightsFile:
    torch = _import_torch(path)
    try:
        # Only tensors are unpickled; anything else raises before it can run. Files older than PyTorch 1.6 are
        # not zip archives and cannot be memory-mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        tensors = _flatten(loaded)
        specs = {
            key: TensorSpec(tuple(tensor.shape), _numpy(torch.empty(0, dtype=tensor.dtype)).dtype)
            for key, tensor in tensors.items()
        }
    except Exception as error:  # torch raises any error of zip, pickle and the system
        raise WeightsError(f"{path}: damaged, or not a file of tensors only ({_reason(error)})") from error
    return WeightsFile(path, specs, lambda key: _numpy(tensors[key]), read_config(path.parent))


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        message = f"{path}: needs PyTorch; pip install 'fantasy_jax[convert]'"
        raise WeightsError(message) from error
    return torch


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _flatten(loaded: Any) -> dict[str, Any]:
    """Returns the tensors of nested dictionaries under dotted keys, without an outer `model_state`."""
    import torch

    tensors: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        elif not isinstance(value, torch.Tensor) or value.layout != torch.strided or not key:
            raise TypeError(f"{key or 'the top level'} is {type(value).__name__}, not a named dense tensor")
        elif key in tensors:
            raise ValueError(f"{key} occurs twice")
        else:
            tensors[key] = value

    walk(loaded.get("model_state", loaded) if isinstance(loaded, Mapping) else loaded, "")
    return tensors


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    # PyTorch does not convert these to NumPy; they are viewed as integers of the same width.
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
        raise WeightsError(f"{path}: needs onnx; pip install 'fantasy_jax[convert]'") from error
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # protobuf's errors have no common base class
        raise WeightsError(f"{path}: damaged, or not ONNX ({_reason(error)}); download it again") from error
    specs = {key: TensorSpec(value.shape, value.dtype) for key, value in tensors.items()}
    return WeightsFile(path, specs, tensors.__getitem__, read_config(path.parent))


def _open_manifest(path: Path) -> WeightsFile:
    manifest = _read_json(path)
    try:
        # A remark may follow the dtype: "float16 (.pth)".
        dtype = np.dtype(manifest.get("dtype", "float32").split()[0])
        specs = {key: TensorSpec(tuple(map(int, x)), dtype) for key, x in manifest["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        message = f"{path}: is not a manifest, which has an entry 'tensors' of names and shapes ({error!r})"
        raise WeightsError(message) from error

    def read(key: str) -> np.ndarray:
        raise WeightsError(f"{path}: a manifest has no values ({key}); give the file itself")

    return WeightsFile(path, specs, read, {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: is a JSON {type(value).__name__}, not an object")
    return value
