"""Meshes, and which dimension of which array is cut along which mesh axis.

Activations of the transformer are `[B, S, F, D]`, and the `context` axis cuts space, never frames. Audio
(and identity, and expression) attention happens within a latent frame, so a device that holds all frames
of its patch of the picture needs nothing from others for it; self-attention alone talks across devices
(`models/context_attention.py`). Space comes first so that flattening space and frame moves nothing, and so
that padding of space to a multiple of the axis is one suffix that key lengths can mask.

Parameters are cut by one ordered table over their paths. Gradients, the optimizer's moments and running means
have the same paths with something before them, so that the same table cuts them alike.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fantasy_jax.config import ConfigError
from fantasy_jax.typing import Array, Int, Leaf

MESH_AXES = ("data", "fsdp", "context", "tensor")

ContextParallelism = Literal["auto", "gather", "all_to_all", "ring"]
"""How self-attention crosses the context axis: `models/context_attention.py`."""

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # fsdp cuts parameters; for activations it is more data parallelism
    "space": "context",
    "rows": ("context", "tensor"),  # a VAE has no heads to cut: all devices of a clip share its rows
    "heads": "tensor",  # of an MLP: its hidden units
    # Of parameters alone, and for memory alone: a layer is gathered when its turn comes. Along `context` too
    # would save more, but TPUs' compiler then adds up where it should gather, twice the bytes; along `data`
    # they would come from slices that are far apart.
    "embed": "fsdp",
    None: None,
}
"""Logical dimension -> mesh axes."""

PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Convolutions are small, and what they read is cut by rows: every device needs all of them.
    (r"(^|/)(encoder|decoder|moments|latents_in|shortcut)/", ()),
    (r"conv\w*/", ()),
    # Columns of one head stay together, and so do rows of what reads heads.
    (r"\b(query|key|value|gate|mlp_in)/kernel$", ("embed", "heads")),
    (r"\b(query|key|value|gate|mlp_in)/bias$", ("heads",)),
    (r"\b(query|key)_norm/scale$", ("heads",)),
    (r"\b(out|mlp_out)/kernel$", ("heads", "embed")),
    # A LoRA's A and B like the kernel that they lie beside, but for the rank, which is cut for memory.
    (r"\b(out|mlp_out)/dot_general/lora_a$", ("heads", "embed")),
    (r"\b(out|mlp_out)/dot_general/lora_b$", (None, "embed")),
    (r"lora_a$", ("embed", None)),
    (r"\b(query|key|value|gate|mlp_in)/dot_general/lora_b$", ("embed", "heads")),
    (r"lora_b$", ("embed", None)),
    (r"\bposition/embedding$", ()),
    (r"(kernel|embedding)$", ("embed", None)),
    # Biases, norms, modulation, tokens, counters: next to nothing.
    (r"", ()),
)
"""Path of a parameter (searched for; the first found counts) -> its last dimensions. What comes before them,
the axis of layers, is not cut."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share what; one of the numbers may be -1, for all that are left.

    Attributes:
        data: Copies of everything, each with clips of its own. Spans slices, if there are several.
        fsdp: Devices with clips of their own that share parameters and what the optimizer keeps.
        context: Devices that share a clip, each with a part of the picture.
        tensor: Devices that share attention's heads and the MLP's hidden units.
        context_parallelism: How those of `context` exchange what self-attention needs; by default the way
            that sends least and fits.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1
    context_parallelism: ContextParallelism = "auto"

    @property
    def axes(self) -> dict[str, int]:
        """Sizes by axis, as `make_mesh` takes them."""
        return {name: getattr(self, name) for name in MESH_AXES}


def join_processes() -> None:
    """Makes this process one of several, before anything else asks for devices.

    On TPU pods, under SLURM, MPI, and Kubernetes' job sets, JAX finds the others by itself. Elsewhere the
    environment tells: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES, JAX_PROCESS_ID.

    Raises:
        ConfigError: Nothing tells where the others are.
    """
    told = {
        name: int(os.environ[variable])
        for name, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID"))
        if variable in os.environ
    }
    try:
        jax.distributed.initialize(**told)
    except ValueError as error:
        raise ConfigError(
            f"other processes cannot be found ({error}); set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID"
        ) from None


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over the given devices, by default as many of the first ones as it needs.

    Raises:
        ConfigError: The sizes do not fit the devices.
    """
    sizes = dict(zip(MESH_AXES, (data, fsdp, context, tensor), strict=True))
    asked = "mesh of " + ", ".join(f"{name} {size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"{asked}: sizes are at least 1, and one of them may be -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    if devices is None:
        devices = jax.devices() if -1 in sizes.values() else jax.devices()[:known]
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        raise ConfigError(f"{asked}: does not fit {len(devices)} devices")
    # jax.make_mesh would make Explicit axes; the compiler's own propagation is what is wanted here.
    return Mesh(_arrange(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def _arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices so that neighbours in the mesh are neighbours in the machine."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ConfigError(f"mesh: data is {shape[0]}; {slices} slices need a multiple of {slices}")
    within, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def in_host_memory() -> AbstractContextManager:
    """Where arrays go that are made in it: not to a device, if JAX may use the host at all."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS names devices alone
        return nullcontext()


