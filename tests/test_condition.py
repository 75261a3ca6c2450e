"""Conditions of cross-attention: masks, lengths and scales."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY_AUDIO, TINY_WAN, abstract, layer, randomise, relative, tiny_inputs, tiny_transformer
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.condition import Condition
from fantasy_jax.sharding import make_mesh

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

BATCH, SPACE, FRAMES, TOKENS = 2, 6, 3, 7
HEAD_WIDTH = TINY_AUDIO.width // TINY_AUDIO.num_heads


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def attend():
    """Attention of one block to a condition."""
    return layer(randomise(abstract(AudioAdapter, TINY_AUDIO)).layers, 0)


@pytest.fixture(scope="module")
def queries():
    return normal(0, BATCH, SPACE, FRAMES, TINY_AUDIO.num_heads, HEAD_WIDTH)


@pytest.fixture(scope="module", params=["clip", "frame"])
def tokens(request):
    """Tokens that every video token attends to, or tokens of each latent frame."""
    frames = (FRAMES,) if request.param == "frame" else ()
    return normal(1, BATCH, *frames, TOKENS, TINY_AUDIO.token_width)


@pytest.fixture(scope="module")
def mask():
    """Random; one video token attends to one token, and another to none."""
    mask = np.random.default_rng(0).random((BATCH, SPACE, FRAMES, TOKENS)) < 0.5
    mask[..., 0] = True
    mask[0, 1, 2, 1:] = False
    mask[1, 4, 0] = False
    return jnp.asarray(mask)


def selected(tokens, mask, at):
    """The tokens that one video token attends to, `[1, L, D]`."""
    sample, _, frame = at
    own = tokens[sample] if tokens.ndim == 3 else tokens[sample, frame]
    return own[np.asarray(mask[at])][None]


def test_each_video_token_attends_to_its_own_tokens_only(attend, queries, tokens, mask):
    result = attend(queries, Condition(tokens, mask=mask))
    for at in np.ndindex(BATCH, SPACE, FRAMES):
        sample, space, frame = at
        if not mask[at].any():
            continue
        q = queries[sample, space, frame][None, None, None]
        expected = attend(q, Condition(selected(tokens, mask, at)))
        assert relative(result[at], expected[0, 0, 0]) < 1e-6, at


def test_a_video_token_without_tokens_gets_zero(attend, queries, tokens, mask):
    result = np.asarray(attend(queries, Condition(tokens, mask=mask)))
    empty = ~np.asarray(mask).any(axis=-1)
    assert empty.sum() == 1
    assert np.array_equal(np.any(result != 0, axis=(-1, -2)), ~empty)


def test_the_values_of_masked_tokens_do_not_matter(attend, queries, tokens, mask):
    for token in range(TOKENS):
        changed = tokens.at[..., token, :].add(1e3)
        before, after = (attend(queries, Condition(x, mask=mask)) for x in (tokens, changed))
        assert np.array_equal(np.any(before != after, axis=(-1, -2)), mask[..., token])


def test_a_mask_of_all_tokens_is_no_mask(attend, queries, tokens, mask):
    everything = attend(queries, Condition(tokens, mask=jnp.ones_like(mask)))
    assert relative(everything, attend(queries, Condition(tokens))) < 1e-6


def test_padding_is_masked_together_with_the_mask(attend, queries, tokens, mask):
    lengths = jnp.full(tokens.shape[:-2], 4)
    result = attend(queries, Condition(tokens, lengths, mask=mask))
    both = mask & (jnp.arange(TOKENS) < 4)
    assert relative(result, attend(queries, Condition(tokens, mask=both))) < 1e-6
    padding = jnp.zeros_like(mask).at[..., 5].set(True)
    assert not attend(queries, Condition(tokens, lengths, mask=padding)).any()


def test_masked_values_are_scaled(attend, queries, tokens, mask):
    plain = attend(queries, Condition(tokens, mask=mask))
    scaled = attend(queries, Condition(tokens, scale=jnp.array([0.0, 0.5]), mask=mask))
    assert not scaled[0].any()
    assert relative(scaled[1], 0.5 * plain[1]) < 1e-7


@pytest.fixture(scope="module")
def masked_model():
    """A transformer and its arguments; the audio has a mask over 15 space tokens."""
    wan, audio = (replace(config, num_heads=4, num_layers=2) for config in (TINY_WAN, TINY_AUDIO))
    model = tiny_transformer(wan, audio=abstract(AudioAdapter, audio))
    latents, inputs = tiny_inputs(wan, size=(FRAMES, 10, 6), audio=(19, audio.feature_width))
    return model, (latents, inputs.first_frame, jnp.array([100.5, 900.25])), inputs


@pytest.mark.parametrize("attention", ["clip", "frame"])
@pytest.mark.parametrize("sizes", [{"context": 4}, {"context": 4, "data": 2}], ids=str)
def test_a_mask_on_a_mesh_with_padded_space(masked_model, attention, sizes):
    model, arguments, inputs = masked_model
    audio = model.adapters["audio"].condition(inputs.adapters["audio"], 9, attention=attention)
    shape = (BATCH, 15, FRAMES, audio.tokens.shape[-2])
    mask = jnp.asarray(np.random.default_rng(1).random(shape) < 0.3).at[:, 7].set(False)
    conditions = model.conditions(inputs.text, inputs.image) | {"audio": replace(audio, mask=mask)}
    graphdef, state = nnx.split(model)

    def run(state, arguments, conditions):
        return nnx.merge(graphdef, state)(*arguments, conditions)

    expected = np.asarray(jax.jit(run)(state, arguments, conditions))
    without = conditions | {"audio": audio}
    assert relative(jax.jit(run)(state, arguments, without), expected) > 1e-3
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put((state, arguments, conditions), NamedSharding(mesh, PartitionSpec()))
        assert relative(jax.jit(run)(*placed), expected) < 2e-6


def test_a_mask_that_excludes_everything_removes_the_condition(masked_model):
    model, arguments, inputs = masked_model
    audio = model.adapters["audio"].condition(inputs.adapters["audio"], 9)
    mask = jnp.zeros((BATCH, 15, FRAMES, audio.tokens.shape[-2]), bool)
    base = model.conditions(inputs.text, inputs.image)
    forward = nnx.jit(lambda model, conditions: model(*arguments, conditions))
    masked = forward(model, base | {"audio": replace(audio, mask=mask)})
    np.testing.assert_array_equal(masked, forward(model, base))
