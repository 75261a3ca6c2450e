"""Checksums of a store: damage is found on loading and by `check`; what a store says about its weights."""

import json
import logging
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_network, run_convert_weights
from test_weights import AUDIO

from fantasy_jax.config import build, load_config
from fantasy_jax.errors import WeightsError
from fantasy_jax.system.components import SPEECH_ENCODER
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.registry import component_of
from fantasy_jax.weights import checksums
from fantasy_jax.weights.check import check_store
from fantasy_jax.weights.inspect import store_origins
from fantasy_jax.weights.loading import load_network, notes, stored_networks
from fantasy_jax.weights.store import (
    SourceFile,
    check_writable_store,
    network_hash,
    read_record,
    record_hashes,
    save_network,
)

DEBUG = "configs/fantasy_talking_14b.py:debug"
SOURCE = SourceFile("adapter.ckpt", 3, "ab" * 32)


@pytest.fixture
def store(tmp_path):
    """A store of an audio adapter."""
    folder = tmp_path / "store" / "audio_adapter"
    save_network(folder, random_network(AUDIO), component="fantasytalking", sources=[SOURCE])
    return folder.parent


def load(store):
    return load_network(store / "audio_adapter", AUDIO, dtype=jnp.float32)


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_flipped_bits_in_a_hundred_random_places_are_found(store):
    files = [path for path in sorted(store.rglob("*")) if path.is_file()]
    random = np.random.default_rng(0)
    # Half of them anywhere, half in the files of text, which are small.
    places = random.integers(sum(path.stat().st_size for path in files), size=50).tolist()
    small = [path for path in files if path.name in (checksums.SUMS, "component.json")]
    for number in range(100):
        path = small[number % len(small)]
        position = int(random.integers(path.stat().st_size))
        if places:
            position = places.pop()
            for path in files:
                if position < path.stat().st_size:
                    break
                position -= path.stat().st_size
        before, bit = path.read_bytes(), int(random.integers(8))
        flip(path, position, bit)
        where = f"{path}, byte {position}, bit {bit}"
        assert any(result.faults for result in check_store(store)), where
        with pytest.raises(WeightsError) as caught:
            load(store)
        assert str(store) in str(caught.value), where
        assert "\n" not in str(caught.value)
        path.write_bytes(before)
    load(store)


def test_a_file_is_read_once_for_its_checksum(store, monkeypatch):
    monkeypatch.setattr(checksums, "_SETTLED", 0)
    read, sha256 = [], checksums.sha256
    monkeypatch.setattr(checksums, "sha256", lambda path: read.append(path) or sha256(path))
    load(store)
    assert sorted(read) == sorted(
        store / "audio_adapter" / x for x in checksums.read_sums(store / "audio_adapter")
    )
    load(store)
    assert len(read) == len(set(read))


def test_checks_can_be_skipped(store, monkeypatch):
    record = store / "audio_adapter/component.json"
    record.write_text(record.read_text().replace("adapter.ckpt", "another.ckpt"))
    with pytest.raises(WeightsError, match="checksum"):
        load(store)
    monkeypatch.setenv(checksums.SKIP, "1")
    load(store)


def test_check_of_a_store(store, capsys):
    code, out, _ = run_convert_weights(capsys, "check", store)
    assert code == 0
    assert f"{store}/audio_adapter: intact, fantasytalking, float32, adapter.ckpt, abababab\n" in out
    (store / "audio_adapter/note.txt").write_text("")
    flip(max((store / "audio_adapter/rest").rglob("*"), key=lambda x: x.stat().st_size * x.is_file()), 40, 3)
    code, out, _ = run_convert_weights(capsys, "check", store)
    assert code == 1
    assert f"{store}/audio_adapter: DAMAGED\n" in out
    assert "  rest/" in out
    assert "  note.txt is not of this network\n" in out
    (store / "audio_adapter" / checksums.SUMS).unlink()
    code, out, _ = run_convert_weights(capsys, "check", store)
    assert (code, "cannot be checked" in out) == (1, True)
    code, _, err = run_convert_weights(capsys, "check", store / "nowhere")
    assert (code, err.count("\n")) == (2, 1)


def test_the_hash_of_a_network_is_that_of_its_content(tmp_path, store):
    again = tmp_path / "again/audio_adapter"
    save_network(again, random_network(AUDIO), component="fantasytalking", sources=[SOURCE])
    assert network_hash(again) == SOURCE.sha256
    assert record_hashes(again.parent) == record_hashes(store)
    half = random_network(AUDIO, dtype=jnp.bfloat16)
    save_network(again, half, component="fantasytalking", sources=[SOURCE])
    assert network_hash(again) == SOURCE.sha256
    assert record_hashes(again.parent) != record_hashes(store)
    two = [SOURCE, SourceFile("b", 3, "cd" * 32)]
    save_network(again, half, component="fantasytalking", sources=two)
    assert network_hash(again) not in ("ab" * 32, "cd" * 32)


