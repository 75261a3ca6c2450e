"""Training on top of stored weights: frozen networks are referred to, trained ones are stored beside them."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from helpers import damage_record

from configs.tiny import get_config, small_model
from fantasy_jax.config import build
from fantasy_jax.data.encoded import encode_dataset, features
from fantasy_jax.data.records import open_split, write_dataset
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.miniature.synthetic import SyntheticConfig, write_clips
from fantasy_jax.models.lora import LoRAConfig, lora_of
from fantasy_jax.pipelines.config import SampleConfig, read_pipeline, write_pipeline
from fantasy_jax.pipelines.talking import BUNDLED as WEIGHTS
from fantasy_jax.preprocessing.motion import MOTION_FILE, MotionNormaliser
from fantasy_jax.sharding import MeshConfig, make_mesh
from fantasy_jax.system.networks import abstract_networks
from fantasy_jax.training.finetune import finetune
from fantasy_jax.training.loop import LoopConfig
from fantasy_jax.training.objective import StageConfig
from fantasy_jax.training.optim import OptimizerConfig
from fantasy_jax.training.parameters import ALL_TRAINED, trainable
from fantasy_jax.training.stages import StagesConfig
from fantasy_jax.video import VideoConfig
from fantasy_jax.weights.check import check_store
from fantasy_jax.weights.checksums import files_below, write_sums
from fantasy_jax.weights.loading import stored_networks
from fantasy_jax.weights.quantize import quantize_store
from fantasy_jax.weights.store import network_hash, read_record, record_hashes

NORMALISER = MotionNormaliser.fit([(0.1, 0.2), (0.3, 0.5)])
AGREEING = {
    "vae": record_hashes(WEIGHTS)["vae"],
    "model": {"still_condition": True},
    "motion": NORMALISER,
}


@pytest.fixture(scope="module")
def settings():
    """Arguments of `finetune`: two steps of each stage for the adapters alone, on a mesh of four devices."""
    config = get_config()
    stage = StageConfig(
        num_steps=2,
        batch_size=2,
        parameters=(("^adapters/", "trained"), ("", "frozen")),
        remat_save_names=("self_attention",),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=1, ema_decay=0.5),
    )
    return {
        "pipeline": "FantasyTalkingPipeline",
        "model": small_model(),
        "video": build(VideoConfig, config.video, "video"),
        "sampling": build(SampleConfig, config.sample, "sample"),
        "config": StagesConfig(
            loop=LoopConfig(sample_every=0, validate_every=0, num_workers=0),
            mesh=MeshConfig(fsdp=2, context=2),
            stages=(stage, replace(stage, audio_attention="frame", lip_mask_probability=0.8)),
        ),
    }


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, settings):
    """Encoded clips, with the metadata that `prepare` writes."""
    folder, video = tmp_path_factory.mktemp("records"), settings["video"]
    clips = write_clips(SyntheticConfig(train_clips=8, test_clips=8), video, folder)
    NORMALISER.save(folder / MOTION_FILE)
    metadata = {"video": video, **AGREEING}
    return encode_dataset(stored_networks(WEIGHTS, settings["model"]), clips, folder, metadata)


def linked_store(folder, *copied):
    """A store of links to the bundled weights, but copies of some networks."""
    folder.mkdir()
    for source in WEIGHTS.iterdir():
        target = folder / source.name
        if source.name not in copied:
            target.symlink_to(source.resolve())
            continue
        target.mkdir()
        for part in source.iterdir():
            (target / part.name).symlink_to(part.resolve())
    return folder


def change_record(network, changes):
    """Changes the content of a network's record, and so its hash."""
    record = network / "component.json"
    content = json.loads(record.read_text())
    record.unlink()
    record.write_text(json.dumps(content | changes))
    write_sums(network, files_below(network))


