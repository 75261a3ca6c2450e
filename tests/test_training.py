"""The training loop: runs that are stopped resume bit for bit, and a folder belongs to one run at a time."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax.errors import ConfigError, Stopped
from fantasy_jax.files import lock_folder
from fantasy_jax.sharding import make_global_batch, make_mesh
from fantasy_jax.training.loop import LoopConfig, TrainingTask, train
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.state import Trainer

LOOP = LoopConfig(log_every=1, save_every=100, sample_every=0, num_workers=0)
OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup_steps=2)
MESH = make_mesh()


class Line(nnx.Module):
    """A small model, with a random loss as in diffusion."""

    def __init__(self):
        self.weight = nnx.Param(jnp.zeros((3, 3)))


def line_loss(model, batch, keys):
    noisy = batch["x"] + 0.1 * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    return jnp.square(noisy @ model.weight[...] - 2 * batch["x"]).mean(), {"noise": noisy.std()}


def line_task(*, num_steps=12, stop_at=None, broken_at=None, sample=None, **settings):
    def batches(*, start, rows, **_):
        for step in range(start, num_steps):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            x = np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)
            broken = step == broken_at
            yield {"x": (x * (np.nan if broken else 1))[rows], "record": np.arange(4)[rows]}

    return TrainingTask(
        "line", Line(), line_loss, batches, 4, num_steps, OPTIMIZER, sample=sample, settings=settings
    )


def weight(model):
    return np.asarray(model.weight[...])


def saved_steps(folder):
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_training_learns(tmp_path):
    learnt = weight(train(line_task(num_steps=300), LOOP, tmp_path, MESH))
    assert np.abs(learnt - 2 * np.eye(3)).max() < 0.15


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    expected = weight(train(line_task(), LOOP, tmp_path / "at once", MESH))
    with pytest.raises(Stopped) as stopped:
        train(line_task(stop_at=5), LOOP, tmp_path / "resumed", MESH)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert saved_steps(tmp_path / "resumed") == {"6"}
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # restored
    assert np.array_equal(weight(train(line_task(), LOOP, tmp_path / "resumed", MESH)), expected)
    # A complete run is not trained further.
    assert np.array_equal(weight(train(line_task(), LOOP, tmp_path / "resumed", MESH)), expected)


def test_a_run_is_saved_before_it_samples(tmp_path):
    def sample(model, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Stopped):
        train(line_task(sample=sample), replace(LOOP, sample_every=4), tmp_path, MESH)
    assert saved_steps(tmp_path) == {"4"}


def test_samples_get_a_folder_if_videos_are_wanted(tmp_path):
    folders = []

    def sample(model, folder):
        folders.append(folder)
        return {"image": np.zeros((2, 2, 3), np.uint8)}

    loop = replace(LOOP, sample_every=8)
    train(line_task(sample=sample), loop, tmp_path / "images", MESH)
    train(line_task(sample=sample), replace(loop, sample_videos=True), tmp_path / "videos", MESH)
    assert folders == [None, None, *(tmp_path / f"videos/samples/{step:06d}" for step in (8, 12))]


def test_a_short_grace_time_is_warned_about_once(tmp_path, caplog):
    train(line_task(), replace(LOOP, save_every=4), tmp_path / "enough", MESH)
    train(line_task(), replace(LOOP, save_every=4, grace_seconds=1e-3), tmp_path / "short", MESH)
    (warning,) = (record.message for record in caplog.records if record.name == "fantasy_jax.training.loop")
    assert "grace_seconds" in warning


def test_a_checkpoint_holds_settings_and_position(tmp_path):
    train(line_task(kind="straight"), LOOP, tmp_path, MESH)
    about = tmp_path / "checkpoints/12/about/metadata"
    assert json.loads(about.read_text()) == {
        "settings": {"kind": "straight"},
        "position": {"step": 12, "examples": 48},
        "num_steps": 12,
    }


def test_the_step_compiles_once_transfers_nothing_and_donates_its_state():
    mesh = make_mesh(fsdp=4)
    with jax.set_mesh(mesh):
        trainer = Trainer(Line(), line_loss, OPTIMIZER, 10, seed=0, mesh=mesh)
        state = trainer.init_state()
        for i in range(3):
            x = np.full((4, 3), i, np.float32)
            batch = make_global_batch({"x": x}, np.arange(4), 4, mesh)
            step = jax.device_put(np.int32(i), NamedSharding(mesh, PartitionSpec()))
            with jax.transfer_guard("disallow"):
                new_state, metrics = trainer.step(state, trainer.frozen_state, batch, step)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
            assert bool(metrics["finite"])
            state = new_state
        assert trainer.step._cache_size() == 1
        # A step whose number does not match the state changes nothing.
        before = weight(trainer.model(state.params)).copy()
        state, metrics = trainer.step(state, trainer.frozen_state, batch, step)
        assert not bool(metrics["finite"])
        assert int(state.step) == 3
        assert np.array_equal(weight(trainer.model(state.params)), before)


def test_config_error_when_settings_changed(tmp_path):
    train(line_task(kind="straight"), LOOP, tmp_path, MESH)
    with pytest.raises(ConfigError, match="kind"):
        train(line_task(kind="crooked"), LOOP, tmp_path, MESH)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="records 0, 1, 2, 3"):
        train(line_task(broken_at=4), replace(LOOP, save_every=2), tmp_path, MESH)
    assert saved_steps(tmp_path) >= {"2", "4"}
    assert "5" not in saved_steps(tmp_path)


@pytest.mark.parametrize("name", ["log_every", "save_every", "keep_last", "num_workers", "sample_every"])
def test_config_error_for_loop(name):
    with pytest.raises(ConfigError, match=name):
        LoopConfig(**{name: -1})


LOCK = """
import sys, time
from fantasy_jax.files import lock_folder

with lock_folder(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def lock_in_another_process(folder):
    """Starts a process that holds the lock until its standard input closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    return process


def test_config_error_while_another_process_trains_in_the_folder(tmp_path):
    with lock_in_another_process(tmp_path) as other:
        with pytest.raises(ConfigError) as caught:
            train(line_task(), LOOP, tmp_path, MESH)
        assert all(part in str(caught.value) for part in (str(tmp_path), str(other.pid), os.uname().nodename))
        assert not (tmp_path / "checkpoints").exists()
        train(line_task(), LOOP, tmp_path / "another", MESH)
        other.stdin.close()
    train(line_task(), LOOP, tmp_path, MESH)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    with lock_in_another_process(tmp_path) as other:
        other.kill()
        other.wait()
        assert str(other.pid) in (tmp_path / ".lock").read_text()
        train(line_task(), LOOP, tmp_path, MESH)


def test_an_error_releases_the_lock(tmp_path):
    def fail():
        with lock_folder(tmp_path):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with lock_folder(tmp_path):
        pass
