"""Times what `train.py` and `sample.py` run, on the devices that are here, with random weights."""

import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

from fantasy_jax import cli, media
from fantasy_jax.config import ConfigError, build
from fantasy_jax.data.encoded import features
from fantasy_jax.data.loader import batches
from fantasy_jax.data.records import open_split, write_dataset
from fantasy_jax.performance import torch_wan
from fantasy_jax.performance.ahead import clip_size
from fantasy_jax.performance.programs import guided_step, training_steps, vae_decode, vae_encode
from fantasy_jax.performance.timing import WARM_UP, Timing, table, time_calls, time_program
from fantasy_jax.pipeline import ModelConfig, SampleConfig
from fantasy_jax.sharding import make_mesh
from fantasy_jax.training.course import TrainConfig
from fantasy_jax.training.stages import StagesConfig, abstract_batch
from fantasy_jax.training.talking import PadText

PARTS = ("forward", "guided_step", "training_step", "vae", "loader")
_BATCHES = 4
"""That the loader gives in one call: several are read at once, and come together."""
_RECORDS_BYTES = 256 * 2**20

EXAMPLES = """\
examples:
  python -m fantasy_jax.benchmark --config=configs/tiny.py --json=out/tiny.json
  the 14B model on one GPU, at the size and the mesh that fit it:
  python -m fantasy_jax.benchmark --config=configs/fantasy_talking_14b.py --only=forward,guided_step \\
      --size=480x640 --config.sample.max_frames=77 --against=torch
  how many encoded clips of the 14B model two processes read:
  python -m fantasy_jax.benchmark --config=configs/fantasy_talking_14b.py --only=loader \\
      --config.train.loop.workers=2

Weights and inputs are random, sizes and meshes the configuration's. Times are of whole calls, the first ones
left out; operations are counted (fantasy_jax/performance/flops.py); the peak is that of bfloat16.
"""


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, times, prints a table."""
    arguments, config = cli.parse(_parser(), argv)
    only = arguments.only.split(",") if arguments.only else PARTS
    if unknown := [part for part in only if part not in PARTS]:
        raise ConfigError(f"--only={arguments.only}: there is no {unknown[0]!r}; use {', '.join(PARTS)}")
    if arguments.against and "forward" not in only:
        raise ConfigError("--against is a comparison of forward; name it in --only, too")
    if arguments.repeats < 2:
        raise ConfigError(f"--repeats={arguments.repeats}: at least 2 are needed")
    if arguments.json:
        media.check_writable(arguments.json)
    model = build(ModelConfig, config.model, "model")
    sampling = build(SampleConfig, config.sample, "sample")
    training = build(TrainConfig if "data" in config else StagesConfig, config.train, "train")
    size = clip_size(arguments.size, sampling.longest_edge)
    compared = None
    if arguments.against:  # before JAX takes the device's memory
        shapes = abstract_batch(model, sampling, size, 1, make_mesh())
        with cli.phase("PyTorch"):
            compared = torch_wan.time_in_process(model, shapes, arguments.repeats, WARM_UP)
    timings: list[Timing] = []
    for part in only:
        with cli.phase(part):
            timings += _time(part, model, sampling, training, size, arguments.repeats)
    if compared:
        ours = next(timing for timing in timings if timing.name == "forward")
        timings += _compare(compared, ours)
    print(table(timings))
    if arguments.json:
        _write(arguments.json, timings, size, sampling.max_frames, compared)
        print(f"Wrote {arguments.json}")
    return 0


def _parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(prog="python -m fantasy_jax.benchmark", description=__doc__, epilog=EXAMPLES)
    cli.add_config_argument(parser)
    parser.add_argument("--size", metavar="HxW", help="of the clips, in pixels (default: square)")
    parser.add_argument("--only", metavar="PART,PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=10, help="calls that count (default: %(default)s)")
    parser.add_argument(
        "--against",
        choices=["torch"],
        help="time PyTorch's Wan transformer, too, on the same device, in a process of its own",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    return parser


def _time(
    part: str,
    model: ModelConfig,
    sampling: SampleConfig,
    training: StagesConfig,
    size: tuple[int, int],
    repeats: int,
) -> list[Timing]:
    """The timings of a part; its programs are made, run and forgotten one after another."""
    if part == "loader":
        return [_time_loader(model, sampling, training, size, repeats)]
    mesh = make_mesh(**(training.mesh if part == "training_step" else sampling.mesh).axes)
    with jax.set_mesh(mesh):
        if part == "training_step":
            programs = training_steps(model, sampling, training, size, mesh)
        elif part == "vae":
            programs = (make(model, sampling, size, mesh) for make in (vae_encode, vae_decode))
        elif part == "forward":  # a step whose guidance needs one branch
            unguided = replace(sampling, prompt_scale=1.0, audio_scale=1.0)
            programs = (replace(step, name=part) for step in guided_step(model, unguided, size, mesh))
        else:
            programs = guided_step(model, sampling, size, mesh)
        return [time_program(program, repeats, devices=mesh.size, dtype=model.dtype) for program in programs]


def _time_loader(
    model: ModelConfig, sampling: SampleConfig, training: StagesConfig, size: tuple[int, int], repeats: int
) -> Timing:
    """Batches of the first stage, from encoded clips of random numbers with the longest prompts."""
    stage, workers, rng = training.clip_stage, training.loop.workers, np.random.default_rng(0)
    example = abstract_batch(model, sampling, size, 1, make_mesh())

    def record() -> dict[str, np.ndarray]:
        return {name: rng.random(x.shape[1:], np.float32).astype(x.dtype) for name, x in example.items()}

    megabytes = sum(array.nbytes for array in record().values()) / 1e6
    count = min(max(int(_RECORDS_BYTES / 1e6 / megabytes), 1), 256)
    with TemporaryDirectory() as folder:
        splits = {"train": (record() for _ in range(count))}
        records = write_dataset("encoded_clips", folder, lambda: features(record()), splits, {})
        read = batches(
            open_split(records, "train"),
            PadText(model.transformer.text_length),
            batch_size=stage.batch_size,
            start=0,
            workers=workers,
            seed=0,
        )
        busy = []

        def call() -> None:
            for _ in range(_BATCHES):
                next(read)
            busy.append(_processor_seconds())

        seconds = time_calls(call, repeats)
        read.close()
    clips = _BATCHES * stage.batch_size
    each = (busy[-1] - busy[WARM_UP - 1]) / (repeats * clips)
    timing = Timing(f"loader, {clips} clips", seconds)
    rate = f"{clips / timing.median:.1f} clips/s of {megabytes:.1f} MB, {workers} workers"
    return replace(timing, note=f"{rate}, {1e3 * each:.1f} ms of a core each")


def _processor_seconds() -> float:
    """That this process has used and, where /proc tells (Linux), those that it has started."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        if (path := Path(f"/proc/{child.pid}/stat")).exists():
            user, system = path.read_text().rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def _compare(compared: dict, ours: Timing) -> list[Timing]:
    """PyTorch's rows, with how much longer they took; or in one word why there is none."""
    device = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    rows = []
    for way in ("eager", "compiled"):
        seconds = compared[way] if isinstance(compared[way], list) else ()
        timing = Timing(f"forward, PyTorch {way}, without audio", tuple(seconds))
        if compared["device"] != device:
            note = f"on {compared['device']}"
        else:
            note = f"{timing.median / ours.median:.2f} times ours" if seconds else compared[way]
        rows.append(replace(timing, note=note))
    return rows


def _write(
    path: str, timings: Sequence[Timing], size: tuple[int, int], frames: int, compared: dict | None
) -> None:
    content = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "clip": [frames, *size],
        "timings": [timing.to_json() for timing in timings],
    }
    if compared:
        content["versions"]["torch"] = compared["torch"]
    with media.whole_or_nothing(Path(path)) as partial_:
        partial_.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, "fantasy_jax.benchmark")