def values(network):
    flat = nnx.to_flat_state(nnx.state(network, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def changed_parameters(store, model):
    """Paths of the transformer's parameters that differ from the bundled weights, and all paths."""
    stores = (stored_networks(folder, model) for folder in (WEIGHTS, store))
    before, after = (values(networks["transformer"]) for networks in stores)
    assert before.keys() == after.keys()
    return {path for path, value in after.items() if not np.array_equal(value, before[path])}, set(after)


@pytest.mark.slow
def test_adapters_are_trained_and_the_base_is_referred_to(tmp_path, settings, encoded):
    store = finetune(WEIGHTS, [encoded], tmp_path, **settings)
    assert not (store / "audio_adapter").is_symlink()
    assert MotionNormaliser.load(store / "motion_adapter" / MOTION_FILE) == NORMALISER
    trained_with = read_record(store / "audio_adapter")[1]["trained_with"]
    assert trained_with == {"speech_encoder": network_hash(WEIGHTS / "speech_encoder")}
    assert not any(result.faults for result in check_store(store))
    assert read_pipeline(store, "FantasyTalkingPipeline", SampleConfig) == (
        settings["video"],
        settings["sampling"],
    )
    assert (store / "transformer").is_symlink()
    assert (store / "transformer").resolve() == (WEIGHTS / "transformer").resolve()
    changed, paths = changed_parameters(store, settings["model"])
    assert changed == {path for path in paths if path.startswith("adapters/")}
    # Checkpoints do not hold frozen weights, but the hashes of their records.
    about = json.loads((tmp_path / "stage_2/checkpoints/2/about/metadata").read_text())
    assert set(about["settings"]["weights"]) == {path.name for path in WEIGHTS.iterdir() if path.is_dir()}
    kept = (tmp_path / "stage_2/checkpoints/2/state/_METADATA").read_text()
    assert "adapters" in kept
    assert "self_attention" not in kept
    # A complete run is not trained again; a run of other weights is not resumed.
    assert finetune(WEIGHTS, [encoded], tmp_path, **settings) == store
    other = linked_store(tmp_path / "other", "text_encoder")
    change_record(other / "text_encoder", {"note": "another"})
    with pytest.raises(ConfigError, match="weights"):
        finetune(other, [encoded], tmp_path, **settings)


@pytest.mark.slow
def test_a_lora_is_stored_beside_the_base_and_held_out_clips_are_sampled(tmp_path, settings, encoded, caplog):
    rules = (("^adapters/", "frozen"), ("^blocks/.*kernel$", "lora"), ("", "frozen"))
    config = settings["config"]
    config = replace(
        config,
        stages=tuple(replace(stage, parameters=rules) for stage in config.stages),
        loop=replace(config.loop, sample_every=2, sample_videos=True, validate_every=1),
        lora=LoRAConfig(rank=3, alpha=6.0),
    )
    sampling = replace(settings["sampling"], num_inference_steps=2)
    copy = shutil.copytree(encoded.parents[1], tmp_path / "damaged") / encoded.relative_to(encoded.parents[1])
    damage_record(copy, "test", open_split(copy, "test")[0]["latents"].tobytes())
    store = finetune(WEIGHTS, [copy], tmp_path, **settings | {"config": config, "sampling": sampling})
    assert (store / "transformer").is_symlink()
    assert (store / "audio_adapter").is_symlink()
    assert not (store / "lora").is_symlink()
    changed, paths = changed_parameters(store, settings["model"])
    assert changed == {path for path in paths if re.match("blocks/.*kernel$", path)}
    beside = stored_networks(store, settings["model"], merge_lora=False)["transformer"]
    assert lora_of(beside).config.rank == 3
    # Both stages train one LoRA.
    kept = (tmp_path / "stage_2/checkpoints/2/state/_METADATA").read_text()
    assert "lora_a" in kept
    assert "audio" not in kept
    assert {path.suffix for path in (tmp_path / "stage_2/samples/000002").iterdir()} == {".mp4", ".wav"}
    (events,) = (tmp_path / "stage_1").glob("events*")
    assert b"stage_1/validation/at_0.9/loss_at_lips" in events.read_bytes()
    assert "test: record 0 cannot be read" in caplog.text


@pytest.mark.parametrize("mode", ["trained", "lora"])
def test_config_error_for_training_weights_of_eight_bits(tmp_path, settings, mode):
    weights = linked_store(tmp_path / "weights", "transformer")
    dtypes = {"blocks/mlp_in/weight": "int8", "blocks/mlp_in/weight_scale": "float32"}
    change_record(weights / "transformer", {"other_dtypes": dtypes})
    rules = (("^adapters/", "trained"), ("^blocks/.*kernel$", mode), ("", "frozen"))
    first, second = settings["config"].stages
    config = replace(settings["config"], stages=(first, replace(second, parameters=rules)))
    with pytest.raises(ConfigError, match=rf"stages\.1\.parameters: blocks/.* is {mode}, .*8-bit"):
        finetune(weights, [tmp_path / "none"], tmp_path / "run", **settings | {"config": config})


@pytest.mark.slow
def test_adapters_are_trained_beside_weights_of_eight_bits(tmp_path, settings, encoded):
    weights, config = tmp_path / "int8", replace(settings["config"], stages=settings["config"].stages[:1])
    quantize_store(WEIGHTS, weights, "int8", layers="^transformer/blocks/", progress=False)
    store = finetune(weights, [encoded], tmp_path / "run", **settings | {"config": config})
    assert (store / "transformer").resolve() == weights / "transformer"
    assert not (store / "audio_adapter").is_symlink()
    assert not any(result.faults for result in check_store(store))


def write_records(folder, metadata):
    """A dataset of one record, without the inputs of any adapter."""
    record = {"latents": np.zeros((2, 3), np.float16)}
    splits = {split: [record] for split in ("train", "test")}
    return write_dataset("encoded_clips", folder, lambda: features(record), splits, metadata)


VIDEO = VideoConfig(height=64, width=64, num_frames=17, fps=25)
OTHER_NORMALISER = MotionNormaliser.fit([(0.1, 0.2), (0.4, 0.5)])


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"video": replace(VIDEO, height=96)}, ("video.height", "96", "64")),
        ({"video": replace(VIDEO, num_frames=21)}, ("video.num_frames", "21", "17")),
        ({"model": {}}, ("still_condition", "False", "True")),
        ({"video": replace(VIDEO, fps=23)}, ("video.fps", "23", "25")),
        ({"vae": "0123abcd"}, ("vae", "0123abcd", record_hashes(WEIGHTS)["vae"])),
        ({"motion": OTHER_NORMALISER}, ("motion.low", str(OTHER_NORMALISER.low[0]), str(NORMALISER.low[0]))),
    ],
)
def test_config_error_for_records_that_were_made_otherwise(tmp_path, settings, metadata, named):
    weights = linked_store(tmp_path / "weights", "motion_adapter")
    NORMALISER.save(weights / "motion_adapter" / MOTION_FILE)
    records = write_records(tmp_path, {"video": VIDEO, **AGREEING, **metadata})
    with pytest.raises(ConfigError) as caught:
        finetune(weights, [records], tmp_path / "run", **settings)
    assert all(part in str(caught.value) for part in (str(records), *named))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_config_error_for_records_without_the_inputs_of_an_adapter(tmp_path, settings):
    """Records whose metadata agree are refused only for what they lack."""
    weights = linked_store(tmp_path / "weights", "motion_adapter")
    NORMALISER.save(weights / "motion_adapter" / MOTION_FILE)
    metadata = {"video": VIDEO, **AGREEING}
    with pytest.raises(ConfigError, match="audio"):
        finetune(weights, [write_records(tmp_path, metadata)], tmp_path / "run", **settings)


