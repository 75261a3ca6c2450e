"""The measurement of dubbing in the miniature."""

import json
from pathlib import Path

import numpy as np
import pytest

from fantasy_jax.config import build, load_config
from fantasy_jax.miniature import dubbing
from fantasy_jax.miniature.held_out import load_held_out
from fantasy_jax.miniature.synthetic import SyntheticConfig, records
from fantasy_jax.preprocessing.face_masks import latent_mask
from fantasy_jax.video import VideoConfig

TINY = str(Path(__file__).parent.parent / "configs/tiny.py")


def test_the_lips_lie_inside_the_mask_of_the_mouth():
    config = load_config(TINY)
    video = build(VideoConfig, config.video, "video")
    for clip in records(build(SyntheticConfig, config.data, "data"), video, "test", 4):
        masks = {mask: dubbing.clip_masks(clip, mask) for mask in ("none", "lips", "mouth", "face")}
        assert masks["mouth"][clip["lips"] > 0].all()
        assert masks["face"][masks["mouth"]].mean() > 0.99  # corners are rounded to pixels
        assert masks["mouth"].mean() < 0.4
        assert masks["none"].all()
        free = dubbing._pixels(latent_mask(masks["mouth"], 64))
        assert free[masks["mouth"]].all()


@pytest.mark.slow
def test_the_mouth_follows_the_new_audio_and_the_rest_is_the_source(tmp_path):
    held_out = load_held_out(load_config(TINY), None, num_clips=16)
    result = dubbing.measure(held_out, "mouth", 1.0, [0])
    assert result.new.mean > 0.7
    assert result.old.mean < 0.2
    assert result.vae.mean > 45
    assert result.source.mean == pytest.approx(100)
    assert result.changed == 0
    assert "mouth" in dubbing.report([result])
    everything = dubbing.measure(held_out, "none", 0.5, [0])
    assert everything.old.mean > result.old.mean + 0.2
    assert everything.source.mean < 40


@pytest.mark.slow
def test_the_command_writes_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dubbing, "SETTINGS", (("mouth", 1.0),))
    steps, output = "--config.sample.num_inference_steps=2", tmp_path / "dubbing.json"
    dubbing.main([f"--config={TINY}", "--clips=2", "--noises=1", f"--json={output}", steps])
    (figures,) = json.loads(output.read_text()).values()
    assert figures["mask"] == "mouth"
    assert figures["new"]["clips"] == 2
    assert np.isfinite(figures["vae"]["mean"])
    assert "changed" in capsys.readouterr().out
