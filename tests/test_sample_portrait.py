"""Sampling of FantasyPortrait as users start it, and files that must not be overwritten."""

import os

import numpy as np
import pytest
from drawn_faces import clip, open_squares
from PIL import Image
from safetensors.numpy import load_file
from test_sample import ROOT

from fantasy_jax import cli, media
from fantasy_jax.config import build, load_config
from fantasy_jax.errors import ConfigError
from fantasy_jax.pipelines import scene
from fantasy_jax.pipelines.config import PortraitSampleConfig
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.video import VideoConfig
from sample import main

FULL = str(ROOT / "configs/fantasy_portrait_14b.py")
CONFIG = f"--config={FULL}:debug"
COMMON = [CONFIG, "--image=two.png", "--driver=a/v.mp4", "--driver=b/v.mp4", "--output=out/act.mp4"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a picture of two people, two drivers of one name, and files of other kinds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scene, "open_detector", open_squares)
    Image.fromarray(clip((20, 40), (40, 220), frames=1)[0]).save("two.png")
    media.write_audio("voice.wav", np.arange(8000, dtype=np.int16), 16_000)
    for name, level in {"a": 100, "b": 200}.items():
        sound = {"audio": "voice.wav"} if name == "b" else {}
        media.write_video(f"{name}/v.mp4", clip((level, 50), frames=9), 25, lossless=True, **sound)
    (tmp_path / "text.mp4").write_text("no video")
    return tmp_path


@pytest.mark.slow
def test_a_picture_and_drivers_become_a_video(folder, capsys):
    options = ["--overlay=out/who.mp4", "--save_latents=out/latents.safetensors", "--seed=3"]
    assert not main([*COMMON, *options])
    done = capsys.readouterr().out
    for stage in ("Driving videos", "Motion encoder", "Transformer", "Latents to video", "noise"):
        assert stage in done
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "act.mp4",
        "act.png",
        "latents.safetensors",
        "who.mp4",
    ]
    assert media.read_video("out/act.mp4")[0].shape == (9, 32, 64, 3)
    assert media.probe_video("out/act.mp4").has_audio  # the second driver's
    assert load_file("out/latents.safetensors")["latents"].shape == (1, 16, 3, 4, 8)
    assert len(media.read_video("out/who.mp4")[0]) == 9


def test_names_that_are_not_utf8_are_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: print(os.fsdecode(b"\xff.png")), "sample.py")
    assert not stopped.value.code
    assert capsys.readouterr().out.endswith(".png\n")


def test_the_full_size_config_has_the_official_defaults():
    config = load_config(FULL)
    settings = build(PortraitSampleConfig, config.sample, "sample")
    assert settings == PortraitSampleConfig()
    assert build(VideoConfig, config.video, "video") == VideoConfig(720, 720, 81, 25)
    assert list(build(ModelConfig, config.model, "model").adapters) == ["expression"]
    with pytest.raises(ConfigError, match="small"):
        load_config(f"{FULL}:small")
