"""Training of the miniature: crops and initial weights of the VAE, and all parts from scratch, with stops."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from helpers import TINY_WAN
from xla_flags import quick_flags

from fantasy_jax.config import build, load_config, section
from fantasy_jax.data.records import open_split
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.miniature.acting import FACTORS
from fantasy_jax.miniature.clips import SyntheticConfig
from fantasy_jax.miniature.synthetic import clip_settings, records
from fantasy_jax.miniature.train_transformer import initial_networks, initialise_transformer
from fantasy_jax.miniature.train_vae import (
    RandomCrop,
    VAEStageConfig,
    eye_mask,
    initialise_from_pca,
    normalise_latents,
)
from fantasy_jax.miniature.trainer import TRAININGS, MiniatureConfig, MiniatureTrainer
from fantasy_jax.miniature.vae import MiniatureVAEConfig
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.pipelines.portrait import BUNDLED as PORTRAIT
from fantasy_jax.pipelines.talking import BUNDLED
from fantasy_jax.pipelines.tasks import pipeline_of
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.registry import component_of
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.inspect import store_origins
from fantasy_jax.weights.loading import stored_network

ROOT = Path(__file__).parent.parent
VIDEO = VideoConfig(height=64, width=64, num_frames=17, fps=25)


@pytest.fixture(scope="module")
def clips():
    return list(records(SyntheticConfig(), VIDEO, "train", 48))


def test_crops_contain_the_mouth_at_the_configured_rate(clips):
    rng = np.random.default_rng(0)
    crops = [RandomCrop(32, 9, 1.0)(clips[i % 48], rng) for i in range(96)]
    for crop in crops:
        assert crop["video"].shape == (9, 32, 32, 3)
        assert crop["lips"].shape == crop["eyes"].shape == (9, 32, 32)
    assert np.mean([crop["lips"].max() > 127 for crop in crops]) > 0.95
    anywhere = [RandomCrop(32, 9, 0.0)(clips[i % 48], rng) for i in range(96)]
    assert np.mean([crop["lips"].max() > 127 for crop in anywhere]) < 0.9


def test_the_mask_of_the_eyes_holds_what_blinks(clips):
    for clip in clips[:8]:
        mask = eye_mask(clip) > 127
        assert 0.005 < mask.mean() < 0.1
        assert not (mask & (clip["lips"] > 127)).any()
        columns = np.nonzero(mask[0].any(axis=0))[0]
        left, _, right, _ = clip["face_box"][0]
        assert left < columns.min() < columns.max() < right
    # The lids move, and hardly anything around the eyes.
    blinks = [clip for clip in clips if clip["acts"][0, :, FACTORS.index("blink")].max() > 0.9]
    clip = blinks[0]
    closed = clip["acts"][0, :, FACTORS.index("blink")].argmax()
    change = np.abs(clip["video"][closed].astype(int) - clip["video"][0]).sum(axis=-1)
    mask = eye_mask(clip)[[0, closed]].max(axis=0) > 127
    assert change[mask].mean() > 4 * change[~mask].mean()


@pytest.mark.parametrize(("dim", "least"), [(96, 0.85), (24, 0.4)])  # a width of 24 cannot hold 32 numbers
def test_a_new_transformer_knows_the_velocity_of_the_first_frame(dim, least):
    config = replace(TINY_WAN, latent_channels=8, condition_channels=12, dim=dim)
    transformer = WanTransformer(config, rngs=nnx.Rngs(0))
    initialise_transformer(transformer, seed=0)
    keys = jax.random.split(jax.random.key(1))
    latents, noise = (jax.random.normal(key, (4, 3, 4, 4, 8)) for key in keys)
    mask = jnp.zeros((4, 3, 4, 4, 4)).at[:, 0].set(1)
    first_frame = jnp.concatenate([mask, latents.at[:, 1:].set(0)], axis=-1)
    conditions = transformer.conditions(jnp.zeros((4, 4, 24)), jnp.zeros((4, 4, 20)))
    for sigma in (0.3, 0.6, 0.9):
        noisy = (1 - sigma) * latents + sigma * noise
        found = transformer(noisy, first_frame, jnp.full(4, 1000 * sigma), conditions)[:, 0]
        true = (noise - latents)[:, 0]
        assert np.corrcoef(found.ravel(), true.ravel())[0, 1] > least
        assert 0.5 < float(jnp.std(found) / jnp.std(true)) < 1
    still = first_frame.at[:, 1:, ..., 4:].set(latents[:, 1:])
    for sigma in (0.3, 0.6, 0.9):  # in later frames too, where nothing moves
        noisy = (1 - sigma) * latents + sigma * noise
        found = transformer(noisy, still, jnp.full(4, 1000 * sigma), conditions)
        assert np.corrcoef(found.ravel(), (noise - latents).ravel())[0, 1] > least


@pytest.mark.slow
def test_vae_initialised_by_pca_reconstructs_and_normalising_keeps_reconstructions(clips):
    config = MiniatureVAEConfig(
        dim=8,
        dim_mult=(1, 1, 1),
        num_res_blocks=1,
        temporal_downsample=(True, True),
        patch=2,
        overlap=1,
        refiner=8,
        latent_mean=(0.0,) * 16,
        latent_std=(1.0,) * 16,
    )
    vae = component_of(config).init(config, jnp.float32)
    video, lips = (np.stack([clip[name] for clip in clips]) for name in ("video", "lips"))
    initialise_from_pca(vae, video[8:], lips[8:], details_weight=0.0)
    pixels = jnp.asarray(video[:8], jnp.float32) / 127.5 - 1
    encode = nnx.jit(lambda vae, x: vae.encode(x))
    decode = nnx.jit(lambda vae, x: vae.decode(x))
    decoded = decode(vae, encode(vae, pixels))
    psnr = -10 * np.log10(np.square((np.asarray(decoded) - np.asarray(pixels)) / 2).mean())
    assert psnr > 26  # 16 values for each 8 x 8 x 4 pixels
    latents = encode(vae, pixels)
    noised = latents + 0.3 * latents.std() * jax.random.normal(jax.random.key(0), latents.shape)
    error = jnp.square(decode(vae, noised) - pixels).mean()
    initialise_from_pca(vae, video[8:], lips[8:], details_weight=0.0, noise=0.3)
    assert jnp.square(decode(vae, noised) - pixels).mean() < 0.9 * error
    decoded = decode(vae, latents)
    # Latents with another mean and scale than 0 and 1, so that normalising changes them.
    for layer in (vae.shortcut.encode_first, vae.shortcut.encode_chunk):
        layer.kernel[...] = 3 * layer.kernel[...]
        layer.bias[...] = 3 * layer.bias[...] + 1
    for layer in (vae.shortcut.decode_first, vae.shortcut.decode_chunk):
        layer.bias[...] = layer.bias[...] - layer.kernel[...].sum(axis=0) / 3
        layer.kernel[...] = layer.kernel[...] / 3
    np.testing.assert_allclose(decode(vae, encode(vae, pixels)), decoded, atol=1e-4)
    normalise_latents(vae, [video[:4], video[4:8]])
    latents = np.asarray(encode(vae, pixels))
    np.testing.assert_allclose(latents.mean(axis=(0, 1, 2, 3)), 0, atol=1e-4)
    assert np.sqrt(latents.var(axis=(0, 1, 2, 3)).mean()) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(decode(vae, latents), decoded, atol=1e-4)


def training_command(workdir, **changes):
    """The command that trains all parts, in a size that only tests the program."""
    settings = {
        "video.height": 32,
        "video.width": 32,
        "video.num_frames": 5,
        "data.train_clips": 8,
        "data.test_clips": 4,
        "sample.num_inference_steps": 2,
        "model.vae.dim": 8,
        "model.transformer.num_layers": 2,
        "model.audio_adapter.num_layers": 2,
        "model.identity_adapter.num_layers": 2,
        "train.mesh.fsdp": 1,
        "train.loop.save_every": 5,
        "train.loop.sample_every": 30,
        "train.loop.log_every": 1,
        "train.speech.num_steps": 2,
        "train.speech.batch_size": 2,
        "train.face.num_steps": 2,
        "train.face.batch_size": 2,
        "train.vae.num_steps": 30,
        "train.vae.batch_size": 2,
        "train.vae.crop_size": 16,
        "train.vae.num_frames": 5,
        "train.stages.0.num_steps": 2,
        "train.stages.0.batch_size": 2,
        "train.stages.1.num_steps": 30,
        "train.stages.1.batch_size": 2,
    }
    options = [f"--config.{name}={value}" for name, value in (settings | changes).items()]
    return [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *options]


def stop_after_first_checkpoint(command, workdir, part, **run):
    """Runs the command until a part has its first checkpoint, then sends SIGINT, like Ctrl-C."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **run)
    while not (workdir / part / "checkpoints/5").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors[-2000:]
    assert part in errors
    assert "Traceback" not in errors
    assert not (workdir / part / "checkpoints/30").exists()


