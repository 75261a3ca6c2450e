"""The registry of all networks, one row each.

A new network needs a row (`register`), and nothing else that names it: store, import, export, loading,
sharding and ahead-of-time compilation iterate over the rows.
"""

import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.config import build
from fantasy_jax.convert.rules import STORED, Rule, assign
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.models.eight_bit import EXACT, Layers, with_eight_bit
from fantasy_jax.models.layers import abstract, traced_rngs
from fantasy_jax.typing import DType
from fantasy_jax.video import VideoConfig

MODULES = ("fantasy_jax.system.components", "fantasy_jax.miniature.components")
"""Modules that register rows, in order; `components` imports them."""


InputSpec = tuple[tuple[int, ...], DType]
"""Shape and dtype of an array."""


@dataclass(frozen=True)
class Layout:
    """One naming scheme of a network's tensors.

    Attributes:
        name: Such as `official`, `diffusers` or `transformers`.
        signature: Keys by which a file of this layout is detected; empty: none is.
        rules: Makes the key table of a config.
    """

    name: str
    signature: Collection[str]
    rules: Callable[[Any], list[Rule]]


@dataclass(frozen=True)
class Download:
    """Where the published files of a network are, and how they are imported.

    Attributes:
        repository: Name on the Hugging Face hub; empty if `download` does not fetch the network.
        patterns: Shell patterns of the repository's files.
        folder: Folder for these files, relative to the output of `download`.
        wan_files: File or folder of the network in a folder of Wan2.1, by the folder's layout; None if it is
            not part of Wan2.1.
        wan_tokenizer: The same for the tokenizer that belongs to the network.
        tokenizer_key: Key of the tokenizer, a file of SentencePiece, in other programs' files of the network.
        option: Option of `convert_weights.py import` that takes the network's file; empty if there is none.
        metavar: `FILE` or `DIR`.
        help: Help text of the option.
    """

    repository: str = ""
    patterns: Sequence[str] = ()
    folder: str = ""
    wan_files: Mapping[str, str] | None = None
    wan_tokenizer: Mapping[str, str] | None = None
    tokenizer_key: str = ""
    option: str = ""
    metavar: str = "FILE"
    help: str = ""


