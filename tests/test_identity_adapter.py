"""A face becomes tokens that every block sees, and a new adapter changes nothing, to the last bit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import TINY_AUDIO, TINY_WAN, layer, randomise, relative

from fantasy_jax.config import ConfigError
from fantasy_jax.convert.components import COMPONENTS
from fantasy_jax.convert.rules import TensorSpec, export, flat_parameters, load, make_plan
from fantasy_jax.diffusion.sampler import SamplerConfig, sample
from fantasy_jax.models.adapters.audio import AudioAdapter
from fantasy_jax.models.adapters.identity import IDENTITY_SCALE, IdentityAdapter, IdentityAdapterConfig
from fantasy_jax.models.wan import WanTransformer
from fantasy_jax.training.talking import TalkingStageConfig, sampling_inputs, talking_loss

pytestmark = pytest.mark.networks

IDENTITY = IdentityAdapterConfig(
    feature_width=10,
    feature_size=2,
    num_queries=5,
    depth=2,
    token_width=16,
    token_heads=2,
    width=48,
    num_heads=2,
    num_layers=3,
)

forward = nnx.jit(lambda model, *inputs: model(*inputs))


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def model():
    """All parameters random but the identity adapter's, which is as it is built."""
    audio = nnx.eval_shape(lambda: AudioAdapter(TINY_AUDIO, rngs=nnx.Rngs(0)))
    model = randomise(
        nnx.eval_shape(lambda: WanTransformer(TINY_WAN, adapters={"audio": audio}, rngs=nnx.Rngs(1)))
    )
    model.adapters["identity"] = new_adapter()
    return model


def new_adapter():
    return nnx.jit(lambda: IdentityAdapter(IDENTITY, rngs=nnx.Rngs(jax.random.key(2, impl="rbg"))))()


@pytest.fixture(scope="module")
def trained():
    return randomise(nnx.eval_shape(lambda: IdentityAdapter(IDENTITY, rngs=nnx.Rngs(0))))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


FACES = normal(6, 2, 4, IDENTITY.feature_width)
LATENTS = (normal(0, 2, 3, 4, 6, 16), normal(1, 2, 3, 4, 6, 20), jnp.array([3.5, 876.25]))


def heard(model):
    """Text, picture and sound."""
    conditions = model.conditions(normal(3, 2, 5, TINY_WAN.text_dim), normal(4, 2, 9, TINY_WAN.image_dim))
    return conditions | {"audio": model.adapters["audio"].frame_level(normal(5, 2, 20, 12), 9)}


def test_a_new_adapter_changes_nothing(model):
    conditions = heard(model)
    before = forward(model, *LATENTS, conditions)
    after = forward(model, *LATENTS, conditions | {"identity": model.adapters["identity"](FACES)})
    assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


def test_what_it_learns_first_are_values(model):
    """From zero they have gradients, so that the adapter can be trained at all."""
    q, wanted = (normal(seed, 2, 6, 3, IDENTITY.num_heads, 24) for seed in (7, 8))

    def error(adapter):
        return jnp.vdot(layer(adapter.layers, 0)(q, adapter(FACES)), wanted)

    gradients = nnx.jit(nnx.grad(error))(model.adapters["identity"])
    assert gradients["layers"]["value"]["kernel"][0].any()
    assert not gradients["queries"][...].any()  # as long as values are zero


def test_a_trained_adapter_is_heard_by_its_weight(model, trained):
    whole = nnx.merge(*nnx.split(model))
    whole.adapters["identity"] = trained
    conditions = heard(whole)
    without = forward(whole, *LATENTS, conditions)
    scales = jnp.array([0.0, 1.0])
    result = forward(whole, *LATENTS, conditions | {"identity": trained(FACES, scale=scales)})
    assert np.array_equal(result[0], without[0])
    assert relative(result[1], without[1]) > 1e-3
    swapped = forward(whole, *LATENTS, conditions | {"identity": trained(FACES[::-1], scale=scales)})
    assert relative(swapped[1], result[1]) > 1e-4


def test_the_weight_is_the_papers(trained):
    see, q = layer(trained.layers, 0), normal(7, 2, 6, 3, IDENTITY.num_heads, 24)
    condition = trained(FACES)
    assert condition.scale == IDENTITY_SCALE == 0.5
    assert condition.tokens.shape == (2, IDENTITY.num_queries, IDENTITY.token_width)
    assert relative(see(q, condition), 0.5 * see(q, trained(FACES, scale=1.0))) < 1e-7


def test_tokens_know_where_in_the_face_a_feature_lies(trained):
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


