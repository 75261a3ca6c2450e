"""What every network here is built from: norms in float32, and stacks of equal layers run as one.

Linear layers, norms and embeddings are Flax NNX's own; this file fixes the arguments in which PyTorch's
differ (`use_fast_variance`), and adds how layers are stacked and scanned.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.typing import Array, Float

run = jax.jit(lambda network, *inputs: network(*inputs))
"""A network as one compiled program. (`nnx.jit` would give its parameters back, as if they had changed.)"""

Module = TypeVar("Module", bound=nnx.Module)
Layers = TypeVar("Layers")
Carry = TypeVar("Carry")

# Statistics and the affine part are computed in float32 whatever the type of the input, as PyTorch's
# flash-attention era networks do; the mean of squares is not taken as E[x^2] - E[x]^2, which cancels.
LayerNorm = partial(nnx.LayerNorm, use_fast_variance=False, dtype=jnp.float32)
RMSNorm = partial(nnx.RMSNorm, use_fast_variance=False, dtype=jnp.float32)


_MOST_COLUMNS = 2**25
"""Elements that a convolution may gather on a CPU."""


def convolve(
    x: Float[Array, "B T H W C"],
    kernel: Float[Array, "t r c C D"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "B U h w D"]:
    """`jax.lax.conv_general_dilated`, but on a CPU, where that is small enough, as one matrix product.

    XLA's gradients of small and of strided convolutions are naive loops on a CPU, ten times slower than
    gathering what each output sees. Given to `nnx.Conv` as its `conv_general_dilated`.
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:3], strides, padding)
    native = partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    if x.size * math.prod(kernel.shape[:3]) // math.prod(strides) > _MOST_COLUMNS:
        return native(x, kernel)
    by_columns = partial(_convolve_by_columns, strides=strides, padding=padding, **options)

    # The choice is made when the program is lowered, which may be for another machine than this one. It is
    # kept out of JAX's differentiation, which would save what both ways need.
    @jax.custom_vjp
    def choose(x: Array, kernel: Array) -> Array:
        return jax.lax.platform_dependent(x, kernel, cpu=by_columns, default=native)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return choose(x, kernel), (x, kernel)

    def backward(inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        ways = {
            platform: lambda inputs, gradient, way=way: jax.vjp(way, *inputs)[1](gradient)
            for platform, way in (("cpu", by_columns), ("default", native))
        }
        return jax.lax.platform_dependent(inputs, gradient, **ways)

    choose.defvjp(forward, backward)
    return choose(x, kernel)


def _convolve_by_columns(
    x: Array, kernel: Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]], **options: Any
) -> Array:
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ends = [length - size + 1 for length, size in zip(x.shape[1:-1], kernel.shape[:3], strict=True)]
    taps = [
        tuple(slice(i, i + end, step) for i, end, step in zip(place, ends, strides, strict=True))
        for place in np.ndindex(*kernel.shape[:3])
    ]
    columns = jnp.concatenate([x[(slice(None), *tap)] for tap in taps], axis=-1)
    types = {key: options[key] for key in ("precision", "preferred_element_type") if key in options}
    return jnp.dot(columns, kernel.reshape(-1, kernel.shape[-1]), **types)


def stack_layers(make: Callable[[nnx.Rngs], Module], count: int, *, rngs: nnx.Rngs) -> Module:
    """Builds `count` equal layers as one module whose every parameter has a leading axis of that size."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> Module:
        return make(rngs)

    return build(rngs)


def scan_layers(
    step: Callable[[Layers, Carry], Carry],
    layers: Layers,
    carry: Carry,
    *,
    saved_names: Sequence[str] | None = None,
) -> Carry:
    """Runs stacked layers one after another; forty layers are traced and compiled as one.

    Args:
        step: Applies one layer: `(layer, carry) -> carry`.
        layers: What `stack_layers` built, or any module (a tuple of modules, a dict) of such stacks.
        carry: What flows through the layers.
        saved_names: None keeps every activation for the backward pass. Otherwise activations are
            recomputed there, except those that `jax.ad_checkpoint.checkpoint_name` gave one of these names.
    """
    graphdef, state = nnx.split(layers)

    def body(carry: Carry, layer_state: nnx.State) -> tuple[Carry, None]:
        return step(nnx.merge(graphdef, layer_state), carry), None

    if saved_names is not None:
        policy = jax.checkpoint_policies.save_only_these_names(*saved_names)
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, carry, state)[0]
