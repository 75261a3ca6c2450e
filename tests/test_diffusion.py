"""Flow matching, guidance, and the sampler against the official outputs and against their formulas."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    TINY_AUDIO,
    TINY_WAN,
    abstract,
    reference_inputs,
    reference_outputs,
    reference_transformer,
    relative,
    tiny_inputs,
    tiny_transformer,
)

from fantasy_jax.config import build
from fantasy_jax.diffusion import sampler
from fantasy_jax.diffusion.flow import add_noise, sampling_sigmas, velocity_target
from fantasy_jax.diffusion.guidance import (
    GuidanceBranch,
    ScaleSchedule,
    combine,
    difference_scales,
    guidance_branches,
    scale_values,
)
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.wan import NUM_TIMESTEPS
from fantasy_jax.parity.transformers import training_weight
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.system.inputs import ClipInputs

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

WAN = replace(TINY_WAN, num_layers=2)
AUDIO = replace(TINY_AUDIO, num_layers=2)
NO_TEXT, NO_AUDIO, ALL = ("text", "audio"), ("audio",), ()


@pytest.fixture(scope="module")
def tiny():
    """A small transformer with an audio adapter; noise and inputs for a batch of two."""
    model = tiny_transformer(WAN, audio=abstract(AudioAdapter, AUDIO))
    return model, *tiny_inputs(WAN, audio=(19, AUDIO.feature_width))


# Schedules


def test_schedule_and_weights_are_the_official_ones():
    expected = reference_outputs()
    sigmas = sampling_sigmas(4, 5.0)
    assert relative(sigmas[:-1], expected["sample_sigmas"]) < 2e-6
    assert relative(NUM_TIMESTEPS * sigmas[:-1], expected["sample_timesteps"]) < 2e-6
    timesteps = NUM_TIMESTEPS * sampling_sigmas(NUM_TIMESTEPS, 5.0)[:-1]
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


# Guidance


@pytest.mark.parametrize(
    ("text_scale", "audio_scale", "expected"),
    [
        (5.0, 4.5, {NO_TEXT: -4.0, NO_AUDIO: 0.5, ALL: 4.5}),
        (5.0, 1.0, {NO_TEXT: -4.0, NO_AUDIO: 4.0, ALL: 1.0}),
        (5.0, 5.0, {NO_TEXT: -4.0, ALL: 5.0}),
        (1.0, 4.5, {NO_AUDIO: -3.5, ALL: 4.5}),
        (1.0, 1.0, {ALL: 1.0}),
        (2.0, 0.0, {NO_TEXT: -1.0, NO_AUDIO: 2.0}),
        (0.0, 0.0, {NO_TEXT: 1.0}),
    ],
)
def test_branches_of_zero_weight_are_left_out(text_scale, audio_scale, expected):
    branches = guidance_branches(2, text_scale, audio_scale)
    assert branches == tuple(GuidanceBranch(dropped, (w, w)) for dropped, w in expected.items())


def test_a_branch_whose_weight_is_zero_at_some_steps_is_computed():
    schedule = ScaleSchedule(1.0, 3.0)
    assert len(guidance_branches(3, schedule, 1.0)) == 3
    assert len(guidance_branches(3, ScaleSchedule(3.0, 1.0), 1.0)) == 3
    no_audio, full = guidance_branches(3, ScaleSchedule(1.0, 1.0), ScaleSchedule(1.0, 2.0))
    assert (no_audio.weights, full.weights) == ((0.0, -0.5, -1.0), (1.0, 1.5, 2.0))
    assert guidance_branches(3, schedule, schedule) == (
        GuidanceBranch(NO_TEXT, (0.0, -1.0, -2.0)),
        GuidanceBranch(ALL, (1.0, 2.0, 3.0)),
    )
    assert len(guidance_branches(3, ScaleSchedule(1.0, 1.0, "cosine"), 1.0)) == 1


def test_an_adapter_of_another_group_can_guide():
    dropped = [branch.dropped for branch in guidance_branches(1, 5.0, 4.5, "face")]
    assert dropped == [("text", "face"), ("face",), ()]


@pytest.mark.parametrize("text_scale", [1.0, 5.0, ScaleSchedule(0.0, 7.0)])
@pytest.mark.parametrize("audio_scale", [0.0, 1.0, ScaleSchedule(5.0, 0.3, "cosine")])
def test_the_weights_of_each_step_sum_to_one(text_scale, audio_scale):
    branches = guidance_branches(5, text_scale, audio_scale)
    np.testing.assert_allclose(np.sum([branch.weights for branch in branches], axis=0), np.ones(5))
    assert difference_scales(branches).shape == (5, len(branches) - 1)


def test_weights_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match="weights"):
        difference_scales([GuidanceBranch(ALL, (1.0, 0.9))])


def test_combined_velocities_equal_the_formula_of_guidance():
    keys = jax.random.split(jax.random.key(0), 3)
    negative, no_audio, full = (jax.random.normal(key, (2, 5)) for key in keys)
    velocities = {NO_TEXT: negative, NO_AUDIO: no_audio, ALL: full}
    for text_scale in (1.0, 4.5, 5.0):
        for audio_scale in (0.0, 1.0, 4.5):
            branches = guidance_branches(1, text_scale, audio_scale)
            scales = difference_scales(branches)[0]
            guided = combine([velocities[branch.dropped] for branch in branches], scales)
            expected = negative + text_scale * (no_audio - negative) + audio_scale * (full - no_audio)
            assert relative(guided, expected) < 1e-6
    # Nothing is rounded where the classic formula has the same form.
    scales = difference_scales(guidance_branches(1, 5.0, 4.5))[0]
    expected = negative + 5.0 * (no_audio - negative) + 4.5 * (full - no_audio)
    np.testing.assert_array_equal(combine([negative, no_audio, full], scales), expected)


def test_a_scale_may_change_over_the_steps():
    np.testing.assert_array_equal(scale_values(4.5, 3), np.float32([4.5, 4.5, 4.5]))
    np.testing.assert_allclose(scale_values(ScaleSchedule(6.0, 2.0), 5), [6, 5, 4, 3, 2])
    cosine = scale_values(ScaleSchedule(6.0, 2.0, "cosine"), 5)
    np.testing.assert_allclose(cosine, 4 + 2 * np.cos(np.pi * np.arange(5) / 4), rtol=1e-6)
    assert scale_values(ScaleSchedule(6.0, 2.0), 1).tolist() == [6.0]


def test_config_error_for_the_shape_of_a_schedule():
    values = {"start": 1.0, "end": 2.0, "shape": "square"}
    with pytest.raises(ConfigError, match=r"^scale\.shape"):
        build(ScaleSchedule, values, "scale")


# Sampling


@pytest.mark.parametrize("batch_branches", [True, False])
def test_four_guided_steps_are_the_official_ones_and_compile_once(batch_branches):
    inputs, expected = reference_inputs(), reference_outputs()
    names = ("condition_latents", "text", "negative_text", "clip_features")
    steps = []
    compiled = sampler.guided_step._cache_size()
    result = sample(
        reference_transformer(),
        inputs["latents"],
        ClipInputs(*(inputs[name] for name in names), {"audio": inputs["audio_features"]}),
        SamplerConfig(num_inference_steps=4, batch_branches=batch_branches),
        guidance=guidance_branches(4, 5.0, 4.5),
        callback=lambda i, x, _: steps.append((i, np.asarray(x))),
    )
    assert sampler.guided_step._cache_size() == compiled + 1
    assert [i for i, _ in steps] == [0, 1, 2, 3]
    for i, latents in steps:
        assert relative(latents, expected[f"sample_latents_step{i + 1}"]) < 5e-6
    np.testing.assert_array_equal(result, steps[-1][1])


forward = nnx.jit(lambda model, *arguments: model(*arguments))


def plain_velocity(model, inputs, text, audio_scale):
    """The velocity with one set of conditions, as a function of latents and sigma."""
    conditions = model.conditions(text, inputs.image)
    conditions["audio"] = model.adapters["audio"].condition(inputs.adapters["audio"], 9, scale=audio_scale)

    def velocity(latents, sigma):
        timestep = jnp.full(len(latents), NUM_TIMESTEPS * sigma)
        return forward(model, latents, inputs.first_frame, timestep, conditions)

    return velocity


def euler_by_hand(model, noise, inputs, config):
    """Always three evaluations, each with its own conditions; also returns what each step predicts."""
    steps = config.num_inference_steps
    sigmas = sampling_sigmas(steps, config.shift)
    text_scales, audio_scales = (
        scale_values(scale, steps) for scale in (config.text_guidance_scale, config.audio_guidance_scale)
    )
    branches = [
        plain_velocity(model, inputs, text, audio_scale)
        for text, audio_scale in (
            (inputs.negative_text, 0.0),
            (inputs.text, 0.0),
            (inputs.text, config.audio_attention_scale),
        )
    ]
    latents, predicted = noise, []
    for i in range(steps):
        negative, no_audio, full = (velocity(latents, sigmas[i]) for velocity in branches)
        guided = negative + text_scales[i] * (no_audio - negative) + audio_scales[i] * (full - no_audio)
        predicted.append(latents - guided * sigmas[i])
        latents = latents + guided * (sigmas[i + 1] - sigmas[i])
    return latents, predicted


def sample_with(model, noise, inputs, config, callback=None):
    """Samples as FantasyTalking's pipeline does."""
    settings = {"guidance": config.guidance, "options": config.adapter_options, "callback": callback}
    return sample(model, noise, inputs, config, **settings)


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(
            num_inference_steps=3,
            shift=3.0,
            text_guidance_scale=ScaleSchedule(4.0, 1.0, "cosine"),
            audio_guidance_scale=ScaleSchedule(1.0, 6.0),
            audio_attention_scale=0.5,
        ),
        SampleConfig(
            num_inference_steps=2, text_guidance_scale=1.0, audio_guidance_scale=3.0, batch_branches=False
        ),
        SampleConfig(num_inference_steps=2, text_guidance_scale=3.0, audio_guidance_scale=3.0),
        SampleConfig(num_inference_steps=2, text_guidance_scale=1.0, audio_guidance_scale=1.0),
    ],
    ids=["schedules", "no text guidance", "equal scales", "no guidance"],
)
def test_sampling_equals_euler_by_hand(tiny, config):
    expected, expected_predictions = euler_by_hand(*tiny, config)
    predictions = []
    result = sample_with(*tiny, config, lambda i, latents, predicted: predictions.append(predicted))
    assert relative(result, expected) < 5e-6
    np.testing.assert_array_equal(predictions[-1], result)
    for predicted, wanted in zip(predictions, expected_predictions, strict=True):
        assert relative(predicted, wanted) < 5e-6


