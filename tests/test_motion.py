"""The motion adapter: intensities of motion become an offset of the timestep embedding."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY_AUDIO, TINY_WAN, abstract, only_branch, randomise, relative, tiny_transformer

from configs.fantasy_talking_14b import small_model
from fantasy_jax.config import build
from fantasy_jax.convert.rules import TensorSpec, assign, export, flat_parameters, load, make_plan
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.adapters.motion import NEUTRAL, MotionAdapter, MotionAdapterConfig
from fantasy_jax.pipelines.config import SampleConfig, check_motion
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.registry import find_component
from fantasy_jax.training.objective import StageConfig, velocity_objective

WAN = replace(TINY_WAN, num_layers=1)
AUDIO = replace(TINY_AUDIO, num_layers=1)
MOTION = MotionAdapterConfig(hidden=8, positions=4, width=WAN.dim)
LATENTS = (3, 4, 4, WAN.latent_channels)
CALM, LIVELY = jnp.array([[0.1, 0.1], [0.5, 0.5]]), jnp.array([[0.9, 0.1], [0.5, 1.0]])
EMPTY = jnp.zeros((1, 1, WAN.text_dim))


@pytest.fixture(scope="module")
def trained():
    """A transformer with an audio adapter, of random parameters."""
    return tiny_transformer(WAN, audio=abstract(AudioAdapter, AUDIO))


@pytest.fixture
def transformer(trained):
    """The same with a new motion adapter."""
    model = nnx.clone(trained)
    model.adapters["motion"] = find_component("motion_adapter").init(MOTION, jnp.float32)
    return model


def clips():
    """Two encoded clips."""
    shapes = {
        "latents": LATENTS,
        "first_frame": LATENTS,
        "image": (5, WAN.image_dim),
        "text": (WAN.text_length, WAN.text_dim),
        "audio": (12, AUDIO.feature_width),
    }
    keys = jax.random.split(jax.random.key(3), len(shapes))
    batch = {n: jax.random.normal(k, (2, *s)) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    return batch | {"lips": jnp.zeros((2, *LATENTS[:3]))}


@nnx.jit
def loss(model, batch):
    keys = jax.random.split(jax.random.key(0), len(batch["latents"]))
    return velocity_objective(model, batch, keys, config=StageConfig(dropout=0.0), empty_text=EMPTY)[0]


def test_a_new_adapter_changes_nothing_bit_for_bit(trained, transformer):
    keys = jax.random.split(jax.random.key(4), 2)
    latents, first_frame = (
        jax.random.normal(key, (2, *LATENTS[:3], channels))
        for key, channels in zip(keys, (WAN.latent_channels, WAN.condition_channels), strict=True)
    )
    inputs = (latents, first_frame, jnp.array([3.5, 900.0]))
    batch = clips()

    @nnx.jit
    def velocity(model, offset):
        return model(*inputs, model.conditions(batch["text"], batch["image"]), offset)

    offset = transformer.adapters["motion"].time_offset(LIVELY)
    assert offset.shape == (2, WAN.dim)
    without = velocity(trained, None)
    np.testing.assert_array_equal(velocity(transformer, offset), without)
    randomise(transformer.adapters["motion"], 7)
    offset = transformer.adapters["motion"].time_offset(LIVELY)
    assert relative(velocity(transformer, offset), without) > 1e-3


@pytest.mark.parametrize("batch_branches", [True, False])
@pytest.mark.parametrize("branch", range(3))
def test_each_clip_has_its_own_motion_in_every_branch(transformer, branch, batch_branches):
    randomise(transformer.adapters["motion"], 7)
    batch = {name: np.asarray(value) for name, value in (clips() | {"motion": CALM}).items()}
    inputs = ClipInputs.from_records([{name: x[i] for name, x in batch.items()} for i in range(2)], EMPTY)
    noise = jnp.zeros((2, *LATENTS))

    def sampled(motion, **options):
        config = SamplerConfig(num_inference_steps=1, batch_branches=batch_branches)
        given = replace(inputs, adapters=inputs.adapters | {"motion": motion})
        settings = {"guidance": only_branch(branch), "options": {"motion": options}}
        return sample(transformer, noise, given, config, **settings)

    calm, lively, half = sampled(CALM), sampled(LIVELY), sampled(CALM.at[1].set(LIVELY[1]))
    assert all(relative(lively[i], calm[i]) > 1e-3 for i in range(2))
    assert relative(half[0], calm[0]) < 1e-5
    assert relative(half[1], lively[1]) < 1e-5
    assert relative(sampled(LIVELY, scale=2.0), lively) > 1e-3


def test_motion_is_extrapolated_away_from_neutral(transformer):
    adapter = randomise(transformer.adapters["motion"], 7)
    neutral = jnp.full((1, 2), NEUTRAL)
    assert np.array_equal(adapter.time_offset(LIVELY), adapter(LIVELY))
    assert relative(adapter.time_offset(LIVELY, scale=1.0), adapter(LIVELY)) < 1e-6
    assert relative(adapter.time_offset(neutral, scale=3.0), adapter(neutral)) < 1e-6
    three = adapter.time_offset(LIVELY, scale=3.0) - adapter(neutral)
    assert relative(three, 3 * (adapter(LIVELY) - adapter(neutral))) < 1e-5


def test_training_depends_on_the_motion_of_clips(trained, transformer):
    randomise(transformer.adapters["motion"], 7)
    losses = [float(loss(transformer, clips() | {"motion": motion})) for motion in (CALM, LIVELY)]
    assert len({*losses, float(loss(trained, clips()))}) == 3
    with pytest.raises(ConfigError, match="motion"):
        loss(transformer, clips())


def test_face_and_body_differ_and_all_parameters_have_gradients(transformer):
    adapter = randomise(transformer.adapters["motion"], 7)
    swapped = relative(adapter(jnp.array([[0.2, 0.8]])), adapter(jnp.array([[0.8, 0.2]])))
    assert swapped > 1e-2
    gradients = nnx.grad(lambda adapter: jnp.sum(adapter(LIVELY) ** 2))(adapter)
    assert all(jnp.any(gradient) for gradient in jax.tree.leaves(gradients))


def test_weights_are_exported_and_imported_under_pytorch_names():
    component = find_component("motion_adapter")
    adapter, other = (randomise(abstract(MotionAdapter, MOTION), seed) for seed in (0, 1))
    rules = component.layouts[0].rules(MOTION)
    file = dict(export(rules, {path: np.asarray(x) for path, x in flat_parameters(adapter).items()}))
    assert file["conv1.weight"].shape == (16, 16, 3)
    specs = {key: TensorSpec(value.shape, value.dtype) for key, value in file.items()}
    assign(other, load(make_plan(rules, specs, flat_parameters(other)), file.__getitem__))
    np.testing.assert_array_equal(other(LIVELY), adapter(LIVELY))


@pytest.mark.parametrize("setting", ["face_motion", "body_motion"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_config_error_for_a_motion_out_of_range(setting, value):
    with pytest.raises(ConfigError, match=rf"^sample\.{setting}"):
        build(SampleConfig, {setting: value}, "sample")


def test_config_error_for_a_motion_without_an_adapter():
    model, config = small_model(), SampleConfig(face_motion=0.1, body_motion=0.9)
    with pytest.raises(ConfigError, match="motion_adapter"):
        check_motion(model, config)
    check_motion(model, SampleConfig())
    motion = MotionAdapterConfig(width=model.transformer.dim)
    check_motion(model.replace(motion_adapter=motion), config)


def test_config_error_for_an_adapter_of_another_width():
    with pytest.raises(ConfigError, match=r"^motion_adapter\.width"):
        small_model().replace(motion_adapter=MotionAdapterConfig(width=8))
