"""Sampling as users start it: an image, audio and a prompt become an mp4."""

import hashlib
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save

from fantasy_jax import cli
from fantasy_jax.config import build, load_config
from fantasy_jax.diffusion.magcache import read_curve
from fantasy_jax.media import read_video
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.latents import read_noise, save_latents
from fantasy_jax.video import VideoConfig
from sample import main

ROOT = Path(__file__).parent.parent
FULL = str(ROOT / "configs/fantasy_talking_14b.py")
DEBUG = f"{FULL}:debug"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A portrait-like image and two seconds of audio."""
    folder = tmp_path_factory.mktemp("inputs")
    rows, columns = np.mgrid[0:96, 0:96]
    face = (((rows - 50) / 36) ** 2 + ((columns - 48) / 28) ** 2 < 1)[..., None]
    Image.fromarray(np.where(face, [224, 180, 150], [60, 90, 130]).astype(np.uint8)).save(folder / "face.png")
    time = np.arange(2 * 22050) / 22050
    samples = (8000 * np.sin(2 * np.pi * 220 * time) * (np.sin(2 * np.pi * 3 * time) > 0)).astype("<i2")
    with wave.open(str(folder / "voice.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(22050)
        file.writeframes(samples.tobytes())
    return folder


def start(folder, *arguments):
    command = [sys.executable, str(ROOT / "sample.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def common(folder, output="out/first.mp4"):
    return [
        f"--config={ROOT / 'configs/tiny.py'}",
        f"--image={folder / 'face.png'}",
        f"--audio={folder / 'voice.wav'}",
        f"--output={output}",
    ]


@pytest.mark.slow
def test_an_image_and_audio_become_a_video(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["--weights=", "--prompt=A woman is talking.", "--seed=3"]
    main([*common(inputs), *settings, "--config.sample.num_inference_steps=2"])
    done = capsys.readouterr()
    for stage in ("Text encoder", "First frame to latents", "Transformer", "Latents to video"):
        assert stage in done.out
    assert "noise" in done.out
    assert "2.12 s of video: 24 evaluations of the transformer (6 x 2 x 2: windows, steps" in done.out
    assert "Sampling: 100%" in done.err
    frames, fps = read_video(tmp_path / "out/first.mp4")
    assert frames.shape == (50, 64, 64, 3)  # as long as the sound
    assert fps == 25
    with av.open(str(tmp_path / "out/first.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert abs(video.duration * video.time_base - audio.duration * audio.time_base) < 1 / 25
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first.mp4", "first.png"]


def test_noise_and_latents_are_laid_out_as_pytorch_has_them(tmp_path):
    noise = np.random.default_rng(0).standard_normal((1, 16, 3, 4, 6), np.float32)
    (tmp_path / "noise.safetensors").write_bytes(save({"noise": noise}))
    ours = read_noise(tmp_path / "noise.safetensors", (1, 3, 4, 6, 16))
    assert np.array_equal(ours, noise.transpose(0, 2, 3, 4, 1))
    save_latents(tmp_path / "new/latents.safetensors", ours)
    assert np.array_equal(load_file(tmp_path / "new/latents.safetensors")["latents"], noise)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["latents.safetensors"]


def test_the_full_size_config_has_the_official_defaults():
    config = load_config(FULL)
    settings = build(SampleConfig, config.sample, "sample")
    scales = settings.text_guidance_scale, settings.audio_guidance_scale
    assert (settings.num_inference_steps, settings.shift, *scales) == (30, 5, 5, 5)
    assert build(VideoConfig, config.video, "video") == VideoConfig(512, 512, 81, 23)
    assert (settings.tiling, settings.tile, settings.tile_stride) == ("auto", (30, 52), (15, 26))
    assert settings.negative_prompt.startswith("人物静止不动，静止，色调艳丽")
    assert hashlib.sha256(settings.negative_prompt.encode()).hexdigest()[:16] == "c14ba6c81b9d8490"


@pytest.mark.slow
def test_the_debug_configuration_runs(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written = ["--save_latents=out/latents.safetensors", "--previews=out/previews", "--preview_every=2"]
    main([*common(inputs), f"--config={DEBUG}", *written])
    assert "out/latents.safetensors" in capsys.readouterr().out
    assert load_file("out/latents.safetensors")["latents"].shape == (1, 16, 13, 8, 8)
    assert read_video("out/first.mp4")[0].shape == (46, 64, 64, 3)
    assert sorted(Path("out/previews").iterdir()) == [
        Path(f"out/previews/first_step_02.{x}") for x in ("mp4", "png")
    ]
    assert read_video("out/previews/first_step_02.mp4")[0].shape == (49, 64, 64, 3)


@pytest.mark.slow
def test_a_curve_is_measured_and_used(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [*common(inputs), "--weights=", "--seconds=0.6", "--config.sample.num_inference_steps=2"]
    given = ["--config.sample.gating.enabled=True", "--config.sample.magcache.curve=curve.json"]
    main([*settings, "--calibrate=curve.json", *given])  # measures exact steps
    assert "4 evaluations" in capsys.readouterr().out
    measured = read_curve("curve.json")
    assert measured.branches == (("audio",), ())
    assert [len(row) for row in measured.ratios] == [2, 2]
    magcache = ["--config.sample.magcache.curve=curve.json", "--config.sample.magcache.error_bound=100"]
    gates = ["--config.sample.gating.enabled=True", "--config.sample.gating.adapter=0.5"]
    main([*settings, *magcache, *gates, "--output=out/fast.mp4"])
    assert "branches of guidance), of which 2 are made" in capsys.readouterr().out
    assert read_video("out/fast.mp4")[0].shape == read_video("out/first.mp4")[0].shape


@pytest.mark.slow
def test_a_batch_goes_on_after_a_bad_row(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        "image,audio,prompt,output",
        f"{inputs / 'face.png'},{inputs / 'voice.wav'},A woman sings.,out/a.mp4",
        f"none.png,{inputs / 'voice.wav'},,out/b.mp4",
        f"{inputs / 'face.png'},,,out/c.mp4",
        f"{inputs / 'face.png'},{inputs / 'voice.wav'},,out/d.mp4",
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    settings = ["--batch=pairs.csv", "--config.sample.num_inference_steps=2"]
    assert main([f"--config={ROOT / 'configs/tiny.py'}", *settings]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("line ")]
    assert [error.partition(":")[0] for error in errors] == ["line 3", "line 4"]
    assert "none.png" in errors[0]
    assert "audio" in errors[1]
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["a.mp4", "a.png", "d.mp4", "d.png"]


@pytest.mark.slow
def test_devices_can_share_the_work(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [*common(inputs), "--config.sample.num_inference_steps=2"]
    main([*settings, "--save_latents=one.safetensors"])
    sheet = read_sheet("out/first.png")
    mesh = ["--config.sample.mesh.context=2", "--config.sample.mesh.tensor=4"]
    main([*settings, *mesh, "--save_latents=eight.safetensors"])
    one, eight = (load_file(f"{name}.safetensors")["latents"] for name in ("one", "eight"))
    assert np.abs(one - eight).max() < 1e-4
    assert read_video("out/first.mp4")[0].shape == (50, 64, 64, 3)
    # Contact sheets, since the video codec amplifies differences of rounding.
    assert np.abs(sheet - read_sheet("out/first.png")).max() <= 1


def read_sheet(path):
    return np.asarray(Image.open(path).convert("RGB"), int)


def refused(folder, monkeypatch, capsys, arguments):
    """The one line that a refusal prints."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main(arguments), "sample.py")
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("sample.py: error: ")
    assert len(printed.err.splitlines()) == 1
    return printed.err


def test_help_shows_examples():
    done = start(ROOT, "--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert "--config.sample.num_inference_steps=20" in done.stdout
    examples = [line.split()[0] for line in done.stdout.splitlines() if " sample.py --config=" in line]
    assert len(set(examples)) == 1
    assert Path(shutil.which(examples[0]) or ROOT / examples[0]).samefile(sys.executable)
