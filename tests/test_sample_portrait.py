"""Sampling of FantasyPortrait as users start it, and files that must not be overwritten."""

import os
from pathlib import Path

import numpy as np
import pytest
from drawn_faces import clip, open_squares
from PIL import Image
from safetensors.numpy import load_file
from test_sample import DEBUG as TALKING
from test_sample import ROOT

from fantasy_jax import cli, media
from fantasy_jax.config import build, load_config
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import check_separate
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


def contents(folder):
    """Every file and its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *arguments):
    """The line of a refusal, below bars of progress, after which every file is as it was."""
    before = contents(Path.cwd())
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main(list(arguments)), "sample.py")
    *above, error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert error.startswith("sample.py: error: ")
    assert all("Faces" in line for line in above if line)
    assert contents(Path.cwd()) == before
    return error


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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--audio=voice.wav", "--audio"),
        ("--voice=voice.wav", "--voice"),
        ("--batch=pairs.csv", "--batch"),
        ("--image=none.png", "none.png"),
        ("--image=text.mp4", "text.mp4"),
        ("--image=a/v.mp4", "v.mp4"),
        ("--driver=none.mp4", "none.mp4"),
        ("--driver=text.mp4", "text.mp4"),
        ("--driver=voice.wav", "voice.wav"),
        ("--driver=a", "a:"),
        ("--driver=a/v.mp4", "people"),
        ("--box=0.1,0.1,0.5", "--box"),
        ("--box=0.1,0.1,0.5,x", "--box"),
        ("--box=0,0,0.4,1 --box=0.3,0,1,1", "overlap"),
        ("--person=x", "--person"),
        ("--person=3 --person=1", "--person"),
        ("--person=1", "--person"),
        ("--sound=none.wav", "none.wav"),
        ("--sound=two.png", "two.png"),
        ("--noise=none.safetensors", "none.safetensors"),
        ("--weights=none", "none"),
        (f"--seed={10**20}", "seed"),
        ("--output=a", "folder"),
        ("--output=.", "folder"),
        ("--output=text.mp4/x.mp4", "written"),
        (f"--output={252 * 'x'}.mp4", "written"),
        ("--overlay=text.mp4/x.mp4", "written"),
        ("--config.sample.driving.min_found=2", "min_found"),
        ("--config.sample.expression_guidance_scales=2", "expression_guidance_scale"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, change, named):
    assert named in refused(capsys, *COMMON, *change.split())


@pytest.mark.parametrize("missing", ["--image", "--driver", "--output"])
def test_arguments_that_are_needed(capsys, missing):
    given = [argument for argument in COMMON if not argument.startswith(missing)]
    assert missing in refused(capsys, *given)


@pytest.mark.parametrize("option", ["--driver=a/v.mp4", "--sound=voice.wav", "--overlay=o.mp4"])
def test_options_of_portrait_do_not_go_with_other_pipelines(capsys, option):
    talking = ["--image=two.png", "--audio=voice.wav", "--output=out/talk.mp4"]
    for config in (f"{ROOT / 'configs/tiny.py'}", TALKING):
        error = refused(capsys, f"--config={config}", *talking, option)
        assert option.partition("=")[0] in error


@pytest.mark.parametrize(
    "change",
    [
        "--output=a/v.mp4",
        "--output=two.mp4",  # beside it two.png is written
        "--output=a/../two.mp4",
        "--output=link.mp4",
        "--output=hard.mp4",
        "--output=act.png",
        "--overlay=b/v.mp4",
        "--overlay=out/act.mp4",
        "--overlay=out/act.png",
        "--overlay=two.png",
        "--sound=voice.wav --overlay=voice.wav",
        "--save_latents=out/act.mp4",
        "--save_latents=n.safetensors --noise=n.safetensors",
        "--save_latents=two.png",
    ],
)
def test_no_output_overwrites_an_input_or_another_output(folder, capsys, change):
    (folder / "link.mp4").symlink_to("a/v.mp4")
    os.link("b/v.mp4", "hard.mp4")
    (folder / "n.safetensors").touch()
    assert "overwrite" in refused(capsys, *COMMON, *change.split())


@pytest.mark.parametrize(
    "rows",
    [
        ["two.png,voice.wav,two.mp4"],
        ["two.png,voice.wav,out/a.mp4", "out/a.png,voice.wav,out/b.mp4"],
        ["two.png,voice.wav,voice.wav"],
        ["two.png,voice.wav,pairs.csv"],
    ],
    ids=" ".join,
)
def test_no_row_of_a_batch_overwrites_an_input(folder, capsys, rows):
    (folder / "pairs.csv").write_text("\n".join(["image,audio,output", *rows]))
    assert "overwrite" in refused(capsys, f"--config={ROOT / 'configs/tiny.py'}", "--batch=pairs.csv")


def test_a_row_of_a_batch_needs_an_output(folder, capsys):
    (folder / "pairs.csv").write_text("image,audio,output\ntwo.png,voice.wav,\n")
    assert "line 2" in refused(capsys, f"--config={ROOT / 'configs/tiny.py'}", "--batch=pairs.csv")


def test_names_that_are_not_utf8_are_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: print(os.fsdecode(b"\xff.png")), "sample.py")
    assert not stopped.value.code
    assert capsys.readouterr().out.endswith(".png\n")


def test_files_are_compared_whatever_their_names():
    check_separate(["two.png", "none.png"], ["out/a.mp4", "out/a.png", "b.mp4"])
    for outputs in (["./two.png"], [os.path.abspath("two.png")], ["x/y.mp4", "x/z/../y.mp4"]):
        with pytest.raises(ConfigError, match="overwrite"):
            check_separate(["two.png"], outputs)


def test_the_full_size_config_has_the_official_defaults():
    config = load_config(FULL)
    settings = build(PortraitSampleConfig, config.sample, "sample")
    assert settings == PortraitSampleConfig()
    assert build(VideoConfig, config.video, "video") == VideoConfig(720, 720, 81, 25)
    assert list(build(ModelConfig, config.model, "model").adapters) == ["expression"]
    with pytest.raises(ConfigError, match="small"):
        load_config(f"{FULL}:small")
