"""Times the programs of `train.py` and `sample.py` on the attached devices, with random weights."""

import argparse
import json
import multiprocessing
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from fantasy_jax import cli
from fantasy_jax.config import section
from fantasy_jax.data.encoded import batch_spec, features
from fantasy_jax.data.loader import batches
from fantasy_jax.data.records import open_split, write_dataset
from fantasy_jax.diffusion.magcache import MagCacheConfig
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import atomic_write, check_outputs
from fantasy_jax.miniature.trainer import TRAININGS
from fantasy_jax.models.eight_bit import DTYPES, EightBit
from fantasy_jax.performance import torch_wan
from fantasy_jax.performance.ahead import with_size
from fantasy_jax.performance.cache import keep_compiled_programs
from fantasy_jax.performance.profile import check_profiler, kernel_table, read_kernels
from fantasy_jax.performance.program import Program
from fantasy_jax.performance.programs import (
    guided_step_program,
    guided_step_programs,
    training_programs,
    vae_decode_program,
    vae_encode_program,
)
from fantasy_jax.performance.timing import WARM_UP, Timing, time_calls, time_program, timing_table
from fantasy_jax.pipelines.config import PipelineConfig
from fantasy_jax.pipelines.tasks import pipeline_of
from fantasy_jax.sharding import make_mesh
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import abstract_networks
from fantasy_jax.system.vae_memory import free_bytes
from fantasy_jax.training.objective import PadText
from fantasy_jax.training.stages import StagesConfig
from fantasy_jax.video import VideoConfig

PARTS = ("forward", "guided_step", "training_step", "vae", "loader")
_EIGHT_BIT_PARTS = frozenset(PARTS[:2])
_BATCHES_PER_CALL = 4
"""Batches that one timed call of the loader reads: it reads ahead, and batches come in groups."""
_RECORDS_BYTES = 256 * 2**20

EXAMPLES = """\
examples:
  python -m fantasy_jax.benchmark --config=configs/tiny.py --json=out/tiny.json
  the 14B model on one GPU, at a size that fits it:
  python -m fantasy_jax.benchmark --config=configs/fantasy_talking_14b.py --only=forward,guided_step \\
      --size=480x640 --config.video.num_frames=77 --against=torch
  where the time of a guided step goes:
  python -m fantasy_jax.benchmark --config=configs/tiny.py --only=guided_step --profile=out/profile
  how many encoded clips of the 14B model two processes read:
  python -m fantasy_jax.benchmark --config=configs/fantasy_talking_14b.py --only=loader \\
      --config.train.loop.num_workers=2

Weights and inputs are random; sizes and meshes are the config's. Times are of whole calls after a warm-up;
operations are counted (fantasy_jax/performance/flops.py); the peak is that of bfloat16.
"""


