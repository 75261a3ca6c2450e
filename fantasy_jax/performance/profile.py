"""Profiles: a trace of a call, and the time of its kernels by share.

A trace is read by TensorBoard, XProf and Perfetto. Kernels are those of an NVIDIA GPU's streams, the
operations of a TPU, or those of XLA's programs for CPUs, on which a kernel can keep several threads busy.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.profiler import ProfileData

from fantasy_jax.cli import markdown_table
from fantasy_jax.errors import ConfigError

_DEVICE = re.compile(r"/device:(GPU|TPU):\d+$")
_COPY = re.compile(r"[._]\d+$")
"""The number by which XLA tells operations of one kind apart."""


@dataclass(frozen=True)
class Kernel:
    """Calls of one kind of kernel, on one device, or on average where there are several.

    Attributes:
        name: Its name, without the number of the call.
        calls: Number of calls.
        seconds: Time of all calls, without that of kernels that run inside them, as in a loop.
    """

    name: str
    calls: float
    seconds: float


def check_profiler() -> None:
    """Checks that calls can be traced.

    Raises:
        ConfigError: libtpu is loaded on a machine without TPUs, where its profiler can crash.
    """
    platforms = jax.config.jax_platforms
    if jax.default_backend() != "tpu" and find_spec("libtpu") and (not platforms or "tpu" in platforms):
        raise ConfigError(
            "--profile: libtpu can crash the profiler on a machine without TPUs; set JAX_PLATFORMS="
            f"{'cpu' if jax.default_backend() == 'cpu' else 'cuda,cpu'}, so that it is not loaded"
        )


def trace(folder: Path) -> AbstractContextManager:
    """A context whose calls on the devices are written to a folder."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's calls are most of a trace, and slow what is traced
    return jax.profiler.trace(folder, profiler_options=options)


def read_kernels(folder: Path) -> list[Kernel]:
    """The kernels of the last trace in a folder, the longest first."""
    file = max(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return kernels_of(list(ProfileData.from_file(str(file)).planes))


def kernels_of(planes: Sequence) -> list[Kernel]:
    """The kernels in the planes of a trace (`ProfileData.planes`), the longest first."""
    devices = [plane for plane in planes if _DEVICE.match(plane.name)]
    found: dict[str, list[float]] = defaultdict(list)
    for line in _device_lines(devices) if devices else _host_lines(planes):
        for name, seconds in _own_times(line):
            found[_COPY.sub("", name)].append(seconds)
    count = max(len(devices), 1)
    kernels = [Kernel(name, len(times) / count, sum(times) / count) for name, times in found.items()]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


def kernel_table(kernels: Sequence[Kernel], most: int = 20) -> str:
    """Formats kernels as a Markdown table, those after the first ones in one row."""
    total = sum(kernel.seconds for kernel in kernels)
    rest, numbers = kernels[most:], ("calls", "ms", "share")
    rows = list(kernels[:most])
    if rest:
        rows.append(Kernel("the rest", sum(x.calls for x in rest), sum(x.seconds for x in rest)))
    cells = [
        (row.name, f"{row.calls:g}", f"{1e3 * row.seconds:.3f}", f"{100 * row.seconds / total:.1f} %")
        for row in rows
    ]
    return markdown_table(("kernel", *numbers), cells, numbers=numbers)


Event = tuple[str, float, float]
"""Name, start and duration, in nanoseconds."""


def _device_lines(planes: Iterable) -> Iterator[list[Event]]:
    """A TPU's operations, or the kernels of a GPU's streams."""
    for plane in planes:
        lines = {line.name: line for line in plane.lines}
        names = ["XLA Ops"] if "XLA Ops" in lines else [name for name in lines if name.startswith("Stream")]
        for name in names:
            # A TPU names an operation by its text: %fusion.1 = bf16[8,128] fusion(...).
            yield [
                (event.name.split(" = ")[0].lstrip("%"), event.start_ns, event.duration_ns)
                for event in lines[name].events
            ]


def _host_lines(planes: Iterable) -> Iterator[list[Event]]:
    """The operations that each thread of a CPU has run or waited for."""
    for plane in planes:
        for line in plane.lines:
            yield [
                (event.name, event.start_ns, event.duration_ns)
                for event in line.events
                if "hlo_op" in dict(event.stats)
            ]


def _own_times(events: list[Event]) -> Iterator[tuple[str, float]]:
    """Name and seconds of each event of a thread, without the events inside it."""
    inner = [0.0] * len(events)
    events = sorted(events, key=lambda event: (event[1], -event[2]))
    around: list[int] = []
    for i, (_, start, duration) in enumerate(events):
        while around and start >= sum(events[around[-1]][1:]):
            around.pop()
        if around:
            inner[around[-1]] += duration
        around.append(i)
    for (name, _, duration), within in zip(events, inner, strict=True):
        yield name, 1e-9 * (duration - within)
