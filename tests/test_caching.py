"""Guidance gating and MagCache: which steps compute what, and sampling against the same steps by hand."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative
from test_sharding import make_transformer
from test_time_windows import FRAMES, SCHEDULE, clip, draw, frames_of, plain_velocity

from fantasy_jax.config import build, load_config
from fantasy_jax.diffusion import sampler
from fantasy_jax.diffusion.flow import sampling_sigmas
from fantasy_jax.diffusion.guidance import GatingConfig, ScaleSchedule, guidance_branches, needed_branches
from fantasy_jax.diffusion.held import HeldLatents
from fantasy_jax.diffusion.magcache import (
    Calibration,
    MagCacheConfig,
    MagnitudeCurve,
    read_curve,
    skipped_steps,
    write_curve,
)
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.errors import ConfigError
from fantasy_jax.miniature import approximate
from fantasy_jax.performance.programs import guided_step_programs
from fantasy_jax.pipelines.config import PortraitSampleConfig, SampleConfig
from fantasy_jax.sharding import MeshConfig, make_mesh, parameter_shardings, replicate
from fantasy_jax.system.conditioning import cached_velocity, condition
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import abstract_networks
from fantasy_jax.video import VideoConfig, video_frames

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

# Of Wan2.1-I2V-14B at 480p, the two branches of each of 40 steps in turn: MaxDiffusion,
# `configs/base_wan_i2v_14b.yml`.
WAN_480P = [
    *(1.0, 1.0, 0.98783, 0.98993, 0.97559, 0.97593, 0.98311, 0.98319, 0.98202, 0.98225, 0.9888, 0.98878),
    *(0.98762, 0.98759, 0.98957, 0.98971, 0.99052, 0.99043, 0.99383, 0.99384, 0.98857, 0.9886, 0.99065),
    *(0.99068, 0.98845, 0.98847, 0.99057, 0.99057, 0.98957, 0.98961, 0.98601, 0.9861, 0.98823, 0.98823),
    *(0.98756, 0.98759, 0.98808, 0.98814, 0.98721, 0.98724, 0.98571, 0.98572, 0.98543, 0.98544, 0.98157),
    *(0.98165, 0.98411, 0.98413, 0.97952, 0.97953, 0.98149, 0.9815, 0.9774, 0.97742, 0.97825, 0.97826),
    *(0.97355, 0.97361, 0.97085, 0.97087, 0.97056, 0.97055, 0.96588, 0.96587, 0.96113, 0.96124, 0.9567),
    *(0.95681, 0.94961, 0.94969, 0.93973, 0.93988, 0.93217, 0.93224, 0.91878, 0.91896, 0.90955, 0.90954),
    *(0.92617, 0.92616),
]


# Which branches are needed


@pytest.mark.parametrize(
    ("scales", "gates", "expected"),
    [
        ((2.0, 3.0), (0.4, 0.7), [3] * 4 + [2] * 3 + [1] * 3),
        ((2.0, 3.0), (0.7, 0.4), [3] * 7 + [1] * 3),  # the prompt's difference needs the branches between
        ((2.0, 3.0), (0.0, 0.0), [3] + [1] * 9),
        ((2.0, 3.0), (0.41, 1.0), [3] * 5 + [2] * 5),
        ((2.0, 3.0), (1.0, 1.0), [3] * 10),
        ((5.0, 5.0), (0.4, 0.7), [2] * 7 + [1] * 3),  # one difference, of prompt and audio
        ((5.0, 0.0), (0.4, 0.7), [2] * 4 + [1] * 6),
        ((1.0, 3.0), (0.4, 0.7), [2] * 7 + [1] * 3),
        ((1.0, 1.0), (0.4, 0.7), [1] * 10),
    ],
)
def test_gates_of_branches(scales, gates, expected):
    branches = guidance_branches(10, *scales)
    needed = needed_branches(branches, GatingConfig(True, *gates), 10)
    assert needed.sum(axis=1).tolist() == expected
    assert all(sorted(row) == list(row) for row in needed)  # the last ones
    assert needed_branches(branches, GatingConfig(False, *gates), 10).all()


def test_the_first_step_computes_all_differences():
    needed = needed_branches(guidance_branches(10, 2.0, 3.0), GatingConfig(True, 0.4, 0.7), 10, first=6)
    assert needed.sum(axis=1).tolist() == [3] * 7 + [1] * 3


def test_evaluations_of_the_official_settings():
    def count(config, **gates):
        config = replace(config, gating=GatingConfig(True, **gates))
        return config.evaluation_plan(config.guidance).evaluations.sum()

    config = SampleConfig(audio_guidance_scale=4.5)
    assert not config.gating.enabled
    assert count(config) == 63  # of 90
    assert count(config, text=0.5, adapter=0.5) == 60
    assert count(PortraitSampleConfig()) == 2 * 21 + 9  # expression, as audio


# Which steps are skipped


@pytest.mark.parametrize(
    ("bound", "skips", "computed"),
    [(0.04, 2, 19), (0.06, 2, 18), (0.12, 2, 15), (0.12, 4, 13), (0.24, 6, 11)],
)
def test_steps_that_the_published_curve_skips(bound, skips, computed):
    nearest = np.round(np.arange(30) * 39 / 29).astype(int)
    ratios = np.array([WAN_480P[::2], WAN_480P[1::2]])[:, nearest]
    skipped = skipped_steps(ratios, MagCacheConfig(error_bound=bound, max_skips=skips))
    assert (~skipped).sum() == computed
    assert not skipped[:6].any()


def test_the_error_of_skipped_steps_adds_up():
    ratios = np.array([[1.0, 0.9, 0.9, 0.9, 0.9, 0.5, 1.0, 1.0, 1.0]])
    # 0.1, then 0.1 + 0.19 of the second step in a row.
    config = MagCacheConfig(error_bound=0.3, max_skips=3, retention=0.0)
    assert np.flatnonzero(skipped_steps(ratios, config)).tolist() == [1, 2, 4, 6, 7, 8]
    assert np.flatnonzero(skipped_steps(ratios, replace(config, max_skips=1))).tolist() == [1, 3, 6, 8]
    assert np.flatnonzero(skipped_steps(ratios, replace(config, retention=0.3))).tolist() == [2, 3, 6, 7, 8]
    assert np.flatnonzero(skipped_steps(ratios, config, first=2)).tolist() == [3, 4, 6, 7, 8]
    assert not skipped_steps(ratios, replace(config, error_bound=0.0)).any()
    # The branch with the larger error decides for all.
    worse = np.stack([ratios[0], np.where(np.arange(9) == 1, 0.6, ratios[0])])
    assert np.flatnonzero(skipped_steps(worse, config)).tolist() == [2, 3, 6, 7, 8]


# The curve


def curve(steps=30, shift=5.0, scales=(5.0, 4.5)):
    branches = tuple(branch.dropped for branch in guidance_branches(steps, *scales))
    return MagnitudeCurve(shift, branches, ((1.0, *(0.99,) * (steps - 1)),) * len(branches))


def test_a_curve_in_a_file_or_in_the_config(tmp_path):
    path = str(tmp_path / "curve.json")
    write_curve(curve(), path)
    assert read_curve(path) == curve()
    written = json.loads((tmp_path / "curve.json").read_text())
    settings = [MagCacheConfig(curve()), *({"curve": x} for x in (path, written))]
    for magcache in settings:
        values = {"audio_guidance_scale": 4.5, "magcache": magcache}
        config = SampleConfig(**values) if magcache is settings[0] else build(SampleConfig, values, "sample")
        assert config.evaluation_plan(config.guidance).skipped.sum() == 16
        assert config.magcache.curve == curve()  # read with the settings, and not again


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (curve(20), "20 steps .* 30 steps"),
        (curve(shift=3.0), "shift 3, .* shift 5,"),
        (curve(scales=(1.0, 4.5)), "2 branches .* 3 branches"),
        (curve(scales=(5.0, 5.0)), r"2 branches \(without text and audio, all\); .* 3 branches"),
    ],
)
def test_config_error_for_the_curve_of_other_settings(given, named):
    with pytest.raises(ConfigError, match=rf"^magcache\.curve is of .*{named}"):
        SampleConfig(audio_guidance_scale=4.5, magcache=MagCacheConfig(given))


@pytest.mark.parametrize(
    "content", [None, "{", "[]", "{}", '{"shift": 5, "branches": [[]], "ratios": [["a"]]}']
)
def test_config_error_for_the_file_of_a_curve(tmp_path, content):
    path = tmp_path / "curve.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"^curve: {path} "):
        MagCacheConfig(str(path))


def test_config_error_for_settings_that_do_not_go_together():
    with pytest.raises(ConfigError, match="ratios"):
        MagnitudeCurve(5.0, ((), ("audio",)), ((1.0, 0.9),))
    with pytest.raises(ConfigError, match="moving"):
        SampleConfig(audio_guidance_scale=4.5, moving=True, magcache=MagCacheConfig(curve()))


# Sampling


@pytest.fixture(scope="module")
def transformer():
    return make_transformer()


STEPS = 5
SCALES = (ScaleSchedule(3.0, 2.0), ScaleSchedule(2.0, 4.0))
GUIDANCE = guidance_branches(STEPS, *SCALES)
GATES = GatingConfig(True, 0.4, 0.6)
NEEDED = (3, 3, 2, 1, 1)
# Skips the third and the fifth step.
RATIOS = ((1.0, 1.0, 0.99, 0.5, 0.99),) * 3
MAGCACHE = MagCacheConfig(MagnitudeCurve(5.0, tuple(x.dropped for x in GUIDANCE), RATIOS), 0.1, 2, 0.4)
SKIPPED = (False, False, True, False, True)
EXACT = ((3,) * STEPS, (False,) * STEPS)

known_velocity = nnx.jit(cached_velocity)


def by_hand(model, noise, inputs, schedule, needed, skipped, held=None):
    """Sampling in plain steps: each window of each branch alone, whose differences are blended."""
    sigmas, track, cached, differences = sampling_sigmas(STEPS, 5.0), noise, {}, {}
    for step in range(STEPS):
        windows, velocities = schedule.at(step), {}
        for index in range(3 - needed[step], 3):
            dropped = dict.fromkeys(GUIDANCE[index].dropped, False)
            whole = condition(model, inputs, keep=dropped, num_frames=video_frames(FRAMES))
            audio, total = whole.attended["audio"], np.zeros(track.shape, np.float32)
            parts = (frames_of(windows), windows.weights, windows.anchored)
            for number, (frames, weights, anchored) in enumerate(zip(*parts, strict=True)):
                x = track[:, frames]
                if anchored:
                    picture = inputs.first_frame[:, 0, ..., 4:]
                    x = x.at[:, 0].set((1 - sigmas[step]) * picture + sigmas[step] * noise[:, 0])
                cut = replace(audio, tokens=audio.tokens[:, frames], lengths=audio.lengths[:, frames])
                given = replace(whole, attended=whole.attended | {"audio": cut})
                used = cached.get((index, number)) if skipped[step] else None
                found, residual = known_velocity(model, x, jnp.float32(sigmas[step]), given, used)
                if residual is not None:
                    cached[index, number] = residual
                np.add.at(total, (0, frames), np.asarray(found[0] * weights[:, None, None, None]))
            velocities[index] = total
        differences |= {i: velocities[j] - velocities[i] for i, j in pairwise(sorted(velocities))}
        weights = np.cumsum([branch.weights[step] for branch in GUIDANCE[::-1]])[::-1][1:]
        # The formula of guidance, from the velocity with all conditions.
        guided = velocities[2] + sum((weights[i] - 1) * differences[i] for i in range(2))
        track = track + guided * (sigmas[step + 1] - sigmas[step])
        if held is not None:
            level = sigmas[step + 1]
            kept = (1 - level) * held.latents + level * noise
            track = held.mask * track + (1 - held.mask) * kept
    return track


def run(model, noise, inputs, *, windows=SCHEDULE, held=None, callback=None, **settings):
    config = SamplerConfig(num_inference_steps=STEPS, **settings)
    options = {"windows": windows, "held": held, "residual_callback": callback}
    return sample(model, noise, inputs, config, guidance=GUIDANCE, **options)


def test_residuals_give_the_velocity(transformer):
    noise, inputs = clip(SCHEDULE.window)
    given = condition(transformer, inputs)
    expected = plain_velocity(transformer, noise, jnp.float32(0.7), given)
    found, residual = known_velocity(transformer, noise, jnp.float32(0.7), given)
    np.testing.assert_array_equal(found, expected)
    again, nothing = known_velocity(transformer, noise, jnp.float32(0.7), given, residual)
    assert nothing is None
    assert relative(again, expected) < 1e-6
    # Without the blocks, conditions make no difference, and the noise level does.
    dropped = condition(transformer, inputs, keep={"text": False, "audio": False})
    assert relative(known_velocity(transformer, noise, jnp.float32(0.7), dropped, residual)[0], again) == 0
    assert relative(known_velocity(transformer, noise, jnp.float32(0.2), given, residual)[0], again) > 1e-4


HELD = HeldLatents(draw(1, FRAMES, 4, 6, 16, seed=9), jnp.ones((1, FRAMES, 1, 1, 1)).at[:, :2].set(0))


@pytest.mark.parametrize(
    ("settings", "windows", "held", "programs"),
    [
        ({"gating": GATES}, replace(SCHEDULE, moving=True), None, [3, 2, 1]),
        ({"magcache": MAGCACHE, "batch_branches": False, "windows_per_device": 2}, SCHEDULE, HELD, [3, 3]),
        ({"gating": GATES, "magcache": MAGCACHE}, SCHEDULE, None, [3, 2, 1, 1]),
    ],
    ids=["gating, moving windows", "MagCache, one after another, held", "both"],
)
def test_sampling_equals_the_steps_by_hand(transformer, settings, windows, held, programs):
    noise, inputs = clip()
    needed = NEEDED if "gating" in settings else EXACT[0]
    skipped = SKIPPED if "magcache" in settings else EXACT[1]
    compiled = sampler.guided_step._cache_size()
    result = run(transformer, noise, inputs, windows=windows, held=held, **settings)
    assert sampler.guided_step._cache_size() == compiled + len(programs)
    plan = SamplerConfig(num_inference_steps=STEPS, **settings).evaluation_plan(GUIDANCE)
    assert [count for count, _ in plan.kinds] == programs
    expected = by_hand(transformer, noise, inputs, windows, needed, skipped, held)
    assert relative(result, expected) < 1e-6


def test_nothing_changes_where_nothing_is_gated_or_skipped(transformer):
    noise, inputs = clip()
    exact = run(transformer, noise, inputs)
    compiled = sampler.guided_step._cache_size()
    open_gates, no_error = GatingConfig(True, 1.0, 1.0), replace(MAGCACHE, error_bound=0.0)
    result = run(transformer, noise, inputs, gating=open_gates, magcache=no_error)
    np.testing.assert_array_equal(result, exact)
    assert sampler.guided_step._cache_size() == compiled
    assert relative(run(transformer, noise, inputs, gating=GATES, magcache=MAGCACHE), exact) > 1e-4


def test_a_batch_of_clips_is_its_clips(transformer):
    (noise, inputs), settings = (
        clip(SCHEDULE.window),
        {"gating": GATES, "magcache": MAGCACHE, "windows": None},
    )
    both = jnp.concatenate([noise, noise + 1])
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), inputs)
    result = run(transformer, both, twice, **settings)
    for i in range(2):
        single = run(transformer, both[i : i + 1], inputs, **settings)
        assert relative(result[i : i + 1], single) < 1e-5


def test_wrappers_do_not_go_with_residuals(transformer):
    noise, inputs = clip(SCHEDULE.window)
    config = SamplerConfig(num_inference_steps=STEPS, magcache=MAGCACHE)
    with pytest.raises(ValueError, match="wrappers"):
        sample(transformer, noise, inputs, config, guidance=GUIDANCE, wrappers=[lambda velocity: velocity])
    for settings in ({"gating": GATES}, {"magcache": MAGCACHE}):
        with pytest.raises(ValueError, match="residual_callback"):
            run(transformer, noise, inputs, windows=None, callback=print, **settings)


def test_a_calibration_measures_the_residuals(transformer):
    noise, inputs = clip()
    calibration, seen = Calibration(), []

    def callback(step, residuals):
        seen.append([np.asarray(x, np.float64) for x in residuals])
        calibration(step, residuals)

    result = run(transformer, noise, inputs, callback=callback)
    np.testing.assert_allclose(result, run(transformer, noise, inputs), rtol=1e-5, atol=1e-5)
    measured = calibration.curve(5.0, GUIDANCE)
    for branch, ratios in enumerate(measured.ratios):
        norms = [np.linalg.norm(x[branch], axis=-1) for x in seen]
        expected = [1.0, *((after / before).mean() for before, after in pairwise(norms))]
        np.testing.assert_allclose(ratios, expected, atol=2e-5)
    # Twice the same clip has the same mean, and what was measured fits the settings.
    run(transformer, noise, inputs, callback=calibration)
    assert calibration.curve(5.0, GUIDANCE) == measured
    SamplerConfig(num_inference_steps=STEPS, magcache=MagCacheConfig(measured)).evaluation_plan(GUIDANCE)
    with pytest.raises(ConfigError, match="sampled"):
        Calibration().curve(5.0, GUIDANCE)


def test_programs_of_the_approximations():
    config = load_config(str(ROOT / "configs/fantasy_talking_14b.py:debug"))
    model, video = build(ModelConfig, config.model, "model"), build(VideoConfig, config.video, "video")
    given = {"gating": GATES, "magcache": MAGCACHE}
    settings = SampleConfig(num_inference_steps=STEPS, audio_guidance_scale=4.5, **given)
    mesh = make_mesh(fsdp=1)
    with jax.set_mesh(mesh):
        networks = abstract_networks(model, mesh, MeshConfig(fsdp=1))
        programs = list(guided_step_programs(networks, settings, video, mesh))
        assert programs[-1].lower().as_text()
    assert [program.name.removeprefix("guided step, ") for program in programs] == [
        "3 branches",
        "2 branches, blocks skipped",
        "1 branch",
        "1 branch, blocks skipped",
    ]
    three, _, one, skipped = (program.flops for program in programs)
    assert one == pytest.approx(three / 3, rel=0.01)
    assert skipped < 0.1 * one


@pytest.mark.slow
def test_methods_are_compared_with_exact_sampling(tmp_path, capsys):
    names = ["gated 0.25, 0.25", "4 steps", "int8 weights and products", "decoder in bfloat16"]
    options = [f"--config={ROOT / 'configs/tiny.py'}", "--clips=2", f"--json={tmp_path / 'figures.json'}"]
    options += ["--config.sample.gating.enabled=True"]  # which the exact steps leave out
    approximate.main([*options, *(f"--only={name}" for name in names)])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [(name, row["evaluations"]) for name, row in figures.items()] == [
        ("exact", 24),
        ("gated 0.25, 0.25", 15),
        ("4 steps", 8),
        ("int8 weights and products", 24),
        ("decoder in bfloat16", 24),
    ]
    assert figures["exact"]["latents"]["mean"] > 99
    gated, fewer, eight_bit, decoder = (figures[name]["latents"]["mean"] for name in names)
    assert 20 < fewer < gated < eight_bit < 70
    assert decoder > 99
    assert 30 < figures[names[-1]]["frames"]["mean"] < 70
    assert len(capsys.readouterr().out.splitlines()) == 7


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 4}, {"context": 4, "tensor": 2}], ids=str)
def test_caches_are_sharded(transformer, sizes, monkeypatch):
    noise, inputs = clip()
    settings = {"gating": GATES, "magcache": MAGCACHE}
    expected = run(transformer, noise, inputs, **settings)
    mesh, residuals, sampler_step = make_mesh(**sizes), [], sampler.guided_step

    def step(*arguments):
        latents, cache = sampler_step(*arguments)
        residuals.extend(cache.residuals)
        return latents, cache

    monkeypatch.setattr(sampler, "guided_step", step)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(transformer)
        state = jax.device_put(state, parameter_shardings(state, mesh))
        on_mesh = nnx.merge(graphdef, state), *replicate((noise, inputs))
        result = run(*on_mesh, **settings)
    assert relative(result, expected) < 1e-5
    assert residuals
    assert all(x.addressable_shards[0].data.size == x.size // 4 for x in residuals)
