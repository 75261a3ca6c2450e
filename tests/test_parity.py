"""`convert_weights.py verify`: parity with the official PyTorch modules, and detection of differences."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA
from safetensors.numpy import load_file, save_file

from convert_weights import main
from fantasy_jax.errors import MediaError, WeightsError

PAGE = Path(__file__).parent.parent / "docs/parity.md"
TRANSFORMER = ("fantasytalking_dit", "fantasytalking_dit_small_activations")
ENCODERS = (
    "umt5_encoder",
    "umt5_encoder_small_activations",
    "clip_vision",
    "clip_vision_small_activations",
    "wav2vec2",
    "wav2vec2_large_style",
    "pdfgc_motion_encoder",
)
PORTRAIT = (
    "fantasyportrait_adapter",
    "fantasyportrait_adapter_small_activations",
    "fantasyportrait_masked_attention",
    "fantasyportrait_preprocessing",
)
SLOW = ("wan_vae", "fantasyportrait_dit")


@pytest.mark.networks
@pytest.mark.parametrize(
    "name", [*TRANSFORMER, *ENCODERS, *PORTRAIT, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)]
)
def test_every_output_of_a_reference_is_within_its_limit(name, tmp_path, capsys):
    report = tmp_path / "parity.json"
    assert main(["verify", "--reference", str(DATA / name), "--json", str(report)]) == 0
    rows = json.loads(report.read_text())
    activations = load_file(DATA / name / "activations.safetensors")
    assert {f"output.{row['output']}" for row in rows} == {k for k in activations if k.startswith("output.")}
    for row in rows:
        output = row["output"]
        equal = activations[f"output.{output}"].dtype.kind in "iu" and output != "aligned_rgb"
        sampled = output.startswith("sample_latents") or name.startswith("umt5")
        usual = 5e-6 if sampled else 1e-3 if output == "aligned_rgb" else 2e-6
        assert row["limit"] == (0 if equal else usual)
        assert row["relative"] <= row["limit"]
    assert "0 above their limit" in capsys.readouterr().out


def test_several_references_run_in_one_call_and_a_changed_one_fails(tmp_path, capsys):
    changed = tmp_path / "clip_vision"
    shutil.copytree(DATA / "clip_vision", changed)
    activations = load_file(changed / "activations.safetensors")
    activations["output.features"] = activations["output.features"] * np.float32(1 + 1e-5)
    save_file(activations, changed / "activations.safetensors")
    folders = [str(DATA / "umt5_encoder"), str(changed)]
    assert main(["verify", "--reference", folders[0], "--reference", folders[1]]) == 1
    lines = capsys.readouterr().out.splitlines()
    verdicts = {
        line.split(" | ")[1]: line.rsplit("|", 2)[1].strip() for line in lines if line.startswith("| ")
    }
    assert verdicts["hidden"] == "pass"
    assert verdicts["pixel_values"] == "pass"
    assert verdicts["features"] == "fail"


def test_an_output_that_nothing_computes_is_an_error(tmp_path):
    folder = tmp_path / "umt5_encoder"
    shutil.copytree(DATA / "umt5_encoder", folder)
    activations = load_file(folder / "activations.safetensors")
    save_file(activations | {"output.unknown": np.ones(3, np.float32)}, folder / "activations.safetensors")
    with pytest.raises(WeightsError, match="unknown"):
        main(["verify", "--reference", str(folder)])


def test_bfloat16_has_no_limit(capsys):
    folder = str(DATA / "fantasytalking_dit_small_activations")
    assert main(["verify", "--reference", folder, "--dtype", "bfloat16"]) == 0
    row = next(x for x in capsys.readouterr().out.splitlines() if "velocity_audio_scale_1" in x)
    assert row.endswith("| reported |")
    assert 1e-3 < float(row.split(" | ")[4]) < 0.1


@pytest.mark.parametrize("option", ["--json", "--markdown"])
def test_outputs_are_checked_before_the_work(tmp_path, monkeypatch, option):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("convert_weights.verify", lambda *arguments, **settings: pytest.fail("it ran"))
    with pytest.raises(MediaError, match="parity"):
        main(["verify", f"--reference={DATA / 'wav2vec2'}", f"{option}={tmp_path}/file/parity"])


def test_the_page_of_parity_is_written(tmp_path):
    page = tmp_path / "parity.md"
    main(["verify", f"--reference={DATA / 'wav2vec2'}", f"--markdown={page}"])
    written = page.read_text()
    assert f"--reference={DATA / 'wav2vec2'}" in written
    assert "| wav2vec2 | last_hidden_state | 1 x 49 x 48 |" in written
    for name in ("jax", "flax", "numpy", "torch", "transformers", "diffusers"):
        assert re.search(rf"^\| {name} \| \d+\.\d+", written, re.MULTILINE)


def test_the_kept_page_has_every_reference_and_no_failure():
    rows = re.findall(r"^\| (\w+) \| (\w[\w.]*) \| .* \| (\w+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {reference for reference, _, _ in rows} == {
        path.parent.name for path in DATA.glob("*/activations.safetensors")
    }
    assert {verdict for _, _, verdict in rows} == {"pass"}