def test_settings_that_change_over_steps_compile_nothing_again(tiny):
    def run(**settings):
        sample_with(*tiny, SampleConfig(text_guidance_scale=1.0, **settings))
        return sampler.guided_step._cache_size()

    count = run(num_inference_steps=2, audio_guidance_scale=3.0)
    schedule = ScaleSchedule(2.0, 5.0)
    changed = {"num_inference_steps": 3, "shift": 2.0, "audio_attention_scale": 0.5}
    assert run(audio_guidance_scale=schedule, **changed) == count


def test_noise_is_not_donated_and_progress_is_shown(tiny, capsys):
    model, noise, inputs = tiny
    before = np.array(noise)
    config = SamplerConfig(num_inference_steps=2)
    sample(model, noise, inputs, config, guidance=guidance_branches(2, 1.0), progress=True)
    assert "100%" in capsys.readouterr().err
    np.testing.assert_array_equal(noise, before)


def heun(velocity, latents, sigmas):
    """Heun's method: the mean of the velocities at both ends of a step."""
    step, first = sigmas[1] - sigmas[0], velocity(latents, sigmas[0])
    return latents + step * (first + velocity(latents + step * first, sigmas[1])) / 2


def windowed(velocity):
    """A wrapper: the mean of the velocities in overlapping windows of two latent frames."""

    def in_windows(latents, sigma, conditions):
        total, count = jnp.zeros_like(latents), np.zeros(latents.shape[1])
        for start in range(latents.shape[1] - 1):
            frames = slice(start, start + 2)
            rows = jnp.arange(len(latents))
            part = conditions.at_frames(jnp.full_like(rows, start), 2, rows)
            part = replace(part, first_frame=part.first_frame[:, frames])
            total = total.at[:, frames].add(velocity(latents[:, frames], sigma, part))
            count[frames] += 1
        return total / count[:, None, None, None]

    return in_windows


