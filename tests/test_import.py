"""`convert_weights.py import` and `download`: any of the downloads into the store; faults in one line."""

import dataclasses
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import full_size
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DATA, run_convert_weights
from safetensors.numpy import save_file

import convert_weights
from fantasy_jax import weights
from fantasy_jax.convert import components, download, importer
from fantasy_jax.convert.components import recognise
from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import export, flat_parameters, load
from fantasy_jax.weights import load_network

REFERENCES = ("fantasytalking_dit", "wan_vae", "umt5_encoder", "clip_vision", "wav2vec2")


def tiny_components():
    """The components with the references' sizes as their only presets."""
    found = {x.component.name: x for name in REFERENCES for x in recognise(open_weights(DATA / name))}
    return tuple(
        dataclasses.replace(x, presets={"tiny": found[x.name].config})
        for x in components.COMPONENTS
        if x.name in found  # what nobody has published has no reference
    )


@pytest.fixture(scope="module")
def references():
    """Of each component its sizes and parameters by path, float32."""
    found = [x for name in REFERENCES for x in recognise(open_weights(DATA / name))]
    return {x.component.name: (x.config, load(x.plan()[1], x.weights.read)) for x in found}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(components, "COMPONENTS", tiny_components())


@pytest.fixture
def command(capsys):
    """Runs convert_weights.py; gives exit code, standard output, and standard error without its bars."""

    def run(*arguments):
        code, out, err = run_convert_weights(capsys, *arguments)
        told = [x for x in err.splitlines(True) if "B/s" not in x and "B [" not in x and x.strip()]
        return code, out, "".join(told)

    return run


def spelled(references, name, layout):
    """A reference's tensors under the keys of a layout."""
    config, values = references[name]
    component = next(x for x in components.COMPONENTS if x.name == name)
    rules = next(x.rules for x in component.layouts if x.name == layout)(config)
    return {key: np.ascontiguousarray(value) for key, value in export(rules, values)}


