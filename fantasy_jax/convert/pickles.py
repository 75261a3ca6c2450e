"""PyTorch's pickled files, of which only tensors, numbers and strings are unpickled."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fantasy_jax.convert.rules import TensorSpec
from fantasy_jax.errors import WeightsError

_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "ema",
    "model_ema",
    "ema_state_dict",
)
"""Entries under which training programs save a model beside what else they save."""
_STATE = (
    "amp",
    "callback",
    "grad_scaler",
    "hyper_parameters",
    "loops",
    "lr_",
    "optim",
    "rng",
    "scaler",
    "sched",
)
"""Beginnings of the entries that hold the state of a training run, which may contain tensors."""


def read_pickle(path: Path) -> tuple[dict[str, TensorSpec], Any]:
    """Shapes and dtypes of all tensors of a file, and a function that reads one.

    Raises:
        WeightsError: The file is damaged, or holds other things than tensors, numbers and strings.
    """
    torch = import_torch(path)
    try:
        # Anything but tensors and plain values raises before it can run. Files older than PyTorch 1.6 are not
        # zip archives and cannot be memory-mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        tensors = _flatten(_unwrap(loaded))
        specs = {
            key: TensorSpec(tuple(tensor.shape), to_numpy(torch.empty(0, dtype=tensor.dtype)).dtype)
            for key, tensor in tensors.items()
        }
    except Exception as error:  # torch raises any error of zip, pickle and the system
        raise WeightsError(f"{path}: damaged, or not a file of tensors only ({reason(error)})") from error
    return specs, lambda key: to_numpy(tensors[key])


def import_torch(path: Path) -> Any:
    """PyTorch; WeightsError, which begins with `path`, where it is missing."""
    try:
        import torch
    except ModuleNotFoundError as error:
        message = f"{path}: needs PyTorch; pip install 'fantasy_jax[convert]'"
        raise WeightsError(message) from error
    return torch


def reason(error: Exception) -> str:
    """The first line of an error, at most 120 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def to_numpy(tensor: Any) -> np.ndarray:
    """A tensor of PyTorch as an array, also of types that PyTorch does not convert."""
    import torch

    tensor = tensor.detach()
    # PyTorch does not convert these to NumPy; they are viewed as integers of the same width.
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        name = str(tensor.dtype).removeprefix("torch.")
        return tensor.view(torch.uint8).numpy().view(np.dtype(name))
    return tensor.numpy()


def _unwrap(loaded: Any) -> Any:
    """The model of a training program's file, which may be wrapped more than once, without the rest.

    Raises:
        ValueError: There are several models.
    """
    while isinstance(loaded, Mapping):
        found = [name for name in _WRAPPERS if isinstance(loaded.get(name), Mapping) and loaded[name]]
        if not found:
            break
        if len(found) > 1:
            raise ValueError(f"holds several models, {' and '.join(found)}; save the one to use by itself")
        others = [x for name, x in loaded.items() if name not in found and not str(name).startswith(_STATE)]
        if any(map(_has_tensors, others)):
            break  # a part of a model may have such a name, too
        loaded = loaded[found[0]]
    return loaded


def _has_tensors(value: Any) -> bool:
    import torch

    if isinstance(value, Mapping):
        return any(map(_has_tensors, value.values()))
    return isinstance(value, torch.Tensor)


def _flatten(loaded: Any) -> dict[str, Any]:
    """Returns the tensors of nested dictionaries under dotted keys; plain values are passed over.

    Raises:
        TypeError: There is something else, or no tensor at all.
        ValueError: Two tensors have the same key.
    """
    import torch

    tensors: dict[str, Any] = {}
    plain: list[str] = []

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided and key:
            if key in tensors:
                raise ValueError(f"{key} occurs twice")
            tensors[key] = value
        else:
            what = f"{key or 'the top level'} is {type(value).__name__}, not a named dense tensor"
            if not key or not _is_plain(value):
                raise TypeError(what)
            plain.append(what)

    walk(loaded, "")
    if not tensors:
        raise TypeError(plain[0] if plain else "it holds no tensors")
    return tensors


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a string, nothing, or a list of such."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | bytes)
