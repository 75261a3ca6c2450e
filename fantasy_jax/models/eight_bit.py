"""Linear layers whose weights have 8 bits, int8 or float8 (e4m3), and a float32 scale for each output.

    y[o] = scale[o] * sum_i x[i] weight[o, i] + bias[o],    scale[o] = max_i |kernel[i, o]| / largest

The scale is applied to the product. Applied to the weights, it would make them 16-bit operands: XLA takes
the 8-bit matrix units where the operands of `dot_general` have 8 bits, and nothing else tells it to
(openxla/xla, `gemm_rewriter.cc`). For the same reason weights are `[outputs, inputs]`, PyTorch's layout:
NVIDIA's float8 kernels before Blackwell read both operands along the dimension that is summed.

Weights alone in 8 bits take half the memory of bfloat16, and products stay as they are. With `products`, the
inputs are quantised, too, with a scale for each token, and the product itself has 8 bits.
"""

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.errors import ConfigError
from fantasy_jax.models.lora import LowRankDot
from fantasy_jax.typing import Array, DType, Float

EightBit = Literal["int8", "fp8"]

DTYPES: dict[str, np.dtype] = {"int8": np.dtype(jnp.int8), "fp8": np.dtype(jnp.float8_e4m3fn)}
"""Types of weights by their names in settings."""

Layers = Mapping[str, str]
"""Names of the types (`int8`, `float8_e4m3fn`) of layers that have 8-bit weights, by path."""
EXACT: Layers = MappingProxyType({})
"""No layer has 8-bit weights."""

_LARGEST = {DTYPES["int8"]: 127.0, DTYPES["fp8"]: 448.0}
_WEIGHT, _SCALE = "/weight", "/weight_scale"


class EightBitLinear(nnx.Module):
    """A linear layer, or a stack of them, with 8-bit weights; takes the place of an `nnx.Linear`.

    Attributes:
        products: Whether inputs are quantised, too, and multiplied in 8 bits.
        dot_general: A LoRA beside the weights; None: there is none.
    """

    def __init__(self, layer: nnx.Linear, dtype: DType):
        """Takes the sizes, the bias and the type of products of a layer; the weights are zero.

        Args:
            layer: With a kernel `[..., inputs, outputs]`.
            dtype: Type of the weights.
        """
        *stack, inputs, outputs = layer.kernel.shape
        self.weight = nnx.Param(jnp.zeros((*stack, outputs, inputs), dtype))
        self.weight_scale = nnx.Param(jnp.zeros((*stack, outputs), jnp.float32))
        self.bias = nnx.data(layer.bias)
        self.dtype = layer.dtype
        self.products = False
        self.dot_general: LowRankDot | None = nnx.data(None)

    @property
    def kernel(self) -> jax.ShapeDtypeStruct:
        """Shape and type of the kernel that the weights stand for, `[..., inputs, outputs]`."""
        *stack, outputs, inputs = self.weight.shape
        return jax.ShapeDtypeStruct((*stack, inputs, outputs), self.dtype or jnp.float32)

    def __call__(self, inputs: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        """Applies one layer."""
        x = inputs.astype(self.dtype or inputs.dtype)
        multiply = multiply_eight_bit if self.products else multiply_exact
        y = multiply(x, self.weight[...]) * self.weight_scale[...]
        if self.dot_general is not None:
            y += self.dot_general.low_rank(x)
        if self.bias is not None:
            y += self.bias[...]
        return y.astype(x.dtype)


def quantize(
    x: Float[Array | np.ndarray, "*n C"], dtype: DType, scale: Float[np.ndarray, "..."] | None = None
) -> tuple[Array | np.ndarray, Float[Array | np.ndarray, "*n"]]:
    """Rounds to 8 bits with a scale for each row, so that `x` is about `rounded * scale[..., None]`.

    The same for weights `[outputs, inputs]` and for tokens `[..., inputs]`: the error of int8 is at most half
    a scale, that of float8 at most a sixteenth of the value, or half of its smallest number times the scale.

    Args:
        x: Weights or activations.
        dtype: int8 or float8_e4m3fn.
        scale: Scales, or one for all rows, with which no value is too large; None: they are chosen.

    Returns:
        Rounded values of that type, and the scales, float32. A row of zeros has the scale 1.
    """
    xp = jnp if isinstance(x, jax.Array) else np
    dtype, x = np.dtype(dtype), x.astype(np.float32)
    if scale is None:
        # A product, since XLA makes one of a division by a constant, and NumPy does not.
        scale = xp.max(xp.abs(x), axis=-1) * np.float32(1 / _LARGEST[dtype])
    scale = xp.broadcast_to(xp.where(scale > 0, scale, np.float32(1)), x.shape[:-1])
    scaled = x / scale[..., None]
    return (xp.rint(scaled) if dtype == np.int8 else scaled).astype(dtype), scale


def multiply_exact(x: Float[Array, "*n I"], weight: Array) -> Float[Array, "*n O"]:
    """Products in the type of `x` with 8-bit weights `[O, I]`, float32; every 8-bit value is exact in it."""
    return _multiply(x, weight.astype(x.dtype), x.dtype).astype(jnp.float32)


def multiply_eight_bit(x: Float[Array, "*n I"], weight: Array) -> Float[Array, "*n O"]:
    """Products in 8 bits, summed in int32 or float32, with weights `[O, I]`; float32."""
    rounded, scale = quantize(x, weight.dtype)
    summed = _multiply(rounded, weight, jnp.int32 if weight.dtype == jnp.int8 else jnp.float32)
    return summed.astype(jnp.float32) * scale[..., None]


def _multiply(x: Array, weight: Array, dtype: DType) -> Array:
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, preferred_element_type=dtype)


