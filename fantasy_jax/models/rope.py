"""Rotary position embeddings (RoPE) in frame, row and column, and the timestep's sinusoidal embedding.

Both need precise angles, which grow large: rotary factors rounded to bfloat16 change the transformer's output
by 7e-5, a sinusoid computed in float32 by 2.4e-6.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fantasy_jax.typing import Array, Float

_MAX_PERIOD = 10_000.0
_MAX_TIME = 100.0


def rotary_table(
    frames: int, rows: int, columns: int, head_width: int
) -> tuple[Float[Array, "S F K"], Float[Array, "S F K"]]:
    """Cosine and signed sine of the rotary angle of every token and channel, for `rotate`.

    Of the `head_width / 2` channel pairs of a head, a third each (rounded down) is rotated by row and by
    column, the rest by frame. Angles are computed in float64 on the host, in one small table per axis, and
    broadcast to the grid in the compiled program. Source: Wan2.1, `wan/modules/model.py`, `rope_apply`.

    Args:
        frames: Latent frames F.
        rows: Rows of tokens; S is `rows * columns`.
        columns: Columns of tokens.
        head_width: K, even.

    Returns:
        Cosines and signed sines, float32.
    """
    pairs = head_width // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)

    def table(function: Callable[[np.ndarray], np.ndarray]) -> Array:
        parts = []
        for axis, (length, count) in enumerate(zip((frames, rows, columns), counts, strict=True)):
            angles = np.outer(np.arange(length), _MAX_PERIOD ** (-np.arange(count) / count))
            shape = [1, 1, 1, count]
            shape[(2, 0, 1)[axis]] = length  # rows, columns, frames: space before frames
            values = jnp.asarray(function(angles), jnp.float32).reshape(shape)
            parts.append(jnp.broadcast_to(values, (rows, columns, frames, count)))
        return jnp.concatenate(parts, axis=-1).reshape(rows * columns, frames, pairs)

    return _of_channels(table(np.cos), table(np.sin))


def time_table(
    times: Float[Array, "*n"], head_width: int
) -> tuple[Float[Array, "*n K"], Float[Array, "*n K"]]:
    """As `rotary_table`, of fractional positions in time; the fastest angle is 1 radian per unit."""
    pairs = head_width // 2
    angles = times[..., None] * _MAX_TIME ** (-np.arange(pairs, dtype=np.float32) / pairs)
    return _of_channels(jnp.cos(angles), jnp.sin(angles))


def _of_channels(
    cosine: Float[Array, "*n K2"], sine: Float[Array, "*n K2"]
) -> tuple[Float[Array, "*n K"], Float[Array, "*n K"]]:
    """The tables of each pair's channels; the sine of the first channel of a pair is negative."""
    signed = jnp.stack([-sine, sine], axis=-1).reshape(*sine.shape[:-1], -1)
    return jnp.repeat(cosine, 2, axis=-1), signed


def rotate(
    x: Float[Array, "*n N K"], cosine: Float[Array, "*p K"], sine: Float[Array, "*p K"]
) -> Float[Array, "*n N K"]:
    """Rotates each pair of adjacent channels by its angle, in float32; all heads have the same angles.

    The channels of a pair change places by two shifts. Other forms cost a pass over memory: a pair as an axis
    of its own, which TPUs pad to a tile, or two halves that are put together.

    Args:
        x: Channels of all heads.
        cosine: Cosine of each channel's angle, from a table of this module.
        sine: Signed sine.
    """
    values, zero = x.astype(jnp.float32), jnp.zeros((), jnp.float32)
    others = [(0, 0, 0)] * (x.ndim - 1)
    after = jax.lax.pad(values, zero, [*others, (-1, 1, 0)])
    before = jax.lax.pad(values, zero, [*others, (1, -1, 0)])
    partner = jnp.where(np.arange(x.shape[-1]) % 2 == 0, after, before)
    return (values * cosine[..., None, :] + partner * sine[..., None, :]).astype(x.dtype)


def timestep_sinusoid(timestep: Float[Array, " B"], width: int) -> Float[Array, "B {width}"]:
    """Cosines, then sines, of a timestep at `width / 2` frequencies, to the precision of float32.

    The official code computes `timestep * frequency` (up to 1000 radians) in float64. A compiled program
    without float64 gets the same result as follows: angles are in turns; the frequency is split into three
    parts and the timestep into two, of 12 bits each, so that each product is exact in float32; whole turns
    are removed from each product before the sum.

    Args:
        timestep: Timestep in [0, 1000], may be fractional.
        width: Width of the embedding, even.

    Returns:
        The embedding in float32, within 1e-6 of the float64 result.
    """
    half = width // 2
    frequency = _MAX_PERIOD ** (-np.arange(half) / half) / (2 * np.pi)
    pieces = []
    for _ in range(3):
        piece = _leading_bits(frequency.astype(np.float32))
        pieces.append(piece)
        frequency = frequency - piece
    timestep = timestep.astype(jnp.float32)
    coarse = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(timestep, jnp.uint32) & np.uint32(0xFFFFF000), jnp.float32
    )
    turns = jnp.zeros((timestep.shape[0], half), jnp.float32)
    for part in (coarse, timestep - coarse):
        for piece in pieces:
            product = part[:, None] * piece
            turns += product - jnp.round(product)
    angle = 2 * np.pi * (turns - jnp.round(turns))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _leading_bits(x: np.ndarray) -> np.ndarray:
    """The value, rounded towards zero to 12 significant bits."""
    return (x.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)
