"""How much people move: measured in clips, normalised, and told to the transformer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import randomise, relative
from scipy.spatial.transform import Rotation

from fantasy_jax.config import ConfigError, build
from fantasy_jax.convert.components import COMPONENTS
from fantasy_jax.convert.rules import TensorSpec, assign, export, flat_parameters, load, make_plan
from fantasy_jax.data.landmarks import JOINTS, MEDIAPIPE_FACE, BodyTrack, FaceTrack
from fantasy_jax.data.motion import MOTION_FILE, MotionNormaliser, body_intensity, face_intensity
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.models.adapters.audio import AudioAdapter, AudioAdapterConfig
from fantasy_jax.models.adapters.motion import NEUTRAL, MotionAdapter, MotionAdapterConfig
from fantasy_jax.models.wan import WanConfig, WanTransformer
from fantasy_jax.pipeline import ModelConfig, SampleConfig, motion_input
from fantasy_jax.training.talking import TalkingStageConfig, sampling_inputs, talking_loss

WAN = WanConfig(
    latent_channels=4,
    condition_channels=8,
    dim=24,
    ffn_dim=48,
    frequency_dim=16,
    text_dim=12,
    text_length=8,
    image_dim=16,
    num_heads=2,
    num_layers=1,
)
AUDIO = AudioAdapterConfig(feature_width=6, token_width=8, width=24, num_heads=2, num_layers=1)
MOTION = MotionAdapterConfig(hidden=8, positions=4, width=24)
FRAMES, CALM, LIVELY = 3, jnp.array([[0.1, 0.1], [0.5, 0.5]]), jnp.array([[0.9, 0.1], [0.5, 1.0]])


@pytest.fixture(scope="module")
def trained():
    """A transformer that is trained, as it were."""
    adapters = {"audio": AudioAdapter(AUDIO, rngs=nnx.Rngs(0))}
    return randomise(nnx.eval_shape(lambda: WanTransformer(WAN, adapters=adapters, rngs=nnx.Rngs(1))))


@pytest.fixture
def transformer(trained):
    """With a motion adapter that is new."""
    model = nnx.clone(trained)
    model.adapters["motion"] = nnx.jit(lambda: MotionAdapter(MOTION, rngs=nnx.Rngs(2)))()
    return model


def clips():
    """Two encoded clips."""
    shapes = {
        "latents": (FRAMES, 4, 4, 4),
        "first_frame": (FRAMES, 4, 4, 4),
        "image": (5, 16),
        "text": (8, 12),
        "audio": (12, 6),
    }
    keys = jax.random.split(jax.random.key(3), len(shapes))
    batch = {n: jax.random.normal(k, (2, *s)) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return batch | {"lips": jnp.zeros((2, FRAMES, 4, 4))}


@nnx.jit
def loss(model, batch):
    config = TalkingStageConfig(dropout=0.0)
    return talking_loss(
        model,
        batch,
        jax.random.split(jax.random.key(0), len(batch["latents"])),
        config=config,
        empty_text=jnp.zeros((1, 1, 12)),
    )[0]


def test_a_new_adapter_changes_nothing_to_the_bit(trained, transformer):
    keys = jax.random.split(jax.random.key(4), 3)
    latents, first_frame = (
        jax.random.normal(key, (2, FRAMES, 4, 4, channels))
        for key, channels in zip(keys, (4, 8), strict=False)
    )
    inputs = (latents, first_frame, jnp.array([3.5, 900.0]))
    batch = clips()

    @nnx.jit
    def velocity(model, offset):
        return model(*inputs, model.conditions(batch["text"], batch["image"]), offset)

    offset = transformer.adapters["motion"](LIVELY)
    assert offset.shape == (2, WAN.dim)
    without = velocity(trained, None)
    np.testing.assert_array_equal(velocity(transformer, offset), without)
    randomise(transformer.adapters["motion"], 7)
    assert relative(velocity(transformer, transformer.adapters["motion"](LIVELY)), without) > 1e-3


@pytest.mark.parametrize("batch_branches", [True, False])
def test_each_clip_has_its_own_motion_and_every_branch_has_it(transformer, batch_branches):
    randomise(transformer.adapters["motion"], 7)
    batch = {name: np.asarray(value) for name, value in (clips() | {"motion": CALM}).items()}
    records = [{name: value[i] for name, value in batch.items()} for i in range(2)]
    inputs = sampling_inputs(records, jnp.zeros((1, 1, 12)))
    noise = jnp.zeros((2, FRAMES, 4, 4, 4))

    def drawn(motion):
        config = SamplerConfig(steps=1, batch_branches=batch_branches)
        return sample(transformer, noise, replace(inputs, motion=motion), config)

    calm, lively, half = drawn(inputs.motion), drawn(LIVELY), drawn(CALM.at[1].set(LIVELY[1]))
    assert all(relative(lively[i], calm[i]) > 1e-3 for i in range(2))
    assert relative(half[0], calm[0]) < 1e-5
    assert relative(half[1], lively[1]) < 1e-5


def test_motion_is_exaggerated_around_neutral(transformer):
    adapter = randomise(transformer.adapters["motion"], 7)
    usual = jnp.full((1, 2), NEUTRAL)
    assert relative(adapter.exaggerated(LIVELY, 1.0), adapter(LIVELY)) < 1e-6
    assert relative(adapter.exaggerated(usual, 3.0), adapter(usual)) < 1e-6
    three = adapter.exaggerated(LIVELY, 3.0) - adapter(usual)
    assert relative(three, 3 * (adapter(LIVELY) - adapter(usual))) < 1e-5


def test_training_hears_the_motion_of_clips_that_have_it(transformer):
    randomise(transformer.adapters["motion"], 7)
    values = [float(loss(transformer, clips() | more)) for more in ({}, {"motion": CALM}, {"motion": LIVELY})]
    assert len(set(values)) == 3


def test_face_and_body_are_told_apart_and_all_parts_learn(transformer):
    adapter = randomise(transformer.adapters["motion"], 7)
    swapped = relative(adapter(jnp.array([[0.2, 0.8]])), adapter(jnp.array([[0.8, 0.2]])))
    assert swapped > 1e-2
    gradients = nnx.grad(lambda adapter: jnp.sum(adapter(LIVELY) ** 2))(adapter)
    assert all(jnp.any(gradient) for gradient in jax.tree.leaves(gradients))


def test_weights_leave_and_come_back_under_pytorch_names():
    component = next(x for x in COMPONENTS if x.name == "motion_adapter")
    adapter, other = (randomise(MotionAdapter(MOTION, rngs=nnx.Rngs(0)), seed) for seed in (0, 1))
    rules = component.layouts[0].rules(MOTION)
    file = dict(export(rules, {path: np.asarray(x) for path, x in flat_parameters(adapter).items()}))
    assert file["conv1.weight"].shape == (16, 16, 3)
    specs = {key: TensorSpec(value.shape, value.dtype) for key, value in file.items()}
    assign(other, load(make_plan(rules, specs, flat_parameters(other)), file.__getitem__))
    np.testing.assert_array_equal(other(LIVELY), adapter(LIVELY))


@pytest.mark.parametrize("setting", ["face_motion", "body_motion"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_motion_outside_of_its_range_is_refused(setting, value):
    with pytest.raises(ConfigError, match=rf"^sample\.{setting} is {value}; it must lie between 0 and 1"):
        build(SampleConfig, {setting: value}, "sample")


def test_motion_is_refused_where_nothing_can_make_it():
    config = SampleConfig(face_motion=0.1, body_motion=0.9)
    with pytest.raises(ConfigError, match=r"no motion_adapter; leave them at 0\.5"):
        motion_input(ModelConfig(), config)
    assert motion_input(ModelConfig(), SampleConfig()) is None
    model = ModelConfig(motion_adapter=MotionAdapterConfig())
    np.testing.assert_allclose(motion_input(model, config), [[0.1, 0.9]])
    np.testing.assert_array_equal(motion_input(model, SampleConfig()), [[0.5, 0.5]])


def test_the_adapter_must_fit_the_transformer():
    with pytest.raises(ConfigError, match=r"motion_adapter\.width is 8, but the transformer has 5120"):
        ModelConfig(motion_adapter=MotionAdapterConfig(width=8))


def moving_face(expression, head=0.0, frames=24):
    """A mesh whose lips open and close, on a head that turns, nods, comes nearer and moves."""
    random = np.random.default_rng(0)
    shape = random.normal(size=(468, 3)) * (60, 80, 40)
    eyes = {33: (-45, -30, 0), 133: (-20, -30, 0), 362: (20, -30, 0), 263: (45, -30, 0)}
    for point, place in eyes.items():
        shape[point] = place
    points = []
    for time in np.linspace(0, 4 * np.pi, frames):
        frame = shape.copy()
        frame[list(MEDIAPIPE_FACE.outer_lips), 1] += expression * np.sin(time)
        turn = Rotation.from_euler("yxz", head * np.array([0.4, 0.2, 0.3]) * np.sin(time + np.arange(3)))
        scale = 1 + 0.2 * head * np.sin(time)
        points.append(scale * turn.apply(frame) + (200, 200, 0) + head * 50 * np.cos(time))
    present = np.ones(frames, bool)
    return FaceTrack(np.float32(points), present, present.astype(np.float32), MEDIAPIPE_FACE)


def swaying_body(far, frames=24):
    joints = np.tile(np.random.default_rng(1).normal(size=(len(JOINTS), 2)) * 100, (frames, 1, 1))
    joints += far * np.sin(np.linspace(0, 4 * np.pi, frames))[:, None, None]
    return BodyTrack(joints.astype(np.float32), np.ones((frames, len(JOINTS)), np.float32))


def test_a_face_that_moves_more_has_more_intensity_and_its_head_none():
    values = [face_intensity(moving_face(expression)) for expression in (0, 2, 5, 10)]
    assert values[0] < 1e-8
    assert values == sorted(values)
    assert values[3] == pytest.approx(25 * values[1], rel=1e-3)
    assert face_intensity(moving_face(0, head=1.0)) < 1e-6
    assert face_intensity(moving_face(5, head=1.0)) == pytest.approx(values[2], rel=0.25)


def test_intensity_does_not_depend_on_the_size_of_the_picture():
    face = moving_face(5)
    larger = replace(face, points=3 * face.points)
    assert face_intensity(larger) == pytest.approx(face_intensity(face), rel=1e-4)
    body = swaying_body(10)
    grown = replace(body, joints=3 * body.joints)
    assert body_intensity(grown, larger) == pytest.approx(body_intensity(body, face), rel=1e-4)


def test_a_body_that_sways_further_has_more_intensity_and_hidden_joints_do_not_count():
    face = moving_face(0)
    calm, lively = (body_intensity(swaying_body(far), face) for far in (5, 10))
    assert lively == pytest.approx(4 * calm, rel=1e-3)
    body = swaying_body(5)
    joints, visibility = body.joints.copy(), body.visibility.copy()
    joints[:, 9] += 500 * np.random.default_rng(2).normal(size=(24, 2))
    visibility[:, 9] = 0.1
    joints[1::3], visibility[1::3] = np.nan, 0  # not looked for
    assert body_intensity(BodyTrack(joints, visibility), face) == pytest.approx(calm, rel=0.1)


def test_what_is_not_seen_has_no_intensity():
    face, body = moving_face(5), swaying_body(5)
    absent = replace(face, present=np.zeros(24, bool))
    assert np.isnan(face_intensity(absent))
    assert np.isnan(body_intensity(replace(body, visibility=np.zeros_like(body.visibility)), face))


def test_the_usual_clip_is_neutral_and_the_extremes_are_cut_off(tmp_path):
    random = np.random.default_rng(0)
    intensities = [(float(face), float(body)) for face, body in random.lognormal(size=(1001, 2))]
    intensities += [(1e6, float("nan"))]
    normaliser = MotionNormaliser.fit(intensities)
    shares = np.array([normaliser(pair) for pair in intensities])
    assert np.median(shares, axis=0) == pytest.approx([0.5, 0.5], abs=0.01)
    assert shares[-1].tolist() == [1, 0.5]
    assert 0.04 < (shares[:, 0] == 0).mean() < 0.06
    assert np.all(np.diff(shares[np.argsort([face for face, _ in intensities]), 0]) >= 0)
    normaliser.save(tmp_path / MOTION_FILE)
    assert MotionNormaliser.load(tmp_path / MOTION_FILE) == normaliser
    wider = MotionNormaliser.fit(intensities, percentiles=(0.0, 50.0, 100.0))
    assert wider.high[0] == 1e6
    with pytest.raises(ValueError, match="none of its body"):
        MotionNormaliser.fit([(1.0, float("nan"))])


def test_clips_that_are_all_alike_are_usual():
    assert MotionNormaliser.fit([(1.0, 2.0)] * 3)((1.0, 2.0)) == (0.5, 0.5)
