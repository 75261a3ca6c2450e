"""Windows over time: where they lie, their weights, and clips of several windows against each one alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative
from test_sharding import AUDIO, CONFIG, draw, make_transformer

from fantasy_jax.config import build
from fantasy_jax.diffusion.flow import sampling_sigmas
from fantasy_jax.diffusion.guidance import guidance_branches
from fantasy_jax.diffusion.held import HeldLatents
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.diffusion.windows import WindowSchedule, bit_reversal
from fantasy_jax.errors import ConfigError
from fantasy_jax.pipelines.config import SampleConfig
from fantasy_jax.pipelines.latents import initial_noise
from fantasy_jax.sharding import make_mesh, parameter_shardings, replicate
from fantasy_jax.system.conditioning import condition, velocity
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.video import VideoConfig, video_frames

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

FRAMES, WINDOW = 9, 4
STEPS = 2
GUIDANCE = guidance_branches(STEPS, 2.0, 3.0)
SCHEDULE = WindowSchedule(FRAMES, WINDOW, overlap=1)
ALL_ANCHORS = pytest.mark.parametrize("anchor", ["picture", "preceding", "track"])


# Where windows lie


def frames_of(windows):
    """The latent frames of each window."""
    return windows.start[:, None] + np.arange(windows.weights.shape[1])


@ALL_ANCHORS
@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize("frames", [5, 6, 17, 33, 100])
def test_weights_of_each_frame_sum_to_one(frames, continues, moving, anchor):
    schedule = WindowSchedule(frames, 5, 2, anchor, moving, continues)
    for step in (0, 1, 6):
        windows = schedule.at(step, multiple=4)
        total = np.zeros(frames)
        np.add.at(total, frames_of(windows), windows.weights)
        np.testing.assert_allclose(total[1:] if continues else total, 1, atol=1e-6)
        assert len(windows.start) == schedule.count + -schedule.count % 4
        assert windows.weights.min() >= 0
        starts = schedule.starts(step)
        assert starts == sorted(starts)
        assert starts[-1] == frames - schedule.window


def test_the_windows_of_a_minute():
    schedule = WindowSchedule(376, 21)
    assert schedule.count == 25
    assert schedule.count * schedule.window / schedule.num_frames == pytest.approx(1.40, abs=0.005)
    first, second, *_, last = frames_of(schedule.at())
    assert first.tolist() == list(range(21))
    # The picture's position has the sound of the latent before the window.
    assert second.tolist() == list(range(15, 36))
    assert last[-1] == 375
    overlaps = np.diff(schedule.starts()[1:])
    assert overlaps.min() >= schedule.useful - schedule.overlap - 1


def test_the_first_position_of_later_windows_is_thrown_away():
    for anchor in ("picture", "preceding", "track"):
        windows = WindowSchedule(17, 5, 2, anchor).at()
        assert windows.weights[0, 0] == 1
        assert not windows.weights[1:, 0].any()
        assert windows.anchored.tolist() == [False] + [anchor == "picture"] * (len(windows.start) - 1)


def test_windows_move_between_first_and_last():
    schedule = WindowSchedule(33, 5, 2, moving=True)
    assert schedule.count == WindowSchedule(33, 5, 2).count + 1
    starts = np.array([schedule.starts(step) for step in range(8)])
    assert set(starts[:, 0]) == {0}
    assert set(starts[:, -1]) == {28}
    assert len({tuple(row) for row in starts}) > 1
    assert [bit_reversal(step) for step in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]


@pytest.mark.parametrize("overlap", [0, -1, 4, 20])
def test_config_error_for_an_overlap_that_does_not_fit(overlap):
    with pytest.raises(ConfigError, match=rf"^overlap is {overlap}; .* less than the 4 latent frames"):
        WindowSchedule(17, 5, overlap)


def test_config_error_for_an_anchor():
    with pytest.raises(ConfigError, match=r"^sample\.anchor"):
        build(SampleConfig, {"anchor": "mouth"}, "sample")


def test_a_clip_that_fits_has_no_windows():
    window, config = VideoConfig(), SampleConfig()
    assert config.windows(window.for_seconds(3.5), window) is None
    assert config.windows(window.for_seconds(10.0), window).count == 4


def test_the_noise_of_a_short_clip_is_the_beginning_of_a_longer_ones():
    short, long = (initial_noise(3, (1, frames, 4, 6, 16)) for frames in (5, 40))
    np.testing.assert_array_equal(long[:, :5], short)


# Sampling


@pytest.fixture(scope="module")
def transformer():
    return make_transformer()


def clip(frames=FRAMES, seed=0):
    """Noise of a long clip, and inputs whose first-frame condition is that of a window."""
    size = (2 * 2, 2 * 3)
    noise = draw(1, frames, *size, 16, seed=seed)
    first_frame, text = draw(1, WINDOW, *size, 20, seed=1), draw(1, 5, CONFIG.text_dim, seed=2)
    image = draw(1, 9, CONFIG.image_dim, seed=3)
    audio = draw(1, 2 * video_frames(frames), AUDIO.feature_width, seed=4)
    return noise, ClipInputs(first_frame, text, 2 * text, image, {"audio": audio})


def run(model, noise, inputs, *, windows=SCHEDULE, **settings):
    config = SamplerConfig(num_inference_steps=STEPS, batch_branches=False)
    return sample(model, noise, inputs, config, guidance=GUIDANCE, windows=windows, **settings)


plain_velocity = nnx.jit(velocity)


def window_by_window(model, noise, inputs, schedule):
    """Sampling in plain steps: each window of each branch alone, blended by hand."""
    sigmas, num_frames = sampling_sigmas(STEPS, 5.0), video_frames(FRAMES)
    track = noise
    for step in range(STEPS):
        windows, total = schedule.at(step), np.zeros(track.shape, np.float32)
        parts = (frames_of(windows), windows.weights, windows.anchored)
        for frames, weights, anchored in zip(*parts, strict=True):
            x = track[:, frames]
            if anchored:
                picture = inputs.first_frame[:, 0, ..., 4:]
                x = x.at[:, 0].set((1 - sigmas[step]) * picture + sigmas[step] * noise[:, 0])
            guided = 0
            for branch in GUIDANCE:
                keep = dict.fromkeys(branch.dropped, False)
                whole = condition(model, inputs, keep=keep, num_frames=num_frames)
                audio = whole.attended["audio"]
                cut = replace(audio, tokens=audio.tokens[:, frames], lengths=audio.lengths[:, frames])
                conditions = replace(whole, attended=whole.attended | {"audio": cut})
                guided += branch.weights[step] * plain_velocity(
                    model, x, jnp.float32(sigmas[step]), conditions
                )
            np.add.at(total, (0, frames), np.asarray(guided[0] * weights[:, None, None, None]))
        track = track + total * (sigmas[step + 1] - sigmas[step])
    return track


@ALL_ANCHORS
@pytest.mark.parametrize("moving", [False, True])
def test_a_long_clip_is_its_windows_blended(transformer, anchor, moving):
    schedule = replace(SCHEDULE, anchor=anchor, moving=moving)
    noise, inputs = clip()
    result = run(transformer, noise, inputs, windows=schedule)
    assert result.shape == noise.shape
    assert relative(result, window_by_window(transformer, noise, inputs, schedule)) < 1e-5


def test_groups_of_windows_give_what_single_ones_do(transformer):
    noise, inputs = clip()
    config = SamplerConfig(num_inference_steps=STEPS, batch_branches=True, windows_per_device=3)
    result = sample(transformer, noise, inputs, config, guidance=GUIDANCE, windows=SCHEDULE)
    assert relative(result, run(transformer, noise, inputs)) < 1e-5


def test_the_sound_of_a_window_reaches_its_frames_only(transformer):
    noise, inputs = clip()
    changed = replace(inputs, adapters={"audio": inputs.adapters["audio"].at[:, -8:].add(1.0)})
    one, other = (run(transformer, noise, x) for x in (inputs, changed))
    differs = np.abs(one - other).max(axis=(0, 2, 3, 4)) > 0
    assert differs[-1]
    assert not differs[:3].any()


def test_windows_can_have_pictures_of_their_own(transformer):
    noise, inputs = clip()
    several = replace(
        inputs,
        first_frame=jnp.concatenate([inputs.first_frame, inputs.first_frame + 1]),
        text=inputs.text.repeat(2, axis=0),
        negative_text=inputs.negative_text.repeat(2, axis=0),
        image=inputs.image.repeat(2, axis=0),
    )
    plain = run(transformer, noise, inputs)
    assert relative(run(transformer, noise, several), plain) < 1e-6
    last = replace(SCHEDULE, references=(0, SCHEDULE.starts()[-1]))
    differs = np.abs(run(transformer, noise, several, windows=last) - plain).max(axis=(0, 2, 3, 4)) > 1e-5
    # In the second step it spreads through the window before.
    assert differs[last.references[1] :].all()
    assert not differs[: SCHEDULE.starts()[-2]].any()


def test_held_latents_stay(transformer):
    noise, inputs = clip()
    known = draw(*noise.shape, seed=9)
    mask = jnp.ones((1, FRAMES, 1, 1, 1)).at[:, :2].set(0)
    steps = []
    result = run(
        transformer,
        noise,
        inputs,
        held=HeldLatents(known, mask),
        callback=lambda i, x, _: steps.append(np.asarray(x)),
    )
    sigma = sampling_sigmas(STEPS, 5.0)[1]
    np.testing.assert_allclose(steps[0][:, :2], (1 - sigma) * known[:, :2] + sigma * noise[:, :2], rtol=1e-6)
    np.testing.assert_array_equal(result[:, :2], known[:, :2])
    assert relative(result[:, 2:], run(transformer, noise, inputs)[:, 2:]) > 1e-3


def test_strength_leaves_out_the_first_steps(transformer):
    noise, inputs = clip()
    held = HeldLatents(draw(*noise.shape, seed=9), jnp.ones((1, 1, 1, 1, 1)))
    np.testing.assert_array_equal(run(transformer, noise, inputs, held=held, strength=0.0), held.latents)
    seen = []
    run(transformer, noise, inputs, held=held, strength=0.9, callback=lambda i, x, _: seen.append(i))
    assert seen == [1]  # levels are 1 and 0.83


MESHES = [{"data": 4}, {"fsdp": 8}, {"data": 2, "context": 2, "tensor": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_windows_are_shared_by_devices(transformer, sizes):
    noise, inputs = clip()
    expected = run(transformer, noise, inputs)
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(transformer)
        state = jax.device_put(state, parameter_shardings(state, mesh))
        result = run(nnx.merge(graphdef, state), *replicate((noise, inputs)))
        assert relative(result, expected) < 1e-5
