"""Floating point operations of a program, counted exactly in its jaxpr, before any compiler.

Only matrix products and convolutions count, as is usual. A loop's body counts once per iteration (XLA's own
cost analysis counts it once). There are two counts. Model operations are those of the mathematics: attention
as two products forward and four backward, on keys without padding, and nothing twice. Hardware operations are
those of the program as it runs on the devices of its mesh: kernels count what is in them, times their grid,
and what the backward pass recomputes counts again. What devices compute alike counts once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters.partial_eval import dce_jaxpr

from fantasy_jax.models.attention import use_backend

_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""Products of queries and keys in cuDNN's kernels, whose code is not in the program. The backward kernel
computes the scores again, and the gradients of values, weights, keys and queries."""


def model_flops(function: Callable, *arguments: Any) -> int:
    """Counts the operations of one call, on all devices together, with attention as matrix products.

    What `jax.checkpoint` recomputes is in the count; a program without it has the model operations.

    Args:
        function: A pure function, jitted or not.
        arguments: Arrays, or `jax.ShapeDtypeStruct`s of the same shapes.

    Raises:
        ValueError: A `while` loop contains products; its trip count is unknown.
    """
    with use_backend("xla"):
        return hardware_flops(function, *arguments)


def hardware_flops(function: Callable, *arguments: Any) -> int:
    """Counts the operations of one call, on all devices together, with the kernels of the current mesh.

    Args:
        function: A pure function, jitted or not.
        arguments: Arrays, or `jax.ShapeDtypeStruct`s of the same shapes.

    Raises:
        ValueError: A `while` loop contains products; its trip count is unknown.
    """
    return _count(needed_jaxpr(function, *arguments))


def needed_jaxpr(function: Callable, *arguments: Any) -> Jaxpr:
    """The jaxpr of a function without what its results do not need, such as gradients of frozen weights."""
    plain = function.__wrapped__ if hasattr(function, "lower") else function
    jaxpr = jax.make_jaxpr(plain)(*arguments).jaxpr
    return dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def inner_jaxprs(equation: JaxprEqn) -> list[Jaxpr]:
    """The jaxprs of an equation, such as a loop's body."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                found.append(part.jaxpr)
            elif isinstance(part, Jaxpr):
                found.append(part)
    return found


def _count(jaxpr: Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: JaxprEqn) -> int:
    name, inner = equation.primitive.name, list(inner_jaxprs(equation))
    if name == "dot_general":
        return _count_product(equation)
    if name == "conv_general_dilated":
        return _count_convolution(equation)
    if name in _CUDNN_PRODUCTS:
        return _CUDNN_PRODUCTS[name] * _count_attention(equation)
    if name == "pallas_call":
        return math.prod(equation.params["grid_mapping"].grid) * sum(map(_count, inner))
    if name == "scan":
        return equation.params["length"] * sum(map(_count, inner))
    if name == "cond":
        return max(map(_count, inner))
    if name == "shard_map":  # its body is for one device, and every device runs it
        return equation.params["mesh"].size * sum(map(_count, inner))
    if name == "while" and any(map(_count, inner)):
        raise ValueError("a while loop contains products: its trip count is unknown")
    return sum(map(_count, inner))


def _count_product(equation: JaxprEqn) -> int:
    left, right = (variable.aval.shape for variable in equation.invars)
    (_, contracted), (_, batch) = equation.params["dimension_numbers"]
    free = (size for i, size in enumerate(right) if i not in (*contracted, *batch))
    return 2 * math.prod(left) * math.prod(free)


def _count_attention(equation: JaxprEqn) -> int:
    """One product of cuDNN's queries `[B, Q, N, K]` and keys `[B, L, N, K]`."""
    queries, keys = (variable.aval.shape for variable in equation.invars[:2])
    return 2 * math.prod(queries) * keys[1]


def _count_convolution(equation: JaxprEqn) -> int:
    kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    output_features = equation.params["dimension_numbers"].rhs_spec[0]
    per_result = math.prod(kernel) // kernel[output_features]
    return 2 * math.prod(result) * per_result
