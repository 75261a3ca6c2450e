"""Training on top of stored weights: what is frozen stays, what is trained is stored beside it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import fantasy_jax
from fantasy_jax.config import ConfigError, build, load_config
from fantasy_jax.data.encoded import encode_dataset
from fantasy_jax.data.motion import MOTION_FILE, MotionNormaliser
from fantasy_jax.data.synthetic import SyntheticConfig, prepare
from fantasy_jax.models.lora import LoRAConfig
from fantasy_jax.pipeline import ModelConfig, SampleConfig
from fantasy_jax.sharding import MeshConfig
from fantasy_jax.training.finetune import finetune
from fantasy_jax.training.loop import LoopConfig
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.stages import StagesConfig
from fantasy_jax.training.talking import TalkingStageConfig
from fantasy_jax.weights import StoredNetworks

ROOT = Path(__file__).parent.parent
WEIGHTS = Path(fantasy_jax.__file__).parent / "assets/tiny"


@pytest.fixture(scope="module")
def settings():
    config = load_config(str(ROOT / "configs/tiny.py"))
    stage = TalkingStageConfig(
        steps=2,
        batch_size=2,
        parameters=(("^adapters/", "trained"), ("", "frozen")),
        saved=("self_attention",),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup=1, average=0.5),
    )
    return {
        "model": build(ModelConfig, config.model, "model"),
        "sampling": build(SampleConfig, config.sample, "sample"),
        "config": StagesConfig(
            loop=LoopConfig(show_every=0, validate_every=0, workers=0),
            mesh=MeshConfig(fsdp=2, context=2),
            clip_stage=stage,
            frame_stage=replace(stage, audio="frame", lip_probability=0.8),
        ),
    }


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("records")
    clips = prepare(SyntheticConfig(train_clips=8, test_clips=8), folder)
    MotionNormaliser.fit([(0.1, 0.2), (0.3, 0.5)]).save(folder / MOTION_FILE)
    return encode_dataset(StoredNetworks(WEIGHTS, settings["model"]), clips, folder, {})


def values(network):
    flat = nnx.to_flat_state(nnx.state(network, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


@pytest.mark.slow
def test_adapters_are_trained_and_the_base_is_referred_to(tmp_path, settings, encoded):
    store = finetune(WEIGHTS, encoded, tmp_path, **settings)
    assert not (store / "audio_adapter").is_symlink()
    assert (store / "motion_adapter" / MOTION_FILE).read_text() == (
        encoded.parents[1] / MOTION_FILE
    ).read_text()
    assert (store / "transformer").is_symlink()
    assert (store / "transformer").resolve() == (WEIGHTS / "transformer").resolve()
    stores = (StoredNetworks(folder, settings["model"]) for folder in (WEIGHTS, store))
    before, after = (values(networks.transformer()) for networks in stores)
    changed = {path for path, value in after.items() if not np.array_equal(value, before[path])}
    assert changed == {path for path in after if path.startswith("adapters/")}
    # Frozen weights are not in checkpoints, but the hash of their record is.
    about = json.loads((tmp_path / "frame_stage/checkpoints/2/about/metadata").read_text())
    assert set(about["settings"]["weights"]) == {path.name for path in WEIGHTS.iterdir() if path.is_dir()}
    kept = (tmp_path / "frame_stage/checkpoints/2/state/_METADATA").read_text()
    assert "adapters" in kept
    assert "self_attention" not in kept
    # What is complete is not done again; other weights are not gone on with.
    assert finetune(WEIGHTS, encoded, tmp_path, **settings) == store
    other = tmp_path / "other"
    other.mkdir()
    for folder in WEIGHTS.iterdir():
        (other / folder.name).symlink_to(folder.resolve())
    (other / "vae").unlink()
    (other / "vae").mkdir()
    for path in (WEIGHTS / "vae").iterdir():
        (other / "vae" / path.name).symlink_to(path.resolve())
    record = other / "vae/component.json"
    content = json.loads(record.read_text())
    record.unlink()
    record.write_text(json.dumps(content | {"note": "another"}))
    with pytest.raises(ConfigError, match="was begun with another weights"):
        finetune(other, encoded, tmp_path, **settings)


@pytest.mark.slow
def test_a_lora_is_stored_beside_the_base_and_held_out_clips_are_looked_at(tmp_path, settings, encoded):
    rules = (("^adapters/", "frozen"), ("^blocks/.*kernel$", "lora"), ("", "frozen"))
    config = settings["config"]
    stages = {
        name: replace(getattr(config, name), parameters=rules) for name in ("clip_stage", "frame_stage")
    }
    loop = replace(config.loop, show_every=2, show_videos=True, validate_every=1)
    lora = LoRAConfig(rank=3, alpha=6.0)
    sampling = replace(settings["sampling"], steps=2)
    trained = {"config": replace(config, loop=loop, lora=lora, **stages), "sampling": sampling}
    store = finetune(WEIGHTS, encoded, tmp_path, **settings | trained)
    assert (store / "transformer").is_symlink()
    assert (store / "audio_adapter").is_symlink()
    assert not (store / "lora").is_symlink()
    before, after = (StoredNetworks(folder, settings["model"]).transformer() for folder in (WEIGHTS, store))
    before, after = values(before), values(after)
    changed = {path for path, value in after.items() if not np.array_equal(value, before[path])}
    assert changed == {path for path in after if re.match("blocks/.*kernel$", path)}
    # Both stages went on with one LoRA, and a further run goes on with it.
    kept = (tmp_path / "frame_stage/checkpoints/2/state/_METADATA").read_text()
    assert "lora_a" in kept
    assert "audio" not in kept
    assert {path.suffix for path in (tmp_path / "frame_stage/samples/000002").iterdir()} == {".mp4", ".wav"}
    (events,) = (tmp_path / "clip_stage").glob("events*")
    assert b"clip_stage/validation/at_0.9/loss_at_lips" in events.read_bytes()


def test_a_state_for_adapters_alone(settings):
    from fantasy_jax.training.parameters import EVERYTHING, trained

    model = nnx.eval_shape(lambda: StoredNetworks(WEIGHTS, settings["model"]).transformer())
    adapters = trained((("^adapters/", "trained"), ("", "frozen")))
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, adapters))} == {"adapters"}
    everything = len(nnx.to_flat_state(nnx.state(model, trained(EVERYTHING))))
    assert everything == len(nnx.to_flat_state(nnx.state(model, nnx.Param)))
