"""Low-rank adaptation (LoRA) of linear layers: `x W + alpha / rank * (x A) B`; A and B are trained, W is not.

Source: arXiv 2106.09685, section 4.1. A is initialised like a linear layer of PyTorch. B is zero, so that a
new LoRA does not change the network.

A and B are multiplied with the layer's input, not added to its kernel. In a loss, `W + A B` would have a
gradient of the size of W: a third more operations, and as much communication between devices as in full
fine-tuning. In bfloat16, a small A B would also be lost to rounding. For stacked layers, A and B have the
axis of the stack too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from fantasy_jax.config import PositiveFloat, Settings, Width
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.layers import abstract
from fantasy_jax.typing import Array, DType, Float


@dataclass(frozen=True)
class LoRAConfig(Settings):
    """Rank and scale of a LoRA.

    Attributes:
        rank: Columns of A. musubi-tuner recommends 32 for Wan2.1; 16 to 128 are common.
        alpha: The product is multiplied by `alpha / rank`.
    """

    rank: Width = 32
    alpha: PositiveFloat = 32.0

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoRASizes(LoRAConfig):
    """Sizes of a LoRA.

    Attributes:
        layers: Path of each linear layer (`blocks/self_attention/query`), and the shape of its kernel,
            including the axis of a stack.
    """

    layers: tuple[tuple[str, tuple[Width, ...]], ...] = ()


class LowRankDot(nnx.Module):
    """Replaces the `dot_general` of an `nnx.Linear`, and adds the low-rank product."""

    def __init__(
        self, shape: tuple[int, ...], config: LoRAConfig, *, rngs: nnx.Rngs, param_dtype: DType = jnp.float32
    ):
        """Initialises A; B is zero.

        Args:
            shape: Shape of the kernel, `[..., inputs, outputs]`.
            config: Rank and alpha.
            rngs: Random generators for A.
            param_dtype: Type of A and B.
        """
        *stack, inputs, outputs = shape
        # The default of torch.nn.Linear and of peft: uniform within 1 / sqrt(inputs).
        initialise = nnx.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(stack)))
        )
        self.config = LoRAConfig(config.rank, config.alpha)
        self.lora_a = nnx.Param(initialise(rngs.params(), (*stack, inputs, config.rank), param_dtype))
        self.lora_b = nnx.Param(jnp.zeros((*stack, config.rank, outputs), param_dtype))

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the layer's kernel."""
        return (*self.lora_a.shape[:-1], self.lora_b.shape[-1])

    def __call__(self, x: Array, kernel: Array, dimensions: Any, *, precision: Any, **options: Any) -> Array:
        """Computes `jax.lax.dot_general` plus the product, in the type of `x`."""
        full = jax.lax.dot_general(x, kernel, dimensions, precision=precision, **options)
        return full + self.low_rank(x, precision)

    def low_rank(self, x: Array, precision: Any = None) -> Array:
        """The low-rank product alone, in the type of `x`."""
        a, b = (matrix[...].astype(x.dtype) for matrix in (self.lora_a, self.lora_b))
        product = jnp.matmul(jnp.matmul(x, a, precision=precision), b, precision=precision)
        return self.config.scale * product


class LoRA(nnx.Module):
    """Matrices A and B of all layers, as a module of their own that is stored without the base network."""

    def __init__(
        self,
        config: LoRASizes,
        *,
        rngs: nnx.Rngs,
        dtype: DType | None = None,
        param_dtype: DType = jnp.float32,
    ):
        """Builds the matrices. `dtype` is ignored: products have the type of the layers' inputs."""
        del dtype
        self.config = config
        products = {
            tuple(path.split("/")): LowRankDot(shape, config, rngs=rngs, param_dtype=param_dtype)
            for path, shape in config.layers
        }
        for name, part in traverse_util.unflatten_dict(products).items():
            setattr(self, name, nnx.data(part))

    def products(self) -> dict[str, LowRankDot]:
        """All matrices by path of the layer."""
        return _products(self)


