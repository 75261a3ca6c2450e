"""Flow matching, guidance, and the sampler against the official outputs and against their formulas."""

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    TINY_AUDIO,
    TINY_WAN,
    randomise,
    reference_inputs,
    reference_outputs,
    reference_transformer,
    relative,
)

from fantasy_jax.config import ConfigError, build
from fantasy_jax.diffusion import sampler
from fantasy_jax.diffusion.flow import (
    TRAIN_TIMESTEPS,
    add_noise,
    sampling_sigmas,
    training_weight,
    velocity_target,
)
from fantasy_jax.diffusion.guidance import Branch, ScaleSchedule, branches, combine, scale_values
from fantasy_jax.diffusion.sampler import SamplerConfig, SamplerInputs, sample
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.wan import WanTransformer

pytestmark = pytest.mark.networks

WAN = replace(TINY_WAN, num_layers=2)
AUDIO = replace(TINY_AUDIO, num_layers=2)


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def tiny():
    """A small transformer with audio, noise, and something to listen to, for a batch of two."""

    def make():
        return WanTransformer(
            WAN, adapters={"audio": AudioAdapter(AUDIO, rngs=nnx.Rngs(0))}, rngs=nnx.Rngs(0)
        )

    shapes = ((3, 4, 6, 16), (3, 4, 6, 20), (5, 24), (3, 24), (9, 20), (19, 12))
    keys = jax.random.split(jax.random.key(1), len(shapes))
    noise, *inputs = (jax.random.normal(k, (2, *s)) for k, s in zip(keys, shapes, strict=True))
    return randomise(nnx.eval_shape(make)), noise, SamplerInputs(*inputs)


def test_schedule_and_weights_are_the_official_ones():
    expected = reference_outputs()
    sigmas = sampling_sigmas(4, 5.0)
    assert relative(sigmas[:-1], expected["sample_sigmas"]) < 2e-6
    assert relative(TRAIN_TIMESTEPS * sigmas[:-1], expected["sample_timesteps"]) < 2e-6
    timesteps = TRAIN_TIMESTEPS * sampling_sigmas(TRAIN_TIMESTEPS, 5.0)[:-1]
    assert relative(timesteps, expected["train_timesteps_1000"]) < 2e-6
    weights = training_weight(jnp.asarray(timesteps))
    assert relative(weights, expected["train_weights_1000"]) < 2e-6
    assert abs(float(weights.mean()) - 1) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 4, 30])
def test_a_schedule_runs_from_noise_to_data(steps, shift):
    sigmas = sampling_sigmas(steps, shift)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)
    even = np.linspace(1, 0, steps + 1)
    np.testing.assert_allclose(sigmas / (shift - (shift - 1) * sigmas), even, atol=1e-6)


def test_noise_and_velocity_agree():
    keys = jax.random.split(jax.random.key(0), 2)
    latents, noise = (jax.random.normal(key, (3, 2, 4, 4, 5)) for key in keys)
    sigma = jnp.array([1.0, 0.25, 0.0])
    noisy, velocity = add_noise(latents, noise, sigma), velocity_target(latents, noise)
    np.testing.assert_array_equal(noisy[0], noise[0])
    np.testing.assert_array_equal(noisy[2], latents[2])
    left = sigma[:, None, None, None, None]
    assert relative(noisy - left * velocity, latents) < 1e-6
    assert relative(noisy + (1 - left) * velocity, noise) < 1e-6


def test_a_step_needs_as_many_evaluations_as_scales_differ_from_one():
    negative, silent, heard = Branch(True, 0.0), Branch(False, 0.0), Branch(False, 0.75)
    assert branches(5.0, 4.5, loudness=0.75) == (negative, silent, heard)
    assert branches(5.0, 1.0, loudness=0.75) == (negative, silent, heard)
    assert branches(1.0, 4.5, loudness=0.75) == (silent, heard)
    assert branches(1.0, 1.0, loudness=0.75) == (heard,)
    assert len(branches(ScaleSchedule(1.0, 3.0), 1.0)) == 3
    assert len(branches(ScaleSchedule(3.0, 1.0), 1.0)) == 3
    assert len(branches(ScaleSchedule(1.0, 1.0), ScaleSchedule(1.0, 2.0))) == 2
    assert len(branches(ScaleSchedule(1.0, 1.0, "cosine"), 1.0)) == 1


def test_guidance_is_the_formula_and_fewer_evaluations_are_its_special_cases():
    keys = jax.random.split(jax.random.key(0), 3)
    negative, silent, heard = (jax.random.normal(key, (2, 5)) for key in keys)
    expected = negative + 5.0 * (silent - negative) + 4.5 * (heard - silent)
    assert relative(combine([negative, silent, heard], 5.0, 4.5), expected) < 1e-6
    every = [negative, silent, heard]
    assert relative(combine(every[1:], 1.0, 4.5), combine(every, 1.0, 4.5)) < 1e-6
    assert relative(combine(every[2:], 1.0, 1.0), combine(every, 1.0, 1.0)) < 1e-6