@dataclass(frozen=True)
class _Settings:
    """The sections of a config."""

    model: ModelConfig
    video: VideoConfig
    sample: PipelineConfig
    train: StagesConfig
    eight_bit: EightBit | None


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, times the parts and prints a table."""
    arguments, config = cli.parse(_parser(), argv)
    pipeline = pipeline_of(config)
    only, profile = _parts(arguments), Path(arguments.profile) if arguments.profile else None
    check_outputs([arguments.json], cli.config_files(arguments.config, config))
    if profile:
        profile.mkdir(parents=True, exist_ok=True)
    keep_compiled_programs()
    settings = _Settings(
        section(ModelConfig, config, "model"),
        with_size(section(VideoConfig, config, "video"), arguments.size),
        section(pipeline.config_type, config, "sample"),
        section(TRAININGS[config.task], config, "train"),
        arguments.eight_bit,
    )
    if settings.sample.eight_bit_products and not settings.eight_bit and _EIGHT_BIT_PARTS & set(only):
        raise ConfigError("sample.eight_bit_products needs 8-bit weights; add --eight_bit=int8 or fp8")
    reference = None
    if arguments.against:  # before JAX takes the device's memory
        with cli.timed("PyTorch"):
            reference = torch_wan.time_in_process(settings.model, settings.video, arguments.repeats, WARM_UP)
    if profile:
        check_profiler()
    timings: list[Timing] = []
    for part in only:
        with cli.timed(part):
            timings += _time(part, settings, arguments.repeats, profile)
    if reference:
        ours = next(timing for timing in timings if timing.name == "forward")
        timings += _compare(reference, ours)
    print(timing_table(timings))
    if profile:
        _show_kernels(profile, timings)
    if arguments.json:
        _write(arguments.json, timings, settings, reference)
        print(f"Wrote {arguments.json}")
    return 0


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="python -m fantasy_jax.benchmark", description=__doc__, epilog=EXAMPLES)
    cli.add_config_argument(parser)
    parser.add_argument("--size", metavar="HxW", help="size of the clips in pixels (default: the config's)")
    parser.add_argument("--only", metavar="PART,PART", help=f"parts of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--repeats", type=cli.integer(2), default=10, metavar="N", help="timed calls (default: %(default)s)"
    )
    parser.add_argument(
        "--against",
        choices=["torch"],
        help="also time PyTorch's Wan transformer on the same device, in a process of its own",
    )
    parser.add_argument(
        "--profile",
        metavar="DIR",
        help="also trace one call of each program, and print the kernels by their share of the time",
    )
    parser.add_argument(
        "--eight_bit", choices=tuple(DTYPES), help="type of weights of the forward pass and the guided step"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the timings as JSON")
    return parser


def _parts(arguments: argparse.Namespace) -> Sequence[str]:
    """The parts that are timed; refuses options without effect on them."""
    only = arguments.only.split(",") if arguments.only else PARTS
    if unknown := [part for part in only if part not in PARTS]:
        raise ConfigError(f"--only={arguments.only}: no such part {unknown[0]!r}; use {', '.join(PARTS)}")
    if arguments.against and "forward" not in only:
        raise ConfigError("--against compares the forward pass; add forward to --only")
    if arguments.eight_bit and not _EIGHT_BIT_PARTS & set(only):
        raise ConfigError("--eight_bit is for forward and guided_step; add one of them to --only")
    if arguments.profile and set(only) == {"loader"}:
        raise ConfigError("--profile traces programs; add another part than the loader to --only")
    return only


def _time(part: str, settings: _Settings, repeats: int, profile: Path | None) -> list[Timing]:
    """Times a part; its programs are built, run and released one after another."""
    if part == "loader":
        return [_time_loader(settings, repeats)]
    mesh_config = settings.train.mesh if part == "training_step" else settings.sample.mesh
    mesh = make_mesh(**mesh_config.axes)
    options = {"devices": mesh.size, "dtype": settings.model.dtype}
    with jax.set_mesh(mesh):
        return [
            time_program(program, repeats, trace_to=_trace_folder(profile, program.name), **options)
            for program in _programs(part, settings, mesh)
        ]


def _trace_folder(profile: Path | None, name: str) -> Path | None:
    """The folder of a program's trace: `out/profile/guided_step_2_branches`."""
    return profile / re.sub(r"\W+", "_", name) if profile else None


def _show_kernels(profile: Path, timings: Sequence[Timing]) -> None:
    for timing in timings:
        folder = _trace_folder(profile, timing.name)
        if folder.exists():
            print(f"\n{timing.name}, of the trace in {folder}:\n\n{kernel_table(read_kernels(folder))}")


