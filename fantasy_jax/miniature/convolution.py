"""A convolution whose gradients are fast on CPUs, for training the miniature's VAE there."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.typing import Array, Float

_MAX_COLUMNS = 2**25
"""Elements of the largest matrix of columns."""


def convolve(
    x: Float[Array, "B T H W C"],
    kernel: Float[Array, "t r c C D"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "B U h w D"]:
    """`jax.lax.conv_general_dilated`, on CPUs as one matrix product (im2col) unless that needs much memory.

    On CPUs, XLA computes gradients of small and of strided convolutions by naive loops, which is ten times
    slower. For `nnx.Conv`, as its `conv_general_dilated`.
    """
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:3], strides, padding)
    native = partial(jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options)
    if x.size * math.prod(kernel.shape[:3]) // math.prod(strides) > _MAX_COLUMNS:
        return native(x, kernel)
    by_columns = partial(_convolve_by_columns, strides=strides, padding=padding, **options)

    # The platform is that for which the program is lowered, not that of this process. With a custom gradient,
    # JAX does not save the residuals of both branches.
    @jax.custom_vjp
    def choose(x: Array, kernel: Array) -> Array:
        return jax.lax.platform_dependent(x, kernel, cpu=by_columns, default=native)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return choose(x, kernel), (x, kernel)

    def backward(inputs: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        gradients = {
            platform: lambda inputs, gradient, function=function: jax.vjp(function, *inputs)[1](gradient)
            for platform, function in (("cpu", by_columns), ("default", native))
        }
        return jax.lax.platform_dependent(inputs, gradient, **gradients)

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
