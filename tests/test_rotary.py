"""The miniature's expression adapter with rotary time."""

import jax
import numpy as np
import pytest
from helpers import TINY_EXPRESSION, abstract, layer, normal, randomise, relative

from fantasy_jax.miniature.rotary import RotaryExpressionAdapter, RotaryExpressionAdapterConfig
from fantasy_jax.models.adapters.expression import ExpressionAdapter
from fantasy_jax.models.layers import run

FRAMES = 9
FEATURES = normal(1, 2, FRAMES, TINY_EXPRESSION.feature_width, seed=0)
ADAPTERS = {
    ExpressionAdapter: TINY_EXPRESSION,
    RotaryExpressionAdapter: RotaryExpressionAdapterConfig(**vars(TINY_EXPRESSION)),
}


def condition_of(network, features):
    adapter = randomise(abstract(network, ADAPTERS[network]))
    return adapter, jax.jit(network.condition, static_argnums=2)(adapter, features, FRAMES)


def test_tokens_have_the_time_of_their_frame():
    _, condition = condition_of(RotaryExpressionAdapter, FEATURES)
    # Two units a frame, in their middles; the window begins with the last token of the frame before.
    assert condition.frame_times[0].tolist() == [1, 6, 14]
    per_frame = TINY_EXPRESSION.tokens_per_frame
    assert condition.token_times.shape == condition.tokens.shape[:-1]
    assert condition.token_times[0, 1, 1].tolist() == [1, *np.repeat([3, 5, 7, 9], per_frame)]


@pytest.mark.usefixtures("highest_precision")
@pytest.mark.parametrize("network", ADAPTERS)
def test_only_time_tells_the_frames_of_a_latent_frame_apart(network):
    reversed_frames = FEATURES.at[:, :, 1:5].set(FEATURES[:, :, 4:0:-1])
    queries = normal(1, 4, 3, 2, 24, seed=1)
    attended = []
    for features in (FEATURES, reversed_frames):
        adapter, condition = condition_of(network, features)
        attended.append(run(layer(adapter.layers, 0), queries, condition)[:, :, 1])
    difference = relative(*attended)
    if network is RotaryExpressionAdapter:
        assert difference > 0.01
    else:
        assert difference < 1e-6
