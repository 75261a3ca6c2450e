"""Runs that are killed, and runs of several processes: they end as one that nothing happened to."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fantasy_jax.training.loop import LoopConfig

ROOT = Path(__file__).parent.parent
STEPS = 120

PROGRAM = """
import os, sys
from functools import partial
from pathlib import Path

import jax, jax.numpy as jnp, numpy as np
from flax import nnx

from fantasy_jax.data.loader import batches
from fantasy_jax.sharding import join_processes, make_mesh
from fantasy_jax.training.loop import LoopConfig, Task, train
from fantasy_jax.training.optim import OptimizerConfig

workdir, steps, save_every, mesh = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])


class Numbers:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"x": np.random.default_rng(index).normal(size=16).astype(np.float32)}


def jitter(record, rng):
    return {"x": record["x"] + rng.normal(size=16).astype(np.float32) / 10}


class Layers(nnx.Module):
    def __init__(self):
        self.mlp_in = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
        self.mlp_out = nnx.Linear(32, 16, rngs=nnx.Rngs(1))


def loss(model, batch, keys):
    noisy = batch["x"] + 0.1 * jax.vmap(lambda key: jax.random.normal(key, batch["x"].shape[1:]))(keys)
    return jnp.square(model.mlp_out(nnx.relu(model.mlp_in(noisy))) - batch["x"]).mean(), {}


if "JAX_COORDINATOR_ADDRESS" in os.environ:
    join_processes()
read = partial(batches, Numbers(), jitter)
task = Task("layers", Layers(), loss, read, 8, steps, OptimizerConfig(learning_rate=0.01, warmup=2))
config = LoopConfig(log_every=1, save_every=save_every, show_every=0, keep_last=3, workers=0)
model = train(task, config, workdir, make_mesh(**mesh))
from jax.experimental import multihost_utils
state = multihost_utils.process_allgather(nnx.state(model, nnx.Param), tiled=True)
if jax.process_index() == 0:
    np.savez(workdir / "model.npz", *jax.tree.leaves(state))
"""


def start(workdir, *, steps=STEPS, save_every=2, mesh="{}", processes=1, devices=8):
    """Starts the program, as so many processes with so many pretended devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices}"
    base = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-c", PROGRAM, str(workdir), str(steps), str(save_every), mesh]
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=base | (several | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def wait_for(folder, pattern):
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.002)


def finish(processes):
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]


def weights(workdir):
    with np.load(workdir / "model.npz") as file:
        return [file[name] for name in file.files]


def losses(workdir):
    """The losses that runs have logged, of every step."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(workdir.glob("events*"), key=lambda path: path.stat().st_mtime):
        content, place = path.read_bytes(), 0
        # Length and its checksum, an event and its checksum; a kill may have cut the last one.
        while (length := int.from_bytes(content[place : place + 8], "little")) <= len(content) - place - 16:
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += length + 16
            for value in event.summary.value:
                if value.tag.endswith("/loss"):
                    found.setdefault(event.step, set()).add(value.simple_value)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir, mesh="{'fsdp': 4, 'tensor': 2}"))
    return workdir


@pytest.mark.slow
def test_killed_twenty_times_a_run_ends_as_if_it_was_not(undisturbed, tmp_path):
    rng = np.random.default_rng(0)
    kills = 0
    while kills < 20:
        (process,) = start(tmp_path, mesh="{'fsdp': 4, 'tensor': 2}")
        checkpoints, begun = tmp_path / "checkpoints", time.monotonic()
        before = set(checkpoints.glob("*")) if checkpoints.exists() else set()
        # Not before it has come further, and then at any moment, in the middle of a save, too.
        while process.poll() is None and time.monotonic() < begun + 60:
            if checkpoints.exists() and set(checkpoints.glob("*")) - before:
                time.sleep(rng.uniform(0, 0.15))
                break
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    finish(start(tmp_path, mesh="{'fsdp': 4, 'tensor': 2}"))
    assert kills == 20
    assert all(np.array_equal(a, b) for a, b in zip(weights(tmp_path), weights(undisturbed), strict=True))
    whole, parts = losses(undisturbed), losses(tmp_path)
    assert set(whole) == set(parts) == set(range(1, STEPS + 1))
    # What was done again after a kill came out the same.
    assert parts == whole


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["{'data': 2, 'fsdp': 4}", "{'fsdp': 2, 'context': 2, 'tensor': 2}"])
def test_two_processes_are_one(undisturbed, mesh, tmp_path):
    finish(start(tmp_path, processes=2, devices=4, mesh=mesh))
    for one, other in zip(weights(tmp_path), weights(undisturbed), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_one_of_two_processes_is_told_to_stop_and_both_save_in_time(tmp_path):
    two = start(tmp_path, steps=10**6, save_every=20, processes=2, devices=1, mesh="{'fsdp': 2}")
    wait_for(tmp_path, "checkpoints/20")
    two[1].send_signal(signal.SIGINT)  # which the process sends on to itself as SIGTERM
    begun = time.monotonic()
    errors = [process.communicate(timeout=240)[1] for process in two]
    assert time.monotonic() - begun < LoopConfig().grace_seconds
    step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert step >= 20
    for text in errors:
        assert f"Stopped: layers: stopped and saved at step {step} of 1000000" in text, text[-2000:]


@pytest.mark.slow
def test_four_processes_go_on_from_two_on_another_mesh(undisturbed, tmp_path):
    two = start(tmp_path, processes=2, devices=4, mesh="{'data': 2, 'fsdp': 4}")
    wait_for(tmp_path, "checkpoints/20")
    for process in two:
        process.kill()
    for process in two:
        process.communicate()
    assert not (tmp_path / f"checkpoints/{STEPS}").exists()
    finish(start(tmp_path, processes=4, devices=2, mesh="{'fsdp': 2, 'context': 2, 'tensor': 2}"))
    for one, other in zip(weights(tmp_path), weights(undisturbed), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
