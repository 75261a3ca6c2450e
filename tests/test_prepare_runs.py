"""Whole runs of the preparation: records that fit training, resuming, and reports."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prepare_fakes import FPS, FRAMES, SIZE, assert_equal_records, open_fakes, write_talk

from fantasy_jax import cli
from fantasy_jax.config import build, load_config
from fantasy_jax.data.encoded import batch_spec
from fantasy_jax.data.loader import batches
from fantasy_jax.data.records import open_split, read_metadata
from fantasy_jax.errors import ConfigError
from fantasy_jax.files import lock_folder
from fantasy_jax.prepare.command import main
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.training.objective import PadText
from fantasy_jax.video import VideoConfig

ROOT = Path(__file__).parent.parent


def make_input(folder):
    """Writes videos of which six clips are kept, and four dropped for different reasons."""
    folder.mkdir()
    for i in range(3):
        write_talk(folder / f"talk{i}.mp4", seed=i + 1)
    write_talk(folder / "mute.mp4", num_frames=FRAMES, seed=5, audio=False)
    write_talk(folder / "nobody.mp4", num_frames=FRAMES, seed=6, centers=())
    (folder / "text.mp4").write_text("not a video")
    (folder / "twin.mp4").write_bytes((folder / "talk1.mp4").read_bytes())
    return folder


def command(folder, output, config_file, *more):
    return [f"--input={folder}", f"--output={output}", f"--config={config_file}", "--processes=1", *more]


def records_of(dataset):
    splits = json.loads((dataset / "dataset_info.json").read_text())["splits"]
    return {
        split["name"]: [dict(record) for record in open_split(dataset, split["name"])] for split in splits
    }


@pytest.mark.slow
def test_records_fit_training_and_work_is_done_once(tmp_path, config_file, capsys):
    folder, output = make_input(tmp_path / "videos"), tmp_path / "out"
    captions = tmp_path / "captions.csv"
    names = ("talk0.mp4", "talk1.mp4", "talk2.mp4", "mute.mp4", "text.mp4", "talk9.mp4")
    captions.write_text("file_name,prompt\n" + "".join(f"{name},About {name}.\n" for name in names))
    arguments = command(folder, output, config_file, f"--captions={captions}")
    assert main(arguments, open_detectors=open_fakes) == 0
    errors = capsys.readouterr().err
    for name in ("mute.mp4", "nobody.mp4", "text.mp4", "twin.mp4"):
        assert f"dropped: {name}: " in errors
    assert "\ntalk9.mp4: " in errors
    dataset = output / "encoded_clips/1.0.0"
    records = records_of(dataset)
    assert set(records) == {"train", "test"}

    config = load_config(str(config_file))
    model = ModelConfig.from_config(config.model, "model")
    video = build(VideoConfig, config.video, "video")
    pad = PadText(model.transformer.text_length)
    batch = next(batches([open_split(dataset, "train")], pad, batch_size=2, start=0, num_workers=0, seed=0))
    expected = batch_spec(model, video, 2)
    assert {name: batch[name].shape for name in expected} == {name: x.shape for name, x in expected.items()}
    assert batch["motion"].shape == (2, 2)
    assert ((batch["motion"] >= 0) & (batch["motion"] <= 1)).all()
    assert batch["lips"].max() > 0.05
    metadata = read_metadata(dataset)
    assert metadata["video"] == {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "fps": FPS}
    assert metadata["motion"] == json.loads((output / "motion.json").read_text())
    assert metadata["vae"] == metadata["hashes"]["vae"] == "random"
    assert metadata["model"]["vae"]["dim"] == model.vae.dim
    assert "transformer" not in metadata["model"]

    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= 6
    assert page.count("data:image/png;base64,") == 1
    for text in ("mute.mp4: ", "no caption", "talk9.mp4: ", "<td>"):
        assert text in page
    assert "http" not in page

    # The same command does nothing; a new caption is encoded, and no video is analysed again.
    stamps = {path: path.stat().st_mtime_ns for path in (output / "work").rglob("*") if path.is_file()}
    assert main(arguments, open_detectors=open_fakes) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert {path for path in (output / "work").rglob("*") if path.is_file()} == set(stamps)
    captions.write_text(captions.read_text().replace("About talk0", "On talk0"))
    with pytest.raises(ConfigError, match="clips"):
        main(arguments, open_detectors=open_fakes)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


@pytest.mark.slow
def test_a_run_without_a_good_clip_is_an_error(tmp_path, config_file, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    write_talk(folder / "nobody.mp4", num_frames=FRAMES, centers=())
    arguments = command(folder, tmp_path / "out", config_file, "--clips_only")
    with lock_folder(tmp_path / "out"), pytest.raises(ConfigError, match=str(os.getpid())):
        main(arguments, open_detectors=open_fakes)  # another run writes there
    with pytest.raises(SystemExit) as exit_:
        cli.run(lambda: main(arguments, open_detectors=open_fakes), "prepare")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("prepare: error: ")
    assert "nobody.mp4" in (tmp_path / "out/report.html").read_text()


def progress(output):
    """Counts results on disk, of videos and batches."""
    return sum(1 for _ in output.glob("work/*/videos/*/clips.json")) + sum(
        1 for _ in output.glob("work/encoded/*/*")
    )


@pytest.mark.slow
def test_a_run_that_is_killed_repeatedly_ends_like_an_undisturbed_one(tmp_path, config_file):
    folder = make_input(tmp_path / "videos")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }

    def start(output):
        program = [sys.executable, str(ROOT / "tests/prepare_fakes.py")]
        return subprocess.Popen(
            program + command(folder, output, config_file),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    assert start(tmp_path / "undisturbed").wait() == 0
    total = progress(tmp_path / "undisturbed")
    disturbed, rng = tmp_path / "disturbed", random.Random(os.environ.get("SEED", "0"))
    kills = 0
    for goal in sorted(rng.sample(range(1, total - 1), k=5)):
        run = start(disturbed)
        while progress(disturbed) < goal and run.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
    assert kills == 5
    assert start(disturbed).wait() == 0
    for name in ("report.html", "motion.json"):
        assert (disturbed / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    one, other = (records_of(out / "encoded_clips/1.0.0") for out in (disturbed, tmp_path / "undisturbed"))
    assert_equal_records(one, other)
    assert sum(len(records) for records in one.values()) == 6
    assert not list(disturbed.rglob("*.partial"))
