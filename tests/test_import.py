"""`convert_weights.py import`: all files into the store; errors in one line."""

import dataclasses
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from collections import defaultdict, namedtuple
from pathlib import Path

import full_size
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DATA, run_convert_weights
from safetensors.numpy import save_file

from fantasy_jax import disk
from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.rules import export, flat_parameters, load
from fantasy_jax.files import lock_folder
from fantasy_jax.system.registry import components
from fantasy_jax.weights import store
from fantasy_jax.weights.detect import detect
from fantasy_jax.weights.loading import load_network

REFERENCES = (
    "fantasyportrait_dit",
    "fantasytalking_dit",  # its transformer takes the place of the other's
    "wan_vae",
    "umt5_encoder",
    "clip_vision",
    "wav2vec2",
    "pdfgc_motion_encoder",
)


def tiny_rows():
    """The rows of the references' networks, with the references' sizes as their only presets."""
    found = [x for name in REFERENCES for x in detect(open_weights(DATA / name))]
    return {x.component.name: dataclasses.replace(x.component, presets={"tiny": x.config}) for x in found}


@pytest.fixture(scope="module")
def references():
    """Sizes and parameters by path of each network, float32."""
    found = [x for name in REFERENCES for x in detect(open_weights(DATA / name))]
    return {x.component.name: (x.config, load(x.plan()[1], x.weights.read)) for x in found}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, row in tiny_rows().items():
        monkeypatch.setitem(components(), name, row)


@pytest.fixture
def command(capsys):
    """Runs convert_weights.py; returns exit code, standard output, and standard error without bars."""

    def run(*arguments):
        code, out, err = run_convert_weights(capsys, *arguments)
        lines = [x for x in err.splitlines(True) if "B/s" not in x and "B [" not in x and x.strip()]
        return code, out, "".join(lines)

    return run


