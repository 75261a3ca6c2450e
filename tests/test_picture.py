"""How visible the grid of latents is, and image quality of the VAE and of samples."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from fantasy_jax.evaluation.metrics import border_step
from fantasy_jax.miniature import picture
from fantasy_jax.miniature.driven import draw_own
from fantasy_jax.miniature.vae import windows
from fantasy_jax.models.halo import Rows


def test_steps_across_borders_stand_out_in_blocks_and_not_in_a_ramp():
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8)[None, :, None, None], (2, 32, 32, 3))
    noise = np.random.default_rng(0).integers(0, 9, (2, 32, 32, 3)).astype(np.uint8)
    assert border_step(ramp, 8) == pytest.approx(1)
    assert border_step(noise, 8) == pytest.approx(1, abs=0.05)
    blocks = np.random.default_rng(0).integers(0, 200, (2, 4, 4, 3)).astype(np.uint8)
    assert border_step(noise + blocks.repeat(8, axis=1).repeat(8, axis=2), 8) > 5


def test_windows_have_the_neighbours_and_outside_the_image_the_middle():
    x = jnp.arange(12.0).reshape(1, 1, 3, 4, 1)
    around = np.asarray(windows(x, 1, Rows()))[0, 0]
    assert around[1, 1].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert around[0, 3].tolist() == [3, 3, 3, 2, 3, 3, 6, 7, 3]
    np.testing.assert_array_equal(windows(x, 0, Rows()), x)


@pytest.mark.slow
def test_noise_on_latents_costs_quality_and_the_figures_are_printed_and_written(tmp_path, capsys):
    path = tmp_path / "picture.json"
    picture.main(["--config=configs/tiny.py", "--clips=2", f"--json={path}"])
    rows = json.loads(path.read_text())
    assert list(rows) == [
        "rendered clips",
        "VAE",
        *[f"VAE, latents with noise {x}" for x in (0.1, 0.2, 0.3)],
        "samples",
    ]
    quality = [row["first_quarter"]["mean"] for name, row in rows.items() if name.startswith("VAE")]
    assert quality[0] > 30
    assert quality == sorted(quality, reverse=True)
    grids = [rows[name]["grid"]["mean"] for name in ("rendered clips", "VAE, latents with noise 0.3")]
    assert 1 < grids[0] < grids[1] < 1.3
    assert f"| samples | {rows['samples']['first_frame']['mean']:.2f} | " in capsys.readouterr().out


@pytest.mark.slow
def test_people_of_the_portrait_miniature_drive_themselves(tmp_path, monkeypatch):
    def draw(*args, **settings):
        drawn.append(draw_own(*args, **settings))
        return drawn[-1]

    drawn = []
    monkeypatch.setattr(picture, "draw_own", draw)
    path = tmp_path / "picture.json"
    options = ["--clips=1", "--config.sample.num_inference_steps=1", f"--json={path}"]
    picture.main(["--config=configs/tiny_portrait.py", *options])
    assert {"VAE", "samples"} < set(json.loads(path.read_text()))
    (own,) = drawn
    assert own.truths[0] is own.pictures[0] is own.drivers[0][0]
