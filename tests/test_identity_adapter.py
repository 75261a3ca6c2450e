"""The identity adapter: a face becomes tokens that every block attends to; a new adapter is a no-op."""

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
    layer,
    normal,
    only_branch,
    randomise,
    relative,
    tiny_inputs,
    tiny_transformer,
)

from fantasy_jax.convert.rules import TensorSpec, export, flat_parameters, load, make_plan
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.errors import ConfigError
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.adapters.identity import IDENTITY_SCALE, IdentityAdapter, IdentityAdapterConfig
from fantasy_jax.system.inputs import ClipInputs
from fantasy_jax.system.registry import find_component
from fantasy_jax.training.objective import StageConfig, velocity_objective

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

IDENTITY = IdentityAdapterConfig(
    feature_width=10,
    feature_size=2,
    num_queries=5,
    depth=2,
    token_width=16,
    token_heads=2,
    width=TINY_WAN.dim,
    num_heads=TINY_WAN.num_heads,
    num_layers=TINY_WAN.num_layers,
)
NUM_FRAMES = 9

forward = nnx.jit(lambda model, *inputs: model(*inputs))


FACES = normal(2, 4, IDENTITY.feature_width, seed=6)
NOISE, INPUTS = tiny_inputs(audio=(20, TINY_AUDIO.feature_width))
LATENTS = (NOISE, INPUTS.first_frame, jnp.array([3.5, 876.25]))


@pytest.fixture(scope="module")
def model():
    """All parameters are random, except those of the identity adapter, which is new."""
    model = tiny_transformer(audio=abstract(AudioAdapter, TINY_AUDIO))
    model.adapters["identity"] = find_component("identity_adapter").init(IDENTITY, jnp.float32)
    return model


@pytest.fixture(scope="module")
def trained():
    """An adapter without zeros, like one that was trained."""
    return randomise(abstract(IdentityAdapter, IDENTITY))


@pytest.fixture(scope="module")
def identified(model, trained):
    """The model with the trained adapter."""
    copy = nnx.clone(model)
    copy.adapters["identity"] = trained
    return copy


def conditions_without_face(model):
    """Text, image and audio."""
    audio = model.adapters["audio"].condition(INPUTS.adapters["audio"], NUM_FRAMES)
    return model.conditions(INPUTS.text, INPUTS.image) | {"audio": audio}


def test_a_new_adapter_changes_nothing_bit_for_bit(model):
    conditions = conditions_without_face(model)
    before = forward(model, *LATENTS, conditions)
    identity = model.adapters["identity"].condition(FACES, NUM_FRAMES)
    after = forward(model, *LATENTS, conditions | {"identity": identity})
    assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


def test_the_values_of_a_new_adapter_have_gradients(model):
    """They are zero-initialised, and can be trained from zero."""
    q, wanted = (normal(2, 6, 3, IDENTITY.num_heads, 24, seed=seed) for seed in (7, 8))

    def error(adapter):
        return jnp.vdot(layer(adapter.layers, 0)(q, adapter.condition(FACES, NUM_FRAMES)), wanted)

    gradients = nnx.jit(nnx.grad(error))(model.adapters["identity"])
    assert gradients["layers"]["value"]["kernel"][0].any()
    assert not gradients["queries"][...].any()  # as long as values are zero


def test_a_trained_adapter_is_weighted_by_its_scale(identified, trained):
    conditions = conditions_without_face(identified)
    without = forward(identified, *LATENTS, conditions)

    def velocity(faces):
        identity = trained.condition(faces, NUM_FRAMES, scale=jnp.array([0.0, 1.0]))
        return forward(identified, *LATENTS, conditions | {"identity": identity})

    result, swapped = velocity(FACES), velocity(FACES[::-1])
    assert np.array_equal(result[0], without[0])
    assert relative(result[1], without[1]) > 1e-3
    assert relative(swapped[1], result[1]) > 1e-4


def test_the_default_scale_is_the_papers(trained):
    attend, q = layer(trained.layers, 0), normal(2, 6, 3, IDENTITY.num_heads, 24, seed=7)
    condition = trained.condition(FACES, NUM_FRAMES)
    assert condition.scale == trained.default_scale == IDENTITY_SCALE == 0.5
    assert condition.tokens.shape == (2, IDENTITY.num_queries, IDENTITY.token_width)
    whole = attend(q, trained.condition(FACES, NUM_FRAMES, scale=1.0))
    assert relative(attend(q, condition), 0.5 * whole) < 1e-7


def test_tokens_depend_on_the_place_of_a_feature_in_the_face(trained):
    tokens = trained.tokens(FACES)
    assert relative(trained.tokens(FACES[:, ::-1]), tokens) > 1e-3
    # Every token depends on every place, and on no other sample.
    for place in range(4):
        changed = trained.tokens(FACES.at[0, place].add(1.0))
        assert np.all(np.any(changed[0] != tokens[0], axis=-1))
        assert np.array_equal(changed[1], tokens[1])


def test_tokens_differ_from_each_other(trained):
    tokens = np.asarray(trained.tokens(FACES)[0])
    distance = np.linalg.norm(tokens[:, None] - tokens[None], axis=-1)
    assert distance[~np.eye(len(tokens), dtype=bool)].min() > 1e-2