def doubled(velocity):
    return lambda latents, sigma, conditions: 2 * velocity(latents, sigma, conditions)


def shifted(velocity):
    return lambda latents, sigma, conditions: velocity(latents, sigma, conditions) + 1


@pytest.mark.parametrize("batch_branches", [True, False])
def test_another_solver_takes_the_guided_velocity(tiny, batch_branches):
    model, noise, inputs = tiny
    sigmas = sampling_sigmas(3, 5.0)
    text_scale = 3.0
    negative, full = (plain_velocity(model, inputs, x, 0.0) for x in (inputs.negative_text, inputs.text))

    def guided(latents, sigma):
        low = negative(latents, sigma)
        return low + text_scale * (full(latents, sigma) - low)

    expected = noise
    for i in range(3):
        expected = heun(guided, expected, sigmas[i : i + 2])
    compiled = sampler.guided_step._cache_size()
    result = sample(
        model,
        noise,
        inputs,
        SamplerConfig(num_inference_steps=3, batch_branches=batch_branches),
        guidance=guidance_branches(3, text_scale, 0.0),
        solver=heun,
    )
    assert sampler.guided_step._cache_size() == compiled + 1
    assert relative(result, expected) < 5e-6


@pytest.mark.parametrize("batch_branches", [True, False])
def test_a_wrapper_can_change_the_conditions_of_a_velocity(tiny, batch_branches):
    model, noise, inputs = tiny
    config = SamplerConfig(num_inference_steps=2, batch_branches=batch_branches)
    settings = {"guidance": guidance_branches(2, 2.0, 3.0)}
    compiled = sampler.guided_step._cache_size()
    result = sample(model, noise, inputs, config, wrappers=[windowed], solver=heun, **settings)
    assert sampler.guided_step._cache_size() == compiled + 1
    assert relative(result, sample(model, noise, inputs, config, solver=heun, **settings)) > 1e-3
    # The first frame is in one window, which does not contain the last.
    changed = replace(inputs, first_frame=inputs.first_frame.at[:, -1].add(1.0))
    single = replace(config, num_inference_steps=1)
    once = {"guidance": guidance_branches(1, 2.0, 3.0), "wrappers": [windowed]}
    one, other = (sample(model, noise, x, single, **once) for x in (inputs, changed))
    assert np.array_equal(one[:, 0], other[:, 0])
    assert not np.array_equal(one[:, 1], other[:, 1])


