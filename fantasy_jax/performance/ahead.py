"""Programs compiled for machines that are not here, and what they will need there.

libtpu compiles for any TPU slice without one. What comes out is the program that the slice would run: memory
and collectives are read off it. Operations are counted by `flops`. The time is a roofline's, what the binding
limit alone would take if everything else were free.
"""

import argparse
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from fantasy_jax.cli import phase
from fantasy_jax.config import ConfigError
from fantasy_jax.media import check_writable, whole_or_nothing
from fantasy_jax.models.attention import use_backend
from fantasy_jax.performance.chips import GIB, Chip, chip_of
from fantasy_jax.performance.collectives import Exchange, exchanges
from fantasy_jax.sharding import MeshConfig, make_mesh
from fantasy_jax.typing import Leaf

_NO_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu would ask a TPU's machine about itself, and complain of; and that several may compile."""
_EXCEEDED = re.compile(r"(?:Used |temporaries \()([\d.]+)([GMK])(?: of|\) exceeds)", re.IGNORECASE)
"""What TPUs' compiler says, in either of two ways, of a program that needs more memory than a chip has."""


@dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
        name: Of it.
        lower: Lowers the very function that runs.
        arguments: What it is handed, abstract, with shardings.
        flops: Operations of a call, on all chips together.
        call: That function, of arrays like the arguments.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    arguments: Leaf
    flops: int
    call: Callable[..., Leaf]


@dataclass(frozen=True)
class Report:
    """What a program needs on a slice. Bytes are those of one chip.

    Attributes:
        program: Its name.
        topology: The slice, as libtpu calls it.
        chips: How many.
        mesh: Sizes of its axes.
        memory: A chip's.
        arguments: What is handed in, and what comes out in other memory.
        temporaries: What is needed beside that.
        fits: Whether a chip holds both.
        flops: Operations of a call, on all chips together.
        exchanges: Collectives by kind.
        limits: Seconds a call by each limit alone: compute, memory, links.
        compile_seconds: Time that compiling took.
        weighty: Where it does not fit: the arguments that weigh most, by path.
    """

    program: str
    topology: str
    chips: int
    mesh: dict[str, int]
    memory: int
    arguments: int
    temporaries: int
    fits: bool
    flops: int
    exchanges: dict[str, Exchange]
    limits: dict[str, float]
    compile_seconds: float
    weighty: dict[str, int]

    @property
    def binding(self) -> str:
        """The limit that takes longest."""
        return max(self.limits, key=self.limits.get)


def slice_devices(topology: str) -> list[jax.Device]:
    """The devices of a slice that is not here.

    Args:
        topology: As libtpu calls it: `v5p:4x4x4`, `v5e:16x16`, `v6e:2x4`; several alike as `v5p:2x2x2*2`.

    Raises:
        ConfigError: libtpu is not installed, or does not know it.
    """
    for name, value in _NO_MACHINE.items():
        os.environ.setdefault(name, value)
    try:
        one, times, count = topology.partition("*")
        several = {"num_slices": int(count)} if times else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=one, **several).devices
    except Exception as error:  # whatever libtpu, or its absence, makes JAX raise
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"--topology={topology}: {reason}; it takes the extra `tpu` (pip install '.[tpu]') "
            "and names such as v5e:4x4, v5p:2x2x2, v6e:2x4, v6e:2x4*2"
        ) from None


def compile_only(
    arguments: argparse.Namespace,
    longest_edge: int,
    sizes: MeshConfig,
    programs: Callable[[tuple[int, int], Mesh], Iterable[Program]],
) -> int:
    """Compiles programs for a slice that is not here, with the attention that runs there, and reports.

    Args:
        arguments: With what `add_arguments` adds.
        longest_edge: Of the clips, in pixels, if no size is given.
        sizes: Of the mesh.
        programs: Makes them, of the clips' height and width and the mesh that is in force.

    Returns:
        The exit code: 1 where a program does not fit.

    Raises:
        ConfigError: The slice is not known, or not named at all, or the sizes do not fit it.
        MediaError: The report cannot be written; nothing has been compiled then.
    """
    topology = arguments.topology
    if not topology:
        raise ConfigError("--topology is needed: the slice to compile for, such as v5p:4x4x4")
    size = clip_size(arguments.size, longest_edge)
    if arguments.json:
        check_writable(arguments.json)
    mesh = make_mesh(**sizes.axes, devices=slice_devices(topology))
    with jax.set_mesh(mesh), use_backend("splash"):
        reports = []
        for program in programs(size, mesh):
            with phase(f"Compiling: {program.name}"):
                reports.append(compile_ahead(program, topology, mesh))
    return show(reports, arguments.json)


