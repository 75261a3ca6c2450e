"""Figures of driven people on constructed cases, the judge, and the arms of the ablation."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal

from fantasy_jax.config import load_config, section
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature import ablation, judge, reenactment, trainer
from fantasy_jax.miniature.ablation import (
    ARMS,
    BASE,
    arm_model,
    combine,
    differences,
    initial,
    table,
    under_official_mask,
)
from fantasy_jax.miniature.clips import SyntheticConfig
from fantasy_jax.miniature.driven import draw_driven
from fantasy_jax.miniature.judge import GROUPS, Judge, JudgeConfig, train_judge
from fantasy_jax.miniature.reenactment import COLUMNS, Control, Reenactment, head_motion
from fantasy_jax.miniature.train_motion_encoder import READ, MotionRegressor, MotionStageConfig
from fantasy_jax.models.face_encoder import FaceEncoderConfig
from fantasy_jax.models.motion_encoder import MotionEncoder, MotionEncoderConfig
from fantasy_jax.sharding import make_mesh
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.registry import component_of
from fantasy_jax.video import VideoConfig

ROOT = Path(__file__).parent.parent
SMALL = MotionEncoderConfig(
    width=8, feature_dim=16, pose_dim=2, eye_dim=4, emotion_dim=4, landmarks=4, depth=1, image_size=32
)


class DarkMouth(Judge):
    """Reads opening and smile from how dark the middle of the mouth is, and the rest from other pixels."""

    def __init__(self):
        self.factors, self.image_size = READ, 64

    def __call__(self, faces):
        grey = faces.astype(np.float64).mean(axis=-1)
        readings = grey[:, ::4, ::4].reshape(len(faces), -1)[:, : len(READ)]
        for name in ("opening", "smile"):
            readings[:, READ.index(name)] = -grey[:, 33:36, 29:36].mean(axis=(1, 2))
        return readings


@pytest.mark.slow
def test_the_truth_is_at_the_floor_another_act_at_chance_and_swapped_people_follow_each_other():
    video = VideoConfig(height=64, width=64, num_frames=17, fps=25)
    driven = draw_driven(video, SyntheticConfig(acting=1.0, close=0.0), people=2, count=4)
    truths, others = (np.stack([clip["video"] for clip in clips]) for clips in (driven.truths, driven.others))
    # The same faces in the same place, with other acts.
    pairs = list(zip(driven.truths, driven.pictures, strict=True))
    assert not any(np.array_equal(x[name], y[name]) for x, y in pairs for name in ("video", "acts"))
    boxes = [np.stack([clip["face_box"] for clip in clips]) for clips in (driven.truths, driven.pictures)]
    np.testing.assert_array_equal(boxes[0], np.broadcast_to(boxes[1][:, :, :1], boxes[0].shape))
    faces = FaceEncoderConfig(depths=(1, 1, 1), widths=(8, 8, 8), embedding=8, image_size=32)
    face_encoder = component_of(faces).init(faces, jnp.float32)
    measure = Reenactment(driven, truths, DarkMouth(), face_encoder).measure

    truth = measure(truths)
    assert [getattr(truth, group).mean() for group in GROUPS] == [0, 0, 0]
    assert truth.background.mean() > 90
    assert truth.identity.mean() == pytest.approx(1)
    assert truth.own.mean() > 0.25  # half of it is smile, which this judge does not see
    assert abs(truth.other.mean()) < 0.25
    assert truth.gap == pytest.approx(truth.own - truth.other)

    chance = measure(others)
    for group in GROUPS:
        assert getattr(chance, group).mean() == pytest.approx(1)

    swapped = replace(driven, drivers=[drivers[::-1] for drivers in driven.drivers])
    mistaken = Reenactment(swapped, truths, DarkMouth(), face_encoder).measure(truths)
    np.testing.assert_array_equal((mistaken.own, mistaken.other), (truth.other, truth.own))
    assert mistaken.gap.mean() < 0
    assert measure(np.flip(truths, axis=2)).background.mean() < 30


def test_the_motion_of_a_head_is_found():
    y, x = np.mgrid[:64, :64]
    blob = np.exp(-((x - 30) ** 2 / 150 + (y - 28) ** 2 / 250)) + 0.3 * np.sin(x / 4) * np.cos(y / 5)
    frame = np.uint8(np.clip(255 * blob, 0, 255))[..., None].repeat(3, axis=2)
    box = np.array([14.0, 8, 46, 48])
    matrix = head_motion(frame, np.roll(frame, (1, 2), axis=(0, 1)), box)
    np.testing.assert_allclose(matrix, [[1, 0, 2], [0, 1, 1]], atol=0.05)
    np.testing.assert_array_equal(head_motion(frame, np.zeros_like(frame), box), np.eye(2, 3))


@pytest.mark.slow
def test_a_judge_has_to_read_enough_and_keeps_its_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "_NUM_PEOPLE", 64)
    config = JudgeConfig(encoder=SMALL, stage=MotionStageConfig(num_steps=2, batch_size=8))
    with pytest.raises(ConfigError, match=r"^judge.least_r2 is 0.7, but the judge's R2 are turn -?\d[^\n]*$"):
        train_judge(config, 32, tmp_path, make_mesh())
    with pytest.raises(ConfigError, match=r"judge\.seed"):
        train_judge(replace(config, seed=2), 32, tmp_path, make_mesh())


def control(*values):
    return Control(*[np.array(values)] * len(COLUMNS))


def test_errors_over_clips_and_over_seeds_are_apart():
    one, other = control(0.9, 1.1), control(2.7, 3.3)
    assert combine([one, other])["pose"] == {
        "mean": 2.0,
        "clips": pytest.approx(0.2),
        "seeds": pytest.approx(1.0),
    }
    rows = table({"full": {2: [one, other]}, "official-mask": {3: [one]}}).splitlines()[2:]
    assert rows[0].startswith("| full | 2 | 2.000 +- 0.200 +- 1.000 |")
    assert rows[1].startswith("| official mask | 3 | 1.000 +- 0.100 |")


def test_arms_are_compared_on_the_same_clips():
    arms = {"no-eal": {1: [control(1.5, 2.5)]}, "full": {1: [control(1.0, 2.0)], 2: [control(1.0, 2.0)]}}
    compared = differences(arms)
    assert table(compared).splitlines()[2].startswith(f"| {ARMS['no-eal'].title} | 1 | 0.500 +- 0.000 |")
    assert {name: list(measured) for name, measured in compared.items()} == {"no-eal": [1]}
    assert differences({"no-eal": arms["no-eal"]}) == {}


def random_judge(*_):
    regressor = MotionRegressor(MotionEncoder(SMALL, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    return Judge(regressor, dict.fromkeys(READ, 1.0))


def test_the_official_mask_shows_each_of_three_people_two_drivers():
    clip = {"expression": np.arange(3)[:, None, None] * np.ones((3, 5, 2)), "owners": np.int32([1, 2, 3])}
    changed = under_official_mask(clip)
    labels = jnp.arange(4)[None, None]
    empty = jnp.zeros(())
    inputs = ClipInputs(
        empty,
        empty,
        empty,
        empty,
        {"expression": jnp.asarray(changed["expression"])[None]},
        labels,
        {"expression": jnp.asarray(changed["owners"])[None]},
    )
    attended = np.asarray(inputs.attended_people("expression"))[0, :, 0]
    counts = [np.bincount(changed["expression"][row, 0, 0].astype(int), minlength=3) for row in attended]
    # The blocks of drivers are in reverse order, and the mask is whether labels differ.
    official = [[3 - driver != label for driver in range(3)] for label in (1, 2, 3)]
    assert np.array(counts).tolist() == [[2, 2, 2], *np.int32(official).tolist()]


@pytest.mark.slow
def test_arms_add_to_the_base():
    model = section(ModelConfig, load_config(str(ROOT / "configs/tiny_portrait.py")), "model")
    small = model.replace(
        transformer=replace(model.transformer, num_layers=1),
        expression_adapter=replace(model.expression_adapter, num_layers=1),
    )
    base = initial(arm_model(small, BASE), 0)
    frames = normal(1, 1, 5, model.expression_adapter.feature_width)
    for name, tokens in {"eal-all": 32, "no-mca": 24}.items():
        arm = initial(arm_model(small, ARMS[name]), 1, base=base)
        adapter = arm.adapters["expression"]
        assert adapter.tokens(frames).shape[2] == 5 * tokens
        assert adapter.masked == (name != "no-mca")
        for kept in ("projections", "layers"):
            one, other = (
                nnx.to_flat_state(nnx.state(getattr(x.adapters["expression"], kept))) for x in (base, arm)
            )
            assert all(np.array_equal(a[1][...], b[1][...]) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_arms_are_trained_once_and_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reenactment, "train_judge", random_judge)
    monkeypatch.setattr(trainer, "ENCODERS", {})  # they keep their random weights
    settings = {
        "video.height": 32,
        "video.width": 32,
        "video.num_frames": 5,
        "data.acting": 1.0,
        "data.train_clips": 4,
        "data.test_clips": 2,
        "sample.num_inference_steps": 2,
        "model.vae.dim": 8,
        "model.motion_encoder.width": 8,
        "model.motion_encoder.depth": 1,
        "model.transformer.num_layers": 1,
        "model.expression_adapter.num_layers": 1,
        "train.people": (1,),
        "train.shares": (),
        "train.mesh.fsdp": 1,
        "train.loop.num_workers": 0,
        "train.loop.sample_every": 0,
        "train.loop.validate_every": 0,
        "train.vae.crop_size": 16,
        "train.vae.num_frames": 5,
        "train.stages.0.batch_size": 2,
        "train.stages.0.optimizer.warmup_steps": 1,
        "ablation.base_steps": 2,
        "ablation.arm_steps": 4,
    }
    arguments = [
        "--config=configs/tiny_portrait.py",
        *(f"--config.{name}={value}" for name, value in settings.items()),
        f"--workdir={tmp_path}",
        f"--json={tmp_path / 'figures.json'}",
        "--clips=2",
        "--people=2",
        "--only=full",
    ]
    ablation.main(arguments)
    figures = (tmp_path / "figures.json").read_text()
    assert set(json.loads(figures)["arms"]["full"]["2"][0]) == set(COLUMNS)
    states = list((tmp_path / "portrait/ablation/seed_0").glob("*/stage_1/checkpoints/*/"))
    assert sorted(path.parts[-4] + path.name for path in states if path.name.isdigit()) == ["base2", "full4"]
    times = [path.stat().st_mtime_ns for path in states]
    ablation.main(arguments)
    assert [path.stat().st_mtime_ns for path in states] == times
    assert (tmp_path / "figures.json").read_text() == figures
    assert capsys.readouterr().out.splitlines()[-2].startswith("| full | 2 | ")
