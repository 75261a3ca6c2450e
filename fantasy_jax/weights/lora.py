"""LoRAs that are added to a transformer while it is loaded: that of a store, and files of other programs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.config import Factor, Settings
from fantasy_jax.convert.files import open_weights
from fantasy_jax.convert.lora import LoRATensors, check_lora, read_lora
from fantasy_jax.convert.rules import LINEAR, flat_parameters
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.models.lora import add_products, merged_kernel
from fantasy_jax.models.wan import WanConfig
from fantasy_jax.system.registry import component_of, find_component
from fantasy_jax.typing import Array, Float
from fantasy_jax.weights.checksums import sha256
from fantasy_jax.weights.store import LORA, item_name, items, read_config, read_item

Values = dict[str, Any]
Merge = Callable[[str, Values], Values]
"""Hook `(item, parameters by path) -> parameters`, such as one that adds LoRA deltas."""


@dataclass(frozen=True)
class LoRAFile(Settings):
    """A LoRA file of another program, in any spelling of `convert.lora`.

    Attributes:
        path: The file.
        strength: Factor of all that it adds.
    """

    path: str
    strength: Factor = 1.0


def parse_lora(text: str) -> LoRAFile:
    """A LoRA file from `FILE` or `FILE:STRENGTH`.

    Raises:
        ConfigError: The file is not named, or the strength is out of range.
    """
    path, _, number = text.rpartition(":")
    try:
        file = LoRAFile(path, float(number)) if path else LoRAFile(text)
    except ConfigError as error:
        raise ConfigError(f"lora={text}: {error}") from error
    except ValueError:  # the colon belongs to the name
        file = LoRAFile(text)
    if not file.path:
        raise ConfigError("lora: is empty; give FILE or FILE:STRENGTH")
    return file


@dataclass(frozen=True, eq=False)
class OpenLoRA:
    """A LoRA file that fits a transformer.

    Attributes:
        tensors: Its content.
        strength: Factor of all that it adds.
    """

    tensors: LoRATensors
    strength: float

    def changed(self, *, products: bool = True) -> set[str]:
        """Paths of the parameters that `merge` changes."""
        return {
            entry.path
            for entry, change in self.tensors.changes
            if products or change.difference or entry.transform is not LINEAR
        }

    def merge(self, *, products: bool = True) -> Merge:
        """A hook that adds the file to the transformer's parameters, which become float32 for it.

        Args:
            products: Whether low-rank products are added too; without, they are for `attach`.
        """

        def merge(item: str, values: Values) -> Values:
            merged = dict(values)
            for entry, change in self.tensors.changes:
                if item_name(entry.layer) != item:
                    continue
                if products and (factors := self.tensors.product(entry, change)):
                    merged[entry.path] = merged_kernel(merged[entry.path], *factors, self.strength)
                if (difference := self.tensors.difference(entry, change)) is not None:
                    merged[entry.path] = _sum(merged[entry.path], np.float32(self.strength) * difference)
            return merged

        return merge

    def attach(self, network: nnx.Module) -> None:
        """Adds the low-rank products beside the layers of a transformer, in place."""
        factors: dict[str, dict[int | None, tuple[np.ndarray, np.ndarray]]] = {}
        for entry, change in self.tensors.changes:
            if found := self.tensors.product(entry, change):
                a, b = found
                path = entry.path.removesuffix("/kernel")
                factors.setdefault(path, {})[entry.layer] = a, np.float32(self.strength) * b
        target = self.tensors.plan.target
        stacks = {path: _stacked(x, target[f"{path}/kernel"].shape) for path, x in factors.items()}
        add_products(network, stacks)


def open_loras(files: Sequence[LoRAFile], config: WanConfig | None) -> list[OpenLoRA]:
    """Opens LoRA files for a transformer; reads no values.

    Args:
        files: The files.
        config: Sizes of the transformer; None if there is none.

    Raises:
        WeightsError: A file is missing, damaged, no LoRA, or for another transformer or none.
    """
    check_exist(files)
    if not files:
        return []
    if config is None:
        raise WeightsError(f"{files[0].path}: there is no transformer to add it to")
    target = flat_parameters(component_of(config).abstract(config))
    opened = []
    for file in files:
        tensors = read_lora(open_weights(file.path), config, target)
        opened.append(OpenLoRA(check_lora(tensors, config), file.strength))
    return opened


def lora_origin(file: LoRAFile) -> str:
    """A LoRA file's strength, name and the first eight digits of its SHA-256, in one line."""
    path = open_weights(file.path).path
    return f"{path.name}, strength {file.strength:g}, {sha256(path)[:8]}"


def check_exist(files: Sequence[LoRAFile]) -> None:
    """Raises a WeightsError if a LoRA file is missing, which says how a published one is fetched."""
    for path in (Path(file.path) for file in files):
        if path.exists():
            continue
        source = find_component(LORA).download
        hosted = next((name for name in source.patterns if path.as_posix().endswith(name)), None)
        if hosted is None:
            raise WeightsError(f"{path}: no such LoRA file")
        folder = path.as_posix().removesuffix(hosted).rstrip("/") or "."
        raise WeightsError(
            f"{path}: is missing; `convert_weights.py download --component={LORA} --output={folder}` fetches "
            f"it from {source.repository} (Hugging Face, 0.7 GiB), and --lora=FILE gives another one"
        )


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


def chain_merges(merges: Sequence[Merge]) -> Merge:
    """One hook for several, in their order; the parameters themselves where there is none."""

    def merge(item: str, values: Values) -> Values:
        for each in merges:
            values = each(item, values)
        return values

    return merge


@jax.jit
def _add(value: Array, difference: Array) -> Array:
    return value.astype(jnp.float32) + difference


def _sum(value: Array | np.ndarray, difference: np.ndarray) -> Array | np.ndarray:
    """A parameter, or the shards of it that this process has, plus a difference, float32."""
    return _add(value, difference) if isinstance(value, jax.Array) else value.astype(np.float32) + difference


def _stacked(
    layers: dict[int | None, tuple[np.ndarray, np.ndarray]], kernel: tuple[int, ...]
) -> tuple[Float[np.ndarray, "*stack I R"], Float[np.ndarray, "*stack R O"]]:
    """A and B of a layer, or of a stack of layers: zeros where one has a smaller rank, or none."""
    if None in layers:
        return layers[None]
    *stack, inputs, outputs = kernel
    rank = max(a.shape[-1] for a, _ in layers.values())
    a, b = np.zeros((*stack, inputs, rank), np.float32), np.zeros((*stack, rank, outputs), np.float32)
    for index, (thin, wide) in layers.items():
        a[index, :, : thin.shape[1]], b[index, : len(wide)] = thin, wide
    return a, b
