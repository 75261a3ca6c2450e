"""The main job, as users start it: a picture, a sound and a prompt become an mp4."""

import subprocess
import sys
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from helpers import DATA
from PIL import Image

from fantasy_jax import cli
from fantasy_jax.media import read_video
from sample import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A portrait-like picture and two seconds of sound."""
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
@pytest.mark.parametrize(
    "speech", [[], [f"--wav2vec2={DATA / 'wav2vec2'}", "--config.model.audio_adapter.feature_width=48"]]
)
def test_a_picture_and_a_sound_become_a_video(inputs, tmp_path, monkeypatch, capsys, speech):
    monkeypatch.chdir(tmp_path)
    settings = ["--prompt=A woman is talking.", "--seed=3", "--config.sample.steps=2"]
    main([*common(inputs), *settings, *speech])
    done = capsys.readouterr()
    for phase in ("Text encoder", "First frame through the VAE", "Transformer", "Latents to video"):
        assert phase in done.out
    assert "they are random, and the video will be noise" in done.out
    assert "The sound lasts 2.00 s and is cut to the video's 0.68 s." in done.out
    assert "Sampling: 100%" in done.err
    frames, fps = read_video(tmp_path / "out/first.mp4")
    assert frames.shape == (17, 64, 64, 3)
    assert fps == 25
    with av.open(str(tmp_path / "out/first.mp4")) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert abs(video.duration * video.time_base - audio.duration * audio.time_base) < 1 / 25
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first.mp4", "first.png"]


def test_a_wav2vec2_that_does_not_fit_is_refused(inputs, tmp_path, monkeypatch, capsys):
    folder = f"--wav2vec2={DATA / 'wav2vec2'}"
    error = refused(tmp_path, monkeypatch, capsys, [*common(inputs), folder])
    assert "feature_width is 40, but the speech encoder's features have width 48" in error
    error = refused(tmp_path, monkeypatch, capsys, [*common(inputs), f"--wav2vec2={DATA / 'wan_vae'}"])
    assert "holds wan_vae, where wav2vec2 is meant" in error


def test_both_makers_of_features_hear_the_sound():
    from fantasy_jax.data.speech import LogMel, load_wav2vec2

    time = np.arange(16000) / 16000
    sounds = [0.3 * np.sin(2 * np.pi * hertz * time).astype(np.float32) for hertz in (200, 900)]
    for encoder in (LogMel(40), load_wav2vec2(DATA / "wav2vec2")):
        low, high = (np.asarray(encoder(sound)) for sound in sounds)
        assert low.shape == (1, 49, encoder.width)
        assert np.abs(low - high).mean() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--image=none.png", "none.png: no such picture"),
        ("--audio=none.wav", "none.wav: no such sound file"),
        ("--config=none.py", "none.py: no such config file"),
        ("--config.sample.stepz=3", "sample.stepz: no such setting; did you mean steps?"),
        ("--config.sample.steps=many", "sample.steps: wants int, not 'many'"),
        ("--config.sample.steps=0", "sample.steps is 0; at least 1 is needed"),
        ("--config.sample.max_frames=16", "max_frames is 16; it must be 4k + 1"),
        ("--config.model.dtype=float99", "model.dtype: is 'float99'; use one of 'float32', 'bfloat16'"),
        ("--config.model.transformer.num_heads=7", "num_heads is 7; it must cut dim 160 into even parts"),
        ("--config.model.transformer.dim=80", "audio_adapter.width is 160, but what it is joined to has 80"),
        ("--seed=x", "argument --seed: invalid int value: 'x'"),
        ("--colour=red", "unrecognized arguments: --colour=red"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(inputs, tmp_path, monkeypatch, capsys, change, message):
    error = refused(tmp_path, monkeypatch, capsys, [*common(inputs), change])
    assert message in error
    assert not list(tmp_path.rglob("*.mp4"))


def test_an_output_that_cannot_be_written_is_found_before_any_work(inputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    error = refused(tmp_path, monkeypatch, capsys, common(inputs, output="file/first.mp4"))
    assert "cannot be written" in error


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
    assert "--config.sample.steps=20" in done.stdout
