"""Preparation of clips of people who act: who is found, what is dropped, and the records."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import prepare_fakes
import pytest
from prepare_fakes import FPS, FRAMES, SIZE, open_fakes
from real_people import CONFIG as LANDMARKS
from real_people import media_file, need_mediapipe

from fantasy_jax import media
from fantasy_jax.config import load_config, override, section
from fantasy_jax.data.encoded import batch_spec
from fantasy_jax.data.loader import batches
from fantasy_jax.data.records import open_split, read_metadata
from fantasy_jax.errors import ConfigError
from fantasy_jax.prepare.analysis import PrepareTask
from fantasy_jax.prepare.command import main
from fantasy_jax.prepare.config import PortraitPrepareConfig
from fantasy_jax.prepare.filters import PORTRAIT
from fantasy_jax.prepare.portrait import grey_record
from fantasy_jax.prepare.scan import SourceVideo
from fantasy_jax.prepare.stages import open_detectors, prepare_video
from fantasy_jax.preprocessing.driving import DrivingConfig
from fantasy_jax.preprocessing.landmarks import LandmarkConfig
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.training.objective import PadText
from fantasy_jax.video import VideoConfig

ROOT = Path(__file__).parent.parent
OPENINGS = np.linspace(0, 1, FRAMES)
TWO = ((32, 28), (96, 28))
CONFIG = PortraitPrepareConfig(max_people=3, min_turning=0.0, min_sharpness=1.0)
TASK = PrepareTask(CONFIG, VideoConfig(SIZE, 2 * SIZE, FRAMES, FPS))


def clips_of(path, task, open_detectors=open_fakes):
    with open_detectors(task.config) as detectors:
        return list(prepare_video(SourceVideo(str(path), path.name, "0" * 64), task, detectors))


def write(path, *, openings=OPENINGS, gone=0, **drawn):
    """Writes a silent video of people; the second one is gone in the last frames."""
    drawn = {"centers": TWO, "size": (SIZE, 2 * SIZE), "seed": 1} | drawn
    frames = prepare_fakes.draw(openings, **drawn)
    if gone:
        frames[-gone:] = prepare_fakes.draw(openings[-gone:], **drawn | {"centers": drawn["centers"][:1]})
    media.write_video(path, frames, FPS, lossless=True)


def test_the_record_of_two_people_without_sound(tmp_path):
    write(tmp_path / "v.mp4", size=(SIZE, 3 * SIZE), centers=((52, 28), (140, 28)))
    (clip,) = clips_of(tmp_path / "v.mp4", TASK)
    assert (clip.dropped, clip.message) == ("", "")
    assert list(clip.measures) == list(PORTRAIT)
    record = clip.record
    grey = grey_record(TASK)
    assert {name: (x.shape, x.dtype) for name, x in record.items()} == {
        name: (x.shape, x.dtype) for name, x in grey.items()
    }
    assert record["people"] == 2
    # Of 192 columns, those from 27 on are cut: the middle of the faces is at 93.
    boxes, points = record["face_box"], record["face_points"]
    np.testing.assert_allclose(boxes[0, 0], [7, 10, 43, 46], atol=4)
    np.testing.assert_allclose(boxes[1, 0], [101, 16, 125, 40], atol=4)
    assert not boxes[2].any()
    assert not points[2].any()
    for person in range(2):
        assert (points[person] >= boxes[person, :, None, :2] - 1).all()
        assert (points[person] <= boxes[person, :, None, 2:] + 1).all()
    red = record["video"][0, 28, :, 0] > 120
    assert red[12:40].all()
    assert not red[50:95].any()
    assert clip.thumbnail.shape[1] == 168


@pytest.mark.parametrize(
    ("drawn", "settings", "reason"),
    [
        ({"centers": ()}, {}, "no_face"),
        ({}, {"min_people": 3}, "few_people"),
        ({}, {"max_people": 1}, "many_people"),
        ({"gone": 2}, {}, "face_frames"),
        ({}, {"min_face_side": 0.4}, "face_side"),
        ({"centers": ((8, 28), (96, 28))}, {}, "face_inside"),
        ({}, {"min_sharpness": 1e6}, "sharpness"),
        ({}, {"min_turning": 0.5}, "turning"),
        ({"openings": 0 * OPENINGS}, {}, "expression"),
    ],
)
def test_a_clip_is_dropped_for_its_worst_face(tmp_path, drawn, settings, reason):
    write(tmp_path / "v.mp4", **drawn)
    task = replace(TASK, config=replace(CONFIG, **settings))
    (clip,) = clips_of(tmp_path / "v.mp4", task)
    assert clip.dropped == reason
    assert clip.message
    assert "\n" not in clip.line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_people": 3}, r"min_people is 3; it must be at most max_people \(2\)"),
        ({"max_people": 4}, r"max_faces is 4; it must exceed max_people \(4\)"),
    ],
)
def test_numbers_of_people_that_contradict(settings, message):
    with pytest.raises(ConfigError, match=message):
        PortraitPrepareConfig(**settings)
    seven = DrivingConfig(landmarks=LandmarkConfig(max_faces=7))
    PortraitPrepareConfig(max_people=6, driving=seven)


@pytest.mark.slow
def test_real_people_are_kept_and_their_still_picture_is_dropped(tmp_path):
    need_mediapipe()
    config = PortraitPrepareConfig(max_people=3, min_turning=0.0, driving=DrivingConfig(landmarks=LANDMARKS))
    task = PrepareTask(config, VideoConfig(480, 832, 25, 25))
    video, _ = media.read_video(media_file("two_people.mp4"))
    for name, frames in (("moving", video[:24]), ("still", video[:1].repeat(24, axis=0))):
        media.write_video(tmp_path / f"{name}.mp4", frames, 23, lossless=True)
    (moving,) = clips_of(tmp_path / "moving.mp4", task, open_detectors)
    (still,) = clips_of(tmp_path / "still.mp4", task, open_detectors)
    assert (moving.dropped, still.dropped) == ("", "expression")
    left, right, nobody = moving.record["face_box"]
    assert (left[:, 2] < right[:, 0]).all()
    assert not nobody.any()


@pytest.mark.slow
def test_records_of_people_fit_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    videos = tmp_path / "part_001/f6"
    videos.mkdir(parents=True)
    for number, centers in enumerate((TWO, TWO[:1], ())):
        write(videos / f"f60{number}.mp4", centers=centers)
    (tmp_path / "c.csv").write_text("path,clip_id,caption,\nclips/part_001/f6/f600,f600,Two people.,\n")
    config_file = "configs/fantasy_portrait_14b.py:debug"
    settings = ["prepare.max_people=3", "prepare.min_turning=0.0", "prepare.min_sharpness=1.0"]
    settings += ["prepare.batch_size=2", "prepare.test_fraction=0.0", "model.vae.dim=4", "video.width=128"]
    settings += ["model.vae.num_res_blocks=1", "model.image_encoder.image_size=28"]
    command = [f"--config={config_file}", f"--input={tmp_path}", f"--output={tmp_path / 'out'}"]
    command += [f"--captions={tmp_path / 'c.csv'}", "--processes=1", *(f"--config.{x}" for x in settings)]
    with pytest.raises(ConfigError, match="--face has no effect"):
        main([*command, "--face=1"], open_detectors=open_fakes)
    keep = "--config.prepare.keep_uncaptioned=True"
    assert main([*command, keep], open_detectors=open_fakes) == 0
    printed = capsys.readouterr()
    assert "dropped: part_001/f6/f602.mp4, 0.0 to 0.4 s: no face is found" in printed.err
    assert "c.csv: has no caption for 2 videos, whose prompts are empty" in printed.out
    assert "train.py" not in printed.out  # random encoders fit no store
    folder = tmp_path / "out/encoded_clips/1.0.0"
    assert not (tmp_path / "out/motion.json").exists()
    metadata = read_metadata(folder)
    assert metadata["hashes"]["motion_encoder"] == "random"
    assert "motion" not in metadata

    config = override(load_config(config_file), settings)
    model, video = section(ModelConfig, config, "model"), section(VideoConfig, config, "video")
    records = open_split(folder, "train")
    batch = next(batches([records], PadText(512), batch_size=2, start=0, num_workers=0, seed=0))
    expected = batch_spec(model, video, 2, people=3)
    assert {name: (batch[name].shape, batch[name].dtype) for name in expected} == {
        name: (x.shape, x.dtype) for name, x in expected.items()
    }
    two, one = records
    np.testing.assert_array_equal([two["owners"], one["owners"]], [[1, 2, -1], [1, -1, -1]])
    assert set(np.unique(two["labels"])) == {0, 1, 2}
    assert set(np.unique(one["labels"])) == {0, 1}
    assert [[bool(person.any()) for person in record["expression"]] for record in (two, one)] == [
        [True, True, False],
        [True, False, False],
    ]
    assert len(two["text"]) > len(one["text"]) == 1  # the empty prompt
