"""Synthetic clips: determinism, agreement with their ground truth, and the measurement of mouth opening."""

import itertools
import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from fantasy_jax.data.records import open_split
from fantasy_jax.errors import ConfigError
from fantasy_jax.evaluation.metrics import correlation, windowed_rms
from fantasy_jax.evaluation.mouth import mouth_opening
from fantasy_jax.miniature.clips import PROMPTS, SyntheticConfig, plan_clip
from fantasy_jax.miniature.synthetic import main, records, write_clips
from fantasy_jax.miniature.voices import draw_voice, speak
from fantasy_jax.video import VideoConfig

CONFIG = SyntheticConfig(train_clips=16, test_clips=16)
VIDEO = VideoConfig(height=64, width=64, num_frames=17, fps=25)


@pytest.fixture(scope="module")
def clips():
    return list(records(CONFIG, VIDEO, "test", 32))


def correlations(clips):
    return np.array([correlation(mouth_opening(c["video"], c["face_box"][0]), c["opening"]) for c in clips])


def test_clips_are_deterministic_and_differ_by_seed_split_and_index(clips):
    again = next(records(CONFIG, VIDEO, "test", 1))
    for name, value in clips[0].items():
        assert np.array_equal(again[name], value), name
    other = next(records(replace(CONFIG, seed=1), VIDEO, "test", 1))
    train = next(records(CONFIG, VIDEO, "train", 1))
    for clip in (other, train, clips[1]):
        assert not np.array_equal(clip["video"], clips[0]["video"])
        assert not np.array_equal(clip["waveform"], clips[0]["waveform"])


def test_lip_mask_lies_inside_the_face_box_and_follows_the_opening(clips):
    for clip in clips:
        left, top, right, bottom = clip["face_box"][0]
        rows, columns = np.nonzero(clip["lips"][0] > 127)
        assert rows.size
        assert top < rows.min()
        assert rows.max() < bottom
        assert left < columns.min()
        assert columns.max() < right
        area = (clip["lips"] / 255).sum(axis=(1, 2))
        assert correlation(area, clip["opening"]) > 0.6  # not 1: rounded lips are smaller
        assert clip["opening"].min() >= 0
        assert clip["opening"].max() <= 1


def test_opening_correlates_with_the_energy_of_its_own_audio_only(clips):
    energies = [windowed_rms(c["waveform"] / 32767, VIDEO.num_frames, VIDEO.fps) for c in clips]
    own = [correlation(e, c["opening"]) for e, c in zip(energies, clips, strict=True)]
    others = [correlation(e, c["opening"]) for e, c in zip(energies[1:], clips, strict=False)]
    assert np.mean(own) > 0.9
    assert abs(np.mean(others)) < 0.2


def test_prompts_indicate_the_intensity_of_body_motion():
    plans = [plan_clip(CONFIG, VIDEO, "train", i) for i in range(60)]
    motion = {
        manner: [plan.body_motion for plan in plans if plan.prompt in PROMPTS[manner]] for manner in PROMPTS
    }
    assert len(motion["calm"]) > 15
    assert len(motion["lively"]) > 15
    assert max(motion["calm"]) < min(motion["lively"])


@pytest.mark.parametrize(
    ("changed", "other", "curve", "still_at_zero"),
    [
        ("face_motion", "body_motion", "opening", False),
        ("face_motion", "body_motion", "turn", True),
        ("body_motion", "face_motion", "shift_x", True),
    ],
)
def test_each_motion_intensity_scales_its_own_curves(changed, other, curve, still_at_zero):
    def path_length(**intensities):
        plan = plan_clip(CONFIG, VIDEO, "train", 3, **intensities)
        return np.abs(np.diff(getattr(plan.performance, curve))).sum()

    assert path_length(**{changed: 0.0}) < path_length(**{changed: 0.4}) < path_length(**{changed: 1.0})
    assert (path_length(**{changed: 0.0}) == 0) == still_at_zero
    assert path_length(**{changed: 0.4, other: 0.0}) == path_length(**{changed: 0.4, other: 1.0})


