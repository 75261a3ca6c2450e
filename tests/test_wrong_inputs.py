"""Wrong and unusual inputs of all commands: exit code 2, one line, and every file is as it was.

The rows are in `data/wrong_inputs.txt`, under the name of their command: further arguments, which come after
the command's usual ones, and a word of the message, with `|` between them.
"""

import json
import os
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from drawn_faces import clip, open_squares
from helpers import DATA
from PIL import Image
from prepare_fakes import open_fakes
from safetensors.numpy import save, save_file

import convert_weights
import sample
import train
from fantasy_jax import benchmark, cli, media
from fantasy_jax.evaluation import video as evaluation
from fantasy_jax.miniature import (
    ablation,
    approximate,
    controls,
    detection_probe,
    dubbing,
    lip_sync,
    long_clips,
    motion_probe,
    picture,
    reenactment,
    synthetic,
)
from fantasy_jax.performance import memory
from fantasy_jax.pipelines import dubbing_plan, scene, speakers
from fantasy_jax.prepare import command as prepare
from fantasy_jax.preprocessing import lip_mask

ROOT = Path(__file__).parent.parent
TINY = f"--config={ROOT / 'configs/tiny.py'}"
TINY_PORTRAIT = f"--config={ROOT / 'configs/tiny_portrait.py'}"
FULL = f"--config={ROOT / 'configs/fantasy_talking_14b.py'}"
DEBUG = f"{FULL}:debug"
ACT = f"--config={ROOT / 'configs/fantasy_portrait_14b.py'}:debug"

COMMANDS = {
    "talk": (sample.main, [TINY, "--image=face.png", "--audio=a.wav", "--output=out/t.mp4"]),
    "talks": (
        sample.main,
        [DEBUG, "--image=two.png", "--audio=a.wav", "--audio=b.wav", "--output=out/t.mp4"],
    ),
    "act": (
        sample.main,
        [ACT, "--image=two.png", "--driver=a/v.mp4", "--driver=b/v.mp4", "--output=out/t.mp4"],
    ),
    "dub": (sample.main, [TINY, "--video=v.mp4", "--audio=a.wav", "--output=out/t.mp4"]),
    "batch": (sample.main, [TINY]),
    "decode": (sample.main, [TINY, "--latents=latents.safetensors", "--output=out/t.mp4"]),
    "compile": (sample.main, [TINY, "--compile_only", "--topology=v5e:1x1"]),
    "train": (train.main, [TINY, "--workdir=out/run"]),
    "finetune": (train.main, [DEBUG, "--workdir=out/run", "--records=folder", "--weights=folder"]),
    "verify": (convert_weights.main, ["verify"]),
    "inspect": (convert_weights.main, ["inspect"]),
    "import": (convert_weights.main, ["import", "--output=out/store"]),
    "download": (convert_weights.main, ["download", DEBUG, "--output=out/downloads"]),
    "init": (convert_weights.main, ["init", DEBUG, "--output=out/store"]),
    "check": (convert_weights.main, ["check"]),
    "export": (
        convert_weights.main,
        ["export", f"--weights={ROOT / 'fantasy_jax/assets/tiny'}", "--output=out/x.safetensors"],
    ),
    "prepare": (
        partial(prepare.main, open_detectors=open_fakes),
        [TINY, "--input=a", "--output=out", "--weights="],
    ),
    "benchmark": (benchmark.main, [DEBUG, "--only=loader"]),
    "measure": (evaluation.main, ["v.mp4"]),
    "lip_mask": (lip_mask.main, ["--output=out/t.mp4"]),
    "synthetic": (synthetic.main, [TINY, "--output=out"]),
    "lip_sync": (lip_sync.main, [TINY, "--clips=1"]),
    "long_clips": (long_clips.main, [TINY, "--clips=1"]),
    "controls": (controls.main, [TINY, "--clips=2"]),
    "dubbing": (dubbing.main, [TINY, "--clips=2"]),
    "picture": (picture.main, [TINY, "--clips=1"]),
    "motion_probe": (motion_probe.main, [TINY]),
    "detection_probe": (detection_probe.main, [TINY]),
    "reenactment": (reenactment.main, [TINY_PORTRAIT, "--clips=2", "--workdir=out"]),
    "ablation": (ablation.main, [TINY_PORTRAIT, "--clips=2", "--workdir=out"]),
    "quantize": (
        convert_weights.main,
        ["quantize", f"--weights={ROOT / 'fantasy_jax/assets/tiny'}", "--output=out/q", "--dtype=int8"],
    ),
    "memory": (memory.main, [TINY]),
    "approximate": (approximate.main, [TINY, "--clips=1"]),
}