def layout_tensors(references, name, layout):
    """A reference's tensors under the keys of a layout."""
    config, values = references[name]
    rules = next(x.rules for x in components()[name].layouts if x.name == layout)(config)
    return {key: np.array(value, order="C") for key, value in export(rules, values)}


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
    tensors = layout_tensors(references, "wan2.1_i2v_dit", "official")
    write_sharded(folder, "diffusion_pytorch_model", tensors)
    (folder / "config.json").write_text('{"model_type": "i2v", "dim": 5120, "model": "Wan"}')
    write_pickle(folder / "Wan2.1_VAE.pth", layout_tensors(references, "wan_vae", "official"))
    umt5 = layout_tensors(references, "umt5_encoder", "official")
    write_pickle(folder / "models_t5_umt5-xxl-enc-bf16.pth", umt5)
    clip = layout_tensors(references, "clip_vision", "official") | {"textual.w": np.zeros(3, np.float32)}
    write_pickle(folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", clip)
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def diffusers(folder, references):
    """The same folder in diffusers' layout."""
    for place, name, component, layout in (
        ("transformer", "diffusion_pytorch_model", "wan2.1_i2v_dit", "diffusers"),
        ("text_encoder", "model", "umt5_encoder", "transformers"),
    ):
        write_sharded(folder / place, name, layout_tensors(references, component, layout))
    for place, component, layout in (
        ("vae/diffusion_pytorch_model", "wan_vae", "diffusers"),
        ("image_encoder/model", "clip_vision", "transformers"),
    ):
        (folder / place).parent.mkdir(parents=True)
        save_file(layout_tensors(references, component, layout), folder / f"{place}.safetensors")
    (folder / "image_encoder" / "config.json").write_text('{"hidden_size": 1280, "num_hidden_layers": 32}')
    write_tokenizer(folder / "tokenizer")
    return folder


def speech(folder, references):
    """A folder of wav2vec2."""
    folder.mkdir()
    tensors = layout_tensors(references, "wav2vec2", "transformers with a head, old weight norm")
    save_file(tensors | {"lm_head.bias": np.zeros(3, np.float32)}, folder / "model.safetensors")
    return folder


def adapter(path, references, name="fantasytalking"):
    """The file of an adapter: nested dictionaries, as in the .ckpt."""
    import torch

    nested = defaultdict(dict)
    for key, value in layout_tensors(references, name, "official").items():
        part, rest = key.split(".", 1)
        nested[part][rest] = torch.from_numpy(value)
    torch.save(dict(nested), path)
    return path


def motion_encoder(path, references):
    """The file of PD-FGC's motion encoder."""
    write_pickle(path, layout_tensors(references, "pdfgc_motion_encoder", "official"))
    return path


def single_file(path, references):
    """ComfyUI's file of FantasyPortrait: adapter and motion encoder."""
    motion = layout_tensors(references, "pdfgc_motion_encoder", "official")
    motion = {f"pd_fpg.{key}": value for key, value in motion.items()}
    save_file(layout_tensors(references, "fantasyportrait_adapter", "comfyui") | motion, path)
    return path


def assert_stored(folder, references, names, dtype=np.float32):
    """Checks that the store holds these networks and no other, bit for bit."""
    for name in names:
        config, values = references[name]
        loaded = flat_parameters(load_network(folder / components()[name].slot, config, dtype=dtype))
        for path, value in values.items():
            kept = value.dtype if value.dtype.kind == "i" else dtype  # counters
            np.testing.assert_array_equal(loaded[path], value.astype(kept), strict=True)
    stored = sorted(x.name for x in folder.iterdir() if x.name != ".lock")
    assert stored == sorted(components()[name].slot for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [official, diffusers])
def test_all_networks_of_either_layout(tmp_path, references, command, layout):
    wan = layout(tmp_path / "wan", references)
    sources = ["--wan", wan, "--fantasytalking", adapter(tmp_path / "f.ckpt", references)]
    sources += ["--wav2vec2", speech(tmp_path / "speech", references)]
    file = adapter(tmp_path / "p.ckpt", references, "fantasyportrait_adapter")
    sources += ["--fantasyportrait", file, "--pd_fpg", motion_encoder(tmp_path / "m.pth", references)]
    code, out, err = command("import", *sources, "--output", tmp_path / "store", "--dtype", "float32")
    assert (code, err) == (0, "")
    assert out.count("GiB of float32") == 8
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


def test_adapter_and_motion_encoder_in_one_file(tmp_path, references, command):
    store, file = tmp_path / "store", single_file(tmp_path / "p.safetensors", references)
    code, out, err = command("import", "--fantasyportrait", file, "--output", store, "--dtype", "float32")
    assert (code, err, out.count("GiB of float32")) == (0, "", 2)
    assert_stored(store, references, ["fantasyportrait_adapter", "pdfgc_motion_encoder"])


def test_what_is_complete_is_skipped_and_more_can_be_added(tmp_path, references, command):
    store, file = tmp_path / "store", adapter(tmp_path / "f.ckpt", references)
    sources = ["--fantasytalking", file]
    assert command("import", *sources, "--output", store)[0] == 0
    before = (store / "audio_adapter" / "component.json").stat().st_mtime_ns
    sources += ["--wav2vec2", speech(tmp_path / "speech", references)]
    code, out, _ = command("import", *sources, "--output", store)
    assert code == 0
    assert f"{store}/audio_adapter: already complete\n" in out
    assert f"{store}/speech_encoder: 0.00 GiB of bfloat16\n" in out
    assert (store / "audio_adapter" / "component.json").stat().st_mtime_ns == before
    assert_stored(store, references, ["fantasytalking", "wav2vec2"], jnp.bfloat16)


def test_other_weights_in_the_same_place_are_not_touched(tmp_path, references, command):
    store, file = tmp_path / "store", adapter(tmp_path / "f.ckpt", references)
    assert command("import", "--fantasytalking", file, "--output", store)[0] == 0
    code, out, err = command("import", "--fantasytalking", file, "--output", store, "--dtype", "float32")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{store}/audio_adapter: " in err
    assert_stored(store, references, ["fantasytalking"], jnp.bfloat16)


def test_a_store_that_another_import_writes_to_is_refused(tmp_path, references, command):
    store, file = tmp_path / "store", adapter(tmp_path / "f.ckpt", references)
    with lock_folder(store):
        code, out, err = command("import", "--fantasytalking", file, "--output", store)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(store) in err
    assert str(os.getpid()) in err
    assert command("import", "--fantasytalking", file, "--output", store)[0] == 0


# Bad input: an error of one line, and nothing is written


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
    ("file", "fault", "word"),
    [
        (
            "diffusion_pytorch_model-00002-of-00002.safetensors",
            cut_off,
            "00002-of-00002.safetensors: damaged",
        ),
        ("diffusion_pytorch_model-00002-of-00002.safetensors", Path.unlink, "00002-of-00002.safetensors"),
        ("diffusion_pytorch_model.safetensors.index.json", Path.unlink, "diffusion_pytorch_model"),
        ("Wan2.1_VAE.pth", cut_off, "Wan2.1_VAE.pth: damaged"),
        ("Wan2.1_VAE.pth", hostile, "Wan2.1_VAE.pth: damaged"),
        ("Wan2.1_VAE.pth", other_sizes, "Wan2.1_VAE.pth: fits no preset"),
        ("models_t5_umt5-xxl-enc-bf16.pth", one_tensor_less, "umt5-xxl-enc-bf16.pth: missing: "),
        (
            "google/umt5-xxl/tokenizer_config.json",
            lambda path: (path.unlink(), path.parent.rmdir()),
            "google/umt5-xxl",
        ),
    ],
)
def test_a_bad_file_of_wan(tmp_path, references, command, file, fault, word):
    wan = official(tmp_path / "wan", references)
    fault(wan / file)
    code, out, err = command("import", "--wan", wan, "--output", tmp_path / "store")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert word in err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "kind"),
    [(lambda x: None, "missing"), (lambda x: np.zeros((48, 47), np.float32), "wrong shape")],
)
def test_a_part_of_a_fused_projection(tmp_path, references, command, change, kind):
    wan = diffusers(tmp_path / "wan", references)
    tensors = layout_tensors(references, "clip_vision", "transformers")
    key = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    tensors[key] = change(tensors[key])
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, wan / "image_encoder" / "model.safetensors")
    code, out, err = command("import", "--wan", wan, "--output", tmp_path / "store")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert kind in err
    assert "blocks/qkv/kernel[1]" in err


