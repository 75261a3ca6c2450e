"""Floating point operations of a program, counted exactly in its jaxpr, before any compiler.

Only matrix products and convolutions count, as is usual. A loop's body counts once per iteration (XLA's own
cost analysis counts it once), and what the backward pass recomputes counts again.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from fantasy_jax.models.attention import use_backend


def count_flops(function: Callable, *arguments: Any) -> int:
    """Counts the operations of one call, on all devices together.

    Args:
        function: A pure function, jitted or not.
        arguments: Arrays, or `jax.ShapeDtypeStruct`s of the same shapes.

    Raises:
        ValueError: A `while` loop contains products; its trip count is unknown.
    """
    plain = function.__wrapped__ if hasattr(function, "lower") else function
    with use_backend("xla"):  # kernels hide their products, of which there are as many
        return _count(jax.make_jaxpr(plain)(*arguments).jaxpr)


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


def _count_convolution(equation: JaxprEqn) -> int:
    kernel, result = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    output_features = equation.params["dimension_numbers"].rhs_spec[0]
    per_result = math.prod(kernel) // kernel[output_features]
    return 2 * math.prod(result) * per_result
