"""Timings of calls on the attached devices."""

import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fantasy_jax import cli
from fantasy_jax.performance.chips import CHIPS, GIB
from fantasy_jax.performance.profile import trace
from fantasy_jax.performance.program import Program
from fantasy_jax.typing import Leaf

WARM_UP = 2
"""Calls before the timed ones: the first compiles, and work that it leaves pending may slow the second."""


@dataclass(frozen=True)
class Timing:
    """Run times of repeated calls.

    Attributes:
        name: Name of what was called.
        seconds: Duration of each call after the warm-up; empty if it could not be called (`note` says why).
        flops: Model operations of a call (`performance.flops`), on all devices together; None if not counted.
        devices: Number of devices that share a call.
        peak_flops: Peak bfloat16 operations per second of a device; None if unknown, or if the call computes
            in float32.
        memory: Peak memory of a device (on a CPU: of the process) in bytes, since the process started.
        note: Remarks.
    """

    name: str
    seconds: tuple[float, ...]
    flops: int | None = None
    devices: int = 1
    peak_flops: float | None = None
    memory: int | None = None
    note: str = ""

    @property
    def median(self) -> float | None:
        """Median of the seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """First and third quartile of the seconds."""
        if not self.seconds:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def flops_per_second(self) -> float | None:
        """Operations per second of all devices together."""
        return self.flops / self.median if self.flops and self.seconds else None

    @property
    def peak_fraction(self) -> float | None:
        """Model operations per second as a fraction of the devices' peak (MFU)."""
        rate = self.flops_per_second
        return rate / (self.devices * self.peak_flops) if rate and self.peak_flops else None

    def to_json(self) -> dict[str, Any]:
        """All fields and derived figures."""
        return {
            "name": self.name,
            "median_seconds": self.median,
            "quartile_seconds": self.quartiles,
            "seconds": self.seconds,
            "flops": self.flops,
            "tflops_per_second": self.flops_per_second and self.flops_per_second / 1e12,
            "peak_fraction": self.peak_fraction,
            "devices": self.devices,
            "peak_memory": self.memory,
            "note": self.note,
        }


def time_calls(call: Callable[[], Any], repeats: int) -> tuple[float, ...]:
    """Returns the seconds of `repeats` calls after the warm-up; a call must wait for its own result."""
    seconds = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return tuple(seconds[WARM_UP:])


def time_program(
    program: Program, repeats: int, *, devices: int, dtype: str, trace_to: Path | None = None
) -> Timing:
    """Times a program on random arguments, sharded as its abstract arguments are.

    Args:
        program: The program.
        repeats: Number of timed calls.
        devices: Number of devices that share a call.
        dtype: Type of its matrix products.
        trace_to: Folder for the trace of one more call; None: there is none.
    """
    arguments = random_arguments(program.arguments)

    def call() -> None:
        nonlocal arguments
        result = jax.block_until_ready(program.call(*arguments))
        updated = result[0] if isinstance(result, tuple) else result
        # The next call takes what replaces a donated argument from the result, as a run does.
        arguments = [updated if _is_donated(argument) else argument for argument in arguments]

    seconds = time_calls(call, repeats)
    if trace_to is not None:
        with trace(trace_to):
            call()
    chip = CHIPS.get(jax.devices()[0].device_kind) if dtype == "bfloat16" else None
    peak = chip.flops if chip else None
    return Timing(program.name, seconds, program.flops, devices, peak, peak_memory())


def random_arguments(tree: Leaf) -> Leaf:
    """Draws small random arrays for abstract ones; integers and the optimizer's state are zero.

    Integers of 8 bits, which are weights, are drawn, too: products of zeros would take less power, and time.
    """
    leaves, structure = jax.tree.flatten_with_path(tree)

    def make() -> list[Leaf]:
        key, arrays = jax.random.key(0, impl="rbg"), []
        for index, (path, leaf) in enumerate(leaves):
            is_zero = "opt_state" in jax.tree_util.keystr(path)
            if leaf.dtype.itemsize == 1 and leaf.dtype != jnp.bool_:
                drawn = jax.random.randint(jax.random.fold_in(key, index), leaf.shape, -100, 100, jnp.int8)
                arrays.append(drawn.astype(leaf.dtype))
            elif is_zero or not jnp.issubdtype(leaf.dtype, jnp.floating):
                arrays.append(jnp.zeros(leaf.shape, leaf.dtype))
            else:
                drawn = jax.random.normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
                arrays.append(drawn * jnp.asarray(0.02, leaf.dtype))
        return arrays

    shardings = [leaf.sharding for _, leaf in leaves]
    return jax.tree.unflatten(structure, jax.jit(make, out_shardings=shardings)())


def peak_memory() -> int:
    """Returns the peak memory of the first device, on a CPU of the process, in bytes since the start."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timing_table(timings: Sequence[Timing]) -> str:
    """Formats timings as a Markdown table, one row each."""
    numbers = ("ms, median", "quartiles", "TFLOP", "TFLOP/s", "of peak", "peak GiB so far")
    return cli.markdown_table(("call", *numbers, ""), map(_cells, timings), numbers=numbers)


def _cells(timing: Timing) -> list[str]:
    low, high = timing.quartiles or (None, None)
    return [
        timing.name,
        _number(timing.median, 1e3, ".1f"),
        f"{_number(low, 1e3, '.1f')} to {_number(high, 1e3, '.1f')}",
        _number(timing.flops, 1e-12, ".4f"),
        _number(timing.flops_per_second, 1e-12, ".3f"),
        _number(timing.peak_fraction, 100.0, ".1f", " %"),
        _number(timing.memory, 1 / GIB, ".2f"),
        timing.note,
    ]


def _number(value: int | float | None, factor: float, digits: str, unit: str = "") -> str:
    return "-" if value is None else f"{value * factor:{digits}}{unit}"


def _is_donated(argument: Leaf) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(argument))