def write_sharded(folder, name, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    files = {key: f"{name}-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
    for file in set(files.values()):
        save_file({key: x for key, x in tensors.items() if files[key] == file}, folder / file)
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def write_pickle(path, tensors):
    import torch

    torch.save({key: torch.from_numpy(value) for key, value in tensors.items()}, path)


def write_tokenizer(folder):
    folder.mkdir(parents=True)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')


def official(folder, references):
    """The official folder of Wan2.1, small."""
    tensors = spelled(references, "wan2.1_i2v_dit", "official")
    write_sharded(folder, "diffusion_pytorch_model", tensors)
    (folder / "config.json").write_text('{"model_type": "i2v", "dim": 5120, "model": "Wan"}')
    write_pickle(folder / "Wan2.1_VAE.pth", spelled(references, "wan_vae", "official"))
    umt5 = spelled(references, "umt5_encoder", "official")
    write_pickle(folder / "models_t5_umt5-xxl-enc-bf16.pth", umt5)
    clip = spelled(references, "clip_vision", "official") | {"textual.w": np.zeros(3, np.float32)}
    write_pickle(folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", clip)
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def diffusers(folder, references):
    """The same as diffusers' folders have it."""
    for place, name, component, layout in (
        ("transformer", "diffusion_pytorch_model", "wan2.1_i2v_dit", "diffusers"),
        ("text_encoder", "model", "umt5_encoder", "transformers"),
    ):
        write_sharded(folder / place, name, spelled(references, component, layout))
    for place, component, layout in (
        ("vae/diffusion_pytorch_model", "wan_vae", "diffusers"),
        ("image_encoder/model", "clip_vision", "transformers"),
    ):
        (folder / place).parent.mkdir(parents=True)
        save_file(spelled(references, component, layout), folder / f"{place}.safetensors")
    (folder / "image_encoder" / "config.json").write_text('{"hidden_size": 1280, "num_hidden_layers": 32}')
    write_tokenizer(folder / "tokenizer")
    return folder


def speech(folder, references):
    """A wav2vec2's folder."""
    folder.mkdir()
    tensors = spelled(references, "wav2vec2", "transformers with a head, old weight norm")
    save_file(tensors | {"lm_head.bias": np.zeros(3, np.float32)}, folder / "model.safetensors")
    return folder


def adapter(path, references):
    """The FantasyTalking file: nested, as the .ckpt is."""
    import torch

    nested = {"proj_model": {}, "audio_processor": {}}
    for key, value in spelled(references, "fantasytalking", "official").items():
        part, name = key.split(".", 1)
        nested[part][name] = torch.from_numpy(value)
    torch.save(nested, path)
    return path


def assert_stored(folder, references, names, dtype=np.float32):
    """The store holds these, bit for bit."""
    for name in names:
        config, values = references[name]
        loaded = flat_parameters(load_network(folder / weights.FOLDERS[name], config, dtype=dtype))
        for path, value in values.items():
            np.testing.assert_array_equal(loaded[path], value.astype(dtype), strict=True)
    assert sorted(x.name for x in folder.iterdir()) == sorted(weights.FOLDERS[name] for name in names)


@pytest.mark.parametrize("layout", [official, diffusers])
def test_all_networks_of_either_layout(tmp_path, references, command, layout):
    wan = layout(tmp_path / "wan", references)
    sources = ["--wan", wan, "--fantasytalking", adapter(tmp_path / "f.ckpt", references)]
    sources += ["--wav2vec2", speech(tmp_path / "speech", references)]
    code, out, err = command("import", *sources, "--output", tmp_path / "store", "--dtype", "float32")
    assert (code, err) == (0, "")
    assert out.count("GiB of float32") == 6
    assert_stored(tmp_path / "store", references, references)
    copied = tmp_path / "store" / "text_encoder" / "tokenizer" / "tokenizer_config.json"
    assert "ByT5" in copied.read_text()

    record = json.loads((tmp_path / "store" / "transformer" / "component.json").read_text())
    assert len(record["sources"]) == 2
    for source in record["sources"]:
        path = next(wan.rglob(source["name"]))
        assert source["bytes"] == path.stat().st_size
        digest = subprocess.run(
            ["sha256sum", path], capture_output=True, text=True, check=True
        ).stdout.split()[0]
        assert source["sha256"] == digest


def test_what_is_complete_is_skipped_and_more_can_be_added(tmp_path, references, command):
    store, file = tmp_path / "store", adapter(tmp_path / "f.ckpt", references)
    sources = ["--fantasytalking", file]
    assert command("import", *sources, "--output", store)[0] == 0
    before = (store / "audio_adapter" / "component.json").stat().st_mtime_ns
    sources += ["--wav2vec2", speech(tmp_path / "speech", references)]
    code, out, _ = command("import", *sources, "--output", store)
    assert code == 0
    assert f"{store}/audio_adapter: complete already\n" in out
    assert f"{store}/speech_encoder: 0.00 GiB of bfloat16\n" in out
    assert (store / "audio_adapter" / "component.json").stat().st_mtime_ns == before
    assert_stored(store, references, ["fantasytalking", "wav2vec2"], jnp.bfloat16)


def test_other_weights_in_the_same_place_are_not_touched(tmp_path, references, command):
    store, file = tmp_path / "store", adapter(tmp_path / "f.ckpt", references)
    assert command("import", "--fantasytalking", file, "--output", store)[0] == 0
    code, out, err = command("import", "--fantasytalking", file, "--output", store, "--dtype", "float32")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "audio_adapter: holds bfloat16 weights of other files; delete it, or give another --output" in err
    assert_stored(store, references, ["fantasytalking"], jnp.bfloat16)


# Bad input: one line, and nothing is written


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-300])


def hostile(path):
    path.write_bytes(pickle.dumps(print))


def other_sizes(path):
    import torch

    tensors = torch.load(path)
    torch.save({key: torch.cat([x, x]) for key, x in tensors.items()}, path)


def one_tensor_less(path):
    import torch

    tensors = torch.load(path)
    del tensors["blocks.1.norm1.weight"]
    torch.save(tensors, path)


@pytest.mark.parametrize(
    ("file", "fault", "message"),
    [
        ("diffusion_pytorch_model-00002-of-00002.safetensors", cut_off, "damaged or cut off"),
        ("diffusion_pytorch_model-00002-of-00002.safetensors", Path.unlink, "which is not there"),
        ("diffusion_pytorch_model.safetensors.index.json", Path.unlink, "lacks diffusion_pytorch_model"),
        ("Wan2.1_VAE.pth", cut_off, "not a file of tensors alone, or damaged"),
        ("Wan2.1_VAE.pth", hostile, "not a file of tensors alone, or damaged"),
        ("Wan2.1_VAE.pth", other_sizes, "fits no preset of wan_vae"),
        ("models_t5_umt5-xxl-enc-bf16.pth", one_tensor_less, "missing: nothing fills blocks/norm1/scale[1]"),
        (
            "google/umt5-xxl/tokenizer_config.json",
            lambda path: (path.unlink(), path.parent.rmdir()),
            "umt5-xxl",
        ),
    ],
)
def test_a_bad_file_of_wan(tmp_path, references, command, file, fault, message):
    wan = official(tmp_path / "wan", references)
    fault(wan / file)
    code, out, err = command("import", "--wan", wan, "--output", tmp_path / "store")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: None, "missing: nothing fills blocks/qkv/kernel[1] [48, 48]"),
        (
            lambda x: np.zeros((48, 47), np.float32),
            "q_proj.weight is [48, 47], but blocks/qkv/kernel[1]",
        ),
    ],
)
def test_a_part_of_what_is_fused_here(tmp_path, references, command, change, message):
    wan = diffusers(tmp_path / "wan", references)
    tensors = spelled(references, "clip_vision", "transformers")
    key = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    tensors[key] = change(tensors[key])
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, wan / "image_encoder" / "model.safetensors")
    code, out, err = command("import", "--wan", wan, "--output", tmp_path / "store")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_checkpoint_of_another_model(tmp_path, references, command):
    write_pickle(tmp_path / "vae.pth", spelled(references, "wan_vae", "official"))
    for option in ("--fantasytalking", "--wav2vec2"):
        code, out, err = command("import", option, tmp_path / "vae.pth", "--output", tmp_path / "store")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"vae.pth: holds wan_vae, where {option[2:]} is meant" in err
    code, _, err = command("import", "--wan", tmp_path / "nowhere", "--output", tmp_path / "store")
    assert (code, err) == (2, f"convert_weights.py: error: {tmp_path}/nowhere: no such folder\n")
    code, _, err = command("import", "--output", tmp_path / "store")
    assert (code, err.count("\n")) == (2, 1)
    assert "nothing to import; give --wan, --fantasytalking, --wav2vec2 or --arcface" in err
    assert not (tmp_path / "store").exists()


