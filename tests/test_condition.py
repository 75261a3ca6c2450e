"""Conditions of cross-attention: people, lengths and scales."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    TINY_AUDIO,
    TINY_EXPRESSION,
    TINY_WAN,
    abstract,
    layer,
    normal,
    randomise,
    relative,
    tiny_inputs,
    tiny_transformer,
)
from jax.sharding import NamedSharding, PartitionSpec

from fantasy_jax.diffusion.sampler import StepData, StepProgram, branch_conditions, guided_step
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.adapters.expression import ExpressionAdapter
from fantasy_jax.models.condition import Condition
from fantasy_jax.performance.flops import inner_jaxprs
from fantasy_jax.sharding import make_mesh
from fantasy_jax.system.conditioning import condition, velocity
from fantasy_jax.system.inputs import ClipInputs

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

BATCH, SPACE, FRAMES, PEOPLE, TOKENS = 2, 6, 3, 3, 7
HEAD_WIDTH = TINY_AUDIO.width // TINY_AUDIO.num_heads


@pytest.fixture(scope="module")
def attend():
    """Attention of one block to a condition."""
    return layer(randomise(abstract(AudioAdapter, TINY_AUDIO)).layers, 0)


@pytest.fixture(scope="module")
def queries():
    return normal(BATCH, SPACE, FRAMES, TINY_AUDIO.num_heads, HEAD_WIDTH, seed=0)


@pytest.fixture(scope="module")
def tokens():
    """Tokens of each person and latent frame."""
    return normal(BATCH, PEOPLE, FRAMES, TOKENS, TINY_AUDIO.token_width, seed=1)


@pytest.fixture(scope="module")
def mask():
    """Random; one video token attends to one person's tokens, and another to nobody's."""
    mask = np.random.default_rng(0).random((BATCH, SPACE, FRAMES, PEOPLE)) < 0.5
    mask[..., 0] = True
    mask[0, 1, 2, 1:] = False
    mask[1, 4, 0] = False
    return jnp.asarray(mask)


def test_each_video_token_attends_to_the_tokens_of_its_people_only(attend, queries, tokens, mask):
    result = attend(queries, Condition(tokens, mask=mask))
    for sample, space, frame in np.ndindex(BATCH, SPACE, FRAMES):
        people = np.asarray(mask[sample, space, frame])
        if not people.any():
            continue
        own = tokens[sample, people, frame].reshape(1, -1, tokens.shape[-1])
        expected = attend(queries[sample, space, frame][None, None, None], Condition(own))
        assert relative(result[sample, space, frame], expected[0, 0, 0]) < 1e-6, (sample, space, frame)


def test_a_video_token_without_people_gets_zero(attend, queries, tokens, mask):
    result = np.asarray(attend(queries, Condition(tokens, mask=mask)))
    empty = ~np.asarray(mask).any(axis=-1)
    assert empty.sum() == 1
    assert np.array_equal(np.any(result != 0, axis=(-1, -2)), ~empty)


def test_the_values_of_masked_people_do_not_matter(attend, queries, tokens, mask):
    for person in range(PEOPLE):
        changed = tokens.at[:, person].add(1e3)
        before, after = (attend(queries, Condition(x, mask=mask)) for x in (tokens, changed))
        assert np.array_equal(np.any(before != after, axis=(-1, -2)), mask[..., person])


def test_a_mask_of_everybody_is_no_mask(attend, queries, tokens, mask):
    everybody = attend(queries, Condition(tokens, mask=jnp.ones_like(mask)))
    assert relative(everybody, attend(queries, Condition(tokens))) < 1e-6


def test_one_person_is_attended_to_as_tokens_per_frame_are(attend, queries, tokens):
    lengths = jnp.full((BATCH, FRAMES), 4)
    one = attend(queries, Condition(tokens[:, :1], lengths))
    assert relative(one, attend(queries, Condition(tokens[:, 0], lengths))) < 1e-6


def test_padding_is_masked_together_with_the_mask(attend, queries, tokens, mask):
    lengths = jnp.full((BATCH, FRAMES), 4)
    result = attend(queries, Condition(tokens, lengths, mask=mask))
    assert relative(result, attend(queries, Condition(tokens[..., :4, :], mask=mask))) < 1e-6


def test_masked_values_are_scaled(attend, queries, tokens, mask):
    plain = attend(queries, Condition(tokens, mask=mask))
    scaled = attend(queries, Condition(tokens, scale=jnp.array([0.0, 0.5]), mask=mask))
    assert not scaled[0].any()
    assert relative(scaled[1], 0.5 * plain[1]) < 1e-7


@pytest.fixture(scope="module")
def portrait():
    """A transformer and its arguments, and conditions of three people over 15 space tokens."""
    wan = replace(TINY_WAN, num_heads=4, num_layers=2)
    config = replace(TINY_EXPRESSION, num_heads=4, num_layers=2)
    model = tiny_transformer(wan, expression=abstract(ExpressionAdapter, config))
    features = (PEOPLE, 9, config.feature_width)
    latents, inputs = tiny_inputs(wan, size=(FRAMES, 10, 6), expression=features)
    labels = np.random.default_rng(1).integers(0, 5, (BATCH, FRAMES, 15))  # person 4 has no driver
    return model, latents, replace(inputs, labels=jnp.asarray(labels, jnp.int32))


def products(jaxpr):
    """Shapes of the kernels, the matrices that all samples are multiplied by."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.ndim == 2:
            found.append(equation.invars[1].aval.shape)
        for inner in inner_jaxprs(equation):
            found += products(inner)
    return found