def final_state(workdir, part):
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        state = checkpointer.restore((workdir / part / "checkpoints/30/state").resolve())
    return jax.tree.leaves(state)


@pytest.mark.slow
def test_stopped_and_resumed_training_equals_uninterrupted_training(tmp_path):
    cache = {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    flags = {"XLA_FLAGS": quick_flags()}
    run = {"cwd": ROOT, "text": True, "env": os.environ | cache | flags}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # Without a process that loads batches, which the stopped trainings have: the batches are the same.
    command = training_command(whole, **{"train.loop.num_workers": 0})
    result = subprocess.run(command, capture_output=True, **run)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"{whole}/weights" in result.stdout

    # All but the stopped parts is taken over, which follows from weights that are compared below; samples and
    # validation leave the weights as they are.
    for name in ("data", "speech", "face", "encoded", "stage_1"):
        shutil.copytree(whole / name, parts / name)
    unwatched = {"train.loop.sample_every": 0, "train.loop.validate_every": 0}
    command = training_command(parts, **unwatched)
    stop_after_first_checkpoint(command, parts, "vae", **run)
    stop_after_first_checkpoint(command, parts, "stage_2", **run)
    result = subprocess.run(command, capture_output=True, **run)
    assert result.returncode == 0, result.stderr[-2000:]
    for part in ("vae", "stage_2"):
        one, other = final_state(whole, part), final_state(parts, part)
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    slots = set(build(ModelConfig, load_config("configs/tiny.py").model, "model").networks)
    for store in (whole / "weights", whole / "stage_1/weights"):
        assert {path.name for path in store.iterdir()} == {*slots, "pipeline.json", "SHA256SUMS"}
    # Losses and images of every part.
    events = [path for name in ("vae", "stage_1", "stage_2") for path in whole.glob(f"{name}/events*")]
    assert len(events) == 3
    assert min(path.stat().st_size for path in events) > 10_000


def test_miniature_config_builds():
    config = load_config(str(ROOT / "configs/tiny.py:quick"))
    build(ModelConfig, config.model, "model")
    clip_stage, frame_stage = build(MiniatureConfig, config.train, "train").stages
    assert clip_stage.audio_attention == "clip"
    assert clip_stage.lip_mask_probability == 0
    assert frame_stage.audio_attention == "frame"
    assert frame_stage.lip_mask_probability == 0.8


def make_trainer(workdir, name, data=None, model=None, **changes):
    config = load_config(str(ROOT / f"configs/{name}"))
    config.data.update(data or {})
    config.model.update(model or {})
    config.train.update(changes)
    pipeline = pipeline_of(config)
    return MiniatureTrainer(
        workdir,
        pipeline=pipeline.__name__,
        data=section(SyntheticConfig, config, "data"),
        video=section(VideoConfig, config, "video"),
        model=section(ModelConfig, config, "model"),
        sampling=section(pipeline.config_type, config, "sample"),
        config=section(TRAININGS[config.task], config, "train"),
    )


def test_talking_and_portrait_share_the_vae_of_people_who_act(tmp_path):
    talking, portrait = (make_trainer(tmp_path, name) for name in ("tiny.py:quick", "tiny_portrait.py:quick"))
    assert (list(talking.encoders), list(portrait.encoders)) == (
        ["speech", "face", "vae"],
        ["motion", "detector", "vae"],
    )
    assert talking.encoder_settings("vae") == portrait.encoder_settings("vae")
    assert store_origins(BUNDLED)["vae"] == store_origins(PORTRAIT)["vae"]
    assert (talking.data.acting, portrait.data.acting) == (0, 1)
    assert clip_settings(talking.encoder_data, 1) == clip_settings(portrait.data, 1)
    assert portrait.config.people == (1, 2)
    assert portrait.folder == talking.folder / "portrait"
    stage = portrait.config.stages[0]
    assert (stage.dropout, stage.timesteps, stage.lip_mask_probability) == (0.2, "logit_normal", 0)


def test_sizes_of_stored_encoders_must_be_those_of_the_config(tmp_path):
    with pytest.raises(WeightsError, match=r"^[^\n]*assets/tiny/vae[^\n]*$"):
        make_trainer(tmp_path, "tiny.py", model={"vae": {"refiner": 32}}, initial=str(BUNDLED))
    with pytest.raises(ConfigError, match=r"^train.initial: [^\n]*none of face_detector, [^\n]*$"):
        make_trainer(tmp_path, "tiny_portrait.py", initial=str(tmp_path))


def test_training_begins_with_the_maps_of_the_first_frame_or_with_a_stored_transformer(tmp_path):
    trainer = make_trainer(tmp_path, "tiny.py", initial=str(BUNDLED))
    drawn, taken = (
        initial_networks(trainer.model, seed=1, stored=stored)["transformer"]
        for stored in (None, trainer.stored)
    )
    channels = drawn.config.latent_channels
    latents, condition = (
        drawn.patch_in.kernel[:channels],
        drawn.patch_in.kernel[channels + 4 : 2 * channels + 4],
    )
    np.testing.assert_array_equal(latents, -condition)
    stored = stored_network(BUNDLED, "transformer")
    for name in ("patch_in", "blocks", "patch_out"):
        assert_equal(getattr(taken, name), getattr(stored, name))
    for name, adapter in taken.adapters.items():
        assert_equal(adapter, drawn.adapters[name])


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(one), nnx.state(other))