def test_a_full_disk_is_known_before(tmp_path, references, command, monkeypatch):
    file = adapter(tmp_path / "f.ckpt", references)
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(importer.shutil, "disk_usage", lambda path: usage(1000))
    code, _, err = command("import", "--fantasytalking", file, "--output", tmp_path / "store")
    assert (code, err.count("\n")) == (2, 1)
    assert "store: no room; 0.00 GiB are needed and 0.00 GiB are free" in err
    assert not (tmp_path / "store").exists()


# Memory


@pytest.mark.slow
def test_a_full_size_file_is_never_in_memory_as_a_whole(tmp_path):
    """3.4 GB in, 1.7 GB out. For all of the 14B system run tests/full_size.py."""
    file = full_size.adapter(tmp_path / "fantasytalking_model.ckpt")
    code, peak = full_size.peak_anonymous(
        ["import", "--fantasytalking", file, "--output", tmp_path / "store"]
    )
    assert code == 0
    assert peak < 2**30


# Interruptions


def stop_at(monkeypatch, count, error):
    """Saving the `count`-th item leaves half of it and raises; gives the names of the items begun."""
    save, begun = weights._save_item, []

    def failing(path, values):
        begun.append(path.name)
        if len(begun) == count:
            half = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
            half.mkdir()
            (half / "data").write_text("half")
            raise error
        save(path, values)

    monkeypatch.setattr(weights, "_save_item", failing)
    return begun


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "No space left on device"),
    ],
)
def test_the_next_run_goes_on(tmp_path, references, command, monkeypatch, error, code, message):
    store, file = tmp_path / "store", adapter(tmp_path / "f.ckpt", references)
    arguments = ["import", "--fantasytalking", file, "--output", store, "--dtype", "float32"]
    with monkeypatch.context() as patch:
        begun = stop_at(patch, 3, error)
        failed = command(*arguments)
        assert (failed[0], failed[2].count("\n")) == (code, 1)
        assert message in failed[2]
    assert begun == ["blocks_00", "blocks_01", "blocks_02"]
    assert not (store / "audio_adapter").exists()
    begun = stop_at(monkeypatch, -1, error)
    assert command(*arguments)[0] == 0
    assert begun == ["blocks_02", "rest"]
    assert_stored(store, references, ["fantasytalking"])


def test_what_is_left_of_another_file_is_not_gone_on_with(tmp_path, references, command, monkeypatch):
    store, file = tmp_path / "store", adapter(tmp_path / "f.ckpt", references)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, KeyboardInterrupt())
        assert command("import", "--fantasytalking", file, "--output", store)[0] == 130
    config, values = references["fantasytalking"]
    changed = {"fantasytalking": (config, {path: value + 1 for path, value in values.items()})}
    adapter(file, changed)
    assert command("import", "--fantasytalking", file, "--output", store, "--dtype", "float32")[0] == 0
    assert_stored(store, changed, ["fantasytalking"])


