"""Networks from a store, whole on one device or sharded over a mesh."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fantasy_jax.config import as_json, differences
from fantasy_jax.convert.rules import flat_parameters
from fantasy_jax.errors import WeightsError
from fantasy_jax.models.eight_bit import Layers, eight_bit_layers, layers_of_products, multiply_in_eight_bits
from fantasy_jax.models.layers import is_stacked_matrix
from fantasy_jax.models.lora import attach_lora
from fantasy_jax.preprocessing.text import Tokenizer, byte_tokenizer, load_tokenizer
from fantasy_jax.sharding import WeightsMemory, shard_module, to_host
from fantasy_jax.system.model import ModelConfig
from fantasy_jax.system.networks import MLPS, Networks, RandomLoader, check_memory, is_streamed
from fantasy_jax.system.registry import Component, component_of
from fantasy_jax.typing import DType
from fantasy_jax.weights.lora import (
    LoRAFile,
    Merge,
    OpenLoRA,
    Values,
    chain_merges,
    check_exist,
    lora_merge,
    open_loras,
)
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


def stored_networks(
    directory: str | Path,
    config: ModelConfig | None = None,
    *,
    dtype: str = "bfloat16",
    new_adapters: bool = False,
    merge_lora: bool = True,
    loras: Sequence[LoRAFile] = (),
    weights_memory: WeightsMemory = "device",
    eight_bit_products: bool = False,
) -> Networks:
    """Networks from a store, each loaded when it is asked for.

    Args:
        directory: The store.
        config: Sizes that the store must have, and type of weights and products; the store's preview decoder
            is added if there is one. None takes the store's sizes.
        dtype: Type of weights and products where there is no `config`.
        new_adapters: Whether adapters that the store lacks are initialised, to be trained.
        merge_lora: Whether low-rank products are added to the transformer's weights, or stay beside them.
        loras: Files of LoRAs that are added to the transformer, after the store's LoRA.
        weights_memory: Where the matrices of the blocks of the transformer and its adapters lie.
        eight_bit_products: Whether the transformer's MLPs multiply in 8 bits; their weights must have 8 bits.

    Raises:
        WeightsError: A network is missing, damaged, or of another model, or a LoRA would change 8-bit
            weights; no weights are read to find out.
        ConfigError: Products are to have 8 bits, but no weights of MLPs have.
    """
    directory = Path(directory)
    check_exist(loras)  # before the store, which takes longer to make
    found = stored_networks_of(directory)
    if config is None:
        config = ModelConfig(dtype=dtype, **{slot: sizes for slot, (_, sizes) in found.items()})
    elif config.preview_decoder is None and "preview_decoder" in found:
        config = config.replace(preview_decoder=found["preview_decoder"][1])
    adapters = {row.slot for row in config.adapters.values()} if new_adapters else set()
    new = adapters - found.keys()
    for slot, sizes in config.networks.items():
        if slot in new:
            continue
        if slot not in found:
            raise _missing(directory / slot, found)
        _check_sizes(directory / slot, sizes)
    for note in notes(directory, [slot for slot in config.networks if slot not in new]):
        logging.getLogger(__name__).warning("%s", note)
    loader = StoredLoader(
        directory,
        new=new,
        merge_lora=merge_lora,
        loras=open_loras(loras, config.transformer),
        weights_memory=weights_memory,
        eight_bit_products=eight_bit_products,
    )
    return Networks(config, loader, partial(_tokenizer, directory))


def stored_network(directory: str | Path, slot: str) -> nnx.Module:
    """One network of a store, in float32.

    Raises:
        WeightsError: The store does not hold it, or it is damaged.
    """
    networks = stored_networks(directory, dtype="float32")
    if slot not in networks:
        raise _missing(Path(directory) / slot, networks)
    return networks[slot]


def _missing(folder: Path, found: Iterable[str]) -> WeightsError:
    return WeightsError(
        f"{folder}: is missing; the store holds {', '.join(found) or 'nothing'}. Import it, or take the "
        "config that the store was made for"
    )


def notes(directory: Path, slots: Sequence[str]) -> list[str]:
    """What a user should know about the networks in these slots, one line each.

    Weights that are random, and adapters that were trained with another encoder than the store's.
    """
    stored = {slot: read_record(directory / slot) for slot in slots}
    records = {slot: record for slot, (_, record) in stored.items()}
    random = [slot for slot, record in records.items() if record.get("random")]
    lines = [f"{directory}: the weights of {', '.join(random)} are random"] if random else []
    for slot, record in records.items():
        for encoder, trained_with in record.get("trained_with", {}).items():
            if encoder in records and (given := network_hash(directory / encoder)) != trained_with:
                lines.append(
                    f"{directory / slot}: was trained with another {encoder} ({trained_with[:8]}) than the "
                    f"store's ({given[:8]})"
                )
        # Published files do not say what they were trained with; it is the first of the encoder's presets.
        if record.get("preset") in stored[slot][0].presets and not record.get("trained_with"):
            for encoder in set(stored[slot][0].encoders) & records.keys():
                lines += _unlike_published(directory / slot, *stored[encoder])
    return lines


def _unlike_published(adapter: Path, encoder: Component, record: Mapping[str, Any]) -> list[str]:
    """What to know about an encoder whose settings are not those of the one that is published."""
    name, published = next(iter(encoder.presets.items()))
    found = differences(as_json(published), record["config"])
    names = ", ".join(setting for setting, _, other in found if other is not None)
    if not names:
        return []
    return [
        f"{adapter}: was trained with {name}, but the store's {encoder.slot} has other {names}; continue "
        "training the adapter with this encoder"
    ]


class StoredLoader:
    """Loads networks from a store (a `system.networks.Loader`)."""

    def __init__(
        self,
        directory: Path,
        *,
        new: set[str] = frozenset(),
        merge_lora: bool = True,
        loras: Sequence[OpenLoRA] = (),
        weights_memory: WeightsMemory = "device",
        eight_bit_products: bool = False,
    ):
        """Keeps where they are, and how they are loaded (`stored_networks`).

        Networks of the slots in `new` are initialised instead.

        Raises:
            WeightsError: A LoRA is to be added to 8-bit weights.
            ConfigError: Products are to have 8 bits, but no weights of MLPs have.
        """
        stored = [directory / LORA] if (directory / LORA).exists() else []
        names = [*stored, *(file.tensors.weights.path for file in loras)]
        eight_bit = stored_eight_bit(directory / "transformer") if names or eight_bit_products else {}
        if merge_lora and names and eight_bit:
            raise WeightsError(
                f"{names[0]}: cannot be added to 8-bit weights, to whose precision it would be rounded; set "
                "--config.sample.merge_lora=False, which leaves it beside them"
            )
        for file in loras:
            if changed := {f"{layer}/kernel" for layer in eight_bit} & file.changed(products=merge_lora):
                raise WeightsError(
                    f"{file.tensors.weights.path}: cannot change 8-bit weights ({min(changed)}); use a store "
                    "with weights of 16 bits"
                )
        if eight_bit_products:
            layers_of_products(eight_bit, MLPS)
        self.directory, self.new, self.merge_lora, self.loras = directory, new, merge_lora, loras
        self.weights_memory, self.eight_bit_products = weights_memory, eight_bit_products

    def __call__(self, component: Component, config: Any, dtype: jnp.dtype, mesh: Mesh | None) -> nnx.Module:
        """Loads one network; the transformer with the LoRAs of store and files."""
        if component.slot in self.new:
            return RandomLoader()(component, config, dtype, mesh)
        load = partial(load_network, dtype=dtype, mesh=mesh)
        folder, lora = self.directory / component.slot, self.directory / LORA
        memory = self.weights_memory if is_streamed(component) else "device"
        if component.slot != "transformer":
            return load(folder, config, memory=memory)
        merges = [file.merge(products=self.merge_lora) for file in self.loras]
        if self.merge_lora and lora.exists():
            merges = [lora_merge(lora), *merges]
        network = load(folder, config, merge=chain_merges(merges), memory=memory)
        if not self.merge_lora:
            network = self._with_products(network, load, mesh)
        if self.eight_bit_products:
            multiply_in_eight_bits(network, MLPS)
        return network

    def _with_products(
        self, network: nnx.Module, load: Callable[[Path, Any], nnx.Module], mesh: Mesh | None
    ) -> nnx.Module:
        """The transformer with the products of all LoRAs beside its layers, sharded like their kernels."""
        if (lora := self.directory / LORA).exists():
            attach_lora(network, load(lora, read_config(lora)[1]))
        for file in self.loras:
            file.attach(network)
        return network if mesh is None else shard_module(network, mesh)


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
        memory: Where the matrices of blocks lie.

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
            if is_stacked_matrix(path):
                values[path] = to_host(values[path])
    return component.build(config, dtype, values, eight_bit)


def stored_eight_bit(folder: Path) -> Layers:
    """The layers of a stored network that have 8-bit weights."""
    return eight_bit_layers(read_record(folder)[1].get("other_dtypes", {}))


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
