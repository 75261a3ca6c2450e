"""Runs that are killed and runs of several processes end with the weights of an uninterrupted run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import test_loading
from helpers import random_network
from safetensors.numpy import save_file
from xla_flags import quick_flags

from configs.fantasy_talking_14b import small_model
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.files import lock_folder
from fantasy_jax.system.registry import component_of
from fantasy_jax.weights.check import check_store
from fantasy_jax.weights.loading import StoredLoader
from fantasy_jax.weights.lora import LoRAFile, open_loras
from fantasy_jax.weights.store import LORA, save_network

ROOT = Path(__file__).parent.parent
NUM_STEPS = 120

PROGRAM = """
import os, sys
sys.modules["torch"] = None  # not needed, and tensorboardX would import it, half of the start of a process
from functools import partial
from pathlib import Path

import jax, jax.numpy as jnp, numpy as np
from flax import nnx

from fantasy_jax.data.loader import batches
from fantasy_jax.sharding import init_distributed, make_mesh
from fantasy_jax.training.loop import LoopConfig, TrainingTask, train
from fantasy_jax.training.optim import OptimizerConfig

workdir, mesh = Path(sys.argv[1]), eval(sys.argv[4])
num_steps, save_every = map(int, sys.argv[2:4])


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
    init_distributed()
read = partial(batches, [Numbers()], jitter)
optimizer = OptimizerConfig(learning_rate=0.01, warmup_steps=2)
task = TrainingTask("layers", Layers(), loss, read, 8, num_steps, optimizer)
config = LoopConfig(log_every=1, save_every=save_every, sample_every=0, keep_last=3, num_workers=0)
model = train(task, config, workdir, make_mesh(**mesh))
from jax.experimental import multihost_utils
state = multihost_utils.process_allgather(nnx.state(model, nnx.Param), tiled=True)
if jax.process_index() == 0:
    np.savez(workdir / "model.npz", *jax.tree.leaves(state))
"""


def start(
    workdir,
    *,
    num_steps=NUM_STEPS,
    save_every=2,
    mesh="{}",
    processes=1,
    devices=8,
    cache=None,
    program=PROGRAM,
):
    """Starts the program as several processes, each with a number of virtual devices.

    With a folder as `cache` it finds there the programs that earlier starts have compiled.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    base = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick_flags(devices)}
    if cache is not None:
        base |= {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(cache)}
        base["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-c", program, str(workdir), str(num_steps), str(save_every), mesh]
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
    """All losses that runs have logged, by step."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(workdir.glob("events*"), key=lambda path: path.stat().st_mtime):
        content, offset = path.read_bytes(), 0
        # Length and its checksum, an event and its checksum; a kill may have truncated the last one.
        while (length := int.from_bytes(content[offset : offset + 8], "little")) <= len(
            content
        ) - offset - 16:
            event = Event.FromString(content[offset + 12 : offset + 12 + length])
            offset += length + 16
            for value in event.summary.value:
                if value.tag.endswith("/loss"):
                    found.setdefault(event.step, set()).add(value.simple_value)
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(start(workdir, mesh="{'fsdp': 4, 'tensor': 2}", cache=cache))
    return workdir


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_weights(uninterrupted, tmp_path, cache):
    rng = np.random.default_rng(0)
    kills = 0
    while kills < 20:
        (process,) = start(tmp_path, mesh="{'fsdp': 4, 'tensor': 2}", cache=cache)
        checkpoints, begun = tmp_path / "checkpoints", time.monotonic()
        before = set(checkpoints.glob("*")) if checkpoints.exists() else set()
        # After it has saved a new checkpoint, at any moment, during a save too.
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
    finish(start(tmp_path, mesh="{'fsdp': 4, 'tensor': 2}", cache=cache))
    assert kills == 20
    assert all(np.array_equal(a, b) for a, b in zip(weights(tmp_path), weights(uninterrupted), strict=True))
    expected, found = losses(uninterrupted), losses(tmp_path)
    assert set(expected) == set(found) == set(range(1, NUM_STEPS + 1))
    # Steps that are repeated after a kill have the same losses.
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["{'data': 2, 'fsdp': 4}", "{'fsdp': 2, 'context': 2, 'tensor': 2}"])
def test_two_processes_train_as_one(uninterrupted, mesh, tmp_path):
    finish(start(tmp_path, processes=2, devices=4, mesh=mesh))
    for one, other in zip(weights(tmp_path), weights(uninterrupted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(tmp_path):
    two = start(tmp_path, num_steps=10**6, save_every=20, processes=2, devices=1, mesh="{'fsdp': 2}")
    wait_for(tmp_path, "checkpoints/20")
    two[1].send_signal(signal.SIGINT)  # forwarded as SIGTERM
    errors = [process.communicate(timeout=240)[1] for process in two]
    step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert step >= 20
    for text in errors:
        assert "Stopped" in text, text[-2000:]
        assert f"step {step} " in text, text[-2000:]


@pytest.mark.slow
def test_four_processes_resume_from_two_on_another_mesh(uninterrupted, tmp_path):
    two = start(tmp_path, processes=2, devices=4, mesh="{'data': 2, 'fsdp': 4}")
    wait_for(tmp_path, "checkpoints/20")
    for process in two:
        process.kill()
    for process in two:
        process.communicate()
    assert not (tmp_path / f"checkpoints/{NUM_STEPS}").exists()
    # The four find that the newest checkpoint is damaged, and go on from the one before.
    newest = max((tmp_path / "checkpoints").glob("*[0-9]"), key=lambda path: int(path.name))
    largest = max(newest.glob("state/**/*"), key=lambda path: path.is_file() and path.stat().st_size)
    largest.write_bytes(b"\xff" * largest.stat().st_size)
    finish(start(tmp_path, processes=4, devices=2, mesh="{'fsdp': 2, 'context': 2, 'tensor': 2}"))
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    for one, other in zip(weights(tmp_path), weights(uninterrupted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_all_processes_are_refused_while_another_run_uses_the_folder(tmp_path):
    with lock_folder(tmp_path):
        two = start(tmp_path, processes=2, devices=1, mesh="{'fsdp': 2}")
        errors = [process.communicate(timeout=240)[1] for process in two]
    assert all("ConfigError" in text for text in errors), errors
    assert all(process.returncode for process in two)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_full_disk_of_one_of_two_processes_ends_both_in_one_line(tmp_path):
    two = start(tmp_path, save_every=4, processes=2, devices=1, mesh="{'fsdp': 2}", program=FULL + PROGRAM)
    errors = [process.communicate(timeout=240)[1] for process in two]
    assert [process.returncode for process in two] == [2, 2], errors
    for text in errors:
        (told,) = (line for line in re.split("[\r\n]", text) if "error:" in line)
        assert "no space left on device" in told
        assert "Traceback" not in text
    assert "process 1 failed" in errors[0]
    newest = max(int(path.name) for path in (tmp_path / "checkpoints").glob("*") if path.name.isdecimal())
    assert newest == 8


FULL = """
import errno, os
from fantasy_jax.training import checkpoint