def test_face_motion_is_independent_of_body_motion():
    plans = [plan_clip(CONFIG, VIDEO, "train", i) for i in range(200)]
    faces, bodies = (
        np.array([getattr(plan, f"{name}_motion") for plan in plans]) for name in ("face", "body")
    )
    assert abs(correlation(faces, bodies)) < 0.2
    assert faces.min() < 0.1
    assert faces.max() > 0.9


def test_voices_vary_in_pitch_and_speech_has_the_requested_length():
    rng = np.random.default_rng(0)
    voices = [draw_voice(rng) for _ in range(50)]
    pitches = [voice.pitch for voice in voices]
    assert min(pitches) < 110
    assert max(pitches) > 200
    speech = speak(np.random.default_rng(1), voices[0], num_frames=51, fps=25)
    assert speech.waveform.size == int(51 / 25 * 16000)
    assert np.abs(speech.waveform).max() <= 1
    assert speech.opening.shape == (51,)


@pytest.mark.parametrize("split", ["test", pytest.param("unseen", marks=pytest.mark.slow)])
def test_mouth_opening_is_measured_on_held_out_faces(split):
    clips = list(records(CONFIG, VIDEO, split, 64))
    assert correlations(clips).mean() > 0.95
    blurred = [
        clip | {"video": np.stack([cv2.GaussianBlur(frame, (0, 0), 0.8) for frame in clip["video"]])}
        for clip in clips
    ]
    assert correlations(blurred).mean() > 0.95


def test_mouth_opening_does_not_correlate_with_other_clips_or_still_video(clips):
    wrong = [clip | {"opening": other["opening"]} for clip, other in itertools.pairwise(clips)]
    assert abs(correlations(wrong).mean()) < 0.2
    still = clips[0]["video"][:1].repeat(17, axis=0)
    assert correlation(mouth_opening(still, clips[0]["face_box"][0]), clips[0]["opening"]) == 0


def test_dataset_is_written_once_and_read_back(tmp_path, clips):
    folder = write_clips(CONFIG, VIDEO, tmp_path)
    source = open_split(folder, "test")
    assert len(source) == 16
    assert len(open_split(folder, "train")) == 16
    read = source[0]
    for name, value in clips[0].items():
        assert read[name].decode() == value if name == "prompt" else np.array_equal(read[name], value), name
    assert json.loads((folder / "dataset_info.json").read_text())["fileFormat"] == "array_record"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_clips(CONFIG, VIDEO, tmp_path) == folder
    acting = [write_clips(replace(CONFIG, acting=x), VIDEO, tmp_path) for x in (0.5, 1.0)]
    assert len({folder, *acting}) == 3
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(ConfigError, match="seed"):
        write_clips(replace(CONFIG, seed=5), VIDEO, tmp_path)
    with pytest.raises(ConfigError, match="video"):
        write_clips(CONFIG, replace(VIDEO, fps=24), tmp_path)


def test_command_writes_a_dataset_and_an_example(tmp_path, capsys):
    config = ["--config=configs/tiny.py", "--config.data.train_clips=2", "--config.data.test_clips=2"]
    main([*config, f"--output={tmp_path / 'data'}"])
    assert "MB" in capsys.readouterr().out
    main([*config, f"--output={tmp_path / 'example'}", "--example=3"])
    assert {path.name for path in (tmp_path / "example").iterdir()} == {
        "portrait.png",
        "speech.wav",
        "clip.mp4",
    }


def test_config_errors():
    with pytest.raises(ConfigError, match="train_clips"):
        SyntheticConfig(train_clips=0)


@pytest.mark.parametrize("size", [(64, 48), (16, 16)])
def test_config_error_for_sizes_that_cannot_be_rendered(size, tmp_path):
    with pytest.raises(ConfigError, match="video"):
        write_clips(CONFIG, VIDEO.for_size(*size), tmp_path)