def compile_ahead(program: Program, topology: str, mesh: Mesh) -> Report:
    """Compiles a program for the mesh in force, which is of a slice's devices, and reports."""
    begun, chip = time.perf_counter(), chip_of(mesh.devices.flat[0])
    lowered = program.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not (exceeded := _EXCEEDED.search(str(error))):
            raise
        fits, found = False, {}
        needed = int(float(exceeded[1]) * {"G": 2**30, "M": 2**20, "K": 2**10}[exceeded[2].upper()])
        arguments = sum(_on_a_chip(leaf) for leaf in jax.tree.leaves(program.arguments))
        temporaries = max(needed - arguments, 0)
    else:
        memory = compiled.memory_analysis()
        arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = memory.temp_size_in_bytes
        fits = arguments + temporaries <= chip.memory
        found = exchanges(compiled.as_text())
    return Report(
        program.name,
        topology,
        mesh.size,
        dict(mesh.shape),
        chip.memory,
        arguments,
        temporaries,
        fits,
        program.flops,
        found,
        _limits(chip, mesh.size, program.flops, arguments, temporaries, found),
        time.perf_counter() - begun,
        {} if fits else weighty(program.arguments),
    )


def _limits(
    chip: Chip,
    chips: int,
    flops: int,
    arguments: int,
    temporaries: int,
    found: dict[str, Exchange],
) -> dict[str, float]:
    """Seconds by each limit.

    At least: every argument is read once, every temporary written and read once. An all-reduce sends twice
    what it makes.
    """
    sent = sum(exchange.bytes * (2 if kind == "all-reduce" else 1) for kind, exchange in found.items())
    return {
        "compute": flops / chips / chip.flops,
        "memory": (arguments + 2 * temporaries) / chip.memory_rate,
        "links": sent / chip.link_rate,
    }


def weighty(tree: Leaf, count: int = 10) -> dict[str, int]:
    """The arrays of a tree that take most of a chip's memory, in bytes, by path."""
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): _on_a_chip(leaf)
        for path, leaf in jax.tree.flatten_with_path(tree)[0]
    }
    return dict(sorted(sizes.items(), key=lambda item: -item[1])[:count])


def _on_a_chip(leaf: Leaf) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
    return math.prod(shape) * leaf.dtype.itemsize


def table(reports: Sequence[Report]) -> str:
    """The reports as Markdown, one line each."""
    rows = [
        "| program | slice | mesh | GiB a chip: arguments + temporaries of | PFLOP | exchanged GB a chip "
        "| seconds, by | compiled in |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        mesh = " x ".join(f"{name} {size}" for name, size in report.mesh.items() if size > 1) or "1"
        sent = ", ".join(f"{kind} {x.bytes / 1e9:.2f}" for kind, x in report.exchanges.items()) or "nothing"
        need = f"{report.arguments / GIB:.2f} + {report.temporaries / GIB:.2f} of {report.memory / GIB:.0f}"
        time_ = f"{report.limits[report.binding]:.2f}, {report.binding}"
        rows.append(
            f"| {report.program} | {report.topology}, {report.chips} chips | {mesh} "
            f"| {need}{'' if report.fits else ': does not fit'} | {report.flops / 1e15:.3f} | {sent} "
            f"| {time_} | {report.compile_seconds:.0f} s |"
        )
    return "\n".join(rows)


def write_json(path: str | Path, reports: Sequence[Report]) -> None:
    """Writes the reports, with the versions that made them."""
    content = {
        "jax": jax.__version__,
        "reports": [asdict(report) | {"binding": report.binding} for report in reports],
    }
    with whole_or_nothing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what a command takes to compile its programs in place of running them."""
    group = parser.add_argument_group("compiling for machines that are not here")
    group.add_argument(
        "--compile_only", action="store_true", help="compile, say what a chip would need, and run nothing"
    )
    group.add_argument(
        "--topology", metavar="NAME", help="the slice, as v5e:16x16 or v5p:4x4x4; two of them, as v6e:2x4*2"
    )
    group.add_argument("--size", metavar="HxW", help="of the clips, in pixels (default: square)")
    group.add_argument("--json", metavar="FILE", help="write the report as JSON, too")


def clip_size(size: str | None, longest_edge: int) -> tuple[int, int]:
    """Height and width of `--size`; a square by default.

    Raises:
        ConfigError: It is not two multiples of 16.
    """
    if size is None:
        return longest_edge, longest_edge
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    height, width = map(int, found.groups()) if found else (0, 0)
    if not height or not width or height % 16 or width % 16:
        raise ConfigError(f"--size={size}: height and width are needed, multiples of 16, as 720x1280")
    return height, width


def show(reports: Sequence[Report], path: str | None) -> int:
    """Prints the reports and writes them to a file; the exit code is 1 where a program does not fit."""
    print(table(reports))
    for report in reports:
        if not report.fits:
            print(f"{report.program} does not fit; most of its arguments, a chip, are")
            for name, size in report.weighty.items():
                print(f"  {size / GIB:8.3f} GiB  {name}")
    if path:
        write_json(path, reports)
        print(f"Wrote {path}")
    return 0 if all(report.fits for report in reports) else 1
