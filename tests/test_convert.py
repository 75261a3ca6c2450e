"""The commands of convert_weights.py that read weight files."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DATA, run_convert_weights
from safetensors.numpy import load_file, save_file

import convert_weights
from fantasy_jax.convert.files import open_weights

MANIFESTS = DATA / "manifests"


@pytest.fixture
def command(capsys):
    """Runs convert_weights.py; returns exit code, standard output and standard error."""
    return lambda *arguments: run_convert_weights(capsys, *arguments)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 5), np.float32),
        "a.half": rng.standard_normal((2, 2)).astype(np.float16),
        "b.bfloat16": rng.standard_normal((4, 3)).astype(jnp.bfloat16),
        "b.count": np.arange(3),
        "b.scalar": np.array(2.5, np.float32),
        "b.none": np.zeros((0, 3), np.float32),
    }


def manifest(tmp_path, name, **changes):
    """A manifest of the test data with some tensors changed, or with None removed."""
    content = json.loads((MANIFESTS / f"{name}.json").read_text())
    content["tensors"].update(changes)
    content["tensors"] = {key: shape for key, shape in content["tensors"].items() if shape is not None}
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(content))
    return path


# inspect


@pytest.mark.networks
@pytest.mark.parametrize(
    ("name", "component", "count", "size"),
    [
        ("wan2.1_i2v_14b_dit", "wan2.1_i2v_dit", 1303, "65,579,515,136 of float32 (61.08 GiB)"),
        ("wan2.1_vae", "wan_vae", 194, "507,570,124 of float32"),
        ("fantasytalking_model", "fantasytalking", 83, "3,361,751,040 of float32"),
        ("umt5_xxl_encoder", "umt5_encoder", 242, "11,361,820,672 of bfloat16"),
        ("clip_xlm_roberta_vit_h14", "clip_vision", 393, "1,264,153,602 of float16"),
        ("pd_fpg", "pdfgc_motion_encoder", 387, "36,219,980 of float32"),
        ("fantasyportrait_model", "fantasyportrait_adapter", 188, "4,013,297,664 of float32"),
        ("taew2_1", "taew2_1", 128, "22,631,078 of float16"),
    ],
)
def test_full_size_files_map_completely(command, name, component, count, size):
    path = MANIFESTS / f"{name}.json"
    code, out, err = command("inspect", path)
    assert (code, err) == (0, "")
    assert f"component   {component}, official keys" in out
    assert f"tensors     {count}\n" in out
    assert f"parameters  {json.loads(path.read_text())['parameters']:,}\n" in out
    assert f"bytes       {size}" in out
    assert out.endswith("complete\n")
    assert ("ignored" in out) == (component in ("clip_vision", "taew2_1"))


@pytest.mark.networks
def test_inspect_lists_every_problem_of_a_file(tmp_path, command):
    path = manifest(
        tmp_path,
        "wan2.1_i2v_14b_dit",
        **{
            "blocks.7.ffn.0.bias": None,
            "head.head.bias": None,
            "blocks.40.ffn.0.bias": [13824],
            "blocks.0.self_attn.q.scale": [1],
            "blocks.3.modulation": [6, 1, 5120],
            "text_embedding.0.weight": [4096, 5120],
            "blocks.01.ffn.0.bias": [13824],
        },
    )
    code, out, _ = command("inspect", path)
    assert code == 1
    for kind, name in (
        ("missing", "blocks/mlp_in/bias[7]"),
        ("missing", "patch_out/bias"),
        ("unexpected", "blocks.40.ffn.0.bias"),
        ("unexpected", "blocks.0.self_attn.q.scale"),
        ("wrong shape", "blocks.3.modulation"),
        ("wrong shape", "text_embedding.0.weight"),
        ("ambiguous", "blocks.01.ffn.0.bias"),
    ):
        assert re.search(rf"^  {kind}: .*{re.escape(name)}", out, re.MULTILINE)
    assert out.endswith("INCOMPLETE  7 problems\n")


@pytest.mark.networks
def test_inspect_lists_the_parameter_of_every_tensor(command):
    code, out, _ = command("inspect", MANIFESTS / "fantasytalking_model.json", "--map")
    assert code == 0
    assert out.count(" -> ") == 83
    key = "audio_processor.blocks.39.cross_attn.processor.v_proj.weight"
    assert f"  {key} [5120, 2048] -> layers/value/kernel[39] by permute(1, 0)\n" in out


@pytest.mark.networks
def test_two_networks_in_one_file_are_detected_and_other_tensors_are_reported(tmp_path, command):
    code, out, _ = command("inspect", DATA / "fantasytalking_dit")
    assert code == 0
    assert "component   wan2.1_i2v_dit, official keys, sizes of config.json" in out
    assert "component   fantasytalking, official keys, sizes of config.json" in out

    folder = tmp_path / "unknown"
    shutil.copytree(DATA / "fantasytalking_dit", folder)
    weights = load_file(folder / "weights.safetensors")
    save_file(weights | {"portrait.weight": np.zeros(2)}, folder / "weights.safetensors")
    code, out, _ = command("inspect", folder)
    assert code == 1
    assert "unexpected: portrait.weight [2]" in out


def test_another_model_is_not_detected(tmp_path, tensors, command):
    save_file(tensors, tmp_path / "x.safetensors")
    code, _, err = command("inspect", tmp_path / "x.safetensors")
    assert (code, err.count("\n")) == (2, 1)
    assert "(wan2.1_i2v_dit, fantasytalking, " in err
    assert "miniature" not in err


@pytest.mark.networks
def test_sizes_come_from_presets_that_fit_or_are_named(tmp_path, command):
    path = manifest(tmp_path, "fantasytalking_model", **{"proj_model.proj.weight": [2048, 1024]})
    code, _, err = command("inspect", path)
    assert (code, err.count("\n")) == (2, 1)
    assert "config.json" in err
    code, out, _ = command("inspect", path, "--preset", "fantasytalking")
    assert code == 1
    assert "wrong shape: proj_model.proj.weight" in out
    code, _, err = command("inspect", path, "--preset", "nonesuch")
    assert (code, err.count("\n")) == (2, 1)
    assert "nonesuch" in err


@pytest.mark.networks
def test_a_config_of_another_program_beside_the_file_is_ignored(tmp_path, command):
    # The official folder's own config.json gives the transformer's sizes under other names.
    content = json.loads((MANIFESTS / "wan2.1_i2v_14b_dit.json").read_text())["tensors"]
    (tmp_path / "config.json").write_text('{"model_type": "i2v", "dim": 5120, "model": "Wan"}')
    header, offset = {}, 0
    for key, shape in content.items():
        size = 4 * int(np.prod(shape))
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)  # a sparse file of 61 GiB
    code, out, _ = command("inspect", path)
    assert code == 0
    assert "sizes of wan2.1_i2v_14b" in out
    assert open_weights(path).read("head.head.bias").sum() == 0


# verify: references that cannot run; comparisons are in test_parity.py


def reference(tmp_path, name, keep):
    """A copy of a reference with only the activations whose keys `keep` accepts."""
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder)
    activations = load_file(folder / "activations.safetensors")
    save_file({key: x for key, x in activations.items() if keep(key)}, folder / "activations.safetensors")
    return folder


def test_verify_of_a_missing_folder_and_of_an_unknown_component(tmp_path, command):
    folder = tmp_path / "wan_vae"
    shutil.copytree(DATA / "wan_vae", folder)
    (folder / "config.json").write_text('{"component": "unknown"}')
    for path, word in ((tmp_path / "gone", "gone"), (folder, "unknown")):
        code, out, err = command("verify", "--reference", path)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert word in err


@pytest.mark.parametrize(("lost", "message"), [("input.", "input.waveform"), ("output.", "output.*")])
def test_verify_of_a_reference_that_lacks_arrays(tmp_path, command, lost, message):
    folder = reference(tmp_path, "wav2vec2", lambda key: not key.startswith(lost))
    code, _, err = command("verify", "--reference", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


@pytest.mark.networks
@pytest.mark.parametrize(
    ("name", "lost", "compared"),
    [("wav2vec2", "input_values", 1), pytest.param("wan_vae", "tiled", 2, marks=pytest.mark.slow)],
)
def test_a_reference_need_not_hold_every_output(tmp_path, command, name, lost, compared):
    folder = reference(tmp_path, name, lambda key: lost not in key)
    code, out, _ = command("verify", "--reference", folder)
    assert code == 0
    assert f"{compared} outputs compared, 0 above" in out


def test_verify_of_weights_that_do_not_fit(tmp_path, command):
    folder = tmp_path / "umt5_encoder"
    shutil.copytree(DATA / "umt5_encoder", folder)
    weights = load_file(folder / "weights.safetensors")
    del weights["norm.weight"], weights["blocks.1.norm1.weight"]
    save_file(weights, folder / "weights.safetensors")
    code, _, err = command("verify", "--reference", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{folder}/weights.safetensors: missing: " in err
    assert "(and 1 more)" in err


# The command line


@pytest.mark.parametrize(
    "arguments", [[], ["inspect"], ["verify"], ["paint"], ["verify", "--reference", "x", "--dtype", "int8"]]
)
def test_wrong_arguments_are_one_line(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)


@pytest.mark.slow
def test_the_program_itself():
    program = Path(convert_weights.__file__)

    def run(*arguments):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [sys.executable, program, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )

    shown = run("--help")
    assert shown.returncode == 0
    assert "convert_weights.py verify --reference" in shown.stdout
    assert run("inspect", MANIFESTS / "wan2.1_vae.json").returncode == 0
    failed = run("inspect", "nowhere.safetensors")
    assert failed.returncode == 2
    assert failed.stderr.startswith("convert_weights.py: error: nowhere.safetensors: ")
    assert failed.stderr.count("\n") == 1
