"""Gives changed files and settings to all readers, and keeps those that end in anything but one line.

    .venv/bin/python tests/fuzz.py --seconds=600

Each input is a small valid one with a few random changes. It must be read or refused in one line, within ten
seconds and two GiB. The worker that reads is a process of its own, so that crashes and hangs are found, too.
`test_fuzz_corpus.py` reads what was found again.
"""

import contextlib
import hashlib
import io
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import conftest  # noqa: F401  (checks the types of all signatures)
from fuzz_inputs import MAKERS, ROOT, Seeds
from tqdm import tqdm

from fantasy_jax import cli, media
from fantasy_jax.config import section
from fantasy_jax.convert.files import open_weights
from fantasy_jax.errors import FantasyError
from fantasy_jax.files import check_separate
from fantasy_jax.miniature.synthetic import SyntheticConfig
from fantasy_jax.miniature.trainer import MiniatureConfig
from fantasy_jax.pipelines.batch import read_batch
from fantasy_jax.pipelines.config import read_pipeline
from fantasy_jax.pipelines.latents import read_latents, read_noise
from fantasy_jax.pipelines.portrait import FantasyPortraitPipeline
from fantasy_jax.pipelines.talking import FantasyTalkingPipeline
from fantasy_jax.prepare.captions import read_captions
from fantasy_jax.prepare.config import PortraitPrepareConfig, PrepareConfig
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.training.stages import StagesConfig
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.inspect import inspect
from fantasy_jax.weights.store import read_record

CORPUS = ROOT / "tests/data/fuzz"
SECONDS, MEMORY = 10, 2 << 30
"""What reading one input may take, in seconds and bytes of the whole process."""


def _exhaust(values) -> None:
    for _ in values:
        pass


def _read_weights(path: Path) -> None:
    weights = open_weights(path)
    for key in weights.specs:
        weights.read(key)


def _read_settings(path: Path) -> None:
    location, *settings = path.read_text(encoding="utf-8").split("\n")
    parser = cli.ArgumentParser(prog="fuzz")
    cli.add_config_argument(parser)
    options = [f"--config={ROOT / location}", *(f"--config.{setting}" for setting in settings)]
    _, config = cli.parse(parser, options)
    pipeline, prepare = (
        (FantasyPortraitPipeline, PortraitPrepareConfig)
        if "portrait" in location
        else (FantasyTalkingPipeline, PrepareConfig)
    )
    kinds = {"model": ModelConfig, "video": VideoConfig, "sample": pipeline.config_type}
    kinds |= {"prepare": prepare, "train": StagesConfig}
    if "tiny" in location:
        kinds |= {"train": MiniatureConfig, "data": SyntheticConfig}
    for name, kind in kinds.items():
        section(kind, config, name)
    cli.config_files(location, config)


def _read_batch(path: Path) -> None:
    for request in read_batch(path):
        check_separate([path, request.image, *request.audio], request.outputs)
        media.video_format(request.output)
        for read, names in ((media.read_image, [request.image]), (media.read_audio, request.audio)):
            for name in names:
                with contextlib.suppress(FantasyError):  # as most names are of no file
                    read(name)


def _in_store(read: Callable[[Path], object], name: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, Path(folder, name))
        read(Path(folder))


def _read_pipeline(folder: Path) -> None:
    read_pipeline(folder, "FantasyTalkingPipeline", FantasyTalkingPipeline.config_type)


TARGETS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "picture": (media.read_image,),
    "sound": (media.read_audio, media.audio_seconds, lambda path: _exhaust(media.stream_audio(path, 44_100))),
    "video": (media.probe_video, media.read_video, lambda path: _exhaust(media.stream_frames(path, 25))),
    "weights": (open_weights, _read_weights, inspect),
    "latents": (partial(read_latents, channels=4), partial(read_noise, shape=(1, 2, 2, 2, 4))),
    "settings": (_read_settings,),
    "batch": (_read_batch,),
    "captions": (read_captions,),
    "store": (
        partial(_in_store, read_record, "component.json"),
        partial(_in_store, _read_pipeline, "pipeline.json"),
    ),
}
"""What reads an input, by the beginning of its name."""


def fault_of(path: Path, *, valid: bool = False) -> str:
    """What is wrong with how a file is read by its target; empty if nothing is.

    A `valid` file must not be refused by all readers of its target.
    """
    refusals = []
    for read in TARGETS[path.name.partition("-")[0]]:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stderr(printed):
                cli.run(lambda read=read: _exhaust([read(path)]), "fuzz")
        except SystemExit as stopped:
            *_, last = printed.getvalue().split("\n")[:-1] or [""]
            errors = printed.getvalue().count("fuzz: error: ")
            refused = last.startswith("fuzz: error: ") and last.isprintable() and errors == 1
            if stopped.code not in (0, 2) or "not enough memory" in last or (stopped.code and not refused):
                return f"exit code {stopped.code}: {printed.getvalue()}"
            if stopped.code:
                refusals.append(last)
        except Exception:
            return traceback.format_exc()
    all_refused = len(refusals) == len(TARGETS[path.name.partition("-")[0]])
    return f"it is valid, but refused: {refusals[0]}" if valid and all_refused else ""


