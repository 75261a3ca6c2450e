"""Training: a run that is stopped goes on bit for bit, and the small system learns what it should."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax import cli
from fantasy_jax.cli import Stopped
from fantasy_jax.config import ConfigError, build, load_config
from fantasy_jax.data.synthetic import SyntheticConfig, records
from fantasy_jax.models.vae import VAEConfig, WanVAE
from fantasy_jax.pipeline import ModelConfig
from fantasy_jax.sharding import assemble_batch, make_mesh
from fantasy_jax.training.course import TrainConfig
from fantasy_jax.training.loop import LoopConfig, Task, train
from fantasy_jax.training.optim import OptimizerConfig, make_optimizer
from fantasy_jax.training.state import Trainer
from fantasy_jax.training.vae import Crop, normalise_latents, start_from_principal_components
from train import main

ROOT = Path(__file__).parent.parent
LOOP = LoopConfig(log_every=1, save_every=100, show_every=0, workers=0)
OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup=2)
MESH = make_mesh()


class Line(nnx.Module):
    """Something small to train, with a random loss as diffusion has."""

    def __init__(self):
        self.weight = nnx.Param(jnp.zeros((3, 3)))


def line_loss(model, batch, keys):
    noisy = batch["x"] + 0.1 * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    return jnp.square(noisy @ model.weight[...] - 2 * batch["x"]).mean(), {"noise": noisy.std()}


def line_task(*, steps=12, stop_at=None, broken_at=None, show=None, **settings):
    def batches(*, start, rows, **_):
        for step in range(start, steps):
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            x = np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)
            broken = step == broken_at
            yield {"x": (x * (np.nan if broken else 1))[rows], "record": np.arange(4)[rows]}

    return Task("line", Line(), line_loss, batches, 4, steps, OPTIMIZER, show=show, settings=settings)


def weight(model):
    return np.asarray(model.weight[...])


def test_it_learns(tmp_path):
    learnt = weight(train(line_task(steps=300), LOOP, tmp_path, MESH))
    assert np.abs(learnt - 2 * np.eye(3)).max() < 0.15


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    whole = weight(train(line_task(), LOOP, tmp_path / "whole", MESH))
    with pytest.raises(Stopped, match="line: stopped and saved at step 6 of 12; the same command goes on"):
        train(line_task(stop_at=5), LOOP, tmp_path / "parts", MESH)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as it was
    assert np.array_equal(weight(train(line_task(), LOOP, tmp_path / "parts", MESH)), whole)
    # What is complete is not trained further.
    assert np.array_equal(weight(train(line_task(), LOOP, tmp_path / "parts", MESH)), whole)


def test_what_is_saved_before_pictures_is_all_there_is_to_save(tmp_path):
    def show(model, videos):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Stopped, match="line: stopped and saved at step 4 of 12"):
        train(line_task(show=show), replace(LOOP, show_every=4), tmp_path, MESH)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_a_grace_time_that_is_too_short_is_said_once(tmp_path, caplog):
    train(line_task(), replace(LOOP, save_every=4), tmp_path / "enough", MESH)
    train(line_task(), replace(LOOP, save_every=4, grace_seconds=1e-3), tmp_path / "short", MESH)
    (said,) = (record.message for record in caplog.records if record.name == "fantasy_jax.training.loop")
    assert "may take more than grace_seconds, 0.001; have the signal sent earlier" in said


def test_a_checkpoint_says_where_the_run_stands(tmp_path):
    train(line_task(kind="straight"), LOOP, tmp_path, MESH)
    about = tmp_path / "checkpoints/12/about/metadata"
    assert json.loads(about.read_text()) == {
        "settings": {"kind": "straight"},
        "position": {"step": 12, "examples": 48},
    }


def test_steps_are_compiled_once_move_nothing_and_give_their_memory_away():
    mesh = make_mesh(fsdp=4)
    with jax.set_mesh(mesh):
        trainer = Trainer(Line(), line_loss, OPTIMIZER, 10, seed=0, mesh=mesh)
        state = trainer.initial()
        for step in range(3):
            x = np.full((4, 3), step, np.float32)
            batch = assemble_batch({"x": x}, np.arange(4), 4, mesh)
            number = jax.device_put(np.int32(step), NamedSharding(mesh, PartitionSpec()))
            with jax.transfer_guard("disallow"):
                following, metrics = trainer.step(state, trainer.rest, batch, number)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
            assert bool(metrics["finite"])
            state = following
        assert trainer.step._cache_size() == 1
        # A step out of turn changes nothing.
        before = weight(trainer.model(state.params)).copy()
        state, metrics = trainer.step(state, trainer.rest, batch, number)
        assert not bool(metrics["finite"])
        assert int(state.step) == 3
        assert np.array_equal(weight(trainer.model(state.params)), before)


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path):
    train(line_task(kind="straight"), LOOP, tmp_path, MESH)
    with pytest.raises(ConfigError, match="was begun with another kind"):
        train(line_task(kind="crooked"), LOOP, tmp_path, MESH)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(
        FloatingPointError,
        match=r"line: step 5 \(records 0, 1, 2, 3\) is not finite \(loss nan\); step 4 is saved",
    ):
        train(line_task(broken_at=4), replace(LOOP, save_every=2), tmp_path, MESH)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} >= {"2", "4"}


def test_the_learning_rate_rises_and_falls():
    optimizer = make_optimizer(replace(OPTIMIZER, weight_decay=0.0, warmup=10), 100)
    params = {"x": jnp.ones((2, 2))}
    state, sizes = optimizer.init(params), []
    for _ in range(100):
        updates, state = optimizer.update({"x": jnp.ones((2, 2))}, state, params)
        sizes.append(float(-updates["x"][0, 0]))
    assert sizes[0] == 0
    assert np.argmax(sizes) == 10
    assert sizes[10] == pytest.approx(0.05, rel=1e-3)
    assert sizes[-1] == pytest.approx(0.005, rel=0.05)


@pytest.fixture(scope="module")
def clips():
    return list(records(SyntheticConfig(), "train", 48))


def test_crops_show_the_mouth_as_often_as_they_should(clips):
    rng = np.random.default_rng(0)
    crops = [Crop(32, 9, 1.0)(clips[i % 48], rng) for i in range(96)]
    assert all(crop["video"].shape == (9, 32, 32, 3) and crop["lips"].shape == (9, 32, 32) for crop in crops)
    assert np.mean([crop["lips"].max() > 127 for crop in crops]) > 0.95
    anywhere = [Crop(32, 9, 0.0)(clips[i % 48], rng) for i in range(96)]
    assert np.mean([crop["lips"].max() > 127 for crop in anywhere]) < 0.9


@pytest.mark.slow
def test_the_vae_starts_as_a_linear_coder_and_its_latents_can_be_normalised(clips):
    config = VAEConfig(
        dim=8,
        dim_mult=(1, 1, 1),
        num_res_blocks=1,
        temporal_downsample=(True, True),
        patch=2,
        linear_shortcut=True,
        latent_mean=(0.0,) * 16,
        latent_std=(1.0,) * 16,
    )
    vae = nnx.jit(lambda: WanVAE(config, rngs=nnx.Rngs(jax.random.key(0, impl="rbg"))))()
    video, lips = (np.stack([clip[name] for clip in clips]) for name in ("video", "lips"))
    start_from_principal_components(vae, video[8:], lips[8:], lips_weight=0.0)
    pixels = jnp.asarray(video[:8], jnp.float32) / 127.5 - 1
    there = nnx.jit(lambda vae, x: vae.encode(x))
    back = nnx.jit(lambda vae, x: vae.decode(x))
    latents = there(vae, pixels)
    decoded = back(vae, latents)
    psnr = -10 * np.log10(np.square((np.asarray(decoded) - np.asarray(pixels)) / 2).mean())
    assert psnr > 26  # sixteen numbers for each 8 x 8 x 4 pixels
    # Anything but one and zero, so that normalising has something to do.
    for layer in (vae.shortcut.encode_first, vae.shortcut.encode_chunk):
        layer.kernel[...] = 3 * layer.kernel[...]
        layer.bias[...] = 3 * layer.bias[...] + 1
    for layer in (vae.shortcut.decode_first, vae.shortcut.decode_chunk):
        layer.bias[...] = layer.bias[...] - layer.kernel[...].sum(axis=0) / 3
        layer.kernel[...] = layer.kernel[...] / 3
    np.testing.assert_allclose(back(vae, there(vae, pixels)), decoded, atol=1e-4)
    normalise_latents(vae, [video[:4], video[4:8]])
    latents = np.asarray(there(vae, pixels))
    np.testing.assert_allclose(latents.mean(axis=(0, 1, 2, 3)), 0, atol=1e-4)
    assert np.sqrt(latents.var(axis=(0, 1, 2, 3)).mean()) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(back(vae, latents), decoded, atol=1e-4)


def small_course(workdir, **changes):
    """The command that trains everything, at a size that teaches nothing."""
    settings = {
        "data.size": 32,
        "data.num_frames": 5,
        "data.train_clips": 8,
        "data.test_clips": 4,
        "sample.longest_edge": 32,
        "sample.max_frames": 5,
        "sample.steps": 2,
        "model.vae.dim": 8,
        "model.transformer.num_layers": 2,
        "model.audio_adapter.num_layers": 2,
        "train.mesh.fsdp": 1,
        "train.loop.save_every": 5,
        "train.loop.show_every": 30,
        "train.loop.log_every": 1,
        "model.identity_adapter.num_layers": 2,
        "train.speech.steps": 2,
        "train.speech.batch_size": 2,
        "train.face.steps": 2,
        "train.face.batch_size": 2,
        "train.vae.steps": 30,
        "train.vae.batch_size": 2,
        "train.vae.crop": 16,
        "train.vae.frames": 5,
        "train.clip_stage.steps": 2,
        "train.clip_stage.batch_size": 2,
        "train.frame_stage.steps": 30,
        "train.frame_stage.batch_size": 2,
    }
    options = [f"--config.{name}={value}" for name, value in (settings | changes).items()]
    return [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *options]


def stop_course(command, workdir, part, **run):
    """Runs it until a part has its first checkpoint, then as if Ctrl-C was pressed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **run)
    deadline = time.monotonic() + 600
    first = workdir / part / "checkpoints/5"
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors[-2000:]
    assert f"{part}: stopped and saved at step" in errors
    assert "Traceback" not in errors
    assert not (workdir / part / "checkpoints/30").exists()


