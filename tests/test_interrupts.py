"""Ctrl-C reaches every process of a terminal's group, SIGKILL one: what is told, and what is left running."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from xla_flags import quick_flags

from fantasy_jax import cli
from fantasy_jax.errors import Stopped
from fantasy_jax.training import loop

ROOT = Path(__file__).parent.parent

PROGRAM = """
import sys

if __name__ == "__main__":
    from fantasy_jax.cli import exit_on_interrupt

    exit_on_interrupt("program")

sys.modules["torch"] = None  # not needed, and tensorboardX would import it
import time
from functools import partial
from pathlib import Path

import numpy as np


class Numbers:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.001)
        return {"x": np.random.default_rng(index).normal(size=16).astype(np.float32)}


def same(record, rng):
    return record


def main():
    import jax.numpy as jnp
    from flax import nnx

    from fantasy_jax.data.loader import batches
    from fantasy_jax.sharding import make_mesh
    from fantasy_jax.training.loop import LoopConfig, TrainingTask, train
    from fantasy_jax.training.optim import OptimizerConfig

    def loss(model, batch, keys):
        return jnp.square(model(batch["x"]) - batch["x"]).mean(), {}

    read = partial(batches, [Numbers()], same)
    model = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    task = TrainingTask("part", model, loss, read, 8, 10**6, OptimizerConfig())
    config = LoopConfig(log_every=1, save_every=3, sample_every=0, num_workers=2)
    train(task, config, Path(sys.argv[1]), make_mesh())


if __name__ == "__main__":
    from fantasy_jax import cli

    cli.run(main, "program")
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


def start(program, workdir):
    """Starts the program as the first process of a group, like a terminal."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags()}
    return subprocess.Popen(
        [sys.executable, str(program), str(workdir)],
        env=os.environ | flags | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def group(process):
    """The processes of a program's group that are alive, by their state in /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == process.pid and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def lines(errors):
    """What a program has told, without its progress bars and what it tells if stopping takes long."""
    told = [line for line in re.split("[\r\n]", errors) if line.strip() and "%|" not in line]
    return [line for line in told if not line.endswith(cli._STOPPING)]


def interrupt(process, workdir):
    """Sends SIGINT to the whole group; returns the one line that comes."""
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    told = lines(errors)
    assert process.returncode == 130, errors[-3000:]
    assert len(told) == 1, errors[-3000:]
    assert "Traceback" not in errors
    if stopped := re.search(r"saved at step (\d+)", told[0]):
        assert (workdir / "checkpoints" / stopped[1] / "checksums.json").exists()
    else:
        assert told[0] == "program: interrupted"
    wait_until(lambda: not group(process))
    return told[0]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["imports", "workers start", "training"])
def test_ctrl_c_is_one_line_whatever_it_meets(program, tmp_path, moment):
    process = start(program, tmp_path)
    if moment == "imports":
        time.sleep(1)
    elif moment == "workers start":
        wait_until(lambda: len(group(process)) > 2)  # their first seconds are imports
    else:
        wait_until(lambda: (tmp_path / "checkpoints/6").exists())
    told = interrupt(process, tmp_path)
    assert ("saved" in told) == (moment != "imports")


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(program, tmp_path):
    process = start(program, tmp_path)
    wait_until(lambda: (tmp_path / "checkpoints/3").exists())
    assert len(group(process)) > 2
    process.kill()
    process.communicate()
    wait_until(lambda: not group(process), seconds=10)


class Dropped:
    """Python drops what its destructor raises."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def drop():
    Dropped()
    time.sleep(30)


def replace_error():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise RuntimeError("compilation failed\nin many lines") from error


def work_on_in_cleanup():
    try:
        signal.raise_signal(signal.SIGINT)
    finally:  # as where latents are kept
        signal.raise_signal(signal.SIGINT)
        print("cleaned up")


@pytest.mark.parametrize("main", [drop, replace_error, work_on_in_cleanup])
def test_an_interrupt_is_one_line_whatever_python_and_libraries_make_of_it(main, capsys):
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with pytest.raises(SystemExit) as stopped:
        cli.run(main, "program")
    assert stopped.value.code == 130
    printed = capsys.readouterr()
    assert printed.err == "program: interrupted\n"
    assert (main is work_on_in_cleanup) == (printed.out == "cleaned up\n")
    assert signal.getsignal(signal.SIGINT) is handler
    assert sys.unraisablehook is hook


def test_ctrl_c_is_answered_where_nothing_stops_and_the_second_ends_at_once(monkeypatch, capfd):
    ended = threading.Event()
    monkeypatch.setattr(cli, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(cli, "_SAME_SECONDS", 0.2)
    monkeypatch.setattr(cli, "_end", lambda prog: ended.set())

    def compile_for_long():
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.raise_signal(signal.SIGINT)  # sent twice, as by `timeout`
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.5)
        assert not ended.is_set()
        signal.raise_signal(signal.SIGINT)
        assert ended.wait(10)

    with pytest.raises(SystemExit) as stopped:
        cli.run(compile_for_long, "program")
    assert stopped.value.code == 0
    assert capfd.readouterr().err == f"\nprogram: {cli._STOPPING}\n"


@pytest.mark.parametrize(
    ("received", "repeated", "same_seconds", "ended"),
    [(2, 0, 9, 0), (2, 0, -1, 1), (2, 1, -1, 0), (3, 1, -1, 1)],
)
def test_what_counts_as_a_second_ctrl_c(monkeypatch, received, repeated, same_seconds, ended):
    """Neither what is sent with the first one does, nor what the program repeats."""
    ends = []
    monkeypatch.setattr(cli, "_SAME_SECONDS", same_seconds)
    monkeypatch.setattr(cli, "_end", ends.append)
    reading, writing = os.pipe()
    os.write(writing, bytes(received * [signal.SIGINT]))
    os.close(writing)
    cli._answer_interrupts("program", reading, repeated * [signal.SIGINT])
    assert len(ends) == ended


def test_one_ctrl_c_that_is_answered_ends_by_saving(monkeypatch, capfd):
    monkeypatch.setattr(cli, "_PATIENCE_SECONDS", 0)
    saved, write = [], cli._write_error

    def slow_write(text):
        time.sleep(0.2)
        write(text)

    monkeypatch.setattr(cli, "_write_error", slow_write)

    def main():
        with loop._stop_signals() as signals:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)  # the message is being printed
            saved.extend(signals)
        time.sleep(0.3)
        raise Stopped("saved", signal.SIGINT)

    with pytest.raises(SystemExit) as stopped:
        cli.run(main, "program")
    assert stopped.value.code == 130
    assert saved == [signal.SIGINT]
    assert capfd.readouterr().err == f"\nprogram: {cli._STOPPING}\nsaved\n"


def test_a_warning_that_nobody_reads_ends_nothing(monkeypatch):
    write = mock.Mock(side_effect=BrokenPipeError)
    monkeypatch.setattr(cli.tqdm, "write", write)
    with cli._warnings_shown():
        logging.getLogger("fantasy_jax.part").warning("unread")
    assert write.called
