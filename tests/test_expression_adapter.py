"""The expression adapter: tokens of each person, padding of the first window, and a no-op at the start."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY_EXPRESSION, abstract, layer, normal, randomise, relative

from fantasy_jax.models.adapters.expression import ExpressionAdapter
from fantasy_jax.models.layers import run
from fantasy_jax.system.registry import component_of
from fantasy_jax.video import VideoConfig

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

FRAMES, PEOPLE = 9, 2
condition = jax.jit(ExpressionAdapter.condition, static_argnums=2)
FEATURES = normal(1, PEOPLE, FRAMES, TINY_EXPRESSION.feature_width, seed=0)


@pytest.fixture(scope="module")
def adapter():
    return randomise(abstract(ExpressionAdapter, TINY_EXPRESSION))


def test_a_frame_has_a_token_for_each_part_and_query():
    assert ExpressionAdapter.input_shape(TINY_EXPRESSION, VideoConfig(num_frames=FRAMES)) == (9, 23)
    assert TINY_EXPRESSION.tokens_per_frame == 4 + 3 + 2


def test_the_tokens_of_a_frame_depend_on_that_frame_and_person_only(adapter):
    make = jax.jit(ExpressionAdapter.tokens)
    tokens = make(adapter, FEATURES).reshape(1, PEOPLE, FRAMES, -1, TINY_EXPRESSION.token_width)
    changed = make(adapter, FEATURES.at[0, 1, 3].add(1.0)).reshape(tokens.shape)
    differs = np.any(np.asarray(tokens != changed), axis=(-1, -2))[0]
    expected = np.zeros((PEOPLE, FRAMES), bool)
    expected[1, 3] = True
    np.testing.assert_array_equal(differs, expected)


def test_each_part_changes_its_own_tokens(adapter):
    frame = FEATURES[0, 0, 0]
    starts = np.cumsum([0, *TINY_EXPRESSION.part_widths[:-1]])
    makers = (ExpressionAdapter.raw_tokens, ExpressionAdapter.mouth_tokens, ExpressionAdapter.emotion_tokens)
    raw, mouth, emotion = (changes(jax.jit(make), adapter, frame, starts) for make in makers)
    assert [list(np.any(x, axis=-1)) for x in raw] == np.eye(4, dtype=bool).tolist()
    assert [np.any(x) for x in mouth] == [i == 3 for i in range(4)]
    assert [np.any(x) for x in emotion] == [i == 2 for i in range(4)]


def changes(make, adapter, frame, starts):
    """Where the tokens differ when a part that starts here does."""
    tokens = np.asarray(make(adapter, frame))
    return [tokens != np.asarray(make(adapter, frame.at[i].add(1.0))) for i in starts]


def test_padding_of_the_first_window_is_attended_to_unless_it_is_masked(adapter):
    masked = abstract(ExpressionAdapter, replace(TINY_EXPRESSION, mask_padding=True))
    nnx.update(masked, nnx.state(adapter))
    with_padding, without = (condition(x, FEATURES, FRAMES) for x in (adapter, masked))
    per_frame = TINY_EXPRESSION.tokens_per_frame
    assert with_padding.lengths is None
    assert not with_padding.tokens[:, :, 0, per_frame:].any()
    assert without.lengths[0, 0] == per_frame
    assert (without.lengths[0, 1:] == without.tokens.shape[3]).all()

    queries = normal(1, 4, 3, 2, 24, seed=1)
    attend = layer(adapter.layers, 0)
    real = replace(without, tokens=without.tokens[:, :, :1, :per_frame], lengths=None)
    expected = run(attend, queries[:, :, :1], real)
    assert relative(run(attend, queries, without)[:, :, :1], expected) < 1e-6
    assert relative(run(attend, queries, with_padding)[:, :, :1], expected) > 1e-2


def test_a_new_adapter_is_a_no_op():
    adapter = component_of(TINY_EXPRESSION).init(TINY_EXPRESSION, jnp.float32)
    queries = jnp.ones((1, 4, 3, 2, 24))
    attended = condition(adapter, FEATURES, FRAMES)
    for index in range(TINY_EXPRESSION.num_layers):
        assert not run(layer(adapter.layers, index), queries, attended).any()
    assert all(np.any(x) for x in jax.tree.leaves(nnx.state(adapter.layers.key)))
