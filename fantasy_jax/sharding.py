"""The device mesh, and the mesh axis along which each dimension of each array is sharded.

Activations of the transformer are `[B, S, F, D]`, and the `context` axis shards space, never frames.
Attention to audio (and to faces and expressions) stays within a latent frame, so a device that holds all
frames of its patch of the image needs no communication for it; only self-attention crosses devices
(`models/context_attention.py`). Space comes before frames so that flattening the two moves no data, and so
that padding of space to a multiple of the axis is one suffix that key lengths can mask.

Parameters are sharded by one ordered table over their paths. Gradients, the optimizer's moments and moving
averages have the same paths with a prefix, so that the same table shards them alike.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fantasy_jax.config import Range, Settings
from fantasy_jax.errors import ConfigError
from fantasy_jax.typing import Array, Int, Leaf

MESH_AXES = ("data", "fsdp", "context", "tensor")

WeightsMemory = Literal["device", "host"]
"""Where the weights of stacked layers lie: `host` is for sampling, on one device."""

ContextParallelism = Literal["auto", "gather", "all_to_all"]
"""Strategy of self-attention across the context axis: `models/context_attention.py`."""

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # fsdp shards parameters; for activations it is more data parallelism
    "space": "context",
    "rows": ("context", "tensor"),  # a VAE has no heads to shard: all devices of a clip shard its rows
    "heads": "tensor",  # also the hidden units of MLPs
    "kept": ("tensor", "fsdp", "context"),  # all heads of keys and values that are kept over the steps
    # FSDP: parameters only; each layer is all-gathered just before use. Sharding along `context` too would
    # save more memory, but the TPU compiler then all-reduces instead of all-gathering, which sends twice the
    # bytes; along `data` the gathers would cross slices.
    "embed": "fsdp",
    None: None,
}
"""Logical dimension -> mesh axes."""

PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Convolutions are small, and their inputs are sharded by rows: every device needs the whole kernel.
    (r"(^|/)(encoder|decoder|moments|latents_in|shortcut)/", ()),
    (r"conv\w*/", ()),
    # Columns of one head stay together, and so do rows that read one head.
    (r"\b(query|key|value|gate|mlp_in)/kernel$", ("embed", "heads")),
    (r"\b(query|key|value|gate|mlp_in)/bias$", ("heads",)),
    (r"\b(query|key)_norm/scale$", ("heads",)),
    (r"\b(out|mlp_out)/kernel$", ("heads", "embed")),
    # Weights of 8 bits have the kernel's dimensions in reverse.
    (r"\b(query|key|value|gate|mlp_in)/weight$", ("heads", "embed")),
    (r"\b(query|key|value|gate|mlp_in)/weight_scale$", ("heads",)),
    (r"\b(out|mlp_out)/weight$", ("embed", "heads")),
    (r"/weight$", (None, "embed")),
    # A and B of a LoRA are sharded as their kernel is; the rank is small.
    (r"\b(out|mlp_out)/dot_general/lora_a$", ("heads", "embed")),
    (r"\b(out|mlp_out)/dot_general/lora_b$", (None, "embed")),
    (r"lora_a$", ("embed", None)),
    (r"\b(query|key|value|gate|mlp_in)/dot_general/lora_b$", ("embed", "heads")),
    (r"lora_b$", ("embed", None)),
    (r"\bposition/embedding$", ()),
    (r"(kernel|embedding)$", ("embed", None)),
    # Biases, norms, modulation, tokens, counters: negligible.
    (r"", ()),
)
"""Pattern of a parameter's path (the first that is found decides) -> logical names of its last dimensions.
The dimensions before them, such as the axis of stacked layers, are not sharded."""


@dataclass(frozen=True)
class MeshConfig(Settings):
    """Mesh axis sizes; one may be -1 to take the remaining devices.

    Attributes:
        data: Data parallelism with replicated parameters. Spans slices, if there are several.
        fsdp: Data parallelism with sharded parameters and optimizer state.
        context: Devices that share a clip, each with a part of the image.
        tensor: Devices that share attention heads and hidden units of MLPs.
        context_parallelism: How the devices of `context` exchange what self-attention needs; `auto` selects
            the strategy that sends least and fits.
    """

    data: Annotated[int, Range(-1, 2**20)] = 1
    fsdp: Annotated[int, Range(-1, 2**20)] = -1
    context: Annotated[int, Range(-1, 2**20)] = 1
    tensor: Annotated[int, Range(-1, 2**20)] = 1
    context_parallelism: ContextParallelism = "auto"

    def __post_init__(self):
        super().__post_init__()
        for name, size in self.axes.items():
            if size == 0:
                raise ConfigError(f"{name} is 0; it must be at least 1, or -1 for the remaining devices")

    @property
    def axes(self) -> dict[str, int]:
        """Sizes by axis, the arguments of `make_mesh`."""
        return {name: getattr(self, name) for name in MESH_AXES}


def init_distributed() -> None:
    """Initialises `jax.distributed`; must be called before any other use of devices.

    On TPU pods, under SLURM, MPI and Kubernetes' job sets, JAX detects the other processes. Elsewhere it
    reads the environment: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES,
    JAX_PROCESS_ID.

    Raises:
        ConfigError: Neither gives the address of the other processes.
    """
    numbers = {
        name: int(os.environ[variable])
        for name, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID"))
        if variable in os.environ
    }
    try:
        jax.distributed.initialize(**numbers)
    except ValueError as error:
        raise ConfigError(
            f"cannot find the other processes ({error}); set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
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
    """Makes a mesh over the given devices, by default over the first ones, as many as it needs.

    Raises:
        ConfigError: The sizes do not fit the number of devices.
    """
    sizes = dict(zip(MESH_AXES, (data, fsdp, context, tensor), strict=True))
    asked = "mesh of " + ", ".join(f"{name} {size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ConfigError(f"{asked}: sizes must be at least 1, and one may be -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    if devices is None:
        devices = jax.devices() if -1 in sizes.values() else jax.devices()[:known]
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        raise ConfigError(f"{asked}: does not fit {len(devices)} devices")
    # jax.make_mesh makes Explicit axes by default; here the compiler propagates shardings.
    return Mesh(_arrange(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def _arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges devices so that neighbours in the mesh are physical neighbours."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ConfigError(f"mesh: data ({shape[0]}) must be a multiple of the number of slices ({slices})")
    within, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def in_host_memory() -> AbstractContextManager:
    """A context in which new arrays are placed in host memory, if JAX has a CPU backend."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        return nullcontext()