def final_state(workdir, part):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        state = checkpointer.restore((workdir / part / "checkpoints/30/state").resolve())
    return jax.tree.leaves(state)


@pytest.mark.slow
def test_the_whole_course_stopped_in_the_middle_ends_as_if_it_was_not(tmp_path):
    # What one of the four processes has compiled, the others need not.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = {"cwd": ROOT, "text": True, "env": os.environ | cache}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = subprocess.run(small_course(whole), capture_output=True, timeout=900, **run)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"Wrote {whole}/weights" in result.stdout

    command = small_course(parts, **{"train.loop.show_every": 0})
    stop_course(command, parts, "vae", **run)
    stop_course(command, parts, "frame_stage", **run)
    result = subprocess.run(command, capture_output=True, timeout=900, **run)
    assert result.returncode == 0, result.stderr[-2000:]
    for part in ("vae", "frame_stage"):
        one, other = final_state(whole, part), final_state(parts, part)
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    # Losses and pictures of every part.
    events = [path for name in ("vae", "clip_stage", "frame_stage") for path in whole.glob(f"{name}/events*")]
    assert len(events) == 3
    assert min(path.stat().st_size for path in events) > 10_000


def test_every_setting_of_the_miniature_can_be_built():
    config = load_config(str(ROOT / "configs/tiny.py:quick"))
    build(ModelConfig, config.model, "model")
    course = build(TrainConfig, config.train, "train")
    assert course.clip_stage.audio == "clip"
    assert course.clip_stage.lip_probability == 0
    assert course.frame_stage.audio == "frame"
    assert course.frame_stage.lip_probability == 0.8


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("--config.train.vae.frames=8", "train.vae.frames is 8; it must be 4k + 1"),
        (
            "--config.train.frame_stage.lip_probability=2",
            "lip_probability is 2.0; it must lie between 0 and 1",
        ),
        (
            "--config.train.clip_stage.audio=song",
            "train.clip_stage.audio: is 'song'; use one of 'clip', 'frame'",
        ),
        ("--config.train.loop.workers=-1", "workers is -1; it must not be negative"),
        ("--config.train.vae.crop=128", "train.vae: crops of 9 frames of 128 do not fit; at most 17 of 64"),
        ("--config.train.mesh.fsdp=-2", "mesh of data 1, fsdp -2, context 1, tensor 1: sizes are at least 1"),
        ("--config.train.mesh.fsdp=3", "a batch of 32 cannot be shared by 3"),
        ("--config.train.stage1.steps=3", "train.stage1: no such setting"),
    ],
)
def test_settings_that_cannot_be_are_one_line(setting, message, tmp_path, capsys):
    command = [f"--config={ROOT / 'configs/tiny.py'}", f"--workdir={tmp_path / 'w'}", setting]
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main(command), "train.py")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "w").exists()
