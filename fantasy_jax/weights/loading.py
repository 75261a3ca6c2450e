"""Networks from a store, whole on one device or sharded over a mesh."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fantasy_jax.config import as_json
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.errors import WeightsError
from fantasy_jax.models.eight_bit import eight_bit_layers, multiply_in_eight_bits
from fantasy_jax.models.layers import is_stacked
from fantasy_jax.models.lora import attach_lora, merged_kernel
from fantasy_jax.preprocessing.text import Tokenizer, byte_tokenizer, load_tokenizer
from fantasy_jax.sharding import WeightsMemory, shard_module, to_host
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import MLPS, Networks, RandomLoader, check_memory, is_streamed
from fantasy_jax.system.registry import Component, component_of
from fantasy_jax.typing import DType
from fantasy_jax.weights.store import (
    LORA,
    TOKENIZER,
    check_sums,
    items,
    network_hash,
    read_config,
    read_item,
    read_record,
    stored_networks_of,
)

Values = dict[str, Any]
Merge = Callable[[str, Values], Values]
"""Hook `(item, parameters by path) -> parameters`, such as one that adds LoRA deltas."""


def stored_networks(
    directory: str | Path,
    config: ModelConfig | None = None,
    *,
    dtype: str = "bfloat16",
    new_adapters: bool = False,
    merge_lora: bool = True,
    weights_memory: WeightsMemory = "device",
    eight_bit_products: bool = False,
) -> Networks:
    """Networks from a store, each loaded when it is asked for.

    Args:
        directory: The store.
        config: Sizes that the store must have, and type of weights and products; None takes the store's
            sizes.
        dtype: Type of weights and products where there is no `config`.
        new_adapters: Whether adapters that the store lacks are initialised, to be trained.
        merge_lora: Whether the store's LoRA is added to the transformer's weights, or stays beside them.
        weights_memory: Where the weights of the blocks of the transformer and its adapters lie.
        eight_bit_products: Whether the transformer's MLPs multiply in 8 bits; their weights must have 8 bits.

    Raises:
        WeightsError: A network is missing, damaged, or of another model; no weights are read to find out.
    """
    directory = Path(directory)
    found = stored_networks_of(directory)
    if config is None:
        config = ModelConfig(dtype=dtype, **{slot: sizes for slot, (_, sizes) in found.items()})
    adapters = {row.slot for row in config.adapters.values()} if new_adapters else set()
    new = adapters - found.keys()
    for slot, sizes in config.networks.items():
        if slot in new:
            continue
        if slot not in found:
            raise WeightsError(
                f"{directory / slot}: is missing; the store holds {', '.join(found) or 'nothing'}. Import "
                "it, or take the config that the store was made for"
            )
        _check_sizes(directory / slot, sizes)
    for note in notes(directory, [slot for slot in config.networks if slot not in new]):
        logging.getLogger(__name__).warning("%s", note)
    loader = StoredLoader(
        directory,
        new=new,
        merge_lora=merge_lora,
        weights_memory=weights_memory,
        eight_bit_products=eight_bit_products,
    )
    return Networks(config, loader, partial(_tokenizer, directory))


def notes(directory: Path, slots: Sequence[str]) -> list[str]:
    """What a user should know about the networks in these slots, one line each.

    Weights that are random, and adapters that were trained with another encoder than the store's.
    """
    records = {slot: read_record(directory / slot)[1] for slot in slots}
    random = [slot for slot, record in records.items() if record.get("random")]
    lines = [f"{directory}: the weights of {', '.join(random)} are random"] if random else []
    for slot, record in records.items():
        for encoder, trained_with in record.get("trained_with", {}).items():
            if encoder in records and (given := network_hash(directory / encoder)) != trained_with:
                lines.append(
                    f"{directory / slot}: was trained with another {encoder} ({trained_with[:8]}) than the "
                    f"store's ({given[:8]})"
                )
    return lines


class StoredLoader:
    """Loads networks from a store (a `system.networks.Loader`)."""

    def __init__(
        self,
        directory: Path,
        *,
        new: set[str] = frozenset(),
        merge_lora: bool = True,
        weights_memory: WeightsMemory = "device",
        eight_bit_products: bool = False,
    ):
        """Keeps where they are, and how they are loaded (`stored_networks`).

        Networks of the slots in `new` are initialised instead.

        Raises:
            WeightsError: A LoRA is to be added to 8-bit weights.
        """
        if merge_lora and (directory / LORA).exists() and _has_eight_bit(directory / "transformer"):
            raise WeightsError(
                f"{directory / LORA}: cannot be added to 8-bit weights, to whose precision it would be "
                "rounded; set --config.sample.merge_lora=False, which leaves it beside them"
            )
        self.directory, self.new, self.merge_lora = directory, new, merge_lora
        self.weights_memory, self.eight_bit_products = weights_memory, eight_bit_products

    def __call__(self, component: Component, config: Any, dtype: jnp.dtype, mesh: Mesh | None) -> nnx.Module:
        """Loads one network; the transformer with the store's LoRA."""
        if component.slot in self.new:
            return RandomLoader()(component, config, dtype, mesh)
        folder, lora = self.directory / component.slot, self.directory / LORA
        load = partial(load_network, config=config, dtype=dtype, mesh=mesh)
        if is_streamed(component):
            load = partial(load, memory=self.weights_memory)
        if component.slot != "transformer":
            return load(folder)
        if not lora.exists():
            network = load(folder)
        elif self.merge_lora:
            network = load(folder, merge=lora_merge(lora))
        else:
            network = load(folder)
            attach_lora(network, load_network(lora, read_config(lora)[1], dtype=dtype, mesh=mesh))
            # Beside a layer, A and B are sharded like its kernel.
            network = network if mesh is None else shard_module(network, mesh)
        if self.eight_bit_products:
            multiply_in_eight_bits(network, MLPS)
        return network


