"""References: folders of inputs and outputs, made by running the original modules."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.convert.files import WeightsFile, open_weights, read_config
from fantasy_jax.errors import WeightsError
from fantasy_jax.typing import Array, DType
from fantasy_jax.weights.detect import detect

Outputs = Iterator[tuple[str, np.ndarray | Array]]
"""Name and value of each output."""
_ACTIVATIONS, _WEIGHTS = "activations.safetensors", "weights.safetensors"


def reference_files(folder: str | Path) -> list[Path]:
    """The files that a reference consists of."""
    return [Path(folder) / name for name in ("config.json", _ACTIVATIONS, _WEIGHTS)]


class Reference:
    """A folder of `config.json`, `activations.safetensors`, and in most cases `weights.safetensors`.

    Attributes:
        folder: The folder.
        dtype: Dtype of matrix products and weights of `modules`.
        config: Content of config.json.
        activations: Arrays `input.*` and `output.*`, channels first as in PyTorch.
    """

    folder: Path
    dtype: DType
    config: Mapping[str, Any]
    activations: Mapping[str, np.ndarray]

    def __init__(self, folder: str | Path, dtype: DType = jnp.float32):
        """Reads all but the weights.

        Raises:
            WeightsError: The folder is not a reference.
        """
        self.folder, self.dtype = Path(folder), dtype
        self.config = read_config(self.folder)
        if not isinstance(self.config, Mapping) or not isinstance(self.config.get("component"), str):
            raise WeightsError(f"{self.folder}: has no config.json that names a component")
        file = open_weights(self.folder / _ACTIVATIONS)
        self.activations = {key: file.read(key) for key in file.specs}

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """The outputs by name."""
        prefix = "output."
        return {k.removeprefix(prefix): x for k, x in self.activations.items() if k.startswith(prefix)}

    @cached_property
    def weights(self) -> WeightsFile:
        """The tensors of weights.safetensors."""
        return open_weights(self.folder / _WEIGHTS)

    @cached_property
    def modules(self) -> Mapping[str, nnx.Module]:
        """The networks in weights.safetensors, by the name of their format."""
        return {found.component.name: found.load(self.dtype) for found in detect(self.weights)}

    def array(self, key: str) -> Array:
        """One array of activations.safetensors."""
        return jnp.asarray(self.activations[key])

    def images(self, key: str) -> Array:
        """One array of images, latents or video, channels last."""
        return jnp.moveaxis(self.array(key), 1, -1)


def channels_first(x: Array) -> np.ndarray:
    """Images, latents or video as a reference has them."""
    return np.moveaxis(np.asarray(x), -1, 1)