@pytest.mark.slow
def test_stored_encoders_are_taken_over_and_decide_what_is_encoded(tmp_path):
    few, encoders = {"train_clips": 2, "test_clips": 1}, tmp_path / "encoders"
    encoders.mkdir()
    for slot in ("vae", "motion_encoder", "face_detector"):
        (encoders / slot).symlink_to(PORTRAIT / slot)
    stored = {"data": few, "initial": str(encoders), "people": (1,), "shares": ()}
    workdir = tmp_path / "work"
    trainer = make_trainer(workdir, "tiny_portrait.py", **stored)
    assert not trainer.encoders
    networks, encoded = trainer.prepare()
    assert sorted(path.name for path in workdir.iterdir()) == ["data", "portrait"]
    for slot in ("vae", "motion_encoder", "face_detector"):
        assert_equal(networks[slot], stored_network(PORTRAIT, slot))
    assert len(open_split(encoded[1], "train")) == 2
    wanted = initial_networks(trainer.model, seed=0)["transformer"].patch_in.kernel[...]
    np.testing.assert_array_equal(networks["transformer"].patch_in.kernel[...], wanted)
    with pytest.raises(ConfigError, match=r"train\.initial"):
        make_trainer(workdir, "tiny_portrait.py", **stored | {"initial": ""}).prepare()


def test_vae_stage_config_error():
    with pytest.raises(ConfigError, match="num_frames"):
        VAEStageConfig(num_frames=8)
