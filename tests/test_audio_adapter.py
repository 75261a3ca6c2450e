"""The audio window of each latent frame, and that a frame attends to its own window only."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    TINY_AUDIO,
    abstract,
    layer,
    normal,
    randomise,
    reference_inputs,
    reference_outputs,
    reference_transformer,
    relative,
)

from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.condition import Condition
from fantasy_jax.models.windows import split_windows, window_ranges

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

CONFIG = replace(TINY_AUDIO, num_layers=1)
NUM_FRAMES, NUM_TOKENS = 17, 35

# Tokens per video frame at 23, 24, 25 and 30 frames per second, and where rounding and truncation differ.
RATES = (50 / 23, 50 / 24, 2, 5 / 3, 1.4, 2.8)
CLIPS = [(int(num_frames * rate), num_frames) for num_frames in (5, 9, 17, 49, 81, 201) for rate in RATES]


@pytest.fixture(scope="module")
def adapter():
    return randomise(abstract(AudioAdapter, CONFIG))


@pytest.fixture(scope="module")
def features():
    return normal(2, NUM_TOKENS, CONFIG.feature_width, seed=0)


@pytest.fixture(scope="module")
def queries():
    """`[B, S, F, N, K]`."""
    return normal(2, 6, 5, CONFIG.num_heads, CONFIG.width // CONFIG.num_heads, seed=1)


def test_windows_are_the_official_ones():
    inputs, outputs = reference_inputs(), reference_outputs()
    tokens = jnp.asarray(outputs["audio_tokens"])
    assert np.array_equal(window_ranges(tokens.shape[1], NUM_FRAMES), outputs["audio_window_ranges"])
    windows, lengths = split_windows(tokens, window_ranges(tokens.shape[1], NUM_FRAMES, expand=4))
    assert np.array_equal(windows, outputs["audio_windows"])
    assert np.array_equal(lengths, outputs["audio_window_lengths"])
    # From the features, through projection and norm.
    condition = reference_transformer().adapters["audio"].condition(inputs["audio_features"], NUM_FRAMES)
    assert relative(condition.tokens, outputs["audio_windows"]) < 2e-6
    assert np.array_equal(condition.lengths[0], outputs["audio_window_lengths"])


@pytest.mark.parametrize("name", ["fantasytalking_dit", "fantasytalking_dit_small_activations"])
def test_tokens_are_the_official_ones(name):
    tokens = reference_transformer(name).adapters["audio"].tokens(reference_inputs(name)["audio_features"])
    assert relative(tokens, reference_outputs(name)["audio_tokens"]) < 2e-6


def test_a_clip_of_81_frames_has_the_published_windows():
    ranges = window_ranges(175, 81, expand=4)
    assert ranges.shape == (21, 2)
    assert ranges[0].tolist() == [-11, 5]
    _, lengths = split_windows(jnp.zeros((1, 175, 1)), ranges)
    assert lengths.tolist() == [6, 14, *[17] * 18, 14]


@pytest.mark.parametrize(("num_tokens", "num_frames"), CLIPS)
def test_windows_follow_the_frames_and_cover_every_token(num_tokens, num_frames):
    rate = num_tokens / num_frames
    ranges = window_ranges(num_tokens, num_frames, expand=4)
    assert len(ranges) == (num_frames - 1) // 4 + 1
    assert np.unique(ranges[:, 1] - ranges[:, 0]).tolist() == [2 * int(2 * rate) + 8]
    steps = np.diff(ranges[1:, 0])
    assert np.all(np.abs(steps - 4 * rate) < 1)
    covered = np.unique(np.concatenate([np.arange(first, last + 1) for first, last in ranges]))
    assert set(range(num_tokens)) <= set(covered.tolist())
    # Every window contains the audio of the frame's own four video frames; the first is one video frame.
    for i, (first, last) in enumerate(ranges):
        begin, end = (0, rate) if i == 0 else (rate * (4 * i - 3), rate * (4 * i + 1))
        assert first <= begin
        assert end - 1 <= last
    unexpanded = window_ranges(num_tokens, num_frames)
    assert np.array_equal(ranges - unexpanded, np.broadcast_to([-4, 4], ranges.shape))


@pytest.mark.parametrize(("num_tokens", "num_frames"), [*CLIPS[::7], (2, 1), (1, 9), (40, 1)])
def test_padding_is_zeros_on_the_right(num_tokens, num_frames):
    tokens = np.random.default_rng(0).normal(size=(2, num_tokens, 3)).astype(np.float32)
    ranges = window_ranges(num_tokens, num_frames, expand=4)
    windows, lengths = split_windows(jnp.asarray(tokens), ranges)
    for i, (first, last) in enumerate(ranges):
        real = [tokens[:, j] for j in range(first, last + 1) if 0 <= j < num_tokens]
        assert lengths[i] == len(real)
        expected = np.zeros((2, last - first + 1, 3), np.float32)
        if real:
            expected[:, : len(real)] = np.stack(real, axis=1)
        assert np.array_equal(windows[:, i], expected)


@pytest.fixture
def attend(adapter):
    """Attention of the first block to a condition."""
    return layer(adapter.layers, 0)


def test_padding_is_masked(adapter, features, queries, attend):
    condition = adapter.condition(features, NUM_FRAMES)
    padding = jnp.arange(condition.tokens.shape[2]) >= condition.lengths[..., None]
    assert 0 < padding.sum() < padding.size
    garbage = Condition(jnp.where(padding[..., None], 1e4, condition.tokens), condition.lengths)
    expected = attend(queries, condition)
    np.testing.assert_array_equal(attend(queries, garbage), expected)
    assert relative(attend(queries, Condition(condition.tokens)), expected) > 1e-2  # lengths matter


def test_each_frame_attends_to_its_own_window_only(adapter, features, queries, attend):
    ranges = window_ranges(NUM_TOKENS, NUM_FRAMES, expand=4)
    expected = attend(queries, adapter.condition(features, NUM_FRAMES))
    for token in (0, 6, 17, NUM_TOKENS - 1):
        changed = features.at[:, token].add(1.0)
        result = attend(queries, adapter.condition(changed, NUM_FRAMES))
        differs = np.any(result != expected, axis=(0, 1, 3, 4))
        assert differs.tolist() == [first <= token <= last for first, last in ranges]


def test_a_window_is_widened_on_both_sides(adapter, features, queries, attend):
    for expand in (0, 2):
        ranges = window_ranges(NUM_TOKENS, NUM_FRAMES, expand=expand)
        expected = attend(queries, adapter.condition(features, NUM_FRAMES, expand=expand))
        result = attend(queries, adapter.condition(features.at[:, 17].add(1.0), NUM_FRAMES, expand=expand))
        differs = np.any(result != expected, axis=(0, 1, 3, 4))
        assert differs.tolist() == [first <= 17 <= last for first, last in ranges]


def test_at_clip_level_every_token_attends_to_the_whole_clip(adapter, features, queries, attend):
    condition = adapter.condition(features, NUM_FRAMES, attention="clip")
    assert condition.tokens.shape == (2, NUM_TOKENS, CONFIG.token_width)
    expected = attend(queries, condition)
    for token in (0, NUM_TOKENS // 2, NUM_TOKENS - 1):
        changed = features.at[:, token].add(1.0)
        result = attend(queries, adapter.condition(changed, NUM_FRAMES, attention="clip"))
        assert np.all(np.any(result != expected, axis=(3, 4)))


def test_scales_may_differ_in_a_batch(adapter, features, queries, attend):
    expected = attend(queries, adapter.condition(features, NUM_FRAMES))
    scales = jnp.array([0.0, 2.5])
    result = attend(queries, adapter.condition(features, NUM_FRAMES, scale=scales))
    assert not result[0].any()
    assert relative(result[1], 2.5 * expected[1]) < 1e-7


def test_a_frame_without_audio_is_finite(adapter, features, queries, attend):
    condition = adapter.condition(features[:, :3], NUM_FRAMES)
    late = Condition(condition.tokens, condition.lengths.at[:, -1].set(0))
    assert np.isfinite(attend(queries, late)).all()


def test_values_are_zero_initialised_and_keys_are_not():
    layers = AudioAdapter(CONFIG, rngs=nnx.Rngs(0)).layers
    assert layers.key.kernel[...].any(axis=(1, 2)).all()
    assert not layers.value.kernel[...].any()
    assert layers.key.bias is None
    assert layers.key_norm is None
