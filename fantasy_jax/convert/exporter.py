"""A network of the store back to a safetensors file, under the key names of PyTorch's programs."""

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fantasy_jax import weights
from fantasy_jax.convert.components import Component, Layout
from fantasy_jax.convert.files import WeightsError, write_safetensors
from fantasy_jax.convert.rules import Entry, TensorSpec, export_entries, flat_parameters


def export_weights(
    directory: str | Path,
    network: str,
    output: str | Path,
    *,
    layout: str = "official",
    merge_lora: bool = False,
    progress: bool = True,
) -> str:
    """Writes one network of the store as safetensors, block by block.

    Args:
        directory: The store.
        network: Its folder there, such as `transformer`.
        output: The file to write.
        layout: The spelling of the keys: `official`, `diffusers`, or another that the network has.
        merge_lora: Whether the store's LoRA is added to the transformer's weights.
        progress: Show bytes done and time left.

    Returns:
        What was written, in a line.

    Raises:
        WeightsError: The network is missing, has no such layout, or the file cannot be written.
    """
    folder, output = Path(directory) / network, Path(output)
    if output.suffix != ".safetensors":
        raise WeightsError(f"{output}: is written as safetensors; give a name that ends so")
    component, record = weights.read_record(folder)
    config = component.read_config(record["config"], folder)
    dtype = np.dtype(jnp.dtype(record["dtype"]))
    target = flat_parameters(component.abstract(config))
    chosen = _layout(component, layout, folder)
    # Sorted by item, so that each is read once.
    entries = sorted(export_entries(chosen.rules(config), target), key=_item)
    specs = {entry.key: TensorSpec(_shape(entry, target[entry.path].shape), dtype) for entry in entries}
    total = sum(int(np.prod(spec.shape)) * dtype.itemsize for spec in specs.values())
    places = weights.items(component, config)
    if merge_lora and network != "transformer":
        raise WeightsError(f"{folder}: no LoRA is for it, but for the transformer")
    merge = weights.lora_merge(Path(directory) / weights.LORA) if merge_lora else lambda item, values: values

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        item, values = "", {}
        with tqdm(total=total, unit="B", unit_scale=True, desc=network, disable=not progress) as bar:
            for entry in entries:
                if _item(entry) != item:
                    item, values = _item(entry), {}  # the last item goes before the next comes
                    values = merge(item, weights.read_item(folder, item, places[item]))
                value = entry.transform.inverse(entry.place(values[entry.path], of_layer=True))
                bar.update(value.size * dtype.itemsize)
                yield entry.key, value.astype(dtype)

    output.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(output, specs, tensors())
    return (
        f"{output}: {len(specs)} tensors of {component.name}, {chosen.name} keys, {total:,} bytes of {dtype}"
    )


def _item(entry: Entry) -> str:
    return weights.item_name(entry.layer)


def _shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape in the file, found without memory."""
    return entry.transform.inverse(entry.place(np.broadcast_to(np.int8(0), shape))).shape


def _layout(component: Component, name: str, folder: Path) -> Layout:
    """The layout of this name; where a network has only one kind, the nearest."""
    names = [layout.name for layout in component.layouts]
    if name not in names and name == "official":
        return component.layouts[0]
    if name not in names and name == "diffusers":  # whose folders hold transformers' encoders
        name = "transformers"
    if name not in names:
        raise WeightsError(f"{folder}: {component.name} has no layout {name!r}; there is {', '.join(names)}")
    return component.layouts[names.index(name)]
