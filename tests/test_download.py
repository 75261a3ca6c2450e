"""`convert_weights.py download`, from a hub that is mocked; errors in one line."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from helpers import run_convert_weights

import convert_weights
from configs import fantasy_talking_14b
from fantasy_jax import disk

LORA = "Wan21_I2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"
Sibling = namedtuple("Sibling", "rfilename size")
Info = namedtuple("Info", "siblings")


@pytest.fixture
def command(capsys):
    """Runs convert_weights.py; returns exit code, standard output and standard error."""
    return lambda *arguments: run_convert_weights(capsys, *arguments)


@pytest.fixture
def hub(monkeypatch):
    """A hub of small files; returns the list of the files that are downloaded from it."""
    import huggingface_hub

    hosted = {
        "Wan-AI/Wan2.1-I2V-14B-720P": [
            *("diffusion_pytorch_model-00001-of-00001.safetensors", "config.json", "Wan2.1_VAE.pth"),
            *(
                "models_t5_umt5-xxl-enc-bf16.pth",
                "models_clip_x.pth",
                "google/umt5-xxl/spiece.model",
                "README.md",
                "assets/a.jpg",
            ),
        ],
        "acvlab/FantasyTalking": ["fantasytalking_model.ckpt"],
        "acvlab/FantasyPortrait": ["fantasyportrait_model.ckpt", "pd_fpg.pth"],
        "lightx2v/Wan2.1-I2V-14B-480P-StepDistill-CfgDistill-Lightx2v": [f"loras/{LORA}", "README.md"],
        "Kijai/WanVideo_comfy": ["taew2_1.safetensors", "README.md"],
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


def test_download_of_the_files_that_are_needed_and_missing(tmp_path, command, hub):
    code, out, err = command("download", "--output", tmp_path)
    assert (code, err) == (0, "")
    assert len(hub) == 13
    assert not any("README" in name or "assets" in name or ".bin" in name for name in hub)
    assert (tmp_path / "fantasytalking_model.ckpt").is_file()
    assert (tmp_path / "pd_fpg.pth").is_file()
    assert (tmp_path / "Wan2.1-I2V-14B-720P" / "google" / "umt5-xxl" / "spiece.model").is_file()
    assert out.count("to download\n") == 13

    hub.clear()
    (tmp_path / "fantasytalking_model.ckpt").write_bytes(bytes(4))
    code, out, _ = command("download", "--output", tmp_path)
    assert (code, hub) == (0, ["acvlab/FantasyTalking/fantasytalking_model.ckpt"])
    assert out.count("complete\n") == 12


@pytest.mark.parametrize("name", ["talking", "portrait"])
def test_download_of_the_networks_of_a_config(tmp_path, command, hub, name):
    config = f"configs/fantasy_{name}_14b.py"
    assert command("download", "--output", tmp_path, "--config", config)[0] == 0
    adapters = {file for file in hub if not file.startswith("Wan-AI/")}
    wanted = {
        "talking": {
            "acvlab/FantasyTalking/fantasytalking_model.ckpt",
            "facebook/wav2vec2-base-960h/config.json",
            "facebook/wav2vec2-base-960h/model.safetensors",
        },
        "portrait": {
            "acvlab/FantasyPortrait/fantasyportrait_model.ckpt",
            "acvlab/FantasyPortrait/pd_fpg.pth",
        },
    }
    assert adapters == wanted[name]
    assert len(hub) - len(adapters) == 6


def test_download_of_the_lora_for_few_steps(tmp_path, command, hub):
    config = fantasy_talking_14b.get_config("fast")
    options = ("--config", "configs/fantasy_talking_14b.py:fast")
    assert command("download", "--output", tmp_path / "downloads", *options)[0] == 0
    with_config = [name for name in hub if "lightx2v" in name]
    hub.clear()
    assert command("download", "--output", tmp_path / "alone", "--component=lora")[0] == 0
    assert hub == with_config
    assert len(hub) == 1
    (file,) = config.sample.loras
    assert (tmp_path / file.path).is_file()


def test_download_prints_sizes_and_checks_the_disk_before_it_starts(tmp_path, command, hub, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(129))
    code, out, err = command("download", "--output", tmp_path / "new")
    assert (code, hub, err.count("\n")) == (2, [], 1)
    assert "to download into" in out
    assert "new: not enough disk space" in err
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
    assert "facebook/wav2vec2-base-960h/config.json: " in err
    assert "connection reset" in err
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, local_dir: None)
    code, _, err = command("download", "--output", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "config.json: is incomplete" in err


@pytest.mark.parametrize("partial", [b"", b"half"])
def test_a_failed_download_leaves_only_what_can_be_continued(tmp_path, command, hub, monkeypatch, partial):
    import huggingface_hub

    def failing(name, file, *, local_dir):
        cache = Path(local_dir) / ".cache/huggingface/download"
        cache.mkdir(parents=True)
        (cache / "a.lock").touch()
        (cache / "a.incomplete").write_bytes(partial)
        raise ConnectionError("connection reset")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", failing)
    assert command("download", "--output", tmp_path / "downloads")[0] == 2
    assert (tmp_path / "downloads").exists() == bool(partial)
    (tmp_path / "mine").mkdir()
    assert command("download", "--output", tmp_path / "mine")[0] == 2
    assert (tmp_path / "mine").exists()


def test_a_repository_that_has_changed(tmp_path, command, hub, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, **options: Info([]))
    code, _, err = command("download", "--output", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "Wan-AI/Wan2.1-I2V-14B-720P: " in err
    assert "diffusion_pytorch_model*" in err


def test_download_without_a_network_fails_in_one_line(tmp_path):
    """Not mocked: no server answers at this address."""
    done = subprocess.run(
        [sys.executable, convert_weights.__file__, "download", "--output", tmp_path / "new"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_ENDPOINT": "http://127.0.0.1:9"},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "Wan-AI/Wan2.1-I2V-14B-720P: download failed" in done.stderr
    assert not (tmp_path / "new").exists()
