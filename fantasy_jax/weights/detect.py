"""Detection of the networks in a file, with their layouts and sizes."""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fantasy_jax.convert.files import WeightsFile
from fantasy_jax.convert.lora import is_lora
from fantasy_jax.convert.rules import Plan, Rule, TensorSpec, check, flat_parameters, load, make_plan
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
        prefix: Prefix of its keys in the file.
    """

    component: Component
    layout: Layout
    weights: WeightsFile
    preset: str
    config: Any
    prefix: str = ""

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
        prefix; if all have one, in that of the network that ignores them, or of the first one, of whose plan
        they are problems.

    Raises:
        WeightsError: No network is detected, or no preset fits.
    """
    matches = [
        (component, match) for component in components().values() if (match := _match(component, weights))
    ]
    if not matches and is_lora(weights):
        raise WeightsError(f"{weights.path}: is a LoRA, not a network; give it to sample.py with --lora")
    if not matches:
        names = ", ".join(row.name for row in components().values() if _detectable(row))
        raise WeightsError(f"{weights.path}: holds none of the known networks ({names})")
    prefixes = tuple(prefix for _, (prefix, _) in matches if prefix)
    others = {key: spec for key, spec in weights.specs.items() if not key.startswith(prefixes)}
    found = []
    for component, (prefix, layout) in matches:
        part = weights.part(prefix) if prefix else replace(weights, specs=others)
        found.append(Detected(component, layout, part, *_sizes(component, layout, part, preset), prefix))
    return _with_others(found, others) if len(prefixes) == len(matches) else found


def _with_others(found: list[Detected], others: dict[str, TensorSpec]) -> list[Detected]:
    """Adds the tensors outside of all prefixes to the network that ignores them, or to the first one."""
    added: list[dict[str, TensorSpec]] = [{} for _ in found]
    for key, spec in others.items():
        patterns = [x.component.ignored(x.config) for x in found]
        ignoring = (i for i, names in enumerate(patterns) if any(fnmatchcase(key, name) for name in names))
        added[next(ignoring, 0)][key] = spec
    return [
        replace(x, weights=replace(x.weights, specs={**x.weights.specs, **more}))
        for x, more in zip(found, added, strict=True)
    ]


def _match(component: Component, weights: WeightsFile) -> tuple[str, Layout] | None:
    """Prefix and layout of a network's keys; None if the file does not hold the network.

    Any prefix that ends in a dot will do: other programs write `model.diffusion_model.`, `module.` and more.

    Raises:
        WeightsError: The file holds the network several times.
    """
    for layout in component.layouts:
        found = _prefixes(layout, weights)
        if len(found) > 1:
            names = " and ".join(repr(prefix) for prefix in found)
            raise WeightsError(f"{weights.path}: holds {component.name} several times, under {names}")
        if found:
            return found[0], layout
    return None


def _prefixes(layout: Layout, weights: WeightsFile) -> list[str]:
    """The prefixes under which a file has all keys of a layout's signature."""
    if not layout.signature:
        return []
    first = next(iter(layout.signature))
    prefixes = [key.removesuffix(first) for key in weights.specs if key.endswith(first)]
    prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
    return [x for x in prefixes if all(f"{x}{key}" in weights.specs for key in layout.signature)]


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