def rows():
    """Pytest's parameters: name of the command, its further arguments, word of the message."""
    places = {
        "full": FULL,
        "act": ACT,
        "debug": DEBUG,
        "data": DATA,
        "mine": "--config=mine.py",
        "long": 252 * "x",
    }
    places["tiny"] = TINY.removeprefix("--config=")
    places["tiny_portrait"] = TINY_PORTRAIT.removeprefix("--config=")
    for line in (DATA / "wrong_inputs.txt").read_text().splitlines():
        if line.startswith("["):
            name = line.strip("[]")
        elif line:
            command, _, word = line.rpartition(" | ")
            yield pytest.param(name, shlex.split(command.format(**places)), word, id=f"{name} {command}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good files of all kinds, and bad ones."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("folder", "models", "folder.safetensors", "out"):
            Path(name).mkdir()
        _write_media()
        _write_links()
        _write_weights()
        _write_references()
        _write_configs()
        _write_batches()
        patch.setattr(scene, "open_detector", open_squares)
        patch.setattr(speakers, "MediaPipeFaces", open_squares)
        patch.setattr(dubbing_plan, "open_detector", open_squares)
        yield folder


def _write_media():
    Image.fromarray(clip((20, 40), frames=1)[0]).save("face.png")
    Image.fromarray(clip((20, 40), (40, 220), frames=1)[0]).save("two.png")
    Image.fromarray(clip(frames=1)[0]).save("nobody.png")
    Path("half.png").write_bytes(Path("face.png").read_bytes()[:90])
    for name, size in {"a.wav": 4800, "b.wav": 6240}.items():
        media.write_audio(name, np.arange(size, dtype=np.int16), 16_000)
    Path("half.wav").write_bytes(Path("a.wav").read_bytes()[:30])
    for name, level in {"a": 100, "b": 200}.items():
        media.write_video(f"{name}/v.mp4", clip((level, 50), frames=9), 25, lossless=True)
    media.write_video("v.mp4", clip((10, 60), (20, 200), frames=8), 25, lossless=True, audio="a.wav")
    for name in ("text.png", "text.mp4", "page.pth", "page.onnx"):
        Path(name).write_text("<html>no such page</html>")
    Path("empty").touch()
    Path("models/face.task").write_bytes(b"model")
    for name in ("taken/weights/vae/mine.txt", "taken_2/weights/transformer"):
        Path(name).parent.mkdir(parents=True)
        Path(name).touch()


def _write_links():
    Path("link.mp4").symlink_to("a.wav")
    os.link("a.wav", "hard.mp4")
    Path("linked.mp4").symlink_to("a/v.mp4")
    os.link("b/v.mp4", "hard_v.mp4")


def _write_weights():
    noise = np.zeros((1, 32, 5, 4, 4), np.float32)
    save_file({"noise": noise}, "shape.safetensors")
    save_file({"noise": noise.astype(np.int32)}, "integers.safetensors")
    save_file({"noise": np.full((1, 32, 3, 4, 8), np.nan, np.float32)}, "nan.safetensors")
    save_file({"latents": noise[:, :7]}, "latents.safetensors")
    Path("latents.png").write_bytes(Path("latents.safetensors").read_bytes())
    Path("half.safetensors").write_bytes(save({"noise": noise})[:-100])
    Path("pointer.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    save_file({}, "empty.safetensors")
    Path("manifest.json").write_text("[1, 2]")


def _write_references():
    def write(name, config, activations, weights=None):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config))
        save_file(activations, f"{name}/activations.safetensors")
        source = f"{DATA / 'clip_vision'}/weights.safetensors"
        Path(name, "weights.safetensors").write_bytes(weights or Path(source).read_bytes())

    config = json.loads((DATA / "clip_vision/config.json").read_text())
    image, features = np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 2, 3), np.float32)
    write("no_component", {"size": 3}, {"output.x": image})
    write("other_component", config | {"component": "nothing"}, {"output.x": image})
    write("wrong_sizes", config | {"image_size": 13}, {"input.image": image, "output.features": features})
    write("wrong_shapes", config, {"input.image": image[0], "output.features": features})
    write("lacks_input", config, {"input.wrong_input": image, "output.features": features})
    write("half_reference", config, {"input.image": image, "output.features": features}, b"half")