def _work(connection: Connection) -> None:
    """Reads files by their paths, and sends back the fault of each, its duration and the memory so far."""
    resource.setrlimit(resource.RLIMIT_DATA, (4 * MEMORY, 4 * MEMORY))  # the machine is used by others, too
    connection.send(None)
    while (received := connection.recv()) is not None:
        path, valid = received
        start = time.perf_counter()
        fault = fault_of(path, valid=valid)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        connection.send((fault, time.perf_counter() - start, memory))


class Worker:
    """A process that reads files; it is started again after it has crashed, hung or used too much memory."""

    def __init__(self):
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    def read(self, path: Path, valid: bool) -> tuple[str, float, int]:
        """The fault of a file, its seconds, and the memory of the process so far."""
        if self._process is None:
            self._start()
        self._connection.send((path, valid))
        if not self._connection.poll(SECONDS + 5):
            return self._end("it hangs"), SECONDS + 5.0, 0
        try:
            fault, seconds, memory = self._connection.recv()
        except EOFError:
            self._process.join()
            return self._end(f"it crashes, exit code {self._process.exitcode}"), 0.0, 0
        if memory > MEMORY:
            fault = self._end(f"it takes {memory / 2**30:.2f} GiB\n{fault}")
        elif seconds > SECONDS:
            fault = f"it takes {seconds:.1f} s\n{fault}"
        return fault, seconds, memory

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._end("")

    def _end(self, fault: str) -> str:
        self._process.kill()
        self._process.join()
        self._process = None
        return fault


def _kind(fault: str) -> str:
    """What two faults of one kind share: where an error is raised and its class."""
    lines = [line.strip() for line in fault.splitlines()]
    raised = [line for line in lines if line.startswith("File ")]
    return " ".join([*raised[-1:], (lines[-1] if raised else lines[0]).partition(":")[0]])


def _short(fault: str) -> str:
    """A fault without what a traceback shows of other packages."""
    lines = fault.rstrip().splitlines()
    ours = [line.strip() for line in lines if "File " in line and "fantasy_jax" in line]
    return "\n  ".join([*ours[-3:], *lines[-2:]])[:1000]


def _inputs(random: Random, seeds: Mapping[str, Seeds], spent: Mapping[str, float]) -> Iterator[tuple]:
    """Yields targets, suffixes, contents, and whether they are valid.

    First come those that are, then changed ones of the target that took least time.
    """
    for target, files in seeds.items():
        yield from ((target, *file, True) for file in files)
    while True:
        target = min(seeds, key=lambda target: spent[target])
        yield (target, *MAKERS[target][1](random, seeds[target]), False)


def fuzz(folder: Path, seconds: float, seed: int, corpus: Path) -> int:
    """Reads changed inputs for some time; returns how many kinds of faults were found."""
    seeds, found, largest = {}, set(), 0
    counts, spent, slowest = Counter(), defaultdict(float), defaultdict(float)
    for target, (make, _) in MAKERS.items():
        (folder / target).mkdir()
        seeds[target] = make(folder / target)
    worker, started = Worker(), None
    with tqdm(total=seconds, bar_format="{l_bar}{bar}| {elapsed}, {remaining} left{postfix}") as bar:
        for target, suffix, content, valid in _inputs(Random(seed), seeds, spent):
            path = folder / f"{target}-input{suffix}"
            path.write_bytes(content)
            fault, took, memory = worker.read(path, valid)
            started = started or time.monotonic()  # the worker has started
            counts[target] += 1
            spent[target] += took
            slowest[target], largest = max(slowest[target], took), max(largest, memory)
            if fault and (target, _kind(fault)) not in found:
                found.add((target, _kind(fault)))
                name = f"{target}-{hashlib.sha256(content).hexdigest()[:8]}{suffix}"
                (corpus / name).write_bytes(content)
                bar.write(f"{name}: {_short(fault)}", file=sys.stderr)
            bar.n = min(time.monotonic() - started, seconds)
            bar.set_postfix(inputs=counts.total(), faults=len(found))
            if bar.n >= seconds and not valid:  # however slow the machine is, what is valid is read
                break
    worker.close()
    for target, count in counts.items():
        print(f"{target:10} {count:7} inputs, the slowest {slowest[target]:.2f} s")
    print(f"{counts.total()} inputs, {len(found)} kinds of faults, at most {largest / 2**30:.2f} GiB")
    return len(found)


def main() -> int:
    """Parses the command line."""
    parser = cli.ArgumentParser(prog="fuzz.py", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=cli.integer(0), default=0)
    parser.add_argument(
        "--corpus", type=Path, default=CORPUS, help="folder of the inputs that find something"
    )
    arguments = parser.parse_args()
    corpus = arguments.corpus.absolute()
    corpus.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
    ):  # where relative paths name nothing
        return min(fuzz(Path(folder), arguments.seconds, arguments.seed, corpus), 1)


if __name__ == "__main__":
    cli.run(main, "fuzz.py")