def test_a_checkpoint_of_another_model(tmp_path, references, command):
    write_pickle(tmp_path / "vae.pth", layout_tensors(references, "wan_vae", "official"))
    for option in ("--fantasytalking", "--wav2vec2"):
        code, out, err = command("import", option, tmp_path / "vae.pth", "--output", tmp_path / "store")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "wan_vae" in err
        assert option[2:] in err
    code, _, err = command("import", "--wan", tmp_path / "nowhere", "--output", tmp_path / "store")
    assert (code, err.count("\n")) == (2, 1)
    assert f"{tmp_path}/nowhere: " in err
    code, _, err = command("import", "--output", tmp_path / "store")
    assert (code, err.count("\n")) == (2, 1)
    options = ("transformer", "fantasytalking", "fantasyportrait", "vae", "text_encoder", "image_encoder")
    assert all(f"--{name}" in err for name in ("wan", *options, "wav2vec2", "arcface", "pd_fpg"))
    assert not (tmp_path / "store").exists()


def test_disk_space_is_checked_first(tmp_path, references, command, monkeypatch):
    file = adapter(tmp_path / "f.ckpt", references)
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(1000))
    code, _, err = command("import", "--fantasytalking", file, "--output", tmp_path / "store")
    assert (code, err.count("\n")) == (2, 1)
    assert "store: not enough disk space" in err
    assert not (tmp_path / "store").exists()


# Memory


@pytest.mark.slow
def test_a_full_size_file_is_never_in_memory_as_a_whole(tmp_path):
    """Reads 3.4 GB and writes 1.7 GB. For all networks of the 14B system run tests/full_size.py."""
    file = full_size.adapter(tmp_path / "fantasytalking_model.ckpt")
    code, peak = full_size.peak_anonymous(
        ["import", "--fantasytalking", file, "--output", tmp_path / "store"]
    )
    assert code == 0
    assert peak < 2**30


# Interruptions


def stop_at(monkeypatch, count, error):
    """Makes saving of the `count`-th item leave half of it and raise; returns the names of items begun."""
    save, begun = store._save_item, []

    def failing(checkpointer, path, values):
        begun.append(path.name)
        if len(begun) == count:
            half = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
            half.mkdir()
            (half / "data").write_text("half")
            raise error
        save(checkpointer, path, values)

    monkeypatch.setattr(store, "_save_item", failing)
    return begun


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "No space left on device"),
    ],
)
def test_the_next_run_resumes(tmp_path, references, command, monkeypatch, error, code, message):
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


def test_an_interrupted_import_of_another_file_is_not_resumed(tmp_path, references, command, monkeypatch):
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
from test_import import tiny_rows
from fantasy_jax.system.registry import components
from fantasy_jax.weights import store
from fantasy_jax.weights.importer import import_weights
components().update(tiny_rows())
save, begun = store._save_item, []
def dying(checkpointer, path, values):
    begun.append(path)
    if len(begun) == 3:
        rename = Path.rename
        os.rename = os.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = Path.replace = os.rename
    save(checkpointer, path, values)
    if len(begun) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
store._save_item = dying
import_weights({store!r}, sources={{"fantasytalking": {file!r}}}, dtype="float32", progress=False)
"""


def test_a_killed_import_is_resumed(tmp_path, references, command):
    store, file = tmp_path / "store", adapter(tmp_path / "f.ckpt", references)
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    script = KILLED.format(paths=paths, store=str(store), file=str(file))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(x.name for x in store.iterdir()) == [".lock", "audio_adapter.partial"]
    code, _, err = command("import", "--fantasytalking", file, "--output", store, "--dtype", "float32")
    assert (code, err) == (0, "")
    assert_stored(store, references, ["fantasytalking"])