def load_network(
    folder: Path,
    config: Any,
    *,
    dtype: DType,
    mesh: Mesh | None = None,
    merge: Merge = lambda item, values: values,
    memory: WeightsMemory = "device",
) -> nnx.Module:
    """Loads a stored network of the given sizes.

    On a mesh each process reads its own shards only, one block at a time, so that its host memory holds one
    block beside the shards.

    Args:
        folder: The network's own, such as `DIR/transformer`.
        config: Its sizes.
        dtype: Type of weights and products. Parameters that the store holds in another type than most of the
            network (`other_dtypes`), such as 8-bit weights, keep theirs.
        mesh: Mesh that the parameters are sharded over; None: one device.
        merge: Changes what is read.
        memory: Where the parameters of blocks lie.

    Raises:
        WeightsError: The folder is missing, incomplete, damaged, or of another model.
        ConfigError: Parameters of several devices are to lie in the memory of the host.
    """
    component = _check_sizes(folder, config)
    check_memory(memory, mesh)
    others = read_record(folder)[1].get("other_dtypes", {})
    eight_bit = eight_bit_layers(others)
    abstract = component.abstract(config, dtype, eight_bit)
    target = flat_parameters(abstract if mesh is None else shard_module(abstract, mesh))
    values: Values = {}
    for item, places in items(component, config, eight_bit).items():
        wanted = {path: _layer_spec(target[path], layer, mesh) for path, layer in places.items()}
        read = merge(item, read_item(folder, item, wanted))
        for path, layer in places.items():
            if read[path].shape != wanted[path].shape:
                raise WeightsError(f"{folder / item}: {path} is {read[path].shape}, not {wanted[path].shape}")
            put = _put_numpy if mesh is None else _put_sharded
            values[path] = put(
                values.get(path), target[path], read.pop(path), layer, np.dtype(others.get(path, dtype))
            )
    if memory == "host":
        for path in values:
            if is_stacked(path):
                values[path] = to_host(values[path])
    return component.build(config, dtype, values, eight_bit)


def lora_merge(folder: Path) -> Merge:
    """A hook that adds a stored LoRA to the network that it is for, item by item.

    Raises:
        WeightsError: The LoRA is missing or damaged. The hook raises it where the LoRA is for another
            network.
    """
    component, config = read_config(folder)
    places = items(component, config)

    def merge(item: str, values: Values) -> Values:
        thin = read_item(folder, item, places[item]) if item in places else {}
        merged = {}
        for layer in {path.rpartition("/")[0] for path in thin}:
            kernel, (a, b) = f"{layer}/kernel", (thin[f"{layer}/{name}"] for name in ("lora_a", "lora_b"))
            if kernel not in values or values[kernel].shape != (len(a), b.shape[1]):
                raise WeightsError(f"{folder}: is for {layer} of {len(a)} x {b.shape[1]}, of another model")
            merged[kernel] = merged_kernel(values[kernel], a, b, config.scale)
        return values | merged

    return merge


def _has_eight_bit(folder: Path) -> bool:
    return bool(eight_bit_layers(read_record(folder)[1].get("other_dtypes", {})))


def _put_numpy(stack: Any, spec: Any, value: Any, layer: int | None, dtype: np.dtype) -> np.ndarray:
    """Puts a parameter, or a layer of a stacked one, into host memory."""
    if stack is None:
        stack = np.empty(spec.shape, dtype)
    stack[... if layer is None else layer] = value
    return stack


def _put_sharded(stack: Any, spec: Any, value: Any, layer: int | None, dtype: np.dtype) -> jax.Array:
    """Puts a parameter, or a layer of a stacked one, onto the mesh; the stack is updated in place."""
    if layer is None:
        return jax.device_put(value, spec.sharding).astype(dtype)
    if stack is None:
        stack = jax.jit(lambda: jnp.zeros(spec.shape, dtype), out_shardings=spec.sharding)()
    return _set_layer(stack, value, layer)


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, value: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, value.astype(stack.dtype), layer, 0)


def _layer_spec(spec: Any, layer: int | None, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """A parameter's shape, and its sharding on a mesh; those of one layer of a stacked one."""
    # Without a mesh to load onto, the sharding is that of another mesh in force, and is not wanted.
    sharding = None if mesh is None else spec.sharding
    if layer is None:
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype, sharding=sharding)


def _check_sizes(folder: Path, config: Any) -> Component:
    """The component of a folder, which must have the sizes of a config; raises WeightsError if not."""
    component, stored = read_record(folder)
    if type(config) is not component.config_type:
        raise WeightsError(f"{folder}: holds {component.name}, but {component_of(config).name} is asked for")
    # Sizes that an earlier version did not have are the defaults.
    sizes, given = (as_json(x) for x in (component.read_config(stored["config"], folder), config))
    if sizes != given:
        differing = [name for name in given if given[name] != sizes[name]]
        names = ", ".join(f"{n} {sizes[n]} (asked for: {given[n]})" for n in differing[:3])
        setting = f"--config.model.{component.slot}.{differing[0]}={sizes[differing[0]]}"
        raise WeightsError(f"{folder}: is of another model; it has {names}; {setting} asks for its own")
    return component


def _tokenizer(directory: Path) -> Tokenizer:
    folder = directory / "text_encoder" / TOKENIZER
    if not folder.is_dir():
        return byte_tokenizer()
    check_sums(folder.parent, TOKENIZER)
    return load_tokenizer(folder)
