"""AOT compilation for detached TPU topologies: memory, collectives, roofline.

libtpu compiles for any TPU slice without one. Memory and collectives are read from the compiled program,
which is the one that the slice would run; operations are counted by `flops`. The roofline is a lower bound of
the run time: what compute, memory or links alone would take at their peak rates.
"""

import argparse
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from fantasy_jax import LIBTPU_ENVIRONMENT, cli
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import atomic_write, check_outputs
from fantasy_jax.performance.chips import GIB, Chip, chip_of
from fantasy_jax.performance.collectives import Collective, UnknownTripCountError, collectives
from fantasy_jax.performance.fitting import setups_that_fit
from fantasy_jax.performance.program import Program, device_bytes
from fantasy_jax.sharding import MeshConfig, make_mesh
from fantasy_jax.typing import Leaf
from fantasy_jax.video import VideoConfig

_OUT_OF_MEMORY = re.compile(r"(?:Used |temporaries \()([\d.]+)([GMK])(?: of|\) exceeds)", re.IGNORECASE)
"""The two messages of the TPU compiler about a program that needs more memory than a chip has."""

_OPTIONS = ("topology", "size", "only", "json", "people")
"""Options that have no effect without `--compile_only`."""

MakePrograms = Callable[[VideoConfig, Mesh], Iterable[Program]]