def write(folder, process, written=checkpoint.write_checksums_of_process):
    # The disk of the second process is full at its third checkpoint.
    written(folder, process)
    if process == 1 and len(list(folder.parent.glob("*[0-9]"))) == 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

checkpoint.write_checksums_of_process = write
"""
SAVING = """
import sys
from pathlib import Path

import jax
from flax import nnx

from fantasy_jax.models.adapters.audio import AudioAdapter, AudioAdapterConfig
from fantasy_jax.sharding import in_host_memory, init_distributed
from fantasy_jax.weights.store import save_network

init_distributed()
sizes = AudioAdapterConfig(feature_width=8, token_width=8, width=8, num_heads=2, num_layers=2)
with in_host_memory():
    adapter = AudioAdapter(sizes, rngs=nnx.Rngs(0))
if jax.process_index() == 0:
    save_network(Path(sys.argv[1]), adapter, component="fantasytalking")
"""


@pytest.mark.slow
def test_one_of_two_processes_saves_a_network(tmp_path):
    folder = tmp_path / "audio_adapter"
    finish(start(folder, processes=2, devices=1, program=SAVING))
    assert check_store(tmp_path)[0].faults == []


def with_loras(folder, merge, mesh=None):
    """A stored transformer, float32, with the LoRA of the store and one of another program."""
    sizes = small_model().transformer
    loras = open_loras([LoRAFile(str(folder / test_loading.FILE), 0.5)], sizes)
    load = StoredLoader(folder, merge_lora=merge, loras=loras)
    return load(component_of(sizes), sizes, jnp.dtype("float32"), mesh)


MERGING = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path

import jax, numpy as np
from jax.experimental import multihost_utils

from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.sharding import init_distributed, make_mesh
from test_distributed import with_loras

folder = Path(sys.argv[1])
init_distributed()
for merge in (True, False):
    values = flat_parameters(with_loras(folder, merge, make_mesh(fsdp=2, tensor=2)))
    values = multihost_utils.process_allgather(values, tiled=True)
    if jax.process_index() == 0:
        np.savez(folder / f"{merge}.npz", **values)
"""


@pytest.mark.slow
def test_two_processes_add_loras_as_one(tmp_path):
    sizes = small_model().transformer
    network = random_network(sizes)
    save_network(tmp_path / "transformer", network, component=component_of(sizes).name)
    save_network(tmp_path / LORA, test_loading.lora(network), component=LORA)
    save_file(test_loading.file_tensors(), tmp_path / test_loading.FILE)
    finish(start(tmp_path, processes=2, devices=2, program=MERGING))
    for merge in (True, False):
        expected = flat_parameters(with_loras(tmp_path, merge))
        with np.load(tmp_path / f"{merge}.npz") as found:
            assert set(found) == set(expected)
            for path, value in expected.items():
                np.testing.assert_array_equal(found[path], value, strict=True, err_msg=path)