def _write_configs():
    begin = "from ml_collections import ConfigDict\n"
    texts = {
        "empty": "",
        "raises": "def get_config():\n    return 1 / 0\n",
        "exits": "raise SystemExit(0)\n",
        "returns_nothing": "def get_config():\n    pass\n",
        "returns_dict": "def get_config():\n    return {'task': 'miniature'}\n",
        "no_sections": f"{begin}def get_config():\n    return ConfigDict({{'task': 'miniature'}})\n",
        "section": f"{begin}def get_config():\n    return ConfigDict({{'task': 'miniature', 'model': 3}})\n",
        "task": f"{begin}def get_config():\n    return ConfigDict({{'task': 3}})\n",
        "half": "def get_config(:\n",
        "mine": (ROOT / "configs/tiny.py").read_text(),
    }
    for name, text in texts.items():
        Path(f"{name}.py").write_text(text)
    Path("bytes.py").write_bytes(b"\xff\x00")


def _write_batches():
    texts = {
        "pairs": ["face.png,a.wav,out/x.mp4"],
        "no_rows": [],
        "twice": ["face.png,a.wav,x.mp4", "two.png,b.wav,./folder/../x.mp4"],
        "no_output": ["face.png,a.wav,"],
        "overwrite_1": ["face.png,a.wav,face.mp4"],
        "overwrite_2": ["face.png,a.wav,out/x.mp4", "out/x.png,a.wav,out/y.mp4"],
        "overwrite_3": ["face.png,a.wav,a.wav"],
        "overwrite_4": ["face.png,a.wav,overwrite_4.csv"],
        "sheet": ["face.png,a.wav,out/x.mp4", "face.png,a.wav,nobody.mp4"],
        "suffix": ["face.png,a.wav,out/x.mp4", "face.png,a.wav,out/y.mkv"],
    }
    for name, lines in texts.items():
        Path(f"{name}.csv").write_text("\n".join(["image,audio,output", *lines]))
    Path("columns.csv").write_text("image,audio\nface.png,a.wav")


def state(folder):
    """All files, and when they were changed."""
    paths = (
        path
        for path in folder.rglob("*")
        if not path.is_dir() and not path.match("__pycache__/*") and path.name != ".lock"
    )
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in paths}


@pytest.mark.parametrize(("name", "arguments", "word"), list(rows()))
def test_a_wrong_input_is_one_line_and_changes_no_file(folder, capsys, name, arguments, word):
    before = state(folder)
    main, usual = COMMANDS[name]
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main([*usual, *arguments]), name)
    printed = capsys.readouterr()
    assert stopped.value.code == 2, printed.out
    *above, error = printed.err.splitlines()
    assert all(line.startswith("Faces: ") for line in above if line), printed.err  # bars of progress
    assert ": error: " in error
    assert word in error
    assert "Wrote" not in printed.out
    assert state(folder) == before


def test_there_are_many_rows():
    assert len(list(rows())) >= 400