def test_the_q_former_is_the_textbooks(trained):
    """One block, written out in NumPy."""
    block = layer(trained.blocks, 0)
    values = {
        "/".join(map(str, p)): np.asarray(v[...], np.float64) for p, v in nnx.to_flat_state(nnx.state(block))
    }
    x, face = (np.asarray(normal(seed, 2, rows, 16), np.float64) for seed, rows in ((8, 5), (9, 4)))

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
    adapter = nnx.eval_shape(lambda: IdentityAdapter(IDENTITY, rngs=nnx.Rngs(0), **types))
    assert nnx.eval_shape(lambda adapter: adapter.tokens(FACES), adapter).dtype == jnp.float32


def test_full_size():
    adapter = nnx.eval_shape(lambda: IdentityAdapter(IdentityAdapterConfig(), rngs=nnx.Rngs(0)))
    tokens = nnx.eval_shape(
        lambda a, x: a.tokens(x), adapter, jax.ShapeDtypeStruct((1, 49, 512), jnp.float32)
    )
    assert tokens.shape == (1, 32, 1024)
    count = sum(x.size for x in jax.tree.leaves(nnx.state(adapter, nnx.Param)))
    # 40 blocks' keys and values, and a Q-Former of 4 blocks.
    assert count - 40 * 2 * 1024 * 5120 == pytest.approx(4 * 16 * 1024**2, rel=0.02)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="token_heads is 3; it must divide token_width 16"):
        IdentityAdapterConfig(token_width=16, token_heads=3)


@pytest.fixture(scope="module")
def identified(model, trained):
    """With an identity adapter that is trained, as it were."""
    whole = nnx.clone(model)
    whole.adapters["identity"] = trained
    return whole


CLIPS = {
    "latents": LATENTS[0],
    "first_frame": normal(10, 2, 3, 4, 6, 16),
    "image": normal(4, 2, 9, TINY_WAN.image_dim),
    "text": normal(3, 2, 8, TINY_WAN.text_dim),
    "audio": normal(5, 2, 20, TINY_AUDIO.feature_width),
    "lips": jnp.zeros((2, 3, 4, 6)),
}
EMPTY = jnp.zeros((1, 1, TINY_WAN.text_dim))
KEYS = jax.random.split(jax.random.key(0), 2)


@pytest.mark.parametrize("batch_branches", [True, False])
def test_every_clip_is_sampled_with_its_own_face_in_every_branch(identified, batch_branches):
    arrays = {name: np.asarray(value) for name, value in (CLIPS | {"face": FACES}).items()}
    inputs = sampling_inputs([{k: v[i] for k, v in arrays.items()} for i in range(2)], EMPTY)

    def drawn(face, **settings):
        # Where neither prompt nor audio guides away from it, the first branch alone counts.
        settings = {"prompt_scale": 0.0, "audio_scale": 0.0} | settings
        config = SamplerConfig(steps=1, batch_branches=batch_branches, **settings)
        return sample(identified, LATENTS[0], replace(inputs, face=face), config)

    one, other, half = drawn(inputs.face), drawn(FACES[::-1]), drawn(FACES.at[1].set(FACES[0]))
    assert all(relative(other[i], one[i]) > 1e-5 for i in range(2))
    assert relative(half[0], one[0]) < 1e-6
    assert relative(half[1], other[1]) < 1e-6
    assert relative(drawn(inputs.face, identity_scale=0.0), drawn(None)) < 1e-6
    assert relative(drawn(inputs.face, identity_scale=1.0), one) > 1e-5


def test_training_sees_the_face_unless_the_picture_is_dropped(identified):
    @nnx.jit(static_argnums=2)
    def loss(model, face, dropout):
        config = TalkingStageConfig(dropout=dropout)
        return talking_loss(model, CLIPS | {"face": face}, KEYS, config=config, empty_text=EMPTY)[0]

    assert loss(identified, FACES, 0.0) != loss(identified, FACES[::-1], 0.0)
    assert loss(identified, FACES, 1.0) == loss(identified, FACES[::-1], 1.0)
    with pytest.raises(ConfigError, match="clips have no face; encode them with it"):
        talking_loss(identified, CLIPS, KEYS, config=TalkingStageConfig(), empty_text=EMPTY)


def test_weights_leave_and_come_back_under_pytorch_names(trained):
    component = next(x for x in COMPONENTS if x.name == "identity_adapter")
    rules, values = component.layouts[0].rules(IDENTITY), flat_parameters(trained)
    file = dict(export(rules, values))
    assert file["layers.2.value.weight"].shape == (48, 16)
    assert all(key in file for key in component.layouts[0].signature)
    plan = make_plan(rules, {key: TensorSpec(x.shape, x.dtype) for key, x in file.items()}, values)
    for path, value in load(plan, file.__getitem__).items():
        np.testing.assert_array_equal(value, values[path], strict=True)
