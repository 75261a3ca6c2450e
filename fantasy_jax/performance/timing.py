"""How long calls take on the devices that are here."""

import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from fantasy_jax.performance.ahead import Program
from fantasy_jax.performance.chips import CHIPS, GIB
from fantasy_jax.typing import Leaf

WARM_UP = 2
"""Calls that are not counted: the first of all is slow, and what it leaves to do may slow the second."""


@dataclass(frozen=True)
class Timing:
    """What some calls took.

    Attributes:
        name: Of what was called.
        seconds: Of each call, warm-up left out; none where it could not be called, and the note says why.
        flops: Operations of a call, on all devices together; None where there are none to speak of.
        devices: How many share a call.
        peak_flops: A device's bfloat16 operations a second at best; None where it is not known, or where the
            call computes in float32.
        memory: Most bytes that a device (of a CPU: the process) has held since the process began.
        note: What else there is to say.
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
        """Seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Seconds that a quarter and three quarters of the calls stayed below."""
        if not self.seconds:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def flops_per_second(self) -> float | None:
        """Of all devices together."""
        return self.flops / self.median if self.flops and self.seconds else None

    @property
    def share_of_peak(self) -> float | None:
        """Of what the devices could do at best."""
        rate = self.flops_per_second
        return rate / (self.devices * self.peak_flops) if rate and self.peak_flops else None

    def to_json(self) -> dict[str, Any]:
        """Everything, figures that follow included."""
        return {
            "name": self.name,
            "median_seconds": self.median,
            "quartile_seconds": self.quartiles,
            "seconds": self.seconds,
            "flops": self.flops,
            "tflops_per_second": self.flops_per_second and self.flops_per_second / 1e12,
            "share_of_peak": self.share_of_peak,
            "devices": self.devices,
            "peak_memory": self.memory,
            "note": self.note,
        }


def time_calls(call: Callable[[], Any], repeats: int) -> tuple[float, ...]:
    """Seconds of each of some calls, after the warm-up; a call must wait for its own result."""
    seconds = []
    for _ in range(WARM_UP + repeats):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return tuple(seconds[WARM_UP:])


def time_program(program: Program, repeats: int, *, devices: int, dtype: str) -> Timing:
    """Times a program on random arguments, which lie where the abstract ones say.

    Args:
        program: What to time.
        repeats: How often.
        devices: How many share a call.
        dtype: Of its matrix products.
    """
    arguments = draw(program.arguments)

    def call() -> None:
        nonlocal arguments
        result = jax.block_until_ready(program.call(*arguments))
        following = result[0] if isinstance(result, tuple) else result
        # What a call was given for good, the next one gets from its result, as in a run.
        arguments = [following if _given_away(argument) else argument for argument in arguments]

    seconds = time_calls(call, repeats)
    chip = CHIPS.get(jax.devices()[0].device_kind) if dtype == "bfloat16" else None
    peak = chip.flops if chip else None
    return Timing(program.name, seconds, program.flops, devices, peak, peak_memory())


def draw(tree: Leaf) -> Leaf:
    """Arrays for abstract ones: small random numbers; integers, and what an optimizer keeps, are zero."""
    leaves, structure = jax.tree.flatten_with_path(tree)

    def make() -> list[Leaf]:
        key, arrays = jax.random.key(0, impl="rbg"), []
        for number, (path, leaf) in enumerate(leaves):
            kept = "optimizer" in jax.tree_util.keystr(path)
            if kept or not jnp.issubdtype(leaf.dtype, jnp.floating):
                arrays.append(jnp.zeros(leaf.shape, leaf.dtype))
            else:
                drawn = jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
                arrays.append(drawn * jnp.asarray(0.02, leaf.dtype))
        return arrays

    shardings = [leaf.sharding for _, leaf in leaves]
    return jax.tree.unflatten(structure, jax.jit(make, out_shardings=shardings)())


def peak_memory() -> int:
    """Most bytes that the first device, or on a CPU the process, has held by now."""
    statistics_ = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_:
        return statistics_["peak_bytes_in_use"]
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def table(timings: Sequence[Timing]) -> str:
    """The timings as Markdown, one line each."""
    rows = [
        "| call | ms, median | quartiles | TFLOP | TFLOP/s | of peak | peak GiB so far | |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for timing in timings:
        low, high = timing.quartiles or (None, None)
        rate, share = timing.flops_per_second, timing.share_of_peak
        rows.append(
            f"| {timing.name} | {_or_dash(timing.median, 1e3, '.1f')} "
            f"| {_or_dash(low, 1e3, '.1f')} to {_or_dash(high, 1e3, '.1f')} "
            f"| {_or_dash(timing.flops, 1e-12, '.4f')} | {_or_dash(rate, 1e-12, '.3f')} "
            f"| {_or_dash(share, 100.0, '.1f', ' %')} | {_or_dash(timing.memory, 1 / GIB, '.2f')} "
            f"| {timing.note} |"
        )
    return "\n".join(rows)


def _or_dash(value: int | float | None, factor: float, digits: str, unit: str = "") -> str:
    return "-" if value is None else f"{value * factor:{digits}}{unit}"


def _given_away(argument: Leaf) -> bool:
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(argument))