def test_the_first_wrapper_is_the_innermost(tiny):
    model, noise, inputs = tiny
    config, guidance = SamplerConfig(num_inference_steps=1), guidance_branches(1, 1.0)

    def velocity(*wrappers):
        """One step over the whole schedule is noise minus velocity."""
        return noise - sample(model, noise, inputs, config, guidance=guidance, wrappers=wrappers)

    plain = velocity()
    assert relative(velocity(shifted, doubled), 2 * (plain + 1)) < 1e-5
    assert relative(velocity(doubled, shifted), 2 * plain + 1) < 1e-5


# Settings


def test_the_defaults_are_the_official_scripts():
    config = SampleConfig()
    assert (config.num_inference_steps, config.shift) == (30, 5.0)
    assert (config.text_guidance_scale, config.audio_guidance_scale) == (5.0, 5.0)
    assert (config.audio_attention, config.audio_attention_scale) == ("frame", 1.0)
    assert (config.identity_scale, config.motion_scale) == (0.5, 1.0)
    assert not config.batch_branches


@pytest.mark.parametrize("setting", [{"num_inference_steps": 0}, {"shift": 0.0}, {"shift": -5.0}])
def test_config_error_for_the_sampler(setting):
    with pytest.raises(ConfigError, match=f"^{next(iter(setting))}"):
        SamplerConfig(**setting)