KILLED = """\
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_import import tiny_components
from fantasy_jax import weights
from fantasy_jax.convert import components, importer
components.COMPONENTS = tiny_components()
save, begun = weights._save_item, []
def dying(path, values):
    begun.append(path)
    if len(begun) == 3:
        rename = Path.rename
        os.rename = os.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = Path.replace = os.rename
    save(path, values)
    if len(begun) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
weights._save_item = dying
importer.import_weights({store!r}, fantasytalking={file!r}, dtype="float32", progress=False)
"""


def test_a_killed_import_is_gone_on_with(tmp_path, references, command):
    store, file = tmp_path / "store", adapter(tmp_path / "f.ckpt", references)
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    script = KILLED.format(paths=paths, store=str(store), file=str(file))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [x.name for x in store.iterdir()] == ["audio_adapter.partial"]
    code, _, err = command("import", "--fantasytalking", file, "--output", store, "--dtype", "float32")
    assert (code, err) == (0, "")
    assert_stored(store, references, ["fantasytalking"])


# download


Sibling = namedtuple("Sibling", "rfilename size")
Info = namedtuple("Info", "siblings")


@pytest.fixture
def hub(monkeypatch):
    """A hub of small files; `fetched` tells what was asked of it."""
    import huggingface_hub

    hosted = {
        "Wan-AI/Wan2.1-I2V-14B-720P": [
            *("diffusion_pytorch_model-00001-of-00001.safetensors", "config.json", "Wan2.1_VAE.pth"),
            *("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/spiece.model", "README.md", "assets/a.jpg"),
        ],
        "acvlab/FantasyTalking": ["fantasytalking_model.ckpt"],
        "facebook/wav2vec2-base-960h": ["config.json", "model.safetensors", "pytorch_model.bin"],
    }
    fetched = []

    def model_info(self, name, **options):
        assert options["files_metadata"]
        return Info([Sibling(file, 10) for file in hosted[name]])

    def fetch(name, file, *, local_dir):
        fetched.append(f"{name}/{file}")
        path = Path(local_dir) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return fetched


def test_download_fetches_what_is_needed_and_missing(tmp_path, command, hub):
    code, out, err = command("download", "--output", tmp_path)
    assert (code, err) == (0, "")
    assert len(hub) == 8
    assert not any("README" in name or "assets" in name or ".bin" in name for name in hub)
    assert (tmp_path / "fantasytalking_model.ckpt").is_file()
    assert (tmp_path / "Wan2.1-I2V-14B-720P" / "google" / "umt5-xxl" / "spiece.model").is_file()
    assert out.count("to fetch\n") == 8

    hub.clear()
    (tmp_path / "fantasytalking_model.ckpt").write_bytes(bytes(4))
    code, out, _ = command("download", "--output", tmp_path)
    assert (code, hub) == (0, ["acvlab/FantasyTalking/fantasytalking_model.ckpt"])
    assert out.count("there already\n") == 7


def test_download_prints_sizes_and_checks_the_disk_before_it_starts(tmp_path, command, hub, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(79))
    code, out, err = command("download", "--output", tmp_path / "new")
    assert (code, hub, err.count("\n")) == (2, [], 1)
    assert "to fetch into" in out
    assert "new: no room; 0.00 GiB are needed and 0.00 are free" in err
    (tmp_path / "new" / ".cache").mkdir(parents=True)
    (tmp_path / "new" / ".cache" / "x.incomplete").write_bytes(bytes(1))
    assert command("download", "--output", tmp_path / "new")[0] == 0


def test_a_download_that_fails_or_stops_short(tmp_path, command, hub, monkeypatch):
    import huggingface_hub

    fetch = huggingface_hub.hf_hub_download

    def failing(name, file, *, local_dir):
        if "wav2vec2" in name:
            raise ConnectionError("connection reset\nmore")
        fetch(name, file, local_dir=local_dir)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing)
    code, _, err = command("download", "--output", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "facebook/wav2vec2-base-960h/config.json: cannot be fetched (connection reset)" in err
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, local_dir: None)
    code, _, err = command("download", "--output", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "config.json: did not arrive whole; run the same command again" in err


def test_a_repository_that_has_changed(tmp_path, command, hub, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **options: Info([]))
    code, _, err = command("download", "--output", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "Wan-AI/Wan2.1-I2V-14B-720P: holds no diffusion_pytorch_model*" in err


def test_offline_it_fails_in_one_line(tmp_path):
    """For real: at this address nobody answers."""
    done = subprocess.run(
        [sys.executable, convert_weights.__file__, "download", "--output", tmp_path / "new"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_ENDPOINT": "http://127.0.0.1:9"},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "Wan-AI/Wan2.1-I2V-14B-720P: cannot be fetched" in done.stderr
    assert not (tmp_path / "new").exists()
