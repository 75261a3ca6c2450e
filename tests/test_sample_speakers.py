"""Several people who speak, as users start it."""

import numpy as np
import pytest
from drawn_faces import clip, open_squares
from PIL import Image
from test_sample import DEBUG

from configs.fantasy_talking_14b import small_model
from fantasy_jax import cli, media
from fantasy_jax.pipelines import speakers
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.video import VideoConfig
from sample import main

COMMON = [f"--config={DEBUG}", "--image=two.png", "--audio=a.wav", "--audio=b.wav", "--output=out/talk.mp4"]
PIECE = ["--size=30x50", "--start=0.05", "--seconds=0.2"]
BOXES = ["--box=0.1,0.2,0.3,0.7", "--box=0.6,0.2,0.9,0.7"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with a picture of two people, one of nobody, and two sounds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speakers, "MediaPipeFaces", open_squares)
    Image.fromarray(clip((20, 40), (40, 220), frames=1)[0]).save("two.png")
    Image.fromarray(clip(frames=1)[0]).save("nobody.png")
    for name, seconds in {"a": 0.3, "b": 0.39}.items():
        wave = np.sin(np.arange(int(16_000 * seconds)) / 10)
        media.write_audio(f"{name}.wav", np.round(8000 * wave).astype(np.int16), 16_000)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "width"),
    [
        ([], 64),
        (["--image=nobody.png", *BOXES, "--person=2", "--person=1", *PIECE], 48),
    ],
)
def test_two_sounds_on_a_picture_of_two_people(options, width):
    assert not main([*COMMON, *options])
    assert media.read_video("out/talk.mp4")[0].shape == (9, 32, width, 3)
    assert media.probe_video("out/talk.mp4").has_audio
    assert np.abs(media.read_audio("out/talk.mp4")).max() > 0.1


@pytest.mark.slow
def test_the_sound_is_written_and_not_its_voice():
    single = [argument for argument in COMMON if argument != "--audio=b.wav"]
    assert not main([*single, "--voice=b.wav"])
    written = media.read_audio("out/talk.mp4")
    assert np.abs(written[:4000]).max() > 0.1
    assert np.abs(written[5600:]).max() < 0.01  # a.wav lasts 4800 samples, b.wav 6240


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--audio=a.wav", "--audio"),
        ("--audio=none.wav", "none.wav"),
        ("--image=nobody.png", "--box"),
        ("--person=1", "--person"),
        ("--person=1 --person=1", "--person"),
        ("--person=1 --person=3", "--person=3"),
        ("--person=x", "--person"),
        ("--box=0,0,1,1", "--box"),
        ("--box=0,0,0.4,1 --box=0.3,0,1,1", "overlap"),
        ("--box=0.1,0.1,0.5", "--box"),
        ("--voice=a.wav", "--voice"),
        ("--voice=a.wav --voice=none.wav", "none.wav"),
        ("--driver=a.mp4", "--driver"),
        ("--people=2", "--people"),
        ("--start=9", "a.wav: lasts 0.30 s; nothing is left from 9 s on"),
        ("--start=-1", "start is -1"),
        ("--start=x", "--start"),
        ("--seconds=0", "max_seconds is 0"),
        ("--seconds=9", "less than sample.max_seconds, 9"),
        ("--size=64", "--size=64"),
        ("--size=0x64", "size is 0 x 64"),
        ("--size=16x640", "crop it"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, capsys, change, named):
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main([*COMMON, *change.split()]), "sample.py")
    (error,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert error.startswith("sample.py: error: ")
    assert named in error
    assert not list(folder.rglob("*.mp4"))


@pytest.mark.parametrize("option", ["--voice=a.wav", "--person=1", BOXES[0]])
def test_options_of_one_clip_do_not_go_with_a_batch(folder, capsys, option):
    (folder / "pairs.csv").write_text("image,audio,output\ntwo.png,a.wav,out/a.mp4")
    with pytest.raises(SystemExit):
        cli.run(lambda: main([f"--config={DEBUG}", "--batch=pairs.csv", option]), "sample.py")
    assert option.partition("=")[0] in capsys.readouterr().err


def test_an_output_does_not_overwrite_a_voice(capsys):
    options = ["--voice=a.wav", "--voice=v.mp4", "--output=v.mp4"]
    with pytest.raises(SystemExit):
        cli.run(lambda: main([*COMMON, *options]), "sample.py")
    assert "overwrite" in capsys.readouterr().err


def test_the_longest_clip_of_two_people_has_two_sounds():
    video, tokens = VideoConfig(num_frames=81), 175
    one, two = (ClipInputs.spec(small_model(), video, 1, people=people) for people in (1, 2))
    width = small_model().speech_encoder.hidden_size
    assert (one.adapters["audio"].shape, one.labels) == ((1, tokens, width), None)
    assert two.adapters["audio"].shape == (1, 2, tokens, width)
    assert two.labels.shape == (1, 21, video.tokens_per_frame)
