"""Low-rank adaptation (LoRA) of linear layers: `x W + alpha / rank * (x A) B`; A and B are trained, W is not.

Source: arXiv 2106.09685, section 4.1. A is drawn as PyTorch draws a linear layer. B is zero, so that adding
both changes nothing.

The product is taken with what the layer is given, not added to the kernel. Added up inside the loss,
`W + A B` has a gradient of W's own size: a third more operations, and the traffic of full training between
devices, to be multiplied by two thin matrices in the end. In bfloat16, moreover, a small A B is rounded away
beside W. Stacked layers are scanned like any other: A and B have the stack's axis, too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from fantasy_jax.config import ConfigError
from fantasy_jax.typing import Array, DType, Float


@dataclass(frozen=True)
class LoRAConfig:
    """How much a layer can change.

    Attributes:
        rank: Columns of A. 32 is musubi-tuner's advice for Wan2.1; 16 to 128 are common.
        alpha: The product is multiplied by `alpha / rank`; equal to the rank, it is not.
    """

    rank: int = 32
    alpha: float = 32.0

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}; at least 1 is needed")
        if self.alpha <= 0:
            raise ConfigError(f"alpha is {self.alpha}; a positive number is needed")

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoRASizes(LoRAConfig):
    """All that a LoRA's parameters follow from.

    Attributes:
        layers: Path of each linear layer (`blocks/self_attention/query`) and its kernel's shape, with the
            axis of a stack.
    """

    layers: tuple[tuple[str, tuple[int, ...]], ...] = ()


class LowRankDot(nnx.Module):
    """Takes the place of an `nnx.Linear`'s `dot_general`, and adds the thin matrices' product."""

    def __init__(
        self, shape: tuple[int, ...], config: LoRAConfig, *, rngs: nnx.Rngs, param_dtype: DType = jnp.float32
    ):
        """Draws A; B is zero.

        Args:
            shape: The kernel's, `[..., inputs, outputs]`.
            config: Rank and alpha.
            rngs: For A.
            param_dtype: Of both.
        """
        *stack, inputs, outputs = shape
        # What torch.nn.Linear draws, and peft with it: even, within 1 / sqrt(inputs).
        draw = nnx.initializers.variance_scaling(
            1 / 3, "fan_in", "uniform", batch_axis=tuple(range(len(stack)))
        )
        self.config = LoRAConfig(config.rank, config.alpha)
        self.lora_a = nnx.Param(draw(rngs.params(), (*stack, inputs, config.rank), param_dtype))
        self.lora_b = nnx.Param(jnp.zeros((*stack, config.rank, outputs), param_dtype))

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel that it is added to."""
        return (*self.lora_a.shape[:-1], self.lora_b.shape[-1])

    def __call__(self, x: Array, kernel: Array, dimensions: Any, *, precision: Any, **options: Any) -> Array:
        """As `jax.lax.dot_general`, in the type of `x`."""
        a, b = (thin[...].astype(x.dtype) for thin in (self.lora_a, self.lora_b))
        low = jnp.matmul(jnp.matmul(x, a, precision=precision), b, precision=precision)
        whole = jax.lax.dot_general(x, kernel, dimensions, precision=precision, **options)
        return whole + self.config.scale * low


class LoRA(nnx.Module):
    """The thin matrices of all layers, as a network of their own: what is stored, apart from the base."""

    def __init__(
        self,
        config: LoRASizes,
        *,
        rngs: nnx.Rngs,
        dtype: DType | None = None,
        param_dtype: DType = jnp.float32,
    ):
        """Builds them; products have the type of what layers are given, whatever `dtype`."""
        del dtype
        self.config = config
        products = {
            tuple(path.split("/")): LowRankDot(shape, config, rngs=rngs, param_dtype=param_dtype)
            for path, shape in config.layers
        }
        for name, part in traverse_util.unflatten_dict(products).items():
            setattr(self, name, nnx.data(part))

    def products(self) -> dict[str, LowRankDot]:
        """By path of the layer."""
        return _products(self)


def add_lora(network: nnx.Module, layers: Iterable[str], config: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Lays new matrices beside layers of a network, in place; those that have some keep them.

    Args:
        network: Any, its layers stacked or not.
        layers: Paths of its linear layers.
        config: Rank and alpha.
        rngs: For A.

    Raises:
        ConfigError: A path is no linear layer's, or what lies there is of another rank or alpha.
    """
    for path in layers:
        layer = _layer(network, path)
        if not isinstance(layer, nnx.Linear):
            raise ConfigError(f"lora: {path} is no linear layer")
        if not isinstance(layer.dot_general, LowRankDot):
            layer.dot_general = nnx.data(LowRankDot(layer.kernel.shape, config, rngs=rngs))
        elif layer.dot_general.config != LoRAConfig(config.rank, config.alpha):
            raise ConfigError(f"lora: {path} has one with {layer.dot_general.config}; go on with the same")


def attach_lora(network: nnx.Module, lora: LoRA) -> None:
    """Lays a LoRA's matrices beside the layers of a network, in place."""
    for path, product in lora.products().items():
        layer = _layer(network, path)
        if layer.kernel.shape != product.kernel_shape:
            raise ConfigError(f"lora: is for {product.kernel_shape} at {path}, not {layer.kernel.shape}")
        layer.dot_general = nnx.data(product)


def lora_of(network: nnx.Module) -> LoRA | None:
    """The LoRA that lies beside a network's layers; None if there is none."""
    products = {path.removesuffix("/dot_general"): value for path, value in _products(network).items()}
    if not products:
        return None
    config = next(iter(products.values())).config
    sizes = tuple((path, products[path].kernel_shape) for path in sorted(products))
    lora = nnx.eval_shape(lambda: LoRA(LoRASizes(config.rank, config.alpha, sizes), rngs=nnx.Rngs(0)))
    for path, product in lora.products().items():
        nnx.update(product, nnx.state(products[path]))
    return lora


def merged_kernel(
    kernel: Float[np.ndarray, "I O"],
    a: Float[np.ndarray, "I R"],
    b: Float[np.ndarray, "R O"],
    scale: float,
) -> Float[np.ndarray, "I O"]:
    """A kernel with the product in it, float32."""
    kernel, a, b = (np.asarray(matrix, np.float32) for matrix in (kernel, a, b))
    return kernel + scale * (a @ b)


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
