"""Rotary position embeddings and the timestep's sinusoidal embedding against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative

from fantasy_jax.models.rope import rotary_table, rotate, timestep_sinusoid

pytestmark = pytest.mark.networks

FRAMES, ROWS, COLUMNS = 7, 5, 3


def sinusoid_in_float64(timestep, width):
    half = width // 2
    angle = timestep.astype(np.float64)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1)


def rotated_in_complex128(x):
    """The official form: adjacent channels are a complex number, rotated by frame, row or column."""
    head_width = x.shape[-1]
    third = 2 * (head_width // 6)
    rotations = []
    for length, width in ((FRAMES, head_width - 2 * third), (ROWS, third), (COLUMNS, third)):
        rotations.append(
            np.exp(1j * np.outer(np.arange(length), 1 / 10_000.0 ** (np.arange(0, width, 2) / width)))
        )
    by_frame, by_row, by_column = rotations
    factors = np.empty((ROWS, COLUMNS, FRAMES, head_width // 2), np.complex128)
    for row, column, frame in np.ndindex(factors.shape[:3]):
        factors[row, column, frame] = np.concatenate([by_frame[frame], by_row[row], by_column[column]])
    pairs = x.astype(np.float64).reshape(*x.shape[:-1], -1, 2)
    rotated = (pairs[..., 0] + 1j * pairs[..., 1]) * factors.reshape(1, -1, FRAMES, 1, head_width // 2)
    return np.stack([rotated.real, rotated.imag], axis=-1).reshape(x.shape)


def random_heads(head_width, dtype=np.float32):
    shape = (2, ROWS * COLUMNS, FRAMES, 3, head_width)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("width", [32, 256])
def test_sinusoid_is_precise_in_float32(compiled, width):
    rng = np.random.default_rng(0)
    fractional = rng.uniform(0, 1000, 4096).astype(np.float32)
    timestep = np.concatenate([fractional, [0, 12.5, 999.75, 1000], np.arange(1001)]).astype(np.float32)
    function = jax.jit(timestep_sinusoid, static_argnums=1) if compiled else timestep_sinusoid
    result = function(jnp.asarray(timestep), width)
    assert result.dtype == jnp.float32
    assert np.abs(np.asarray(result) - sinusoid_in_float64(timestep, width)).max() < 1e-6


def test_a_plain_float32_sinusoid_is_not_precise():
    timestep = np.random.default_rng(0).uniform(0, 1000, 4096).astype(np.float32)
    angle = timestep[:, None] * (10_000.0 ** (-np.arange(128) / 128)).astype(np.float32)
    plain = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    assert np.abs(plain - sinusoid_in_float64(timestep, 256)).max() > 1e-5


@pytest.mark.parametrize("head_width", [24, 128, 20, 22])  # 22 and 20 do not divide into equal thirds
def test_rotation_equals_the_official_one(head_width):
    x = random_heads(head_width)
    rotated = rotate(x, *rotary_table(FRAMES, ROWS, COLUMNS, head_width))
    assert relative(rotated, rotated_in_complex128(np.asarray(x))) < 1e-7


def test_table_is_exact_far_from_the_origin():
    cosine, sine = jax.jit(rotary_table, static_argnums=(0, 1, 2, 3))(51, 60, 104, 128)
    assert cosine.shape == sine.shape == (60 * 104, 51, 128)
    angle = np.array([50.0, 59.0, 103.0])  # the first frequency of every axis is 1
    firsts = 2 * np.array([0, 22, 43])
    for channel, sign in ((firsts, -1), (firsts + 1, 1)):
        last = np.asarray([cosine[-1, -1], sine[-1, -1]])[:, channel]
        expected = np.stack([np.cos(angle), sign * np.sin(angle)])
        np.testing.assert_array_equal(last, expected.astype(np.float32))


def test_rotation_keeps_norms_and_the_first_token():
    x = random_heads(128)
    rotated = rotate(x, *rotary_table(FRAMES, ROWS, COLUMNS, 128))
    np.testing.assert_array_equal(rotated[:, 0, 0], x[:, 0, 0])
    assert relative(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1)) < 1e-7


def test_rotation_is_computed_in_float32_for_bfloat16():
    x = random_heads(24, jnp.bfloat16)
    table = rotary_table(FRAMES, ROWS, COLUMNS, 24)
    rotated = rotate(x, *table)
    assert rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotated, rotate(x.astype(jnp.float32), *table).astype(jnp.bfloat16))
