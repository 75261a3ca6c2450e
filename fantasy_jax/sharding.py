"""Meshes, and which dimension of which array is cut along which mesh axis.

Activations of the transformer are `[B, S, F, D]`, and the `context` axis cuts space, never frames. Audio
(and identity, and expression) attention happens within a latent frame, so a device that holds all frames
of its patch of the picture needs nothing from others for it; self-attention alone talks across devices,
by gathering keys and values. Space comes first so that flattening space and frame moves nothing, and so
that padding of space to a multiple of the axis is one suffix that key lengths can mask.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from fantasy_jax.typing import Array

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # fsdp cuts parameters; for activations it is more data parallelism
    "space": "context",
    "heads": "tensor",
    None: None,
}
"""Logical dimension of an activation -> mesh axes."""


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over the given devices, by default as many of the first ones as it needs."""
    sizes = (data, fsdp, context, tensor)
    if devices is None:
        needed = data * fsdp * context * tensor
        devices = jax.devices()[:needed]
    # jax.make_mesh would make Explicit axes; the compiler's own propagation is what is wanted here.
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def axis_size(name: str) -> int:
    """Size of an axis of the mesh in force (`jax.set_mesh`); 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def constrain(x: Array, *dimensions: str | None) -> Array:
    """Fixes how an activation is cut, by the logical names of its dimensions; nothing without a mesh.

    Two dimensions of one array may not be cut along the same mesh axis.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(*dimensions))


def partition(*dimensions: str | None) -> PartitionSpec:
    """How an activation of these logical dimensions is cut."""
    return PartitionSpec(*(RULES[name] for name in dimensions))