def test_a_scale_may_change_over_the_steps():
    np.testing.assert_array_equal(scale_values(4.5, 3), np.float32([4.5, 4.5, 4.5]))
    np.testing.assert_allclose(scale_values(ScaleSchedule(6.0, 2.0), 5), [6, 5, 4, 3, 2])
    cosine = scale_values(ScaleSchedule(6.0, 2.0, "cosine"), 5)
    np.testing.assert_allclose(cosine, 4 + 2 * np.cos(np.pi * np.arange(5) / 4), rtol=1e-6)
    assert scale_values(ScaleSchedule(6.0, 2.0), 1).tolist() == [6.0]


@pytest.mark.parametrize("batch_branches", [True, False])
def test_four_guided_steps_are_the_official_ones_and_compile_once(batch_branches):
    inputs, expected = reference_inputs(), reference_outputs()
    names = ("condition_latents", "text", "negative_text", "clip_features", "audio_features")
    config = SamplerConfig(steps=4, prompt_scale=5.0, audio_scale=4.5, batch_branches=batch_branches)
    steps = []
    compiled = sampler.euler_step._cache_size()
    result = sample(
        reference_transformer(),
        inputs["latents"],
        SamplerInputs(*(inputs[name] for name in names)),
        config,
        each_step=lambda i, x: steps.append((i, np.asarray(x))),
    )
    assert sampler.euler_step._cache_size() == compiled + 1
    assert [i for i, _ in steps] == [0, 1, 2, 3]
    for i, latents in steps:
        assert relative(latents, expected[f"sample_latents_step{i + 1}"]) < 5e-6
    np.testing.assert_array_equal(result, steps[-1][1])


def euler_by_hand(model, noise, inputs, config):
    """Always three evaluations, each with conditions of its own."""
    sigmas = sampling_sigmas(config.steps, config.shift)
    scales = (scale_values(scale, config.steps) for scale in (config.prompt_scale, config.audio_scale))
    forward = nnx.jit(lambda model, *arguments: model(*arguments))
    latents = noise
    for i, (prompt_scale, audio_scale) in enumerate(zip(*scales, strict=True)):
        velocities = []
        for text, loudness in (
            (inputs.negative_text, 0.0),
            (inputs.text, 0.0),
            (inputs.text, config.loudness),
        ):
            conditions = model.conditions(text, inputs.image)
            conditions["audio"] = model.adapters["audio"].frame_level(inputs.audio, 9, scale=loudness)
            timestep = jnp.full(len(noise), TRAIN_TIMESTEPS * sigmas[i])
            velocities.append(forward(model, latents, inputs.first_frame, timestep, conditions))
        negative, silent, heard = velocities
        guided = negative + prompt_scale * (silent - negative) + audio_scale * (heard - silent)
        latents = latents + guided * (sigmas[i + 1] - sigmas[i])
    return latents


@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(
            steps=3,
            shift=3.0,
            prompt_scale=ScaleSchedule(4.0, 1.0, "cosine"),
            audio_scale=ScaleSchedule(1.0, 6.0),
            loudness=0.5,
        ),
        SamplerConfig(steps=2, prompt_scale=1.0, audio_scale=3.0, batch_branches=False),
        SamplerConfig(steps=2, prompt_scale=1.0, audio_scale=1.0),
    ],
    ids=["schedules", "two evaluations", "one evaluation"],
)
def test_sampling_is_euler_by_hand(tiny, config):
    assert relative(sample(*tiny, config), euler_by_hand(*tiny, config)) < 5e-6


def test_no_setting_that_changes_over_steps_compiles_anew(tiny):
    def run(**settings):
        sample(*tiny, SamplerConfig(prompt_scale=1.0, **settings))
        return sampler.euler_step._cache_size()

    count = run(steps=2, audio_scale=3.0)
    assert run(steps=3, shift=2.0, audio_scale=ScaleSchedule(2.0, 5.0), loudness=0.5) == count


def test_noise_survives_and_progress_is_shown(tiny, capsys):
    model, noise, inputs = tiny
    before = np.array(noise)
    sample(model, noise, inputs, SamplerConfig(steps=2, prompt_scale=1.0), progress=True)
    assert "Sampling: 100%" in capsys.readouterr().err
    np.testing.assert_array_equal(noise, before)


def test_the_defaults_are_the_official_scripts():
    assert asdict(SamplerConfig()) == {
        "steps": 30,
        "shift": 5.0,
        "prompt_scale": 5.0,
        "audio_scale": 5.0,
        "loudness": 1.0,
        "identity_scale": 0.5,
        "motion_scale": 1.0,
        "audio": "frame",
        "batch_branches": True,
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplerConfig(steps=0), "steps is 0; at least 1 is needed"),
        (lambda: SamplerConfig(shift=0.0), "shift is 0.0; a positive number is needed"),
        (lambda: SamplerConfig(shift=-5.0), "shift is -5.0"),
        (
            lambda: build(ScaleSchedule, {"start": 1.0, "end": 2.0, "shape": "square"}, "audio_scale"),
            "audio_scale.shape: is 'square'; use one of 'linear', 'cosine'",
        ),
    ],
)
def test_impossible_settings_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