@dataclass(frozen=True)
class CompiledReport:
    """Resources that a program needs on a TPU slice. Bytes are per chip.

    Attributes:
        program: Name of the program.
        topology: Name of the slice, as libtpu calls it.
        num_chips: Chips of the slice.
        mesh: Mesh axis sizes.
        chip_memory: Memory of a chip.
        argument_bytes: Arguments, and results that do not reuse the arguments' memory.
        temporary_bytes: Everything else that is allocated.
        fits: Whether both fit a chip's memory.
        flops: Model operations of a call, on all chips together (`performance.flops`).
        hardware_flops: Operations of a call as the program runs, on all chips together.
        collectives: Collectives by kind; None if they could not be counted.
        roofline: Lower bounds of the run time in seconds: by `compute`, `memory` and `links`.
        compile_seconds: Time that compiling took.
        largest_arguments: Bytes of the largest arguments by path, if the program does not fit.
        would_fit: What would fit, if the program does not (`performance.fitting`).
    """

    program: str
    topology: str
    num_chips: int
    mesh: dict[str, int]
    chip_memory: int
    argument_bytes: int
    temporary_bytes: int
    fits: bool
    flops: int
    hardware_flops: int
    collectives: dict[str, Collective] | None
    roofline: dict[str, float]
    compile_seconds: float
    largest_arguments: dict[str, int]
    would_fit: list[str]

    @property
    def bottleneck(self) -> str:
        """The resource with the largest lower bound."""
        return max(self.roofline, key=self.roofline.get)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--compile_only` and its options to a command that can compile ahead of time."""
    group = parser.add_argument_group("compiling ahead of time")
    group.add_argument(
        "--compile_only", action="store_true", help="compile for --topology and report what a chip needs"
    )
    group.add_argument(
        "--topology",
        metavar="NAME",
        help="TPU slice to compile for, such as v5e:16x16 or v5p:4x4x4; v6e:2x4*2 is two slices",
    )
    group.add_argument(
        "--size",
        metavar="HxW",
        help="height and width of the clips in pixels, multiples of 16 (default: the config's); sample.py "
        "also samples this size, rounded to multiples of 16, without --compile_only",
    )
    group.add_argument(
        "--only", metavar="NAME", help="compile the programs whose name begins so, such as 'guided step'"
    )
    group.add_argument("--json", metavar="FILE", help="also write the report as JSON")


def is_requested(arguments: argparse.Namespace, *, also: Sequence[str] = ()) -> bool:
    """Returns whether `--compile_only` is given.

    Args:
        arguments: The command line.
        also: Names of options that have an effect without it, too.

    Raises:
        ConfigError: Only options are given that belong to it, or with it others, which have no effect then.
    """
    own = {"config", "compile_only", *_OPTIONS}
    others = [name for name, value in vars(arguments).items() if value and name not in own]
    if others and arguments.compile_only:
        raise ConfigError(f"--{others[0]} has no effect with --compile_only")
    names = [name for name in _OPTIONS if name not in also and getattr(arguments, name, None)]
    if names and not arguments.compile_only:
        raise ConfigError(f"--{names[0]} has no effect without --compile_only")
    return arguments.compile_only


def parse_size(size: str | None) -> tuple[int, int] | None:
    """Returns the height and width that `--size=HxW` gives; None without one.

    Raises:
        ConfigError: It has another form, or a side of more than four digits.
    """
    if size is None:
        return None
    if not (sides := re.fullmatch(r"(\d{1,4})x(\d{1,4})", size)):
        raise ConfigError(f"--size={size}: must be height x width in pixels, such as 720x1280")
    return int(sides[1]), int(sides[2])


def with_size(video: VideoConfig, size: str | None) -> VideoConfig:
    """Returns clips of the size that `--size=HxW` gives; without one, the clips as they are.

    Raises:
        ConfigError: It is not two positive multiples of 16.
    """
    if (sides := parse_size(size)) is None:
        return video
    try:
        return video.for_size(*sides)
    except ConfigError as error:
        raise ConfigError(f"--size={size}: {error}") from None


def compile_and_report(
    arguments: argparse.Namespace, video: VideoConfig, mesh_config: MeshConfig, make_programs: MakePrograms
) -> int:
    """Runs `--compile_only` of a command.

    Args:
        arguments: Parsed options of `add_arguments`.
        video: Clips of the config.
        mesh_config: Mesh axis sizes.
        make_programs: As for `compile_programs`.

    Returns:
        The exit code: 1 if a program does not fit.

    Raises:
        ConfigError: `--topology` or `--size` is missing or invalid, or the mesh does not fit the slice.
        MediaError: The file of `--json` cannot be written.
    """
    check_outputs([arguments.json], [arguments.config.partition(":")[0]])
    reports = compile_programs(
        make_programs,
        with_size(video, arguments.size),
        topology=arguments.topology,
        mesh_config=mesh_config,
        only=arguments.only or "",
        json_path=arguments.json,
    )
    if arguments.json:
        print(f"Wrote {arguments.json}")
    return show(reports)


def compile_programs(
    make_programs: MakePrograms,
    video: VideoConfig,
    *,
    topology: str | None,
    mesh_config: MeshConfig,
    only: str = "",
    json_path: str | Path | None = None,
) -> list[CompiledReport]:
    """Compiles programs for a TPU slice that need not be attached.

    Args:
        make_programs: Makes the programs for clips and a mesh, which is in force.
        video: Size and length of the clips.
        topology: Name of the slice, as for `slice_devices`.
        mesh_config: Mesh axis sizes.
        only: Beginning of the names of the programs that are compiled.
        json_path: Also writes the reports to this file.

    Raises:
        ConfigError: The slice is unknown, the mesh does not fit it, or no program has such a name.
        MediaError: `json_path` cannot be written; this is checked before anything is compiled.
    """
    if not topology:
        raise ConfigError("--topology is required: the TPU slice to compile for, such as v5p:4x4x4")
    check_outputs([json_path])
    mesh = make_mesh(**mesh_config.axes, devices=slice_devices(topology))
    reports, names = [], []
    with jax.set_mesh(mesh):
        for program in make_programs(video, mesh):
            names.append(program.name)
            if not program.name.startswith(only):
                continue
            with cli.timed(f"Compiling: {program.name}"):
                reports.append(compile_program(program, topology, mesh))
    if not reports:
        raise ConfigError(f"--only={only}: no program has such a name; there are {', '.join(names)}")
    if json_path:
        write_json(json_path, reports)
    return reports


def slice_devices(topology: str) -> list[jax.Device]:
    """Returns the devices of a TPU slice that need not be attached.

    Args:
        topology: Name of chips and their arrangement: `v4:2x2x4`, `v5p:4x4x4`, `v5e:16x16`, `v6e:2x4`,
            `v7x:2x2x4`; `v5p:2x2x2*2` is two slices.

    Raises:
        ConfigError: libtpu is not installed or does not know the name.
    """
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        name, star, count = topology.partition("*")
        options = {"num_slices": int(count)} if star else {}
        if name.startswith("v4:"):  # as on hosts of v4, where the two cores of a chip are one device
            options["chip_config_name"] = "megacore"
        name = name.replace("v7x:", "tpu7x:")  # libtpu's name
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # JAX passes on whatever libtpu, or its absence, raises
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(
            f"--topology={topology}: {reason}; install the extra `tpu` (pip install '.[tpu]') and use a name "
            "such as v5e:4x4, v5p:2x2x2, v6e:2x4, v6e:2x4*2"
        ) from None


def compile_program(program: Program, topology: str, mesh: Mesh) -> CompiledReport:
    """Compiles one program for the current mesh, whose devices are those of a slice."""
    start, chip = time.perf_counter(), chip_of(mesh.devices.flat[0])
    lowered = program.lower()
    found: dict[str, Collective] | None = None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        fits, arguments = False, device_bytes(program.arguments)
        temporaries = exceeding_temporaries(error, arguments)
    else:
        memory = compiled.memory_analysis()
        arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        temporaries = memory.temp_size_in_bytes
        fits = arguments + temporaries <= chip.memory
        try:
            found = collectives(compiled.as_text())
        except (UnknownTripCountError, jax.errors.JaxRuntimeError) as error:
            # JAX 0.10 cannot read all programs that libtpu compiles for v7x.
            reason = str(error).splitlines()[0]
            logging.getLogger(__name__).warning("%s: collectives not counted: %s", program.name, reason)
    return CompiledReport(
        program=program.name,
        topology=topology,
        num_chips=mesh.size,
        mesh=dict(mesh.shape),
        chip_memory=chip.memory,
        argument_bytes=arguments,
        temporary_bytes=temporaries,
        fits=fits,
        flops=program.flops,
        hardware_flops=program.hardware_flops,
        collectives=found,
        roofline=_roofline(chip, program.hardware_flops / mesh.size, arguments, temporaries, found or {}),
        compile_seconds=time.perf_counter() - start,
        largest_arguments={} if fits else largest_arrays(program.arguments),
        would_fit=[] if fits else _would_fit(program, mesh, arguments, temporaries, chip),
    )


def exceeding_temporaries(error: jax.errors.JaxRuntimeError, arguments: int) -> int:
    """Bytes of the temporaries of a program that does not fit, by the compiler's error.

    Args:
        error: What compiling raised; an error about anything else is raised again.
        arguments: Bytes of the program's arguments.
    """
    if not (exceeded := _OUT_OF_MEMORY.search(str(error))):
        raise error
    needed = int(float(exceeded[1]) * {"G": 2**30, "M": 2**20, "K": 2**10}[exceeded[2].upper()])
    return max(needed - arguments, 0)


def _would_fit(program: Program, mesh: Mesh, arguments: int, temporaries: int, chip: Chip) -> list[str]:
    found = list(map(str, setups_that_fit(program, mesh.shape, arguments, temporaries, chip.memory)))
    if program.batch_size is not None:
        found.append("less that is saved for the backward pass (remat_save_names), or fewer trained weights")
    return found


def _roofline(
    chip: Chip, flops: float, arguments: int, temporaries: int, found: Mapping[str, Collective]
) -> dict[str, float]:
    """Lower bounds of a call's seconds on one chip.

    Every argument is read at least once, every temporary is written and read once. An all-reduce sends twice
    the bytes of its result.
    """
    sent = sum(each.bytes * (2 if kind == "all-reduce" else 1) for kind, each in found.items())
    return {
        "compute": flops / chip.flops,
        "memory": (arguments + 2 * temporaries) / chip.memory_rate,
        "links": sent / chip.link_rate,
    }


def largest_arrays(tree: Leaf, count: int = 10) -> dict[str, int]:
    """Returns the `count` arrays of a tree that take most memory of a chip: bytes by path."""
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): device_bytes(leaf)
        for path, leaf in jax.tree.flatten_with_path(tree)[0]
    }
    return dict(sorted(sizes.items(), key=lambda item: -item[1])[:count])


def report_table(reports: Sequence[CompiledReport]) -> str:
    """Formats reports as a Markdown table, one row each."""
    columns = (
        "program",
        "slice",
        "mesh",
        "GiB per chip: arguments + temporaries of",
        "PFLOP: model, hardware",
    )
    columns += ("collectives, GB per chip", "roofline, s", "compile time")
    return cli.markdown_table(columns, map(_cells, reports))


def _cells(report: CompiledReport) -> list[str]:
    mesh = " x ".join(f"{name} {size}" for name, size in report.mesh.items() if size > 1) or "1"
    needed = f"{report.argument_bytes / GIB:.2f} + {report.temporary_bytes / GIB:.2f}"
    return [
        report.program,
        f"{report.topology}, {report.num_chips} chips",
        mesh,
        f"{needed} of {report.chip_memory / GIB:.0f}{'' if report.fits else ': does not fit'}",
        f"{report.flops / 1e15:.3f}, {report.hardware_flops / 1e15:.3f}",
        _collectives(report),
        f"{report.roofline[report.bottleneck]:.2f}, {report.bottleneck}",
        f"{report.compile_seconds:.0f} s",
    ]


def _collectives(report: CompiledReport) -> str:
    if report.collectives is None:
        return "unknown"
    return ", ".join(f"{kind} {each.bytes / 1e9:.2f}" for kind, each in report.collectives.items()) or "none"


def write_json(path: str | Path, reports: Sequence[CompiledReport]) -> None:
    """Writes reports as JSON, with the version of JAX."""
    content = {
        "jax": jax.__version__,
        "reports": [asdict(report) | {"bottleneck": report.bottleneck} for report in reports],
    }
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def show(reports: Sequence[CompiledReport]) -> int:
    """Prints the table and the largest arguments of programs that do not fit.

    Returns:
        The exit code of the command: 1 if a program does not fit.
    """
    print(report_table(reports))
    for report in reports:
        if not report.fits:
            print(f"{report.program} does not fit; its largest arguments, per chip:")
            for name, size in report.largest_arguments.items():
                print(f"  {size / GIB:8.3f} GiB  {name}")
            print("what would fit, by estimate:")
            print("\n".join(f"  {setup}" for setup in report.would_fit))
    return 0 if all(report.fits for report in reports) else 1