@pytest.mark.parametrize("checksums", [True, False])
def test_a_network_is_replaced_with_its_own_files_only(tmp_path, checksums):
    folder, normaliser = tmp_path / "store/audio_adapter", tmp_path / "motion.json"
    normaliser.write_text("{}")
    network = random_network(AUDIO)
    for _ in range(2):
        save_network(folder, network, component="fantasytalking", files=[normaliser])
        if not checksums:  # as earlier versions stored it
            (folder / "SHA256SUMS").unlink()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(WeightsError, match=r"holds notes\.txt"):
        save_network(folder, network, component="fantasytalking")
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(WeightsError, match=r"holds notes\.txt"):
        check_writable_store(folder.parent)
    check_writable_store(folder.parent, ["vae"])
    # Fine-tuning links the networks that it does not train.
    trained = tmp_path / "trained/audio_adapter"
    trained.parent.mkdir()
    trained.symlink_to(folder, target_is_directory=True)
    for _ in range(2):
        check_writable_store(trained.parent)
        save_network(trained, network, component="fantasytalking")
        assert [path.name for path in trained.parent.iterdir()] == ["audio_adapter"]
    assert not trained.is_symlink()
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    """A store of the debug variant's networks, and its model."""
    store, model = tmp_path_factory.mktemp("small"), build(ModelConfig, load_config(DEBUG).model, "model")
    for slot, sizes in model.networks.items():
        save_network(store / slot, random_network(sizes), component=component_of(sizes).name)
    return store, model


# Random stores


@pytest.fixture(scope="module")
def random_store(tmp_path_factory):
    """The store that `init` writes for the debug variant, and its model."""
    import convert_weights

    store = tmp_path_factory.mktemp("random") / "store"
    assert convert_weights.main(["init", f"--config={DEBUG}", f"--output={store}"]) == 0
    return store, build(ModelConfig, load_config(DEBUG).model, "model")


@pytest.mark.slow
def test_a_store_of_random_weights_says_so(random_store, caplog, capsys):
    store, model = random_store
    assert {slot: read_record(store / slot)[1]["random"] for slot in model.networks} == dict.fromkeys(
        model.networks, True
    )
    with caplog.at_level(logging.WARNING):
        stored_networks(store, model)
    assert "are random" in caplog.text
    assert "vae" in caplog.text
    origins = store_origins(store)
    assert origins.keys() == model.networks.keys()
    assert all("random weights" in line for line in origins.values())
    assert not any(result.faults for result in check_store(store))
    code, _, err = run_convert_weights(capsys, "init", f"--config={DEBUG}", f"--output={store}")
    assert (code, err.count("\n"), "exists already" in err) == (2, 1, True)


def test_another_encoder_than_the_adapters_is_said(small_store, tmp_path, caplog):
    folder, model = small_store
    store = tmp_path / "store"
    shutil.copytree(folder, store)
    adapter = stored_networks(store, model)["audio_adapter"]
    trained_with = {"speech_encoder": network_hash(store / "speech_encoder")}
    save_network(store / "audio_adapter", adapter, component="fantasytalking", trained_with=trained_with)
    caplog.clear()
    stored_networks(store, model)
    assert "another speech_encoder" not in caplog.text
    encoder = random_network(model.speech_encoder, seed=5)
    save_network(store / "speech_encoder", encoder, component="wav2vec2")
    stored_networks(store, model)
    assert "audio_adapter: was trained with another speech_encoder" in caplog.text
    assert trained_with["speech_encoder"][:8] in caplog.text


@pytest.mark.parametrize("changed", [{}, {"do_normalize": False}])
def test_an_encoder_unlike_that_of_the_released_adapter_is_said(small_store, tmp_path, changed, monkeypatch):
    folder, model = small_store
    shutil.copytree(folder, store := tmp_path / "store")
    adapter = stored_networks(store, model)["audio_adapter"]
    released = {"component": "fantasytalking", "preset": "fantasytalking"}
    save_network(store / "audio_adapter", adapter, **released)
    monkeypatch.setitem(
        SPEECH_ENCODER.presets, "wav2vec2_base_960h", replace(model.speech_encoder, **changed)
    )
    found = [note for note in notes(store, ["audio_adapter", "speech_encoder"]) if "random" not in note]
    assert len(found) == len(changed)
    assert all("wav2vec2_base_960h" in note and "do_normalize" in note for note in found)
    save_network(store / "audio_adapter", adapter, **released, trained_with={"speech_encoder": "0" * 64})
    (note,) = (x for x in notes(store, ["audio_adapter", "speech_encoder"]) if "random" not in x)
    assert "another speech_encoder" in note


def test_sizes_that_an_earlier_version_did_not_have_are_the_defaults(small_store, tmp_path):
    store, model = small_store
    folder = tmp_path / "speech_encoder"
    shutil.copytree(store / "speech_encoder", folder)
    record = json.loads((folder / "component.json").read_text())
    del record["config"]["do_normalize"]
    (folder / "component.json").write_text(json.dumps(record))
    checksums.write_sums(folder, checksums.files_below(folder))
    load_network(folder, model.speech_encoder, dtype=jnp.float32)
