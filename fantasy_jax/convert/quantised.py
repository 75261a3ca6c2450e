"""Weights with fewer bits, as float32: float8 and int8 with scales, and GGUF."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fantasy_jax.convert.pickles import reason
from fantasy_jax.convert.rules import TensorSpec
from fantasy_jax.errors import WeightsError
from fantasy_jax.typing import DType

Read = Callable[[str], np.ndarray]
ScaleOf = Callable[[str, DType], np.ndarray | None]
"""The scale of a tensor that has this type and a scale: one value, or one for each row; None for others."""

_SCALES = ("scale_weight", "weight_scale")
"""Names beside `weight` of the factor of its values: ComfyUI's old one; its new one, also LightX2V's."""
_UNUSED = ("scale_input", "input_scale", "comfy_quant")
"""Names of what only products in few bits need: the scale of activations, and the name of the format."""
_MARKER = "scaled_fp8"
"""Key of an empty tensor by which ComfyUI marks a file of scaled weights."""
_SMALL = (jnp.float8_e4m3fn, jnp.float8_e5m2, np.int8)


def with_scales(
    path: Path, specs: Mapping[str, TensorSpec], read: Read
) -> tuple[dict[str, TensorSpec], Read, ScaleOf]:
    """Applies the scales of a file: its weights are float32, and the scales are no tensors of their own.

    A file of float8 without any scale holds plain values and is returned as it is. The scales are returned,
    too: with them, weights of the same type have the file's bits again.

    Args:
        path: The file, for messages.
        specs: Shape and dtype of every tensor.
        read: Reads one tensor.

    Raises:
        WeightsError: A weight of a file with scales lacks its own, a scale lacks its weight, or a scale has
            neither one value nor one for each row.
    """
    scales = {_weight_of(key): key for key in specs if key.rpartition(".")[2] in _SCALES}
    marked = [key for key in specs if key.rpartition(".")[2] == _MARKER]
    if not scales and not marked:
        return dict(specs), read, lambda key, dtype: None
    for weight, scale in scales.items():
        _check_scale(path, weight, scale, specs)
    unused = {*scales.values(), *marked, *(key for key in specs if key.rpartition(".")[2] in _UNUSED)}
    found = {}
    for key, spec in specs.items():
        if key in unused:
            continue
        if key not in scales and spec.dtype in _SMALL:
            raise WeightsError(
                f"{path}: {key} is {spec.dtype} and has no scale, as others of the file have; it would be "
                "read wrongly"
            )
        found[key] = TensorSpec(spec.shape, np.dtype(np.float32)) if key in scales else spec

    def scale_of(key: str, dtype: DType) -> np.ndarray | None:
        if key not in scales or specs[key].dtype != np.dtype(dtype):
            return None
        scale = read(scales[key]).astype(np.float32)
        return scale.reshape(() if scale.size == 1 else -1)

    def scaled(key: str) -> np.ndarray:
        value = read(key)
        if key not in scales:
            return value
        scale = scale_of(key, specs[key].dtype)
        return value.astype(np.float32) * scale.reshape(scale.shape + (1,) * (scale.ndim * (value.ndim - 1)))

    return found, scaled, scale_of


def _weight_of(scale: str) -> str:
    return f"{scale.rpartition('.')[0]}.weight".removeprefix(".")


def _check_scale(path: Path, weight: str, scale: str, specs: Mapping[str, TensorSpec]) -> None:
    if weight not in specs:
        raise WeightsError(f"{path}: {scale} is the scale of {weight}, which is missing; download it again")
    shape, rows = specs[scale].shape, specs[weight].shape[:1]
    size = int(np.prod(shape))
    of_rows = bool(rows) and size == rows[0] and shape[:1] == rows
    is_float = jnp.issubdtype(specs[scale].dtype, np.floating)
    if (size != 1 and not of_rows) or not is_float or specs[weight].dtype not in _SMALL:
        raise WeightsError(
            f"{path}: {scale} {list(shape)} of {specs[scale].dtype} does not scale {weight} "
            f"{list(specs[weight].shape)} of {specs[weight].dtype} as a whole or by rows; give a file of "
            "another precision"
        )


def read_gguf(path: Path) -> tuple[dict[str, TensorSpec], Read]:
    """Shapes of all tensors of a GGUF file, and a function that reads one as float32.

    Raises:
        WeightsError: The package `gguf` is missing, or the file is damaged or of an unknown format.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise WeightsError(f"{path}: needs gguf; pip install 'fantasy_jax[convert]'") from error

    class Reader(gguf.GGUFReader):
        """The package's reader, which at the end of a file would go on counting to any length."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, **options: Any) -> np.ndarray:
            values = super()._get(offset, dtype, count, **options)
            if values.size < count:
                raise ValueError("it ends too early")
            return values

    try:
        reader = Reader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        specs = {key: TensorSpec(_shape(reader, x), np.dtype(np.float32)) for key, x in tensors.items()}
    except Exception as error:  # NumPy's, of a file that ends too early, and those of the package
        raise WeightsError(f"{path}: damaged, or cut off ({reason(error)}); download it again") from error

    def read(key: str) -> np.ndarray:
        tensor = tensors[key]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(specs[key].shape)
        except NotImplementedError as error:
            message = f"{path}: {key} is {tensor.tensor_type.name}, which gguf cannot read"
            raise WeightsError(f"{message}; give a file of another precision") from error
        except ValueError as error:  # of sizes that do not fit each other
            raise WeightsError(
                f"{path}: {key} is damaged ({reason(error)}); download the file again"
            ) from error

    return specs, read


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """A tensor's shape in PyTorch's order, or the one that ComfyUI-GGUF notes where it reshapes it."""
    shape = tuple(int(x) for x in reversed(tensor.shape))
    if field := reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}"):
        noted = tuple(int(x) for x in field.contents())
        if min(noted, default=1) < 0 or math.prod(noted) != math.prod(shape):
            raise ValueError(f"{tensor.name} of shape {shape} cannot have the shape {noted}")
        return noted
    return shape