def test_a_q_former_block_equals_numpys(trained):
    block = layer(trained.blocks, 0)
    values = {
        "/".join(map(str, p)): np.asarray(v[...], np.float64) for p, v in nnx.to_flat_state(nnx.state(block))
    }
    x, face = (np.asarray(normal(2, rows, 16, seed=seed), np.float64) for seed, rows in ((8, 5), (9, 4)))

    def linear(x, name):
        return x @ values[f"{name}/kernel"] + values[f"{name}/bias"]

    def norm(x, name):
        centered = x - x.mean(axis=-1, keepdims=True)
        scaled = centered / np.sqrt(centered.var(axis=-1, keepdims=True) + 1e-5)
        return scaled * values[f"{name}/scale"] + values[f"{name}/bias"]

    def attend(q, k, v):
        q, k, v = (np.stack(np.split(y, 2, axis=-1), axis=1) for y in (q, k, v))
        scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(8))
        result = scores / scores.sum(axis=-1, keepdims=True) @ v
        return np.concatenate([result[:, 0], result[:, 1]], axis=-1)

    expected = x + linear(attend(*np.split(linear(norm(x, "norm1"), "qkv"), 3, axis=-1)), "out")
    q = linear(norm(expected, "norm2"), "query")
    expected = expected + linear(attend(q, *np.split(linear(face, "key_value"), 2, axis=-1)), "face_out")
    hidden = np.asarray(
        jax.nn.gelu(jnp.asarray(linear(norm(expected, "norm3"), "mlp_in")), approximate=False)
    )
    expected = expected + linear(hidden, "mlp_out")
    assert relative(block(jnp.asarray(x, jnp.float32), jnp.asarray(face, jnp.float32)), expected) < 2e-6


def test_in_bfloat16_tokens_stay_float32():
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    adapter = abstract(IdentityAdapter, IDENTITY, **types)
    assert nnx.eval_shape(lambda adapter: adapter.tokens(FACES), adapter).dtype == jnp.float32


def test_full_size():
    adapter = abstract(IdentityAdapter, IdentityAdapterConfig())
    tokens = nnx.eval_shape(
        lambda a, x: a.tokens(x), adapter, jax.ShapeDtypeStruct((1, 49, 512), jnp.float32)
    )
    assert tokens.shape == (1, 32, 1024)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(adapter, nnx.Param)))
    # Keys and values of 40 blocks, and a Q-Former of 4 blocks.
    assert count - 40 * 2 * 1024 * 5120 == pytest.approx(4 * 16 * 1024**2, rel=0.02)


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="token_heads"):
        IdentityAdapterConfig(token_width=16, token_heads=3)


CLIPS = {
    "latents": LATENTS[0],
    "first_frame": normal(2, 3, 4, 6, 16, seed=10),
    "image": INPUTS.image,
    "text": normal(2, TINY_WAN.text_length, TINY_WAN.text_dim, seed=3),
    "audio": INPUTS.adapters["audio"],
    "lips": jnp.zeros((2, 3, 4, 6)),
}
EMPTY = jnp.zeros((1, 1, TINY_WAN.text_dim))
KEYS = jax.random.split(jax.random.key(0), 2)


@pytest.mark.slow
@pytest.mark.parametrize("batch_branches", [True, False])
@pytest.mark.parametrize("branch", range(3))
def test_each_clip_is_sampled_with_its_own_face_in_every_branch(identified, branch, batch_branches):
    arrays = {name: np.asarray(value) for name, value in (CLIPS | {"face": FACES}).items()}
    inputs = ClipInputs.from_records([{k: v[i] for k, v in arrays.items()} for i in range(2)], EMPTY)

    def sampled(face, **options):
        config = SamplerConfig(num_inference_steps=1, batch_branches=batch_branches)
        adapters = {"audio": inputs.adapters["audio"]} | ({} if face is None else {"face": face})
        return sample(
            identified,
            LATENTS[0],
            replace(inputs, adapters=adapters),
            config,
            guidance=only_branch(branch),
            options={"identity": options},
        )

    one, other, half = sampled(FACES), sampled(FACES[::-1]), sampled(FACES.at[1].set(FACES[0]))
    assert all(relative(other[i], one[i]) > 1e-5 for i in range(2))
    assert relative(half[0], one[0]) < 1e-6
    assert relative(half[1], other[1]) < 1e-6
    assert relative(sampled(FACES, scale=0.0), sampled(None)) < 1e-6
    assert relative(sampled(FACES, scale=1.0), one) > 1e-5
    assert np.array_equal(sampled(FACES, scale=IDENTITY_SCALE), one)


def test_training_depends_on_the_face_unless_the_image_is_dropped(identified):
    @nnx.jit(static_argnums=2)
    def loss(model, face, dropout):
        config = StageConfig(dropout=dropout)
        return velocity_objective(model, CLIPS | {"face": face}, KEYS, config=config, empty_text=EMPTY)[0]

    assert loss(identified, FACES, 0.0) != loss(identified, FACES[::-1], 0.0)
    assert loss(identified, FACES, 1.0) == loss(identified, FACES[::-1], 1.0)
    with pytest.raises(ConfigError, match="face"):
        velocity_objective(identified, CLIPS, KEYS, config=StageConfig(), empty_text=EMPTY)


def test_weights_are_exported_and_imported_under_pytorch_names(trained):
    component = find_component("identity_adapter")
    rules, values = component.layouts[0].rules(IDENTITY), flat_parameters(trained)
    file = dict(export(rules, values))
    assert file["layers.2.value.weight"].shape == (48, 16)
    assert all(key in file for key in component.layouts[0].signature)
    plan = make_plan(rules, {key: TensorSpec(x.shape, x.dtype) for key, x in file.items()}, values)
    for path, value in load(plan, file.__getitem__).items():
        np.testing.assert_array_equal(value, values[path], strict=True)
