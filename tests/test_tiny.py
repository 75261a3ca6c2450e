"""The weights that come with the project: the first thing that anybody sees of it."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fantasy_jax import media
from fantasy_jax.config import ConfigError, build, load_config
from fantasy_jax.data.synthetic import SyntheticConfig, records
from fantasy_jax.evaluation import controls, lipsync, video
from fantasy_jax.pipeline import (
    ModelConfig,
    SampleConfig,
    decode_latents,
    generate_latents,
    latent_shape,
    starting_noise,
)
from fantasy_jax.weights import StoredNetworks
from sample import main

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "fantasy_jax/assets"
CONFIG = load_config(str(ROOT / "configs/tiny.py"))
SAMPLE = build(SampleConfig, CONFIG.sample, "sample")
PORTRAIT, SPEECH = ASSETS / "example/portrait.png", ASSETS / "example/speech.wav"


@pytest.fixture(scope="module")
def networks():
    return StoredNetworks(ASSETS / "tiny", build(ModelConfig, CONFIG.model, "model"))


def latents(networks, *, picture=None, sound=None, prompt="A person is talking calmly.", **settings):
    picture = picture or media.read_picture(PORTRAIT)
    sound = media.read_sound(SPEECH) if sound is None else sound
    config = replace(SAMPLE, **settings)
    noise = starting_noise(0, latent_shape(picture, sound, config, networks.config.vae.latent_channels))
    return np.asarray(
        generate_latents(networks, config, picture=picture, sound=sound, prompt=prompt, noise=noise)
    )


def test_the_weights_are_small():
    assert sum(path.stat().st_size for path in (ASSETS / "tiny").rglob("*") if path.is_file()) < 15e6


@pytest.mark.slow
def test_picture_sound_and_prompt_each_change_the_result(networks):
    expected = latents(networks, steps=4, prompt_scale=2.0)
    assert np.array_equal(latents(networks, steps=4, prompt_scale=2.0), expected)
    mirrored = media.read_picture(PORTRAIT).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    changes = {
        "picture": {"picture": mirrored},
        "sound": {"sound": media.read_sound(SPEECH)[::-1].copy()},
        "prompt": {"prompt": "An excited person speaks and moves a lot."},
    }
    for name, change in changes.items():
        difference = latents(networks, steps=4, prompt_scale=2.0, **change) - expected
        assert np.sqrt(np.square(difference).mean()) > 0.01, name


@pytest.mark.slow
def test_mouths_follow_the_sound_and_not_another(networks):
    clips = list(records(build(SyntheticConfig, CONFIG.data, "data"), "test", 24))
    figures = lipsync.LipSync(networks, SAMPLE, clips).figures()
    assert figures["correlation_of_renders"].mean > 0.95
    assert figures["correlation_of_vae"].mean > 0.9
    assert figures["correlation"].mean > 0.7
    assert figures["correlation_with_that_sound"].mean > 0.65
    assert abs(figures["correlation_with_another_sound"].mean) < 0.25
    assert figures["psnr_outside_lips"].mean > 25


@pytest.mark.slow
def test_faces_stay_who_they_are_and_move_as_they_are_told(networks, monkeypatch):
    monkeypatch.setattr(controls, "SETTINGS", (0.0, 0.5, 1.0))
    clips = list(records(build(SyntheticConfig, CONFIG.data, "data"), "test", 64))
    measured = lipsync.LipSync(networks, SAMPLE, clips)
    gained = controls.identity(measured)["identity_gained"]
    assert gained.mean > 3 * gained.standard_error
    courses = controls.motions(measured)
    for course in courses.values():
        assert course["rank_correlation"] == 1
        assert np.ptp([sync.mean for sync in course["lip_sync"]]) < 0.05


@pytest.mark.slow
def test_the_demo(tmp_path, capsys):
    output = tmp_path / "demo.mp4"
    files = [f"--image={PORTRAIT}", f"--audio={SPEECH}", f"--output={output}"]
    main([f"--config={ROOT / 'configs/tiny.py'}", *files])
    assert output.exists()
    assert output.with_suffix(".png").exists()
    video.main([str(output), f"--image={PORTRAIT}", f"--json={tmp_path / 'figures.json'}"])
    assert "correlation with energy" in capsys.readouterr().out
    frames, fps = media.read_video(output)
    assert frames.shape == (17, 64, 64, 3)
    assert fps == 25
    assert video.psnr(frames[0], np.asarray(media.read_picture(PORTRAIT))) > 25


def test_the_energy_of_sound_is_where_the_sound_is():
    sound = np.zeros(16000, np.float32)
    sound[8000:9600] = 0.5 * np.sin(np.arange(1600))
    energy = video.sound_energy(sound, 25, 25)
    assert energy.argmax() in (12, 13, 14)
    assert energy[:11].max() < 1e-6
    assert energy.max() == pytest.approx(0.5 / np.sqrt(2), rel=0.05)
    assert video.sound_energy(sound[:100], 25, 25).shape == (25,)


def test_figures_have_their_error():
    figure = lipsync.figure([1.0, 2.0, 3.0])
    assert (figure.mean, figure.clips) == (2.0, 3)
    assert figure.standard_error == pytest.approx(1 / np.sqrt(3))
    assert lipsync.figure([1.0]).standard_error == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.mp4"], "none.mp4: no such video"),
        ([str(PORTRAIT)], "portrait.png"),
        (["{demo}", "--face=0.1,0.2"], "--face=0.1,0.2: give four shares"),
        (["{demo}", "--face=0.5,0,0.2,1"], "left must be less than right"),
    ],
)
def test_what_cannot_be_measured(arguments, message, tmp_path):
    demo = tmp_path / "demo.mp4"
    media.write_video(demo, np.zeros((5, 64, 64, 3), np.uint8), 25, sound=SPEECH)
    with pytest.raises((media.MediaError, ValueError), match=message):
        video.main([argument.format(demo=demo) for argument in arguments])


def test_no_clips_cannot_be_measured():
    with pytest.raises(ConfigError, match="--clips=0: at least 1 is needed"):
        lipsync.main([f"--config={ROOT / 'configs/tiny.py'}", "--clips=0"])


def test_decoding_gives_frames(networks):
    shape = (1, 2, 8, 8, networks.config.vae.latent_channels)
    assert decode_latents(networks, jnp.zeros(shape), SAMPLE).shape == (5, 64, 64, 3)
