"""Weights files of every kind behind one interface: what a file holds, and one tensor at a time."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

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
    "U8": np.uint8,
    "BOOL": np.bool_,
}


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
        return WeightsFile(self.path, specs, lambda key: self.read(prefix + key), self.config)


def open_weights(path: str | Path) -> WeightsFile:
    """Opens weights of any kind; reads names and shapes only.

    Args:
        path: A .safetensors file; a .pth, .pt or .ckpt file, of which nothing but tensors is ever unpickled; a
            folder of either, with an index if there are several; or a JSON manifest of names and shapes.

    Raises:
        WeightsError: It is missing, damaged, of no known kind, or not complete.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path}: no such file or folder")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _open_safetensors([path], _config_beside(path))
    if path.suffix in (".pth", ".pt", ".ckpt", ".bin"):
        return _open_pickle(path)
    if path.suffix == ".json":
        return _open_manifest(path)
    raise WeightsError(
        f"{path}: not a kind of weights that is known; give .safetensors, .pth, .ckpt or .json"
    )


def _open_folder(folder: Path) -> WeightsFile:
    if indices := sorted(folder.glob("*.safetensors.index.json")):
        index = _read_json(indices[0]).get("weight_map", {})
        shards = sorted({folder / name for name in index.values()})
        for shard in shards:
            if not shard.is_file():
                raise WeightsError(f"{indices[0]}: names {shard.name}, which is not there; fetch it again")
        opened = _open_safetensors(shards, _config_beside(indices[0]))
        if lost := sorted(set(index) - set(opened.specs)):
            raise WeightsError(f"{indices[0]}: names {lost[0]} and {len(lost) - 1} more that no shard holds")
        return opened
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.pth")) + sorted(
        folder.glob("*.ckpt")
    )
    weights = [file for file in files if file.name != "activations.safetensors"]
    if len(weights) != 1:
        names = ", ".join(file.name for file in weights) or "none"
        raise WeightsError(f"{folder}: wants one weights file or an index of several, and holds {names}")
    return open_weights(weights[0])


def _open_safetensors(paths: list[Path], config: Mapping[str, Any]) -> WeightsFile:
    specs: dict[str, TensorSpec] = {}
    places: dict[str, tuple[Path, int]] = {}
    for path in paths:
        try:
            # Opening checks that the header is sound and that the file is as long as it says.
            with safe_open(path, framework="numpy"):
                pass
            header, start = _safetensors_header(path)
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise WeightsError(f"{path}: damaged or cut off ({error}); fetch it again") from error
        for key, entry in header.items():
            dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
            specs[key] = TensorSpec(tuple(entry["shape"]), dtype)
            places[key] = path, start + entry["data_offsets"][0]

    def read(key: str) -> np.ndarray:
        # Mapped by NumPy, for safetensors gives bfloat16 only to frameworks that have it.
        (path, start), spec = places[key], specs[key]
        return np.memmap(path, spec.dtype, "r", start, spec.shape or (1,)).reshape(spec.shape)

    return WeightsFile(paths[0], specs, read, config)


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """Names, types and places of a file's tensors, and where its data begin."""
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def _open_pickle(path: Path) -> WeightsFile:
    try:
        import torch
    except ModuleNotFoundError as error:
        message = f"{path}: reading it needs PyTorch; pip install 'fantasy_jax[convert]', or use safetensors"
        raise WeightsError(message) from error
    try:
        # Tensors only: anything else in the pickle is refused before it could run.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever the zip, the pickle or the system does
        reason = str(error).strip().splitlines()[0][:120]
        raise WeightsError(f"{path}: not a file of tensors alone, or damaged ({reason})") from error
    tensors = dict(_flatten(loaded, path))
    specs = {
        key: TensorSpec(tuple(tensor.shape), _numpy(torch.empty(0, dtype=tensor.dtype)).dtype)
        for key, tensor in tensors.items()
    }
    return WeightsFile(path, specs, lambda key: _numpy(tensors[key]), _config_beside(path))


def _flatten(loaded: Any, path: Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors of nested dictionaries under dotted keys; a wrapper called `model_state` is taken off."""
    import torch

    if not isinstance(loaded, Mapping):
        raise WeightsError(
            f"{path}: holds {type(loaded).__name__} at {prefix or 'the top'}, not named tensors"
        )
    loaded = loaded.get("model_state", loaded) if not prefix else loaded
    for key, value in loaded.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        else:
            yield from _flatten(value, path, f"{prefix}{key}.")


def _numpy(tensor: Any) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.detach().numpy()


def _open_manifest(path: Path) -> WeightsFile:
    manifest = _read_json(path)
    if "tensors" not in manifest:
        raise WeightsError(f"{path}: is no manifest; it has no entry 'tensors' of names and shapes")
    specs = {k: TensorSpec(tuple(shape), np.dtype(np.float32)) for k, shape in manifest["tensors"].items()}

    def read(key: str) -> np.ndarray:
        raise WeightsError(f"{path}: a manifest holds names and shapes, no values such as {key}")

    return WeightsFile(path, specs, read, {})


def _config_beside(path: Path) -> Mapping[str, Any]:
    config = path.parent / "config.json"
    return _read_json(config) if config.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: not JSON ({error})") from error