def axis_size(name: str) -> int:
    """Size of an axis of the mesh in force (`jax.set_mesh`); 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def constrain(x: Array, *dimensions: str | None) -> Array:
    """Fixes how an activation is cut, by the logical names of its dimensions; nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(*dimensions))


def partition(*dimensions: str | None) -> PartitionSpec:
    """How an array of these logical dimensions is cut.

    Raises:
        ValueError: Two of them would be cut along the same mesh axis.
    """
    axes = [RULES[name] for name in dimensions]
    used = [axis for entry in axes if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(set(used)) < len(used):
        raise ValueError(f"dimensions {dimensions} collide: they are cut along {used}")
    return PartitionSpec(*axes)


def whole(tree: Leaf) -> Leaf:
    """Puts all of every array on every device of the mesh in force; nothing without a mesh."""
    return tree if jax.sharding.get_abstract_mesh().empty else jax.device_put(tree, PartitionSpec())


def parameter_partition(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How a parameter, or whatever is kept for one, is cut.

    Args:
        path: Its names, joined by `/`.
        shape: Its sizes; a dimension that its axes do not divide is left whole.
        mesh: Whose axes count.
    """
    logical = next(dimensions for pattern, dimensions in PARAMETERS if re.search(pattern, path))
    if len(logical) > len(shape):
        raise ValueError(f"{path}: has {len(shape)} dimensions, its rule is for {len(logical)} or more")
    axes = partition(*[None] * (len(shape) - len(logical)), *logical)
    return PartitionSpec(
        *(entry if size % _size(entry, mesh) == 0 else None for entry, size in zip(axes, shape, strict=True))
    )


def parameter_shardings(tree: Leaf, mesh: Mesh) -> Leaf:
    """A sharding for every array of a tree of parameters, gradients, or an optimizer's state."""

    def sharding(path: tuple, leaf: Leaf) -> NamedSharding:
        return NamedSharding(mesh, parameter_partition(_path(path), leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, tree)


def share(network: nnx.Module, mesh: Mesh) -> nnx.Module:
    """A network whose parameters are cut for the mesh; of abstract ones that is only noted."""
    graphdef, state = nnx.split(network)
    return nnx.merge(graphdef, place(state, parameter_shardings(state, mesh)))


def place(tree: Leaf, shardings: Leaf) -> Leaf:
    """Puts arrays where their shardings say; of `jax.ShapeDtypeStruct`s it is only noted."""

    def put(leaf: Leaf, sharding: NamedSharding) -> Leaf:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, tree, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every array of a batch is cut: along its leading axis."""
    return NamedSharding(mesh, partition("batch"))


def rows_of_this_process(batch_size: int, mesh: Mesh) -> Int[np.ndarray, " R"]:
    """Which examples of a batch this process' devices need; processes that share a clip need the same.

    Raises:
        ConfigError: The batch cannot be shared evenly.
    """
    sharing = _size(RULES["batch"], mesh)
    if batch_size % sharing:
        raise ConfigError(f"a batch of {batch_size} cannot be shared by {sharing} (mesh: data x fsdp)")
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[place] for place in places]))


def assemble_batch(
    local: Mapping[str, np.ndarray], rows: Int[np.ndarray, " R"], batch_size: int, mesh: Mesh
) -> dict[str, Array]:
    """Global arrays of what each process has read.

    Args:
        local: By name, the examples `rows`, in that order.
        rows: From `rows_of_this_process`.
        batch_size: Examples in the batch of all processes.
        mesh: Over all processes.
    """

    def assemble(value: np.ndarray) -> Array:
        def part(place: tuple[slice, ...]) -> np.ndarray:
            return value[np.searchsorted(rows, np.arange(batch_size)[place[0]])]

        shape = (batch_size, *value.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh), part)

    return {name: assemble(value) for name, value in local.items()}


def _size(entry: str | tuple[str, ...] | None, mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def _path(path: tuple) -> str:
    """As in `nnx.to_flat_state`: a variable is a leaf there, and not what holds the `value`."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    return "/".join(names[:-1] if names[-1] == "value" else names)
