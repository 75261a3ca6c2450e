"""The synthetic world: deterministic, varied, true to its own truth; and the instrument that reads it."""

import itertools
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from fantasy_jax.config import ConfigError
from fantasy_jax.data.records import open_split
from fantasy_jax.data.synthetic import PROMPTS, SyntheticConfig, main, plan_clip, prepare, records
from fantasy_jax.data.voices import draw_voice, speak
from fantasy_jax.evaluation.mouth import correlation, mouth_opening
from fantasy_jax.evaluation.video import sound_energy

CONFIG = SyntheticConfig(train_clips=16, test_clips=16)


@pytest.fixture(scope="module")
def clips():
    return list(records(CONFIG, "test", 32))


def correlations(clips):
    return np.array([correlation(mouth_opening(c["video"], c["face_box"][0]), c["opening"]) for c in clips])


def test_the_same_seed_gives_the_same_clip_and_another_another(clips):
    again = next(records(CONFIG, "test", 1))
    for name, value in clips[0].items():
        assert np.array_equal(again[name], value), name
    other = next(records(replace(CONFIG, seed=1), "test", 1))
    train = next(records(CONFIG, "train", 1))
    for clip in (other, train, clips[1]):
        assert not np.array_equal(clip["video"], clips[0]["video"])
        assert not np.array_equal(clip["sound"], clips[0]["sound"])


def test_truth_lies_where_the_picture_shows_it(clips):
    for clip in clips:
        left, top, right, bottom = clip["face_box"][0]
        rows, columns = np.nonzero(clip["lips"][0] > 127)
        assert rows.size
        assert top < rows.min()
        assert rows.max() < bottom
        assert left < columns.min()
        assert columns.max() < right
        area = (clip["lips"] / 255).sum(axis=(1, 2))
        assert correlation(area, clip["opening"]) > 0.6  # rounded lips are smaller, so not one
        assert clip["opening"].min() >= 0
        assert clip["opening"].max() <= 1


def test_mouths_follow_the_sound(clips):
    energies = [sound_energy(c["sound"] / 32767, CONFIG.num_frames, CONFIG.fps) for c in clips]
    own = [correlation(e, c["opening"]) for e, c in zip(energies, clips, strict=True)]
    others = [correlation(e, c["opening"]) for e, c in zip(energies[1:], clips, strict=False)]
    assert np.mean(own) > 0.9
    assert abs(np.mean(others)) < 0.2


def test_prompts_tell_how_much_the_head_moves():
    plans = [plan_clip(CONFIG, "train", i) for i in range(60)]
    motion = {
        manner: [plan.body_motion for plan in plans if plan.prompt in PROMPTS[manner]] for manner in PROMPTS
    }
    assert len(motion["calm"]) > 15
    assert len(motion["lively"]) > 15
    assert max(motion["calm"]) < min(motion["lively"])


@pytest.mark.parametrize(
    ("asked", "other", "course", "rests"),
    [
        ("face_motion", "body_motion", "opening", False),
        ("face_motion", "body_motion", "turn", True),
        ("body_motion", "face_motion", "shift_x", True),
    ],
)
def test_the_intensity_of_motion_is_what_is_asked_for(asked, other, course, rests):
    def path(**intensities):
        plan = plan_clip(CONFIG, "train", 3, **intensities)
        return np.abs(np.diff(getattr(plan.performance, course))).sum()

    assert path(**{asked: 0.0}) < path(**{asked: 0.4}) < path(**{asked: 1.0})
    assert (path(**{asked: 0.0}) == 0) == rests
    assert path(**{asked: 0.4, other: 0.0}) == path(**{asked: 0.4, other: 1.0})


def test_only_its_number_tells_how_lively_a_face_is():
    plans = [plan_clip(CONFIG, "train", i) for i in range(200)]
    faces, bodies = (
        np.array([getattr(plan, f"{name}_motion") for plan in plans]) for name in ("face", "body")
    )
    assert abs(correlation(faces, bodies)) < 0.2
    assert faces.min() < 0.1
    assert faces.max() > 0.9


def test_voices_differ_in_pitch_and_colour():
    rng = np.random.default_rng(0)
    voices = [draw_voice(rng) for _ in range(50)]
    pitches = [voice.pitch for voice in voices]
    assert min(pitches) < 110
    assert max(pitches) > 200
    speech = speak(np.random.default_rng(1), voices[0], num_frames=51, fps=25)
    assert speech.waveform.size == int(51 / 25 * 16000)
    assert np.abs(speech.waveform).max() <= 1
    assert speech.opening.shape == (51,)


@pytest.mark.parametrize("split", ["test", "unseen"])
def test_the_instrument_reads_mouths_that_nobody_trains_with(split):
    clips = list(records(CONFIG, split, 64))
    assert correlations(clips).mean() > 0.95
    blurred = [
        clip | {"video": np.stack([cv2.GaussianBlur(frame, (0, 0), 0.8) for frame in clip["video"]])}
        for clip in clips
    ]
    assert correlations(blurred).mean() > 0.95


def test_the_instrument_finds_nothing_where_nothing_is(clips):
    wrong = [clip | {"opening": other["opening"]} for clip, other in itertools.pairwise(clips)]
    assert abs(correlations(wrong).mean()) < 0.2
    still = clips[0]["video"][:1].repeat(17, axis=0)
    assert correlation(mouth_opening(still, clips[0]["face_box"][0]), clips[0]["opening"]) == 0


def test_the_dataset_is_written_once_and_read_back(tmp_path, clips):
    folder = prepare(CONFIG, tmp_path)
    source = open_split(folder, "test")
    assert len(source) == 16
    assert len(open_split(folder, "train")) == 16
    # TFDS shuffles what it writes.
    read = next(source[i] for i in range(16) if np.array_equal(source[i]["opening"], clips[0]["opening"]))
    for name, value in clips[0].items():
        assert read[name].decode() == value if name == "prompt" else np.array_equal(read[name], value), name
    assert json.loads((folder / "dataset_info.json").read_text())["fileFormat"] == "array_record"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert prepare(CONFIG, tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ConfigError, match="made with another seed; remove it"):
        prepare(replace(CONFIG, seed=5), tmp_path)


def test_the_command_writes_a_dataset_and_an_example(tmp_path, capsys):
    config = ["--config=configs/tiny.py", "--config.data.train_clips=2", "--config.data.test_clips=2"]
    main([*config, f"--output={tmp_path / 'data'}"])
    assert "MB" in capsys.readouterr().out
    main([*config, f"--output={tmp_path / 'example'}", "--example=3"])
    assert {path.name for path in (tmp_path / "example").iterdir()} == {
        "portrait.png",
        "speech.wav",
        "clip.mp4",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 40}, "size is 40"),
        ({"num_frames": 16}, "num_frames is 16"),
        ({"train_clips": 0}, "at least 1"),
    ],
)
def test_sizes_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        SyntheticConfig(**settings)