def test_a_store_of_another_pipeline_is_refused(tmp_path, settings):
    weights = linked_store(tmp_path / "weights")
    (weights / "pipeline.json").unlink()
    write_pipeline(weights, "OtherPipeline", VIDEO, SampleConfig())
    with pytest.raises(WeightsError, match="OtherPipeline"):
        finetune(weights, [tmp_path / "records"], tmp_path / "run", **settings)


def test_a_store_of_another_model_is_refused(tmp_path, settings):
    model = settings["model"]
    other = model.replace(text_encoder=replace(model.text_encoder, num_layers=7))
    with pytest.raises(WeightsError, match="text_encoder"):
        finetune(WEIGHTS, [tmp_path / "records"], tmp_path / "run", **settings | {"model": other})


def test_the_state_of_adapters_alone(settings):
    mesh = MeshConfig(fsdp=1)
    model = abstract_networks(settings["model"], make_mesh(**mesh.axes), mesh)["transformer"]
    adapters = trainable((("^adapters/", "trained"), ("", "frozen")))
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(model, adapters))} == {"adapters"}
    everything = len(nnx.to_flat_state(nnx.state(model, trainable(ALL_TRAINED))))
    assert everything == len(nnx.to_flat_state(nnx.state(model, nnx.Param)))


def test_config_error_for_no_stages():
    with pytest.raises(ConfigError, match="stages"):
        StagesConfig(stages=())