def _programs(part: str, settings: _Settings, mesh: jax.sharding.Mesh) -> Iterable[Program]:
    model, video, sample = settings.model, settings.video, settings.sample
    if part == "training_step":
        yield from training_programs(model, settings.train, video, mesh)
        return
    networks = abstract_networks(
        model,
        mesh,
        sample.mesh,
        eight_bit=settings.eight_bit,
        weights_memory=sample.weights_memory,
        eight_bit_products=sample.eight_bit_products,
    ).with_dtypes(vae=sample.vae_dtype)
    if part == "forward":  # a step whose guidance has one branch
        exact = replace(sample, magcache=MagCacheConfig())
        scales = [field.name for field in fields(exact) if field.name.endswith("guidance_scale")]
        unguided = replace(exact, **dict.fromkeys(scales, 1.0))
        yield replace(guided_step_program(networks, unguided, video, mesh), name=part)
    elif part == "guided_step":
        yield from guided_step_programs(networks, sample, video, mesh)
    else:
        yield vae_encode_program(networks, video, mesh, free=free_bytes())
        yield vae_decode_program(networks, sample, video, mesh, free=free_bytes())


def _time_loader(settings: _Settings, repeats: int) -> Timing:
    """Times batches of the first stage, from random encoded clips with the longest prompts."""
    model, loop = settings.model, settings.train.loop
    batch_size, rng = settings.train.stages[0].batch_size, np.random.default_rng(0)
    spec = batch_spec(model, settings.video, 1)

    def record() -> dict[str, np.ndarray]:
        return {name: rng.random(x.shape[1:], np.float32).astype(x.dtype) for name, x in spec.items()}

    megabytes = sum(array.nbytes for array in record().values()) / 1e6
    count = min(max(int(_RECORDS_BYTES / 1e6 / megabytes), 1), 256)
    with TemporaryDirectory() as folder:
        splits = {"train": (record() for _ in range(count))}
        records = write_dataset("encoded_clips", folder, lambda: features(record()), splits, {})
        loader = batches(
            [open_split(records, "train")],
            PadText(model.transformer.text_length),
            batch_size=batch_size,
            start=0,
            num_workers=loop.num_workers,
            seed=0,
        )
        busy = []

        def call() -> None:
            for _ in range(_BATCHES_PER_CALL):
                next(loader)
            busy.append(_cpu_seconds())

        seconds = time_calls(call, repeats)
        loader.close()
    clips = _BATCHES_PER_CALL * batch_size
    per_clip = (busy[-1] - busy[WARM_UP - 1]) / (repeats * clips)
    timing = Timing(f"loader, {clips} clips", seconds)
    rate = f"{clips / timing.median:.1f} clips/s of {megabytes:.1f} MB, {loop.num_workers} workers"
    return replace(timing, note=f"{rate}, {1e3 * per_clip:.1f} ms of a core per clip")


def _cpu_seconds() -> float:
    """CPU time of this process and, where /proc exists (Linux), of its child processes."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        if (path := Path(f"/proc/{child.pid}/stat")).exists():
            user, system = path.read_text().rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def _compare(reference: dict[str, Any], ours: Timing) -> list[Timing]:
    """PyTorch's timings, each with its ratio to ours or with the reason why there is none."""
    device = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    rows = []
    for mode in ("eager", "compiled"):
        seconds = reference[mode] if isinstance(reference[mode], list) else ()
        timing = Timing(f"forward, PyTorch {mode}, without audio", tuple(seconds))
        if reference["device"] != device:
            note = f"on {reference['device']}"
        else:
            note = f"{timing.median / ours.median:.2f} times ours" if seconds else reference[mode]
        rows.append(replace(timing, note=note))
    return rows


def _write(
    path: str, timings: Sequence[Timing], settings: _Settings, reference: dict[str, Any] | None
) -> None:
    video, sample = settings.video, settings.sample
    content = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "clip": [video.num_frames, *video.size],
        "eight_bit": settings.eight_bit,
        "eight_bit_products": sample.eight_bit_products,
        "weights_memory": sample.weights_memory,
        "timings": [timing.to_json() for timing in timings],
    }
    if reference:
        content["versions"]["torch"] = reference["torch"]
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.benchmark")
