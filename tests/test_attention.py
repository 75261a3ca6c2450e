"""The one attention function against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative

from fantasy_jax.config import ConfigError
from fantasy_jax.models.attention import attention, choose_backend, use_backend
from fantasy_jax.sharding import make_mesh

pytestmark = pytest.mark.networks

BATCH, QUERIES, KEYS, HEADS, WIDTH = 3, 10, 14, 2, 16


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def qkv():
    rng = np.random.default_rng(0)
    shapes = [(BATCH, length, HEADS, WIDTH) for length in (QUERIES, KEYS, KEYS)]
    return [2 * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def in_float64(q, k, v, seen=True, bias=0.0, scale=WIDTH**-0.5):
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) * scale + bias
    weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).swapaxes(1, 2)


def test_plain(qkv):
    assert relative(attention(*map(jnp.asarray, qkv)), in_float64(*qkv)) < 5e-7


def test_keys_behind_the_length_are_not_seen(qkv):
    lengths = np.array([KEYS, 5, 1], np.int32)
    seen = np.arange(KEYS) < lengths[:, None]
    result = attention(*map(jnp.asarray, qkv), kv_lengths=jnp.asarray(lengths))
    assert relative(result, in_float64(*qkv, seen[:, None, None])) < 5e-7
    q, k, v = qkv
    garbage = [jnp.asarray(np.where(seen[..., None, None], x, 1e4)) for x in (k, v)]
    np.testing.assert_array_equal(
        attention(jnp.asarray(q), *garbage, kv_lengths=jnp.asarray(lengths)), result
    )


@pytest.mark.parametrize("shape", [(1, 1, QUERIES, KEYS), (BATCH, HEADS, QUERIES, KEYS), (BATCH, 1, 1, KEYS)])
def test_mask_and_bias_of_any_broadcast_shape(qkv, shape):
    rng = np.random.default_rng(1)
    mask = rng.random(shape) < 0.6
    mask[..., 0] = True
    bias = rng.normal(size=shape).astype(np.float32)
    result = attention(*map(jnp.asarray, qkv), mask=jnp.asarray(mask), bias=jnp.asarray(bias))
    assert relative(result, in_float64(*qkv, mask, bias)) < 5e-7


def test_scale_and_everything_at_once(qkv):
    lengths = np.array([KEYS, 9, 4], np.int32)
    mask = np.random.default_rng(1).random((1, HEADS, QUERIES, KEYS)) < 0.6
    mask[..., 0] = True
    seen = mask & (np.arange(KEYS) < lengths[:, None])[:, None, None]
    result = attention(
        *map(jnp.asarray, qkv), kv_lengths=jnp.asarray(lengths), mask=jnp.asarray(mask), scale=1.0
    )
    assert relative(result, in_float64(*qkv, seen, scale=1.0)) < 5e-7


def test_bfloat16_rounds_weights_but_not_the_softmax(qkv):
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    result = attention(*rounded)
    assert result.dtype == jnp.bfloat16
    # Values and weights are rounded once each, 2^-9 at most; a softmax in bfloat16 costs several times that.
    assert relative(result, in_float64(*rounded)) < 4e-3


def test_scores_far_from_zero_do_not_overflow(qkv):
    q, k, v = (jnp.asarray(x) for x in qkv)
    assert relative(attention(100 * q, k, v), in_float64(100 * qkv[0], *qkv[1:])) < 2e-5


def test_a_query_that_sees_nothing_is_finite_and_so_are_its_gradients(qkv):
    lengths = jnp.array([KEYS, 0, 3])

    def total(q, k, v):
        return attention(q, k, v, kv_lengths=lengths).sum()

    arrays = [jnp.asarray(x) for x in qkv]
    np.testing.assert_allclose(
        attention(*arrays, kv_lengths=lengths)[1],
        np.broadcast_to(qkv[2][1].mean(axis=0), (QUERIES, HEADS, WIDTH)),
        rtol=1e-5,
        atol=1e-6,
    )
    assert all(np.isfinite(x).all() for x in jax.grad(total, argnums=(0, 1, 2))(*arrays))


def with_gradient(q, k, v, lengths, weights):
    """Attended values, and the gradient of a weighted sum of them."""

    def total(q, k, v):
        heard = attention(q, k, v, kv_lengths=lengths)
        return (heard.astype(jnp.float32) * weights).sum(), heard

    (_, heard), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return heard, *gradients


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 5e-6), (jnp.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "lengths"), [(128, 256, None), (200, 150, (150, 70)), (30, 700, (513, 1))]
)
def test_splash_attention_is_the_plain_one_at_any_length(queries, keys, lengths, dtype, limit):
    rng = np.random.default_rng(0)
    shapes = [(2, queries, 2, 128), *[(2, keys, 2, 128)] * 2]
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    weights = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
    lengths = None if lengths is None else jnp.asarray(lengths)
    expected = with_gradient(q, k, v, lengths, weights)
    with use_backend("splash_interpreted"):
        assert choose_backend(q, k).name == "splash_interpreted"
        results = with_gradient(q, k, v, lengths, weights)
    for result, wanted in zip(results, expected, strict=True):
        assert result.dtype == wanted.dtype
        assert relative(result.astype(jnp.float32), wanted.astype(jnp.float32)) < limit


def test_splash_attention_on_a_mesh_is_the_plain_one():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 128)), jnp.float32) for n in (64, 150, 150))
    lengths = jnp.array([150, 33])
    expected = attention(q, k, v, kv_lengths=lengths)
    with jax.set_mesh(make_mesh(data=2, context=2, tensor=2)), use_backend("splash_interpreted"):
        result = jax.jit(lambda q, k, v: attention(q, k, v, kv_lengths=lengths))(q, k, v)
    assert relative(result, expected) < 2e-6


def test_a_backend_takes_what_it_can_and_leaves_the_rest():
    def chosen(backend, keys, width, dtype=jnp.bfloat16):
        with use_backend(backend):
            shapes = ((1, 256, 2, width), (1, keys, 2, width))
            return choose_backend(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).name

    assert chosen("splash", 256, 128) == "splash"
    assert chosen("splash", 25, 128) == "plain"  # the audio of a frame
    assert chosen("splash", 257, 80) == "plain"  # heads of CLIP's tower
    assert chosen("cudnn", 256, 128) == "cudnn"
    assert chosen("cudnn", 256, 128, jnp.float32) == "plain"
    assert chosen("plain", 256, 128) == "plain"
    q = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    assert choose_backend(q, q).name == "plain"  # what a CPU has
    with pytest.raises(ConfigError, match="there is no backend 'flash'; use one of splash, cudnn"):
        use_backend("flash").__enter__()
