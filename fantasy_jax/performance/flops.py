"""Floating point operations of a program, counted exactly where it is written, before any compiler.

Matrix products and convolutions, as the field counts them; a loop's body counts as often as it runs, and what
is computed anew for the backward pass counts again. XLA's own count takes a loop's body once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from fantasy_jax.models.attention import use_backend


def count_flops(function: Callable, *arguments: Any) -> int:
    """Operations of one call, on all devices together.

    Args:
        function: Pure; jitted or not.
        arguments: Arrays, or `jax.ShapeDtypeStruct`s of the same shapes.
    """
    plain = function.__wrapped__ if hasattr(function, "lower") else function

    def anew(*arguments: Any) -> Any:
        """JAX remembers what it traced, whatever the backend was then; it has never seen this function."""
        return plain(*arguments)

    with use_backend("plain"):  # kernels hide their products, and do the same number of them
        return _count(jax.make_jaxpr(anew)(*arguments).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: JaxprEqn) -> int:
    name, inner = equation.primitive.name, list(_inner(equation))
    if name == "dot_general":
        return _of_product(equation)
    if name == "conv_general_dilated":
        return _of_convolution(equation)
    if name == "scan":
        return equation.params["length"] * sum(map(_count, inner))
    if name == "cond":
        return max(map(_count, inner))
    if name == "shard_map":  # written for one device, run by all
        return equation.params["mesh"].size * sum(map(_count, inner))
    if name == "while" and any(map(_count, inner)):
        raise ValueError("a while loop with products in it: nobody knows how often it runs")
    return sum(map(_count, inner))


def _inner(equation: JaxprEqn) -> list[Jaxpr]:
    """Programs that an equation calls."""
    found = []
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                found.append(part.jaxpr)
            elif isinstance(part, Jaxpr):
                found.append(part)
    return found


def _of_product(equation: JaxprEqn) -> int:
    left, right = (variable.aval.shape for variable in equation.invars)
    (_, contracted), (_, batch) = equation.params["dimension_numbers"]
    free = (size for i, size in enumerate(right) if i not in (*contracted, *batch))
    return 2 * math.prod(left) * math.prod(free)


def _of_convolution(equation: JaxprEqn) -> int:
    kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    output_features = equation.params["dimension_numbers"].rhs_spec[0]
    per_result = math.prod(kernel) // kernel[output_features]
    return 2 * math.prod(result) * per_result
