"""The store of weights: what is saved is loaded, and nothing else is."""

import dataclasses
import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomise

from configs import tiny
from fantasy_jax import weights
from fantasy_jax.config import ConfigError, build
from fantasy_jax.convert.components import COMPONENTS
from fantasy_jax.convert.files import WeightsError
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.data.speech import Wav2Vec2Features
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.adapters.identity import IdentityAdapterConfig
from fantasy_jax.models.adapters.motion import MotionAdapterConfig
from fantasy_jax.models.face_encoder import FaceEncoderConfig
from fantasy_jax.models.wav2vec2 import Wav2Vec2Config
from fantasy_jax.pipeline import ModelConfig, Networks
from fantasy_jax.weights import FOLDERS, StoredNetworks, load_network, save_network

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


def model_config():
    """The miniature, with a wav2vec2 and adapters of its own."""
    config = build(ModelConfig, tiny.get_config().model, "model")
    adapter = dataclasses.replace(config.audio_adapter, feature_width=48)
    motion = MotionAdapterConfig(hidden=8, positions=2, width=config.transformer.dim)
    transformer = config.transformer
    identity = IdentityAdapterConfig(
        feature_width=6,
        feature_size=4,
        num_queries=3,
        depth=1,
        token_width=8,
        token_heads=2,
        width=transformer.dim,
        num_heads=transformer.num_heads,
        num_layers=transformer.num_layers,
    )
    face = FaceEncoderConfig(depths=(1, 2), widths=(4, 6), embedding=8, image_size=16)
    return dataclasses.replace(
        config,
        speech_encoder=SPEECH,
        audio_adapter=adapter,
        motion_adapter=motion,
        identity_adapter=identity,
        face_encoder=face,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of the whole miniature, and its networks."""
    folder, config = tmp_path_factory.mktemp("store"), model_config()
    networks = {}
    for seed, (name, place) in enumerate(FOLDERS.items()):
        component = next(x for x in COMPONENTS if x.name == name)
        network = nnx.jit(
            lambda c=component, p=place: c.network(
                getattr(config, p), rngs=nnx.Rngs(jax.random.key(0, impl="rbg"))
            )
        )()
        networks[place] = randomise(network, seed)
        save_network(folder / place, network, component=name, preset="tiny")
    return folder, config, networks


@pytest.fixture
def adapter(tmp_path):
    """A store of an adapter alone, to be damaged."""
    config = model_config().audio_adapter
    network = randomise(AudioAdapter(config, rngs=nnx.Rngs(0)))
    save_network(tmp_path / "audio_adapter", network, component="fantasytalking")
    return tmp_path / "audio_adapter", config, network


def assert_equal(loaded, network):
    wanted = flat_parameters(network)
    found = flat_parameters(loaded)
    assert found.keys() == wanted.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, wanted[path], strict=True)


def test_every_network_comes_back_bit_for_bit(store):
    folder, config, networks = store
    stored = StoredNetworks(folder, config)
    assert isinstance(stored, Networks)
    transformer = stored.transformer()
    for name in ("audio", "motion", "identity"):
        assert_equal(transformer.adapters.pop(name), networks[f"{name}_adapter"])
    assert_equal(transformer, networks["transformer"])
    vae = stored.vae()
    assert_equal(vae, networks["vae"])
    np.testing.assert_array_equal(vae.latent_std.get_value(), networks["vae"].latent_std.get_value())
    text_encoder, tokenizer = stored.text_encoder()
    assert_equal(text_encoder, networks["text_encoder"])
    assert tokenizer("a")["input_ids"] == [100, 1], "bytes, for none is stored"
    assert_equal(stored.image_encoder(), networks["image_encoder"])
    speech = stored.speech_encoder()
    assert isinstance(speech, Wav2Vec2Features)
    assert_equal(speech.model, networks["speech_encoder"])
    assert_equal(stored.face_encoder(), networks["face_encoder"])


def test_a_store_does_not_tell_where_it_was_written(store):
    folder, *_ = store
    for file in folder.rglob("*"):
        assert file.is_dir() or str(folder).encode() not in file.read_bytes(), file


def test_blocks_are_items_of_their_own(store):
    folder, config, _ = store
    record = json.loads((folder / "transformer" / "component.json").read_text())
    assert list(record["items"]) == [*(f"blocks_{i:02d}" for i in range(5)), "rest"]
    assert all(size > 0 for size in record["items"].values())
    assert record["config"]["dim"] == config.transformer.dim
    assert (record["component"], record["preset"], record["dtype"]) == ("wan2.1_i2v_dit", "tiny", "float32")
    assert sorted(x.name for x in folder.iterdir()) == sorted(FOLDERS.values())


def test_a_network_runs_as_it_did_and_in_another_type(store):
    folder, config, networks = store
    loaded = load_network(folder / "audio_adapter", config.audio_adapter, dtype=jnp.float32)
    features = jnp.ones((1, 3, 48))
    np.testing.assert_array_equal(loaded.tokens(features), networks["audio_adapter"].tokens(features))
    half = load_network(folder / "audio_adapter", config.audio_adapter, dtype=jnp.bfloat16)
    for path, value in flat_parameters(half).items():
        wanted = flat_parameters(networks["audio_adapter"])[path]
        np.testing.assert_array_equal(value, wanted.astype(jnp.bfloat16), strict=True)


def test_adapters_that_a_store_lacks_start_anew_where_that_is_meant(store, tmp_path):
    folder, config, networks = store
    for place in FOLDERS.values():
        if place != "motion_adapter":
            (tmp_path / place).symlink_to(folder / place)
    with pytest.raises(WeightsError, match="motion_adapter: holds no complete weights"):
        StoredNetworks(tmp_path, config)
    transformer = StoredNetworks(tmp_path, config, new_adapters=True).transformer()
    assert_equal(transformer.adapters["audio"], networks["audio_adapter"])
    assert not transformer.adapters["motion"](jnp.array([[0.1, 0.9]])).any()


def test_a_transformer_is_stored_without_its_adapters(store, tmp_path):
    folder, config, networks = store
    transformer = StoredNetworks(folder, config).transformer()
    save_network(tmp_path / "transformer", transformer, component="wan2.1_i2v_dit")
    loaded = load_network(tmp_path / "transformer", config.transformer, dtype=jnp.float32)
    assert_equal(loaded, networks["transformer"])


def test_saving_again_replaces(adapter):
    folder, config, network = adapter
    randomise(network, seed=5)
    save_network(folder, network, component="fantasytalking")
    assert_equal(load_network(folder, config, dtype=jnp.float32), network)
    assert [x.name for x in folder.parent.iterdir()] == ["audio_adapter"]


# What is not loaded


def test_weights_of_other_sizes_are_of_another_model(adapter):
    folder, config, _ = adapter
    other = dataclasses.replace(config, num_layers=7, num_heads=8)
    with pytest.raises(WeightsError, match=r"of another model; .*num_heads 4 \(asked for: 8\), num_layers 5"):
        load_network(folder, other, dtype=jnp.float32)
    with pytest.raises(WeightsError, match="holds fantasytalking, where another network is meant"):
        load_network(folder, SPEECH, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "component.json").unlink(), "no complete weights"),
        (lambda folder: (folder / "component.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "component.json").write_text("{}"), "damaged"),
        (lambda folder: (folder / "component.json").write_text("[]"), "damaged"),
        (lambda folder: shutil.rmtree(folder / "rest"), "has 0 bytes"),
        (lambda folder: shutil.rmtree(folder), "no complete weights"),
    ],
)
def test_a_damaged_store(adapter, damage, message):
    folder, config, _ = adapter
    damage(folder)
    with pytest.raises(WeightsError, match=message):
        load_network(folder, config, dtype=jnp.float32)


def test_an_item_that_is_cut_off(adapter):
    folder, config, _ = adapter
    file = max((x for x in (folder / "blocks_03").rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"blocks_03: has .* bytes, not"):
        load_network(folder, config, dtype=jnp.float32)


def test_an_item_of_the_right_size_that_holds_something_else(adapter):
    folder, config, _ = adapter
    file = folder / "blocks_03" / "_METADATA"
    file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(WeightsError, match=r"blocks_03: damaged .*; import it again"):
        load_network(folder, config, dtype=jnp.float32)


def test_a_missing_network_is_found_before_anything_is_loaded(store, tmp_path):
    folder, config, _ = store
    with pytest.raises(WeightsError, match="nowhere: no such folder"):
        StoredNetworks(tmp_path / "nowhere", config)
    other = dataclasses.replace(config, vae=dataclasses.replace(config.vae, num_res_blocks=3))
    with pytest.raises(WeightsError, match="vae: of another model; it has num_res_blocks 1"):
        StoredNetworks(folder, other)
    shutil.copytree(folder, tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "vae")
    with pytest.raises(WeightsError, match=r"vae: holds no complete weights \(no component\.json\)"):
        StoredNetworks(tmp_path / "store", config)


# Interruptions and full disks


def interrupt(monkeypatch, error, count):
    """The `count`-th item and all after it cannot be saved; gives the names of those that were tried."""
    save, tried = weights._save_item, []

    def failing(path, values):
        tried.append(path.name)
        if len(tried) >= count:
            (path.parent / f"{path.name}.orbax-checkpoint-tmp").mkdir()
            raise error
        save(path, values)

    monkeypatch.setattr(weights, "_save_item", failing)
    return tried


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_save_leaves_what_was_there(adapter, monkeypatch, error):
    folder, config, network = adapter
    before = {path: np.array(value) for path, value in flat_parameters(network).items()}
    interrupt(monkeypatch, error, 3)
    with pytest.raises((KeyboardInterrupt, WeightsError)):
        save_network(folder, randomise(network, seed=9), component="fantasytalking")
    loaded = flat_parameters(load_network(folder, config, dtype=jnp.float32))
    for path, value in before.items():
        np.testing.assert_array_equal(loaded[path], value)
    with pytest.raises(WeightsError, match="no complete weights"):
        load_network(folder.with_name("audio_adapter.partial"), config, dtype=jnp.float32)
    monkeypatch.undo()
    save_network(folder, network, component="fantasytalking")
    assert_equal(load_network(folder, config, dtype=jnp.float32), network)
    assert [x.name for x in folder.parent.iterdir()] == ["audio_adapter"]


def test_what_orbax_says_of_a_full_disk_is_one_line(tmp_path, monkeypatch):
    class Full:
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def save(self, *arguments):
            raise ValueError('RESOURCE_EXHAUSTED: Error writing "k": No space left on device\nmore')

    monkeypatch.setattr(weights.ocp, "Checkpointer", lambda handler: Full())
    adapter = AudioAdapter(model_config().audio_adapter, rngs=nnx.Rngs(0))
    with pytest.raises(
        WeightsError, match=r"blocks_00: cannot be written \(No space left on device\)"
    ) as error:
        save_network(tmp_path / "adapter", adapter, component="fantasytalking")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "adapter").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    adapter = AudioAdapter(model_config().audio_adapter, rngs=nnx.Rngs(0))
    with pytest.raises(WeightsError, match="cannot be written"):
        save_network(tmp_path / "file" / "x", adapter, component="fantasytalking")


def test_faces_are_encoded_in_float32_whatever_the_others_are(store):
    folder, config, networks = store
    half = dataclasses.replace(config, dtype="bfloat16")
    assert_equal(StoredNetworks(folder, half).face_encoder(), networks["face_encoder"])


@pytest.mark.parametrize(
    ("part", "settings", "told"),
    [
        (
            "identity_adapter",
            {"num_layers": 9},
            "identity_adapter.num_layers is 9, but what it is joined to has 5",
        ),
        ("identity_adapter", {"feature_size": 7}, "identity_adapter.feature_size is 7, but .* has 4"),
        ("face_encoder", None, "identity_adapter is set, but no face_encoder"),
    ],
)
def test_an_identity_adapter_fits_what_it_is_joined_to(part, settings, told):
    config = model_config()
    changed = settings and dataclasses.replace(getattr(config, part), **settings)
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(config, **{part: changed})