def mesh_device() -> Any:
    """A device of the mesh in force, which need not be attached; JAX's first one without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0] if device is None else device


def to_host(value: np.ndarray) -> Array:
    """An array in pinned memory of the host, from where the first device copies what it needs at a time."""
    pinned = SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return jax.device_put(value, pinned)


def axis_size(name: str) -> int:
    """Size of an axis of the current mesh (`jax.set_mesh`); 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def constrain(x: Array, *dimensions: str | None) -> Array:
    """Constrains the sharding of an activation by logical names of its dimensions; no-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(*dimensions))


def last_partition(x: Leaf, name: str) -> PartitionSpec:
    """Returns the partition of an array whose last dimension has a logical name, if its axes divide it."""
    axes = RULES[name]
    devices = math.prod(map(axis_size, (axes,) if isinstance(axes, str) else axes or ()))
    return partition(*[None] * (len(x.shape) - 1), name if x.shape[-1] % devices == 0 else None)


def constrain_last(x: Array, name: str) -> Array:
    """Constrains an activation to `last_partition`; no-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, last_partition(x, name))


def partition(*dimensions: str | None) -> PartitionSpec:
    """Returns the partition of an array with these logical dimensions.

    Raises:
        ValueError: Two dimensions map to the same mesh axis.
    """
    axes = [RULES[name] for name in dimensions]
    used = [axis for entry in axes if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(set(used)) < len(used):
        raise ValueError(f"dimensions {dimensions} collide: they are sharded along {used}")
    return PartitionSpec(*axes)


def divisible_partition(
    shape: Sequence[int], *dimensions: str | None, mesh: Mesh | AbstractMesh | None = None
) -> PartitionSpec:
    """Returns the partition of an array; a dimension that its mesh axes do not divide is not sharded.

    Args:
        shape: Shape of the array.
        dimensions: Logical names of its dimensions.
        mesh: The mesh; None: the current one.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    axes = partition(*dimensions)
    return PartitionSpec(
        *(entry if size % _size(entry, mesh) == 0 else None for entry, size in zip(axes, shape, strict=True))
    )


def replicate(tree: Leaf) -> Leaf:
    """Replicates every array on all devices of the current mesh; no-op without a mesh."""
    return tree if jax.sharding.get_abstract_mesh().empty else jax.device_put(tree, PartitionSpec())


def parameter_partition(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns the partition of a parameter, or of its gradient, moments or average.

    Args:
        path: Names joined by `/`.
        shape: Shape; a dimension that its mesh axes do not divide is not sharded.
        mesh: The mesh.
    """
    logical = next(dimensions for pattern, dimensions in PARAMETERS if re.search(pattern, path))
    if len(logical) > len(shape):
        raise ValueError(f"{path}: has {len(shape)} dimensions, but its rule needs {len(logical)} or more")
    return divisible_partition(shape, *[None] * (len(shape) - len(logical)), *logical, mesh=mesh)


def parameter_shardings(tree: Leaf, mesh: Mesh) -> Leaf:
    """Returns the sharding of every array in a tree of parameters, gradients or optimizer state."""

    def sharding(path: tuple, leaf: Leaf) -> NamedSharding:
        return NamedSharding(mesh, parameter_partition(_path(path), leaf.shape, mesh))

    return jax.tree.map_with_path(sharding, tree)


def shard_module(module: nnx.Module, mesh: Mesh) -> nnx.Module:
    """Returns the module with sharded parameters; abstract parameters get their shardings as annotations."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, place(state, parameter_shardings(state, mesh)))


def place(tree: Leaf, shardings: Leaf) -> Leaf:
    """Moves arrays to their shardings; `jax.ShapeDtypeStruct`s get them as annotations."""

    def put(leaf: Leaf, sharding: NamedSharding) -> Leaf:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(put, tree, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every array of a batch: along its leading axis."""
    return NamedSharding(mesh, partition("batch"))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises a ConfigError if a global batch cannot be sharded evenly."""
    shards = _size(RULES["batch"], mesh)
    if batch_size % shards:
        raise ConfigError(
            f"batch_size ({batch_size}) must be a multiple of data x fsdp of the mesh ({shards})"
        )


def process_rows(batch_size: int, mesh: Mesh) -> Int[np.ndarray, " R"]:
    """Returns the rows of a global batch that this process loads; processes that share a clip load the same.

    Raises:
        ConfigError: The batch cannot be sharded evenly.
    """
    check_batch_size(batch_size, mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices]))


def make_global_batch(
    local: Mapping[str, np.ndarray], rows: Int[np.ndarray, " R"], batch_size: int, mesh: Mesh
) -> dict[str, Array]:
    """Makes global arrays from the rows that each process has loaded.

    Args:
        local: Arrays by name, with the examples `rows` in that order.
        rows: Result of `process_rows`.
        batch_size: Examples in the global batch.
        mesh: Mesh of all processes.
    """

    def make_global(value: np.ndarray) -> Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return value[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        shape = (batch_size, *value.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)

    return {name: make_global(value) for name, value in local.items()}


def _size(entry: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def _path(path: tuple) -> str:
    """Path as in `nnx.to_flat_state`, where a variable is a leaf and does not contain a `value`."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
    return "/".join(names[:-1] if names[-1] == "value" else names)
