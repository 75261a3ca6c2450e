"""Convolutions over sharded rows: neighbouring devices exchange the rows next to the cut (halo exchange).

All devices of a clip hold equally many rows, at every resolution, so that neighbouring rows are on the same
device or on neighbouring devices. An image whose number of rows is not divisible is padded at the bottom; the
padding is set to zero before each convolution, like the convolution's own padding.
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
    """How the rows of an image are sharded; by default they are not.

    Attributes:
        devices: Number of devices, each with as many rows.
        real: Rows of the image at some resolution.
        padded: Rows with padding, at the same resolution.
    """

    devices: int = 1
    real: int = 1
    padded: int = 1

    def extend(self, x: Float[Array, "B T H W C"], *, above: int, below: int) -> Float[Array, "B T R W C"]:
        """Adds the nearest rows of the neighbouring devices, and zeros at the edges of the image."""
        if self.devices == 1:
            return jnp.pad(x, ((0, 0), (0, 0), (above, below), (0, 0), (0, 0)))
        x = self._without_padding(x)
        down = [(i, i + 1) for i in range(self.devices - 1)]
        parts = [x]
        # A device that is no target of the permutation receives zeros.
        if above:
            parts.insert(0, jax.lax.ppermute(x[:, :, -above:], _AXES, down))
        if below:
            parts.append(jax.lax.ppermute(x[:, :, :below], _AXES, [(j, i) for i, j in down]))
        return jnp.concatenate(parts, axis=2)

    def gather(self, x: Float[Array, "B T H W C"]) -> Float[Array, "B T R W C"]:
        """All rows of the image, without padding."""
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


def num_row_shards() -> int:
    """Number of devices that the rows of a clip are sharded over, on the mesh in force; 1 without a mesh."""
    return math.prod(axis_size(axis) for axis in _AXES)


def halo_exchange(
    run: Callable[[Leaf, Array, Leaf, Rows], tuple[Array, Leaf]],
    state: Leaf,
    x: Float[Array, "B T H W C"],
    carried: Leaf = None,
    *,
    multiple: int = 1,
) -> tuple[Float[Array, "B U R V D"], Leaf]:
    """Runs a function with rows sharded over the `context` and `tensor` axes of the mesh in force.

    Args:
        run: Function of the state, one device's rows, what is carried, and how rows are sharded. It returns
            its result, whose resolution may be another, and what the next call carries.
        state: First argument of `run`, replicated.
        x: Images or videos. Their rows are padded, and the padding is removed from the result.
        carried: What the previous call returned, a tree of arrays `[B, T, R, W, C]`; None in the first call.
        multiple: Number that a device's rows must be a multiple of.

    Returns:
        The result, and what the next call carries, both sharded by rows. What is carried keeps the padding.
    """
    devices = num_row_shards()
    if devices == 1:
        return run(state, x, carried, Rows())
    height = x.shape[2]
    padded = height + -height % (devices * multiple)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - height), (0, 0), (0, 0)))
    batch = partition("batch")[0] if x.shape[0] % (axis_size("data") * axis_size("fsdp")) == 0 else None
    spec = PartitionSpec(batch, None, _AXES)
    sharded = jax.shard_map(
        lambda state, x, carried: run(state, x, carried, Rows(devices, height, padded)),
        in_specs=(PartitionSpec(), spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    result, carried = sharded(state, x, carried)
    return result[:, :, : result.shape[2] * height // padded], carried
