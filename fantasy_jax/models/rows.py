"""Rows of a picture shared by devices, which send each other those that convolutions read across edges.

Every device of a clip holds equally many rows, at every resolution alike, so that a row's neighbours are on
the same device or on the next. A picture whose rows do not divide is padded at its bottom; padding is made
zero again before each convolution, as what lies beyond a picture's edge is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fantasy_jax.sharding import RULES, axis_size, partition
from fantasy_jax.typing import Array, Float, Leaf

_AXES = RULES["rows"]


@dataclass(frozen=True)
class Rows:
    """Who holds which rows; by default all are here.

    Attributes:
        devices: That share a picture.
        real: Rows of the picture, at some resolution.
        padded: With padding, at the same.
    """

    devices: int = 1
    real: int = 1
    padded: int = 1

    def extend(self, x: Float[Array, "B T H W C"], *, above: int, below: int) -> Float[Array, "B T R W C"]:
        """Puts the neighbours' nearest rows around those that are here, zeros at the picture's edges."""
        if self.devices == 1:
            return jnp.pad(x, ((0, 0), (0, 0), (above, below), (0, 0), (0, 0)))
        x = self._without_padding(x)
        down = [(i, i + 1) for i in range(self.devices - 1)]
        parts = [x]
        # Who is sent nothing receives zeros.
        if above:
            parts.insert(0, jax.lax.ppermute(x[:, :, -above:], _AXES, down))
        if below:
            parts.append(jax.lax.ppermute(x[:, :, :below], _AXES, [(j, i) for i, j in down]))
        return jnp.concatenate(parts, axis=2)

    def gather(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T R W C"]:
        """All rows of the picture."""
        if self.devices == 1:
            return x
        return jax.lax.all_gather(x, _AXES, axis=2, tiled=True)[:, :, : self._real(x)]

    def _real(self, x: Array) -> int:
        return x.shape[2] * self.devices * self.real // self.padded

    def _without_padding(self, x: Array) -> Array:
        if self.real == self.padded:
            return x
        row = jax.lax.axis_index(_AXES) * x.shape[2] + jnp.arange(x.shape[2])
        return jnp.where((row < self._real(x))[:, None, None], x, 0)


def sharing_rows() -> int:
    """Devices that share a clip's rows on the mesh in force; 1 without a mesh."""
    return math.prod(axis_size(axis) for axis in _AXES)


def by_rows(
    run: Callable[[Leaf, Array, Rows], Array], state: Leaf, x: Float[Array, "B T H W C"], *, multiple: int = 1
) -> Float[Array, "B U R V D"]:
    """Runs on rows that all devices of a clip share: those of `context` and of `tensor`.

    Args:
        run: Of the state, a device's rows, and who holds which. May change the resolution.
        state: Every device needs all of it.
        x: Padded here; what comes of the padding is cut off.
        multiple: Rows that must stay together.

    Returns:
        The result, its rows still cut.
    """
    devices = sharing_rows()
    if devices == 1:
        return run(state, x, Rows())
    height = x.shape[2]
    padded = height + -height % (devices * multiple)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - height), (0, 0), (0, 0)))
    batch = partition("batch")[0] if x.shape[0] % (axis_size("data") * axis_size("fsdp")) == 0 else None
    cut = PartitionSpec(batch, None, _AXES)
    shared = jax.shard_map(
        lambda state, x: run(state, x, Rows(devices, height, padded)),
        in_specs=(PartitionSpec(), cut),
        out_specs=cut,
        check_vma=False,
    )
    result = shared(state, x)
    return result[:, :, : result.shape[2] * height // padded]
