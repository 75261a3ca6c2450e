"""Attention against float64, and its kernels against XLA."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative
from jax.sharding import AbstractMesh

from fantasy_jax.errors import ConfigError
from fantasy_jax.models.attention import (
    _splash,
    attention,
    choose_backend,
    grouped_attention,
    use_backend,
)
from fantasy_jax.sharding import make_mesh

pytestmark = [pytest.mark.usefixtures("highest_precision"), pytest.mark.networks]

BATCH, QUERIES, KEYS, HEADS, WIDTH = 3, 10, 14, 2, 16


@pytest.fixture
def qkv():
    rng = np.random.default_rng(0)
    shapes = [(BATCH, length, HEADS, WIDTH) for length in (QUERIES, KEYS, KEYS)]
    return [2 * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def in_float64(q, k, v, allowed=True, bias=0.0, scale=WIDTH**-0.5):
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) * scale + bias
    weights = np.where(allowed, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).swapaxes(1, 2)


def test_attention_equals_float64(qkv):
    assert relative(attention(*map(jnp.asarray, qkv)), in_float64(*qkv)) < 5e-7


def test_keys_after_the_length_are_masked(qkv):
    lengths = np.array([KEYS, 5, 1], np.int32)
    allowed = np.arange(KEYS) < lengths[:, None]
    result = attention(*map(jnp.asarray, qkv), kv_lengths=jnp.asarray(lengths))
    assert relative(result, in_float64(*qkv, allowed[:, None, None])) < 5e-7
    q, k, v = qkv
    garbage = [jnp.asarray(np.where(allowed[..., None, None], x, 1e4)) for x in (k, v)]
    np.testing.assert_array_equal(
        attention(jnp.asarray(q), *garbage, kv_lengths=jnp.asarray(lengths)), result
    )


@pytest.mark.parametrize("shape", [(1, 1, QUERIES, KEYS), (BATCH, HEADS, QUERIES, KEYS), (BATCH, 1, 1, KEYS)])
def test_bias_of_any_broadcast_shape(qkv, shape):
    bias = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    result = attention(*map(jnp.asarray, qkv), bias=jnp.asarray(bias))
    assert relative(result, in_float64(*qkv, bias=bias)) < 5e-7


def test_scale_lengths_and_bias_together(qkv):
    lengths = np.array([KEYS, 9, 4], np.int32)
    bias = np.random.default_rng(1).normal(size=(1, HEADS, QUERIES, KEYS)).astype(np.float32)
    allowed = (np.arange(KEYS) < lengths[:, None])[:, None, None]
    result = attention(
        *map(jnp.asarray, qkv), kv_lengths=jnp.asarray(lengths), bias=jnp.asarray(bias), scale=1.0
    )
    assert relative(result, in_float64(*qkv, allowed, bias, scale=1.0)) < 5e-7


@pytest.mark.parametrize("lengths", [None, [7, 5, 1]], ids=str)
def test_grouped_attention_equals_attention_to_all_keys_with_a_mask(qkv, lengths):
    q, k, v = qkv
    groups = [x.reshape(BATCH, 2, KEYS // 2, HEADS, WIDTH) for x in (k, v)]
    mask = np.random.default_rng(2).random((BATCH, QUERIES, 2)) < 0.6
    mask[0, 0], mask[0, 1], mask[0, 2] = False, True, [True, False]
    allowed = np.repeat(mask, KEYS // 2, axis=-1)[:, None]
    if lengths is not None:
        inside = np.arange(KEYS // 2) < np.array(lengths)[:, None]
        allowed = allowed & np.tile(inside, 2)[:, None, None]
        lengths = jnp.asarray(lengths, jnp.int32)
    arguments = map(jnp.asarray, (q, *groups))
    result = grouped_attention(*arguments, kv_lengths=lengths, mask=jnp.asarray(mask))
    with np.errstate(invalid="ignore"):
        expected = np.nan_to_num(in_float64(q, k, v, allowed))
    assert relative(result, expected) < 5e-7
    assert not result[0, 0].any()


def test_gradients_of_grouped_attention_are_finite_where_nothing_is_attended_to(qkv):
    q, *groups = (jnp.asarray(x) for x in (qkv[0], *(x[:, None] for x in qkv[1:])))
    mask = jnp.zeros((BATCH, QUERIES, 1), bool).at[:, 1:].set(True)
    gradients = jax.grad(lambda *x: grouped_attention(*x, mask=mask).sum(), argnums=(0, 1, 2))(q, *groups)
    assert all(jnp.isfinite(x).all() for x in gradients)
    assert not gradients[0][:, 0].any()


def test_bfloat16_computes_the_softmax_in_float32(qkv):
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    result = attention(*rounded)
    assert result.dtype == jnp.bfloat16
    # Values and weights are rounded once each, 2^-9 at most; a softmax in bfloat16 costs several times that.
    assert relative(result, in_float64(*rounded)) < 4e-3


def test_large_scores_do_not_overflow(qkv):
    q, k, v = (jnp.asarray(x) for x in qkv)
    assert relative(attention(100 * q, k, v), in_float64(100 * qkv[0], *qkv[1:])) < 2e-5


def test_output_and_gradients_are_finite_if_all_keys_are_masked(qkv):
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


def with_gradients(attend, q, k, v, weights):
    """Output of attention, and the gradients of its weighted sum."""

    def total(q, k, v):
        output = attend(q, k, v)
        return (output.astype(jnp.float32) * weights).sum(), output

    (_, output), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return output, *gradients


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 5e-6), (jnp.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "lengths"), [(128, 256, None), (200, 150, (150, 70)), (30, 700, (513, 1))]
)
def test_splash_equals_xla_at_any_length(queries, keys, lengths, dtype, limit):
    rng = np.random.default_rng(0)
    shapes = [(2, queries, 2, 128), *[(2, keys, 2, 128)] * 2]
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    weights = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
    lengths = None if lengths is None else jnp.asarray(lengths)
    expected = with_gradients(partial(attention, kv_lengths=lengths), q, k, v, weights)
    splash = partial(_splash, kv_lengths=lengths, scale=128**-0.5, interpret=True)
    for result, wanted in zip(with_gradients(splash, q, k, v, weights), expected, strict=True):
        assert result.dtype == wanted.dtype
        assert relative(result.astype(jnp.float32), wanted.astype(jnp.float32)) < limit


def test_splash_equals_xla_on_a_mesh():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 128)), jnp.float32) for n in (64, 150, 150))
    lengths = jnp.array([150, 33])
    expected = attention(q, k, v, kv_lengths=lengths)
    splash = partial(_splash, kv_lengths=lengths, scale=128**-0.5, interpret=True)
    with jax.set_mesh(make_mesh(data=2, context=2, tensor=2)):
        result = jax.jit(splash)(q, k, v)
    assert relative(result, expected) < 2e-6


def chosen(keys=256, width=128, dtype=jnp.bfloat16):
    q, k = (jax.ShapeDtypeStruct((1, length, 2, width), dtype) for length in (256, keys))
    return choose_backend(q, k).name


def test_shapes_that_a_kernel_does_not_support_go_to_xla():
    with use_backend("splash"):
        assert chosen() == "splash"
        assert chosen(keys=25) == "xla"  # audio tokens of a frame
        assert chosen(keys=257, width=80) == "xla"  # heads of CLIP's tower
    with use_backend("cudnn"):
        assert chosen() == "cudnn"
        assert chosen(dtype=jnp.float32) == "xla"


@dataclass(frozen=True)
class Device:
    platform: str


@dataclass(frozen=True)
class OldDevice:
    """What JAX 0.10.0 knows of the devices of a mesh."""

    device_kind: str


@pytest.mark.parametrize(
    ("device", "backend"),
    [
        (None, "xla"),  # the default platform of these tests is the CPU
        (Device("cpu"), "xla"),
        (Device("tpu"), "splash"),
        (Device("gpu"), "cudnn"),
        (OldDevice("cpu"), "xla"),
        (OldDevice("TPU v5 lite"), "splash"),
        (OldDevice("NVIDIA H100 80GB HBM3"), "cudnn"),
    ],
)
def test_the_backend_is_that_of_the_platform_of_the_mesh(device, backend):
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        assert chosen() == backend
        with use_backend("xla"):
            assert chosen() == "xla"


def test_the_forced_backend_is_part_of_the_key_of_jit():
    traced = []
    run = jax.jit(lambda x: traced.append(chosen()) or x)
    for name in ("splash", "xla", "splash"):
        with use_backend(name):
            run(jnp.zeros(1))
    assert traced == ["splash", "xla"]


def test_unknown_backend_is_a_config_error():
    with pytest.raises(ConfigError, match="flash"):
        use_backend("flash")