@dataclass(frozen=True)
class Component:
    """One network.

    Attributes:
        name: Name of its weight format, in `component.json`, references and `convert_weights.py`.
        slot: Its field in `ModelConfig`, and its folder in the store.
        network: Its class: `network(config, rngs=..., dtype=..., param_dtype=...)`.
        presets: Published sizes by name.
        from_json: Makes the sizes from a config.json beside a weights file; KeyError or TypeError if that
            belongs to another program. None: it holds the fields of `config_type`.
        layouts: Naming schemes of its tensors; detection takes the first that matches.
        ignored: Makes shell patterns of keys that are not needed.
        prefix: Prefix of its keys in a file that it shares with another network.
        equal: Fields of its config that must equal a field of another network, as `slot.field`.
        adapter: Name of the condition that it adds to the transformer; None for a network that is not an
            adapter.
        dtype: Fixed dtype of its weights and products; None: that of the system.
        inputs: Shapes and dtypes of what it runs on for one clip, from the sizes of all networks and the
            geometry of the clip; None for a network that other programs contain.
        download: Its published files.
    """

    name: str
    slot: str
    network: Callable[..., nnx.Module]
    presets: Mapping[str, Any]
    from_json: Callable[[dict[str, Any]], Any] | None
    layouts: Sequence[Layout]
    ignored: Callable[[Any], Sequence[str]] = lambda config: ()
    prefix: str = ""
    equal: Mapping[str, str] | None = None
    adapter: str | None = None
    dtype: str | None = None
    inputs: Callable[[Any, VideoConfig], Sequence[InputSpec]] | None = None
    download: Download = Download()

    @property
    def config_type(self) -> type:
        """The dataclass of its sizes."""
        return type(next(iter(self.presets.values())))

    @property
    def encoders(self) -> list[str]:
        """Slots of the networks whose outputs it takes, except for the transformer."""
        slots = [field.partition(".")[0] for field in (self.equal or {}).values()]
        return [slot for slot in dict.fromkeys(slots) if slot != "transformer"]

    def read_config(self, values: Mapping[str, Any], path: Path) -> Any:
        """Builds the sizes from the JSON form of their fields; `path` is for the WeightsError."""
        try:
            return build(self.config_type, values, self.name)
        except (TypeError, ValueError) as error:
            raise WeightsError(f"{path}: does not hold the sizes of {self.name} ({error})") from error

    def published_config(self, values: Mapping[str, Any]) -> Any:
        """Builds the sizes from the config.json beside a weights file; None if it does not hold them."""
        try:
            return (self.from_json or self._from_fields)(dict(values))
        except (KeyError, TypeError):
            return None

    def _from_fields(self, values: Mapping[str, Any]) -> Any:
        return _from_fields(self.config_type, values)

    def abstract(self, config: Any, dtype: DType = jnp.float32, eight_bit: Layers = EXACT) -> nnx.Module:
        """Returns the module with `jax.ShapeDtypeStruct`s as parameters.

        Args:
            config: Sizes.
            dtype: Dtype of weights and matrix products.
            eight_bit: Layers that have 8-bit weights.
        """
        return abstract(lambda rngs: with_eight_bit(self._make(config, dtype, rngs), eight_bit))

    def init(self, config: Any, dtype: DType, *, seed: int = 0, **more: Any) -> nnx.Module:
        """Returns the module with random initial weights, drawn by one compiled program.

        Args:
            config: Sizes.
            dtype: Dtype of weights and matrix products.
            seed: Seed of the weights.
            more: Further modules that the constructor takes.
        """

        @nnx.jit
        def draw(key: jax.Array, more: dict[str, Any]) -> nnx.Module:
            return self._make(config, dtype, traced_rngs(key), **more)

        # The default generator would take most of the compile time, once for each parameter.
        return draw(jax.random.key(seed, impl="rbg"), more)

    def build(
        self,
        config: Any,
        dtype: DType,
        values: dict[str, np.ndarray | jax.Array],
        eight_bit: Layers = EXACT,
    ) -> nnx.Module:
        """Returns the module with the given parameters.

        Args:
            config: Sizes.
            dtype: Dtype of weights and matrix products.
            values: All parameters by path. Each is removed once it is set, so that no weight is in memory
                twice.
            eight_bit: Layers that have 8-bit weights.

        Raises:
            ConversionError: A parameter is missing or unexpected.
        """
        module = self.abstract(config, dtype, eight_bit)
        assign(module, values, consume=True)
        # Variables other than parameters (the VAE's latent statistics) are not stored but computed from the
        # config. The compiler removes the unused initial weights.
        others = jax.jit(lambda: nnx.state(self._make(config, dtype, traced_rngs()), nnx.Not(STORED)))
        nnx.update(module, others())
        return module

    def _make(self, config: Any, dtype: DType, rngs: nnx.Rngs, **more: Any) -> nnx.Module:
        return self.network(config, rngs=rngs, dtype=dtype, param_dtype=dtype, **more)


_ROWS: dict[str, Component] = {}


def register(component: Component) -> Component:
    """Adds a row, and returns it."""
    _ROWS[component.name] = component
    return component


def components() -> dict[str, Component]:
    """Returns all rows by the name of their format."""
    for name in MODULES:
        importlib.import_module(name)
    return _ROWS


def slots() -> list[str]:
    """Returns the slots of all networks, in the order of their rows."""
    return list(dict.fromkeys(component.slot for component in components().values()))


def find_component(name: str, where: str | Path = "") -> Component:
    """Returns the row of a format; WeightsError, which begins with `where`, if there is none."""
    if name not in components():
        raise WeightsError(f"{where}: {name!r} is not the format of a network")
    return components()[name]


def component_of(config: Any) -> Component:
    """Returns the row whose sizes have the type of `config`."""
    for component in components().values():
        if component.config_type is type(config):
            return component
    raise ConfigError(f"{type(config).__name__}: no network has a config of this type")


def _from_fields(kind: Any, value: Any) -> Any:
    """A value of JSON as its annotated type: dataclasses from their fields, lists as tuples."""
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        return kind(**{name: _from_fields(hints.get(name), x) for name, x in value.items()})
    return tuple(_from_fields(None, x) for x in value) if isinstance(value, list) else value