def with_eight_bit(network: nnx.Module, layers: Layers) -> nnx.Module:
    """Replaces layers of a network by ones with 8-bit weights of zeros, in place, and returns it.

    Raises:
        ConfigError: A path is not that of a linear layer.
    """
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(network)}
    for path, dtype in layers.items():
        if not isinstance(modules.get(path), nnx.Linear):
            raise ConfigError(f"{path}: is not a linear layer and cannot have 8-bit weights")
        parent, _, name = path.rpartition("/")
        setattr(modules[parent], name, nnx.data(EightBitLinear(modules[path], dtype)))
    return network


def linear_layers(network: nnx.Module, pattern: str, dtype: EightBit, *, prefix: str = "") -> Layers:
    """The linear layers of a network whose path, after a prefix, matches; all for the same 8-bit type."""
    paths = ("/".join(map(str, x)) for x, module in nnx.iter_modules(network) if type(module) is nnx.Linear)
    return {path: str(DTYPES[dtype]) for path in paths if re.search(pattern, prefix + path)}


def eight_bit_layers(dtypes: Mapping[str, str]) -> Layers:
    """The layers with 8-bit weights among parameters, whose types are given by path."""
    layers = (path.removesuffix(_SCALE) for path in dtypes if path.endswith(_SCALE))
    return {layer: dtypes[layer + _WEIGHT] for layer in layers}


def multiply_in_eight_bits(network: nnx.Module, pattern: str) -> None:
    """Sets `products` of the 8-bit layers whose path matches, in place.

    Raises:
        ConfigError: There are none.
    """
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(network)}
    layers = [path for path, module in modules.items() if isinstance(module, EightBitLinear)]
    for path in layers_of_products(layers, pattern):
        modules[path].products = True


def layers_of_products(layers: Iterable[str], pattern: str) -> list[str]:
    """The paths that match, of layers with 8-bit weights.

    Raises:
        ConfigError: There are none.
    """
    if found := [path for path in layers if re.search(pattern, path)]:
        return found
    raise ConfigError(
        "sample.eight_bit_products: the transformer's MLPs have no 8-bit weights; use a store that "
        "convert_weights.py quantize has made"
    )


def quantize_values(
    values: Mapping[str, np.ndarray],
    layers: Layers,
    scales: Mapping[str, np.ndarray | None] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Parameters by path with the kernels of layers in 8 bits: weight and scale in place of the kernel.

    Args:
        values: Parameters by path.
        layers: The layers.
        scales: Scales of those whose kernels had 8 bits before, by path of the layer.
    """
    found = {path: x for path, x in values.items() if path.removesuffix("/kernel") not in layers}
    for layer, dtype in layers.items():
        if (kernel := values.get(f"{layer}/kernel")) is not None:
            rows = np.swapaxes(kernel, -1, -2)
            found[layer + _WEIGHT], found[layer + _SCALE] = quantize(rows, dtype, scales.get(layer))
    return found


def dequantize_values(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reverse of `quantize_values`, up to rounding: kernels, float32."""
    kept = {path: x for path, x in values.items() if not path.endswith((_WEIGHT, _SCALE))}
    for layer in eight_bit_layers({path: str(x.dtype) for path, x in values.items()}):
        weight = values[layer + _WEIGHT].astype(np.float32) * values[layer + _SCALE][..., None]
        kept[f"{layer}/kernel"] = np.swapaxes(weight, -1, -2)
    return kept


def quantized_dtypes(dtypes: Mapping[str, str], layers: Layers) -> dict[str, str]:
    """Types of parameters by path (those that differ from most) once the kernels of layers have 8 bits."""
    kept = {path: dtype for path, dtype in dtypes.items() if path.removesuffix("/kernel") not in layers}
    changed = {
        layer + name: kind
        for layer, dtype in layers.items()
        for name, kind in ((_WEIGHT, dtype), (_SCALE, "float32"))
    }
    return dict(sorted((kept | changed).items()))