@pytest.mark.parametrize("single", [True, False])
def test_a_step_projects_only_what_a_long_clip_cannot_keep(single):
    wan, audio = replace(TINY_WAN, num_layers=2), replace(TINY_AUDIO, num_layers=2)
    graphdef, state = nnx.split(tiny_transformer(wan, audio=abstract(AudioAdapter, audio)))
    latents, inputs = tiny_inputs(wan, batch=1, audio=(19, audio.feature_width))
    dropped = (("text", "audio"), ("audio",), ())
    conditions = branch_conditions(graphdef, dropped, (), 9, single, state, inputs)
    step = partial(guided_step.__wrapped__, graphdef, StepProgram())
    data = StepData(np.zeros(2, np.float32), np.zeros(2, np.float32))
    kernels = products(jax.make_jaxpr(step)(state, latents, conditions, data).jaxpr)
    # Five around the blocks, and eight in a block: attention has four and two, the MLP two.
    projections = [(audio.token_width, wan.dim)] * 2
    assert len(kernels) == (13 if single else 13 + len(projections))
    assert all(kernels.count(shape) == (0 if single else 2) for shape in projections)
    # Branches differ in the text only.
    rows = {"text": 2, "image": 1, "audio": 1} if single else {"text": 2, "image": 1}
    assert {name: k.shape[:2] for name, (k, _) in conditions.kept.items()} == {
        name: (wan.num_layers, count) for name, count in rows.items()
    }


def test_kept_keys_and_values_are_shared_by_the_devices_of_a_clip():
    graphdef, state = nnx.split(tiny_transformer(replace(TINY_WAN, num_layers=2)))
    _, inputs = tiny_inputs(batch=1)
    with jax.set_mesh(make_mesh(fsdp=2, context=2, tensor=2)):
        placed = jax.device_put((state, inputs), PartitionSpec())
        kept = branch_conditions(graphdef, ((),), (), 9, True, *placed).kept
    for x in jax.tree.leaves(kept):
        assert {shard.data.nbytes for shard in x.addressable_shards} == {x.nbytes // 8}


def predict(model, latents, inputs):
    """The velocity, by one program."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, latents, inputs):
        model = nnx.merge(graphdef, state)
        return velocity(model, latents, jnp.array([0.1, 0.9]), condition(model, inputs))

    return np.asarray(run(state, latents, inputs))


@pytest.mark.parametrize("sizes", [{"context": 4}, {"context": 4, "data": 2}], ids=str)
def test_labels_on_a_mesh_with_padded_space(portrait, sizes):
    model, latents, inputs = portrait
    expected = predict(*portrait)
    assert relative(predict(model, latents, replace(inputs, labels=None)), expected) > 1e-3
    mesh = make_mesh(**sizes)
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(model)
        placed = jax.device_put((state, latents, inputs), NamedSharding(mesh, PartitionSpec()))
        assert relative(predict(nnx.merge(graphdef, placed[0]), *placed[1:]), expected) < 2e-6


def test_people_without_a_driver_remove_the_condition(portrait):
    model, latents, inputs = portrait
    undriven = replace(inputs, labels=jnp.full_like(inputs.labels, PEOPLE + 1))
    without = replace(inputs, adapters={}, labels=None)
    np.testing.assert_array_equal(predict(model, latents, undriven), predict(model, latents, without))


def test_a_person_attends_to_their_own_input_only_and_the_background_to_all():
    labels = jnp.asarray([[[0, 1, 2, 3, 4]]])
    inputs = ClipInputs(None, None, None, None, {"expression": jnp.zeros((1, 3, 9, 2))}, labels)
    allowed = inputs.attended_people("expression")[0, :, 0]
    expected = [[True, True, True], *np.eye(3, dtype=bool), [False, False, False]]
    np.testing.assert_array_equal(allowed, expected)


def test_owners_say_whose_input_it_is():
    labels = jnp.asarray([[[0, 1, 2, 3]]])
    owners = {"expression": jnp.asarray([[3, -1, 1]])}
    inputs = ClipInputs(None, None, None, None, {"expression": jnp.zeros((1, 3, 9, 2))}, labels, owners)
    allowed = inputs.attended_people("expression")[0, :, 0]
    expected = [[True, False, True], [False, False, True], [False] * 3, [True, False, False]]
    np.testing.assert_array_equal(allowed, expected)
