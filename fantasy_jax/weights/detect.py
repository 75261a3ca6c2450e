"""Detection of the networks in a file, with their layouts and sizes."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fantasy_jax.convert.files import WeightsFile
from fantasy_jax.convert.rules import Plan, Rule, check, flat_parameters, load, make_plan
from fantasy_jax.errors import WeightsError
from fantasy_jax.system.registry import Component, Layout, components
from fantasy_jax.typing import DType


@dataclass(frozen=True)
class Detected:
    """A network in a file.

    Attributes:
        component: Its row.
        layout: Layout of its keys.
        weights: Its tensors.
        preset: Name of its sizes, or `config.json`.
        config: Its sizes.
    """

    component: Component
    layout: Layout
    weights: WeightsFile
    preset: str
    config: Any

    @property
    def rules(self) -> list[Rule]:
        """The key table."""
        return self.layout.rules(self.config)

    def plan(self, dtype: DType = jnp.float32) -> tuple[nnx.Module, Plan]:
        """Returns the module without memory, and how the file fills it."""
        module = self.component.abstract(self.config, dtype)
        ignored = self.component.ignored(self.config)
        return module, make_plan(self.rules, self.weights.specs, flat_parameters(module), ignore=ignored)

    def load(self, dtype: DType = jnp.float32) -> nnx.Module:
        """Returns the network with the file's weights.

        Raises:
            ConversionError: The file does not fit.
        """
        plan = check(self.plan(dtype)[1], self.weights.path)
        return self.component.build(self.config, dtype, load(plan, self.weights.read))


def detect(weights: WeightsFile, *, preset: str | None = None) -> list[Detected]:
    """Detects the networks in a file: one, or several that share it under different prefixes.

    Args:
        weights: An opened file.
        preset: Name of the sizes; None: those of the config.json beside the file, or of the preset that fits.

    Returns:
        One item for each network. Tensors that belong to no network are in the part of the network without a
        prefix, or in that of the first network if all have one; they are problems of its plan.

    Raises:
        WeightsError: No network is detected, or no preset fits.
    """
    matches = [
        (component, match) for component in components().values() if (match := _match(component, weights))
    ]
    if not matches:
        names = ", ".join(row.name for row in components().values() if _detectable(row))
        raise WeightsError(f"{weights.path}: holds none of the known networks ({names})")
    prefixes = tuple(prefix for _, (prefix, _) in matches if prefix)
    others = {key: spec for key, spec in weights.specs.items() if not key.startswith(prefixes)}
    without_prefix = replace(weights, specs=others)
    found = []
    for component, (prefix, layout) in matches:
        part = weights.part(prefix) if prefix else without_prefix
        found.append(Detected(component, layout, part, *_sizes(component, layout, part, preset)))
    if len(prefixes) == len(matches):
        first = replace(found[0].weights, specs={**found[0].weights.specs, **others})
        found[0] = replace(found[0], weights=first)
    return found


def _match(component: Component, weights: WeightsFile) -> tuple[str, Layout] | None:
    """Prefix and layout of a network's keys; None if the file does not hold the network."""
    for prefix in dict.fromkeys(("", component.prefix)):
        if layout := _layout(component, weights.part(prefix)):
            return prefix, layout
    return None


def _layout(component: Component, part: WeightsFile) -> Layout | None:
    for layout in component.layouts:
        if layout.signature and all(key in part.specs for key in layout.signature):
            return layout
    return None


def _detectable(component: Component) -> bool:
    return any(layout.signature for layout in component.layouts)


def _sizes(component: Component, layout: Layout, part: WeightsFile, preset: str | None) -> tuple[str, Any]:
    """Name and config of the network's sizes."""
    names = ", ".join(component.presets)
    if preset is not None:
        if preset not in component.presets:
            raise WeightsError(f"{part.path}: {component.name} has no preset {preset!r}; choose from {names}")
        return preset, component.presets[preset]
    if part.config and (config := component.published_config(part.config)) is not None:
        return "config.json", config
    # Presets differ in width. A file of the right width that lacks a layer must fail, not pass as smaller.
    for name, config in component.presets.items():
        if _width_fits(component, layout, config, part):
            return name, config
    raise WeightsError(
        f"{part.path}: fits no preset of {component.name} ({names}); put a config.json beside it"
    )


def _width_fits(component: Component, layout: Layout, config: Any, part: WeightsFile) -> bool:
    keys = {key: part.specs[key] for key in layout.signature}
    plan = make_plan(layout.rules(config), keys, flat_parameters(component.abstract(config)))
    return not any(problem.kind in ("wrong shape", "unexpected") for problem in plan.problems)
