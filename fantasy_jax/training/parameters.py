"""Which parameters are trained: ordered rules over their paths, which must cover every parameter."""

import re
from collections.abc import Callable
from typing import Literal

from flax import nnx

from fantasy_jax.errors import ConfigError

ParameterMode = Literal["frozen", "trained", "lora"]
"""`lora`: a linear layer's kernel is frozen, and low-rank matrices beside it are trained (`models.lora`)."""

ParameterRules = tuple[tuple[str, ParameterMode], ...]
"""Pairs of a regular expression and a mode. The first expression that is found in a parameter's path
(`blocks/self_attention/query/kernel`) decides."""

ALL_TRAINED: ParameterRules = (("", "trained"),)

_LORA = re.compile(r"/dot_general/lora_[ab]$")
_NUM_SHOWN = 3


def parameter_modes(model: nnx.Module, rules: ParameterRules) -> dict[str, ParameterMode]:
    """Returns the mode of every parameter by its path.

    Matrices of a LoRA are left out: they are trained unless the kernel that they lie beside is frozen.

    Args:
        model: The model, or its `nnx.eval_shape`.
        rules: Ordered rules.

    Raises:
        ConfigError: A parameter matches no rule, or a rule is the first match of no parameter.
    """
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    paths = [path for path in paths if not _LORA.search(path)]
    found = {path: _first_match(rules, path) for path in paths}
    if uncovered := [path for path, rule in found.items() if rule is None]:
        more = f" and {len(uncovered) - _NUM_SHOWN} more" if len(uncovered) > _NUM_SHOWN else ""
        raise ConfigError(
            f"parameters: no rule matches {', '.join(uncovered[:_NUM_SHOWN])}{more}; end with "
            "('', 'frozen') or ('', 'trained')"
        )
    if unused := [pattern for pattern, _ in rules if pattern not in {rule[0] for rule in found.values()}]:
        raise ConfigError(
            f"parameters: {unused[0]!r} matches no parameter that an earlier rule leaves; paths are "
            f"{', '.join(paths[:_NUM_SHOWN])} and {len(paths) - _NUM_SHOWN} more"
        )
    return {path: rule[1] for path, rule in found.items()}


def trainable(rules: ParameterRules) -> Callable[[tuple, object], bool]:
    """Returns a Flax filter of the parameters that are trained, matrices of a LoRA included."""

    def is_trainable(path: tuple, value: object) -> bool:
        name = "/".join(map(str, path))
        kernel = _LORA.sub("/kernel", name)
        rule = _first_match(rules, kernel)
        if not isinstance(value, nnx.Param) or rule is None:
            return False
        return rule[1] == "trained" or (rule[1] == "lora" and name != kernel)

    return is_trainable


def lora_layers(model: nnx.Module, rules: ParameterRules) -> list[str]:
    """Returns the paths of the linear layers that are trained through a LoRA.

    Raises:
        ConfigError: As `parameter_modes`; or a parameter that is no kernel has mode `lora`.
    """
    selected = [path for path, mode in parameter_modes(model, rules).items() if mode == "lora"]
    if wrong := [path for path in selected if not path.endswith("/kernel")]:
        raise ConfigError(f"parameters: {wrong[0]} cannot have a LoRA; only kernels of linear layers can")
    return [path.removesuffix("/kernel") for path in selected]


def _first_match(rules: ParameterRules, path: str) -> tuple[str, ParameterMode] | None:
    return next((rule for rule in rules if re.search(rule[0], path)), None)
