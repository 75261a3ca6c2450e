"""Export of a stored network to a safetensors file with the keys of PyTorch programs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fantasy_jax.convert.files import write_safetensors
from fantasy_jax.convert.rules import Entry, TensorSpec, export_entries, flat_parameters
from fantasy_jax.errors import WeightsError
from fantasy_jax.files import check_outputs
from fantasy_jax.models.eight_bit import dequantize_values, eight_bit_layers
from fantasy_jax.system.registry import Component, Layout
from fantasy_jax.weights.inspect import store_paths
from fantasy_jax.weights.lora import LoRAFile, chain_merges, lora_merge, open_loras
from fantasy_jax.weights.store import LORA, item_name, items, read_item, read_record


def export_weights(
    directory: str | Path,
    slot: str,
    output: str | Path,
    *,
    layout: str = "official",
    merge_lora: bool = False,
    loras: Sequence[LoRAFile] = (),
    progress: bool = True,
) -> str:
    """Writes one network of a store as safetensors, one block at a time; 8-bit weights in 16 or 32 bits.

    Args:
        directory: The store.
        slot: The network's folder in the store, such as `transformer`.
        output: The file to write.
        layout: Layout of the keys: `official`, `diffusers`, or another one that the network has.
        merge_lora: Whether the store's LoRA is added to the transformer's weights.
        loras: Files of LoRAs that are added to them too.
        progress: Whether to show a progress bar.

    Returns:
        A summary in one line.

    Raises:
        WeightsError: The network is missing or has no such layout.
        MediaError: The file cannot be written.
    """
    folder, output = Path(directory) / slot, Path(output)
    if output.suffix != ".safetensors":
        raise WeightsError(f"{output}: the name must end in .safetensors")
    if (merge_lora or loras) and slot != "transformer":
        raise WeightsError(f"{folder}: a LoRA can only be merged into the transformer")
    component, record = read_record(folder)
    config = component.read_config(record["config"], folder)
    chosen = _layout(component, layout, folder)
    target = flat_parameters(component.abstract(config))
    # Sorted by item, so that each is read once.
    entries = sorted(export_entries(chosen.rules(config), target), key=_item)
    specs = {entry.key: _spec(entry, target[entry.path].shape, record) for entry in entries}
    total = sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in specs.values())
    places = items(component, config, eight_bit_layers(record.get("other_dtypes", {})))
    merges = [lora_merge(Path(directory) / LORA)] if merge_lora else []
    merges += [lora.merge() for lora in open_loras(loras, config)] if loras else []
    merge = chain_merges(merges)
    check_outputs([output], [*store_paths(directory), *(file.path for file in loras)])

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        item, values = "", {}
        with tqdm(total=total, unit="B", unit_scale=True, desc=slot, disable=not progress) as bar:
            for entry in entries:
                if _item(entry) != item:
                    item, values = _item(entry), {}  # frees the previous item before the next one is read
                    values = merge(item, dequantize_values(read_item(folder, item, places[item])))
                value = entry.transform.inverse(entry.place(values[entry.path], of_layer=True))
                value = value.astype(specs[entry.key].dtype)
                bar.update(value.nbytes)
                yield entry.key, value

    write_safetensors(output, specs, tensors())
    kind = f"{chosen.name} keys, {total:,} bytes of {record['dtype']}"
    lost = "; the keys do not hold still_condition" if getattr(config, "still_condition", False) else ""
    return f"{output}: {len(specs)} tensors of {component.name}, {kind}{lost}"


def _item(entry: Entry) -> str:
    return item_name(entry.layer)


def _spec(entry: Entry, shape: tuple[int, ...], record: Mapping[str, Any]) -> TensorSpec:
    """Shape and dtype of a tensor in the file, without allocating it; `shape` is that of the parameter."""
    dtype = entry.transform.dtype or record.get("other_dtypes", {}).get(entry.path, record["dtype"])
    value = entry.transform.inverse(entry.place(np.broadcast_to(np.int8(0), shape)))
    return TensorSpec(value.shape, np.dtype(dtype))


def _layout(component: Component, name: str, folder: Path) -> Layout:
    """Returns the layout of this name; for `official` and `diffusers` the network's closest one."""
    names = [layout.name for layout in component.layouts]
    if name not in names and name == "official":
        return component.layouts[0]
    if name not in names and name == "diffusers":  # whose folders hold encoders of transformers
        name = "transformers"
    if name not in names:
        raise WeightsError(
            f"{folder}: {component.name} has no layout {name!r}; choose from {', '.join(names)}"
        )
    return component.layouts[names.index(name)]