def add_lora(network: nnx.Module, layers: Iterable[str], config: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Adds a LoRA to layers of a network, in place; layers that have one keep it.

    Args:
        network: Any network, with stacked layers or without.
        layers: Paths of its linear layers.
        config: Rank and alpha.
        rngs: Random generators for A.

    Raises:
        ConfigError: A path is not that of a linear layer, or its LoRA has another rank or alpha.
    """
    for path in layers:
        layer = _layer(network, path)
        if not isinstance(layer, nnx.Linear):
            raise ConfigError(f"lora: {path} is not a linear layer")
        if not isinstance(layer.dot_general, LowRankDot):
            layer.dot_general = nnx.data(LowRankDot(layer.kernel.shape, config, rngs=rngs))
        elif layer.dot_general.config != LoRAConfig(config.rank, config.alpha):
            found = layer.dot_general.config
            raise ConfigError(
                f"lora: rank and alpha must match the existing LoRA of {path} ({found.rank}, {found.alpha})"
            )


def attach_lora(network: nnx.Module, lora: LoRA) -> None:
    """Attaches a LoRA to the layers of a network, in place."""
    for path, product in lora.products().items():
        layer = _layer(network, path)
        if layer.kernel.shape != product.kernel_shape:
            raise ConfigError(
                f"lora: {path} must be {product.kernel_shape}, as in the LoRA, not {layer.kernel.shape}"
            )
        layer.dot_general = nnx.data(product)


def lora_of(network: nnx.Module) -> LoRA | None:
    """The LoRA of a network's layers; None if there is none."""
    products = {path.removesuffix("/dot_general"): value for path, value in _products(network).items()}
    if not products:
        return None
    config = next(iter(products.values())).config
    sizes = tuple((path, products[path].kernel_shape) for path in sorted(products))
    lora = abstract(lambda rngs: LoRA(LoRASizes(config.rank, config.alpha, sizes), rngs=rngs))
    for path, product in lora.products().items():
        nnx.update(product, nnx.state(products[path]))
    return lora


def add_products(
    network: nnx.Module,
    products: Mapping[
        str, tuple[Float[Array | np.ndarray, "*stack I R"], Float[Array | np.ndarray, "*stack R O"]]
    ],
) -> None:
    """Adds low-rank products beside layers of a network, in place, and to those that are there already.

    Args:
        network: Any network.
        products: A and B by path of the layer, with the axis of its stack; B is multiplied by its scale.
    """
    for path, (a, b) in products.items():
        layer = _layer(network, path)
        dtype = layer.kernel.dtype
        if isinstance(there := layer.dot_general, LowRankDot):
            a = jnp.concatenate([there.lora_a[...], a], -1)
            b = jnp.concatenate([there.config.scale * there.lora_b[...], b], -2)
        product = _empty_product(layer.kernel.shape, a.shape[-1])
        product.lora_a, product.lora_b = (nnx.Param(jnp.asarray(x, dtype)) for x in (a, b))
        layer.dot_general = nnx.data(product)


def _empty_product(shape: tuple[int, ...], rank: int) -> LowRankDot:
    """A product of scale 1, without its matrices."""
    return abstract(lambda rngs: LowRankDot(shape, LoRAConfig(rank, float(rank)), rngs=rngs))


def merged_kernel(
    kernel: Float[Array | np.ndarray, "I O"],
    a: Float[Array | np.ndarray, "I R"],
    b: Float[Array | np.ndarray, "R O"],
    scale: float,
) -> Float[Array | np.ndarray, "I O"]:
    """A kernel plus the low-rank product, float32; that of a sharded kernel is sharded likewise."""
    if isinstance(kernel, jax.Array):
        return jax.jit(_merged, out_shardings=kernel.sharding)(kernel, a, b, scale)
    kernel, a, b = (matrix.astype(np.float32) for matrix in (kernel, a, b))
    return kernel + np.float32(scale) * (a @ b)


def _merged(kernel: Array, a: Array, b: Array, scale: Array) -> Array:
    kernel, a, b = (matrix.astype(jnp.float32) for matrix in (kernel, a, b))
    return kernel + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _products(network: nnx.Module) -> dict[str, LowRankDot]:
    return {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(network)
        if isinstance(node, LowRankDot)
    }


def _layer(network: nnx.Module, path: str) -> nnx.Module:
    def child(node: Any, name: str) -> Any:
        return node[name] if isinstance(node, nnx.Dict) else getattr(node, name)

    return reduce(child, path.split("/"), network)
