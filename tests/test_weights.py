"""The store of weights: networks are loaded as they were saved, and damaged or foreign ones are refused."""

import dataclasses
import errno
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_network, randomise
from safetensors.numpy import load_file

from configs.tiny import small_model
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.models.adapters.audio import AudioAdapter, AudioAdapterConfig
from fantasy_jax.models.adapters.identity import IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import MotionAdapterConfig
from fantasy_jax.models.face_encoder import FaceEncoderConfig
from fantasy_jax.models.motion_encoder import MotionEncoderConfig
from fantasy_jax.models.tiny_decoder import TinyDecoderConfig
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
from fantasy_jax.system.registry import component_of
from fantasy_jax.weights import store as store_module
from fantasy_jax.weights.exporter import export_weights
from fantasy_jax.weights.loading import load_network, stored_networks
from fantasy_jax.weights.store import save_network

pytestmark = pytest.mark.networks

SPEECH = Wav2Vec2Config(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    conv_dim=(16, 16),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
)
AUDIO = AudioAdapterConfig(feature_width=48, token_width=16, width=24, num_heads=4, num_layers=5)


def model_config():
    """The miniature, with smaller adapters and encoders of speech, faces and motion."""
    model = small_model()
    transformer = model.transformer
    in_transformer = {
        "width": transformer.dim,
        "num_heads": transformer.num_heads,
        "num_layers": transformer.num_layers,
    }
    return model.replace(
        speech_encoder=SPEECH,
        audio_adapter=dataclasses.replace(model.audio_adapter, feature_width=SPEECH.hidden_size),
        motion_adapter=MotionAdapterConfig(hidden=8, positions=2, width=transformer.dim),
        identity_adapter=IdentityAdapterConfig(
            feature_width=6,
            feature_size=4,
            num_queries=3,
            depth=1,
            token_width=8,
            token_heads=2,
            **in_transformer,
        ),
        face_encoder=FaceEncoderConfig(depths=(1, 2), widths=(4, 6), embedding=8, image_size=16),
        motion_encoder=MotionEncoderConfig(
            width=8, feature_dim=16, pose_dim=3, eye_dim=2, emotion_dim=4, landmarks=5, depth=1, image_size=16
        ),
        preview_decoder=TinyDecoderConfig(32, widths=(6, 4, 4, 4), num_blocks=1),
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of all networks, and the networks."""
    folder, config = tmp_path_factory.mktemp("store"), model_config()
    networks = {
        slot: random_network(sizes, seed) for seed, (slot, sizes) in enumerate(config.networks.items())
    }
    for slot, network in networks.items():
        component = component_of(network.config).name
        save_network(folder / slot, network, component=component, preset="tiny")
    return folder, config, networks


@pytest.fixture
def adapter(tmp_path):
    """A store of an audio adapter, to be damaged."""
    network = random_network(AUDIO)
    save_network(tmp_path / "audio_adapter", network, component="fantasytalking")
    return tmp_path / "audio_adapter", AUDIO, network


def assert_equal(loaded, network):
    wanted = flat_parameters(network)
    found = flat_parameters(loaded)
    assert found.keys() == wanted.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, wanted[path], strict=True)


@pytest.mark.slow
def test_every_network_is_loaded_bit_for_bit(store):
    folder, config, networks = store
    stored = stored_networks(folder, config)
    assert stored.config == config
    assert list(stored) == list(networks)
    transformer = stored["transformer"]
    for name in ("audio", "motion", "identity"):
        assert_equal(transformer.adapters.pop(name), networks[f"{name}_adapter"])
    assert_equal(transformer, networks["transformer"])
    for slot in networks.keys() - {"transformer"}:
        assert_equal(stored[slot], networks[slot])
    np.testing.assert_array_equal(
        stored["vae"].latent_std.get_value(), networks["vae"].latent_std.get_value()
    )
    assert isinstance(stored["speech_encoder"], Wav2Vec2Model)
    assert stored.tokenizer("a")["input_ids"] == [100, 1], "the byte tokenizer, since none is stored"


def test_a_store_is_loaded_without_a_config(store):
    folder, config, _ = store
    assert stored_networks(folder, dtype="float32").config == config
    assert stored_networks(folder).config.dtype == "bfloat16"


def test_a_stored_preview_decoder_needs_no_entry_in_the_config(store):
    folder, config, _ = store
    assert stored_networks(folder, config.replace(preview_decoder=None)).config == config


@pytest.mark.parametrize("slot", ["face_encoder", "motion_encoder"])
def test_encoders_of_faces_are_float32_in_every_system(store, slot):
    folder, config, networks = store
    assert_equal(stored_networks(folder, config.replace(dtype="bfloat16"))[slot], networks[slot])


def test_a_store_does_not_contain_its_own_path(store):
    folder, *_ = store
    for file in folder.rglob("*"):
        assert file.is_dir() or str(folder).encode() not in file.read_bytes(), file


def test_blocks_are_items_of_their_own(store):
    folder, config, networks = store
    record = json.loads((folder / "transformer" / "component.json").read_text())
    assert list(record["items"]) == [*(f"blocks_{i:02d}" for i in range(5)), "rest"]
    assert all(size > 0 for size in record["items"].values())
    assert record["config"]["dim"] == config.transformer.dim
    assert (record["component"], record["preset"], record["dtype"]) == ("wan2.1_i2v_dit", "tiny", "float32")
    assert sorted(x.name for x in folder.iterdir()) == sorted(networks)


def test_a_loaded_network_computes_the_same_and_can_have_another_dtype(store):
    folder, config, networks = store
    loaded = load_network(folder / "audio_adapter", config.audio_adapter, dtype=jnp.float32)
    features = jnp.ones((1, 3, 48))
    np.testing.assert_array_equal(loaded.tokens(features), networks["audio_adapter"].tokens(features))
    half = load_network(folder / "audio_adapter", config.audio_adapter, dtype=jnp.bfloat16)
    for path, value in flat_parameters(half).items():
        wanted = flat_parameters(networks["audio_adapter"])[path]
        np.testing.assert_array_equal(value, wanted.astype(jnp.bfloat16), strict=True)


def test_mixed_dtypes_are_saved_loaded_and_exported(tmp_path):
    network = random_network(AUDIO, dtype=jnp.bfloat16)
    scale = network.norm.scale[...].astype(jnp.float32) + 2**-20
    network.norm.scale = nnx.Param(scale)
    key = network.layers.key.kernel[...].astype(jnp.float32) + 2**-20
    network.layers.key.kernel = nnx.Param(key)
    folder = tmp_path / "audio_adapter"
    save_network(folder, network, component="fantasytalking")
    record = json.loads((folder / "component.json").read_text())
    assert record["dtype"] == "bfloat16"
    assert record["other_dtypes"] == {"layers/key/kernel": "float32", "norm/scale": "float32"}
    loaded = load_network(folder, AUDIO, dtype=jnp.bfloat16)
    assert_equal(loaded, network)
    save_network(tmp_path / "again" / "audio_adapter", loaded, component="fantasytalking")
    again = json.loads((tmp_path / "again/audio_adapter/component.json").read_text())
    assert again | {"items": None} == record | {"items": None}  # the items' bytes differ from save to save
    # Parameters of the other type keep theirs when the network is loaded in another one.
    wider = flat_parameters(load_network(folder, AUDIO, dtype=jnp.float32))
    assert {str(value.dtype) for value in wider.values()} == {"float32"}
    np.testing.assert_array_equal(wider["norm/scale"], scale)
    export_weights(tmp_path, "audio_adapter", tmp_path / "a.safetensors", progress=False)
    tensors = load_file(tmp_path / "a.safetensors")
    processor = "audio_processor.blocks.{}.cross_attn.processor.{}_proj.weight"
    for layer in range(AUDIO.num_layers):
        np.testing.assert_array_equal(tensors[processor.format(layer, "k")], key[layer].T, strict=True)
        value = network.layers.value.kernel[layer].T
        np.testing.assert_array_equal(tensors[processor.format(layer, "v")], value, strict=True)
    np.testing.assert_array_equal(tensors["proj_model.norm.weight"], scale, strict=True)


def test_adapters_that_a_store_lacks_can_be_initialised(store, tmp_path):
    folder, config, networks = store
    for slot in networks.keys() - {"motion_adapter"}:
        (tmp_path / slot).symlink_to(folder / slot)
    with pytest.raises(WeightsError, match="motion_adapter"):
        stored_networks(tmp_path, config)
    transformer = stored_networks(tmp_path, config, new_adapters=True)["transformer"]
    assert_equal(transformer.adapters["audio"], networks["audio_adapter"])
    assert not transformer.adapters["motion"](jnp.array([[0.1, 0.9]])).any()
    # Networks that are no adapters are not initialised.
    (tmp_path / "vae").unlink()
    with pytest.raises(WeightsError, match="vae"):
        stored_networks(tmp_path, config, new_adapters=True)


def test_a_transformer_is_stored_without_its_adapters(store, tmp_path):
    folder, config, networks = store
    transformer = stored_networks(folder, config)["transformer"]
    save_network(tmp_path / "transformer", transformer, component="wan2.1_i2v_dit")
    loaded = load_network(tmp_path / "transformer", config.transformer, dtype=jnp.float32)
    assert_equal(loaded, networks["transformer"])


def test_saving_again_replaces(adapter):
    folder, config, network = adapter
    randomise(network, seed=5)
    save_network(folder, network, component="fantasytalking")
    assert_equal(load_network(folder, config, dtype=jnp.float32), network)
    assert [x.name for x in folder.parent.iterdir()] == ["audio_adapter"]


# Errors


def test_weights_of_other_sizes_are_refused(adapter):
    folder, config, _ = adapter
    other = dataclasses.replace(config, num_layers=7, num_heads=8)
    with pytest.raises(WeightsError) as caught:
        load_network(folder, other, dtype=jnp.float32)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    assert all(part in message for part in ("num_heads 4", "8", "num_layers 5", "7"))
    with pytest.raises(WeightsError, match="wav2vec2"):
        load_network(folder, SPEECH, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "component.json").unlink(), "component.json"),
        (lambda folder: (folder / "component.json").write_text("{"), "component.json"),
        (lambda folder: (folder / "component.json").write_text("{}"), "component.json"),
        (lambda folder: (folder / "component.json").write_text("[]"), "component.json"),
        (lambda folder: shutil.rmtree(folder / "rest"), "rest"),
        (shutil.rmtree, "audio_adapter"),
    ],
)
def test_a_damaged_store_is_refused(adapter, damage, named):
    folder, config, _ = adapter
    damage(folder)
    with pytest.raises(WeightsError, match=named):
        load_network(folder, config, dtype=jnp.float32)


def test_a_truncated_item_is_refused(adapter):
    folder, config, _ = adapter
    file = max((x for x in (folder / "blocks_03").rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="blocks_03"):
        load_network(folder, config, dtype=jnp.float32)


def test_an_item_of_the_right_size_with_other_content_is_refused(adapter):
    folder, config, _ = adapter
    file = folder / "blocks_03" / "_METADATA"
    file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(WeightsError, match="blocks_03") as caught:
        load_network(folder, config, dtype=jnp.float32)
    assert "\n" not in str(caught.value)


def test_a_component_that_is_not_known_is_refused(adapter):
    folder, config, _ = adapter
    record = folder / "component.json"
    record.write_text(record.read_text().replace("fantasytalking", "nonsense"))
    with pytest.raises(WeightsError, match="nonsense"):
        load_network(folder, config, dtype=jnp.float32)


def test_a_missing_network_is_found_before_anything_is_loaded(store, tmp_path):
    folder, config, _ = store
    with pytest.raises(WeightsError, match="nowhere"):
        stored_networks(tmp_path / "nowhere", config)
    other = config.replace(vae=dataclasses.replace(config.vae, num_res_blocks=3))
    with pytest.raises(WeightsError, match="num_res_blocks 1"):
        stored_networks(folder, other)
    for slot in config.networks.keys() - {"vae"}:
        (tmp_path / slot).symlink_to(folder / slot)
    with pytest.raises(WeightsError, match="vae"):
        stored_networks(tmp_path, config)
    (tmp_path / "vae").mkdir()
    with pytest.raises(WeightsError, match="vae"):
        stored_networks(tmp_path, config)


# Interruptions and full disks


def interrupt(monkeypatch, error, count):
    """Makes saving fail from the `count`-th item on; returns the names of the items that were tried."""
    save, tried = store_module._save_item, []

    def failing(checkpointer, path, values):
        tried.append(path.name)
        if len(tried) >= count:
            (path.parent / f"{path.name}.orbax-checkpoint-tmp").mkdir()
            raise error
        save(checkpointer, path, values)

    monkeypatch.setattr(store_module, "_save_item", failing)
    return tried


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_save_keeps_the_previous_network(adapter, monkeypatch, error):
    folder, config, network = adapter
    before = {path: np.array(value) for path, value in flat_parameters(network).items()}
    tried = interrupt(monkeypatch, error, 3)
    with pytest.raises((KeyboardInterrupt, WeightsError)):
        save_network(folder, randomise(network, seed=9), component="fantasytalking")
    assert len(tried) == 3
    loaded = flat_parameters(load_network(folder, config, dtype=jnp.float32))
    for path, value in before.items():
        np.testing.assert_array_equal(loaded[path], value)
    with pytest.raises(WeightsError, match="partial"):
        load_network(folder.with_name("audio_adapter.partial"), config, dtype=jnp.float32)
    monkeypatch.undo()
    save_network(folder, network, component="fantasytalking")
    assert_equal(load_network(folder, config, dtype=jnp.float32), network)
    assert [x.name for x in folder.parent.iterdir()] == ["audio_adapter"]


def test_orbaxs_error_of_a_full_disk_becomes_one_line(tmp_path, monkeypatch):
    def save(*arguments, **options):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing "k": No space left on device\nmore')

    monkeypatch.setattr(store_module.ocp.Checkpointer, "save", save)
    adapter = AudioAdapter(AUDIO, rngs=nnx.Rngs(0))
    with pytest.raises(WeightsError, match="No space left on device") as error:
        save_network(tmp_path / "adapter", adapter, component="fantasytalking")
    assert "blocks_00" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "adapter").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    adapter = AudioAdapter(AUDIO, rngs=nnx.Rngs(0))
    with pytest.raises(WeightsError, match="file"):
        save_network(tmp_path / "file" / "x", adapter, component="fantasytalking")


@pytest.mark.parametrize(
    ("slot", "settings", "named"),
    [
        ("identity_adapter", {"num_layers": 9}, "identity_adapter.num_layers"),
        ("identity_adapter", {"feature_size": 7}, "identity_adapter.feature_size"),
        ("face_encoder", None, "face_encoder"),
    ],
)
def test_config_error_for_an_identity_adapter_that_does_not_fit(slot, settings, named):
    model = model_config()
    changed = settings and dataclasses.replace(model.networks[slot], **settings)
    with pytest.raises(ConfigError, match=named):
        model.replace(**{slot: changed})
