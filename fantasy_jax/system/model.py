"""Sizes of all networks of a system."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from ml_collections import ConfigDict

from fantasy_jax.config import build
from fantasy_jax.errors import ConfigError, WeightsError
from fantasy_jax.system.registry import Component, component_of, find_component, slots


class ModelConfig:
    """Sizes of all networks of a system.

    Each network is an attribute named by its slot, None where the system does not have it:
    `model.transformer.dim`, `model.audio_adapter`.

    Attributes:
        networks: Sizes by slot.
        dtype: Type of matrix products, and of the weights of networks that are not trained.
    """

    networks: dict[str, Any]
    dtype: Literal["float32", "bfloat16"]

    def __init__(self, *, dtype: str = "bfloat16", **networks: Any):
        """Checks that the networks fit each other.

        Raises:
            ConfigError: A network is in a slot that is not its own, or sizes do not fit.
        """
        self.dtype = dtype
        self.networks = {slot: config for slot, config in networks.items() if config is not None}
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is {dtype!r}; it must be 'float32' or 'bfloat16'")
        rows = {slot: component_of(config) for slot, config in self.networks.items()}
        for slot, component in rows.items():
            if component.slot != slot:
                raise ConfigError(f"{slot}: {component.name} belongs to {component.slot}")
        for slot, component in rows.items():
            for field, other in (component.equal or {}).items():
                self._check_equal(slot, field, other)
        self.networks = {slot: self.networks[slot] for slot in slots() if slot in self.networks}

    def _check_equal(self, slot: str, field: str, other: str) -> None:
        other_slot, other_field = other.split(".")
        if other_slot not in self.networks:
            raise ConfigError(f"{slot} needs {other_slot}, whose {other_field} it takes; set both")
        value, wanted = getattr(self.networks[slot], field), getattr(self.networks[other_slot], other_field)
        if value != wanted:
            raise ConfigError(f"{slot}.{field} ({value}) must equal {other} ({wanted})")

    def __getattr__(self, name: str) -> Any:
        """The sizes of the network in a slot; None where the system has none."""
        if name.startswith("_") or name in ("networks", "dtype"):
            raise AttributeError(name)
        if name not in self.networks and name not in slots():
            raise AttributeError(f"there is no network called {name!r}")
        return self.networks.get(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and self.to_config() == other.to_config()

    def __hash__(self) -> int:
        return hash((self.dtype, *sorted(self.networks.items())))

    def __repr__(self) -> str:
        return f"ModelConfig(dtype={self.dtype!r}, {', '.join(f'{k}={v}' for k, v in self.networks.items())})"

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with other sizes, by slot, or another `dtype`; None removes a network."""
        return ModelConfig(**{"dtype": self.dtype, **self.networks, **changes})

    @property
    def adapters(self) -> dict[str, Component]:
        """The rows of the adapters that the system has, by the name of their condition."""
        rows = map(component_of, self.networks.values())
        return {row.adapter: row for row in rows if row.adapter is not None}

    def to_config(self) -> dict[str, Any]:
        """The settings as a config file shows them; `component` names the format of each network."""
        sizes = {
            slot: {"component": component_of(config).name, **asdict(config)}
            for slot, config in self.networks.items()
        }
        return {"dtype": self.dtype, **sizes}

    @classmethod
    def from_config(cls, values: Mapping[str, Any] | ConfigDict, path: str) -> "ModelConfig":
        """Builds the settings from a config's section.

        Raises:
            ConfigError: A setting does not exist, is of the wrong type, or does not fit the others.
        """
        networks = {}
        for slot, section in values.items():
            if slot == "dtype" or section is None:
                continue
            if not isinstance(section, Mapping | ConfigDict):
                raise ConfigError(f"{path}.{slot}: must hold the sizes of a network, not {section!r}")
            sizes = dict(section)
            name = sizes.pop("component", None)
            if name is None:
                raise ConfigError(f"{path}.{slot}.component: is missing; name the network's format")
            try:
                component = find_component(str(name), f"{path}.{slot}.component")
            except WeightsError as error:
                raise ConfigError(str(error)) from None
            networks[slot] = build(component.config_type, sizes, f"{path}.{slot}")
        dtype = values.get("dtype", "bfloat16")
        if not isinstance(dtype, str):
            raise ConfigError(f"{path}.dtype: must be 'float32' or 'bfloat16', not {dtype!r}")
        try:
            return cls(**networks, dtype=dtype)
        except ConfigError as error:
            raise ConfigError(f"{path}.{error}") from None
