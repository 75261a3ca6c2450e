"""Acting people: what it changes, where their faces are, and clips of several of them."""

from dataclasses import asdict, replace

import jax
import numpy as np
import pytest

from fantasy_jax.data.records import open_split
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature.acting import EMOTIONS, EXPRESSIONS, FACTORS, acts, draw_acting, hold
from fantasy_jax.miniature.clips import SyntheticConfig, plan_clip, plan_group
from fantasy_jax.miniature.faces import acting_face, brow_color, draw_face, stack_faces
from fantasy_jax.miniature.rendering import face_box, face_points, render_batch
from fantasy_jax.miniature.synthetic import as_group, records, write_clips
from fantasy_jax.video import VideoConfig

VIDEO = VideoConfig(height=32, width=32, num_frames=5, fps=25)
CLIP = replace(VIDEO, num_frames=17)
ACTING = SyntheticConfig(acting=1.0, train_pairs=2, test_pairs=2, test_trios=2)


def test_acting_adds_to_a_clip_and_changes_nothing_else():
    plain, acted = (plan_clip(SyntheticConfig(acting=x), CLIP, "train", 5) for x in (0.0, 1.0))
    assert np.array_equal(plain.speech.waveform, acted.speech.waveform)
    assert acted.prompt.startswith(plain.prompt)
    changed = {
        name
        for name in FACTORS
        if np.any(getattr(plain.performance, name) != getattr(acted.performance, name))
    }
    assert changed == {*EXPRESSIONS, "gaze_x", "gaze_y", "turn", "nod", "roll"}
    for name in ("gaze_x", "gaze_y", *EXPRESSIONS):
        assert not getattr(plain.performance, name).any(), name
    faces = asdict(plain.face), asdict(acted.face)
    assert {name for name in faces[0] if np.any(faces[0][name] != faces[1][name])} <= {
        *("eyes", "brows", "brow_shade", "tint", "softness", "relief")
    }
    half = plan_clip(SyntheticConfig(acting=0.5), CLIP, "train", 5).performance
    gaze = acted.performance.gaze_x
    np.testing.assert_allclose(half.gaze_x, gaze / 2, atol=1e-6)


def test_heads_turn_and_nod_emotions_are_mixed_and_gaze_jumps():
    performances, emotions = [], []
    for index in range(400):
        acting = draw_acting(np.random.default_rng(index), CLIP)
        emotions.append(acting.emotions)
        performances.append(acting.apply(hold(17), 1.0))
    values = np.stack([acts(performance) for performance in performances])
    deviations = dict(zip(FACTORS, values.std(axis=(0, 1)), strict=True))
    assert 0.08 < deviations["turn"] < 0.12
    assert 0.055 < deviations["nod"] < 0.085
    assert {len(names) for names in emotions} == {1, 2}
    assert {names[0] for names in emotions} == set(EMOTIONS)
    happy = [names == ("happy",) for names in emotions]
    smile = values[..., FACTORS.index("smile")].mean(axis=1)
    assert smile[happy].mean() > 0.4 > smile[np.logical_not(happy)].mean() + 0.3
    steps = np.abs(np.diff(values[..., FACTORS.index("gaze_x")], axis=1))
    assert np.median(steps) < 1e-6  # at rest more than half of the time
    assert (steps.max(axis=1) > 0.1).mean() > 0.3


def test_brows_of_acting_faces_differ_from_the_skin():
    faces = [acting_face(draw_face(np.random.default_rng(i))) for i in range(200)]
    contrasts = np.array([np.linalg.norm(face.skin - brow_color(face)) for face in faces])
    assert contrasts.min() > 0.3
    assert (contrasts > 0.419).mean() > 0.9


@pytest.mark.parametrize("people", [2, 3])
def test_people_stand_from_left_to_right_in_one_light(people):
    close = []
    for index in range(20):
        group = plan_group(ACTING, VIDEO, "test", index, people)
        boxes = np.stack(
            [
                face_box(x.face, x.performance, place)[0]
                for x, place in zip(group.people, group.places, strict=True)
            ]
        )
        assert (boxes[:-1, 2] < boxes[1:, 0]).all()
        assert boxes[0, 0] > -people
        assert boxes[-1, 2] < people
        assert all(np.array_equal(x.face.light, group.people[0].face.light) for x in group.people)
        close.append(not np.allclose(np.diff(group.places), 2))
    assert 4 <= sum(close) <= 16


@pytest.fixture
def drawn():
    """Draws stills at 64 x 64."""

    def draw(faces, performances):
        stacked = jax.tree.map(lambda x: x[:, None], stack_faces(faces))
        acting = jax.tree.map(lambda *x: np.stack(x)[:, None], *performances)
        return render_batch(stacked, acting, np.zeros((len(faces), 1), np.float32), size=64)[0][:, 0]

    return draw


@pytest.mark.slow
def test_every_factor_is_visible_and_points_lie_on_what_they_name(drawn):
    face = acting_face(replace(draw_face(np.random.default_rng(3)), glasses=0.0))
    one = {
        name: 0.1 if name in ("turn", "nod", "roll", "shift_x", "shift_y", "body") else 1.0
        for name in FACTORS
    }
    still, *moved = drawn([face] * 20, [hold(1), *(hold(1, **{name: value}) for name, value in one.items())])
    for name, picture in zip(one, moved, strict=True):
        assert np.abs(picture - still).max() > 0.1, name
    # Where the colour of the lips and of the irises changes, mouth and eyes are.
    pose = {"turn": 0.2, "nod": -0.1, "roll": 0.2, "shift_x": 0.05, "smile": 0.5, "opening": 0.3}
    other = [replace(face, lips=1 - face.lips), replace(face, iris=1 - face.iris)]
    posed = hold(1, **pose)
    reference, lips, irises = drawn([face, *other], [posed] * 3)
    places = (np.arange(64) + 0.5) / 32 - 1
    points = face_points(face, posed)[0]
    for picture, named in ((lips, points[3:]), (irises, points[:2])):
        weight = np.abs(picture - reference).sum(axis=-1)
        center = np.array([(weight * places).sum(), (weight * places[:, None]).sum()]) / weight.sum()
        np.testing.assert_allclose(center, named.mean(axis=0), atol=0.05)


@pytest.mark.slow
def test_clips_of_one_and_two_people_are_written_and_read_in_one_format(tmp_path):
    (single,) = records(ACTING, VIDEO, "test", 1)
    folder = write_clips(ACTING, VIDEO, tmp_path, people=2)
    pair = open_split(folder, "test")[0]
    assert len(open_split(folder, "train")) == 2
    assert pair["video"].shape == (5, 32, 64, 3)
    for record, people in ((as_group(single), 1), (as_group(pair), 2)):
        assert record["people"] == people
        assert record["acts"].shape == (people, 5, len(FACTORS))
        boxes, points = record["face_box"][:, :, None], record["face_points"]
        assert points.shape == (people, 5, 5, 2)
        assert (boxes[..., :2] < points).all()
        assert (points < boxes[..., 2:]).all()
    # Each person's lips are in the mask, below the nose and inside the box.
    for (left, top, right, bottom), points in zip(
        pair["face_box"][:, 0], pair["face_points"][:, 0], strict=True
    ):
        nose = int(points[2, 1])
        assert pair["lips"][0, max(nose, int(top)) : int(bottom), int(left) : int(right)].max() > 127
    with pytest.raises(ConfigError, match="test_trios is 0"):
        write_clips(replace(ACTING, test_trios=0), VIDEO, tmp_path, people=3)
