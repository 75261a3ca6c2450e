"""Which parameters are frozen, trained, or trained through a LoRA: ordered rules that leave none out."""

import re
from collections.abc import Callable
from typing import Literal

from flax import nnx

from fantasy_jax.config import ConfigError

Treatment = Literal["frozen", "trained", "lora"]
"""`lora`: a linear layer's kernel is frozen, and the thin matrices beside it are trained (`models.lora`)."""

Rules = tuple[tuple[str, Treatment], ...]
"""Pattern, searched for in a parameter's path (`blocks/self_attention/query/kernel`), and its treatment. The
first whose pattern is found counts."""

EVERYTHING: Rules = (("", "trained"),)

_THIN = re.compile(r"/dot_general/lora_[ab]$")
_SHOWN = 3


def treatments(model: nnx.Module, rules: Rules) -> dict[str, Treatment]:
    """What the rules say of every parameter, by path.

    A LoRA that lies beside a kernel is left out: it is trained unless the kernel is frozen.

    Args:
        model: Or its `nnx.eval_shape`.
        rules: In order.

    Raises:
        ConfigError: A parameter has no rule, or a rule decides on no parameter.
    """
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    paths = [path for path in paths if not _THIN.search(path)]
    found = {path: _first(rules, path) for path in paths}
    if uncovered := [path for path, rule in found.items() if rule is None]:
        more = f" and {len(uncovered) - _SHOWN} more" if len(uncovered) > _SHOWN else ""
        raise ConfigError(
            f"parameters: no rule for {', '.join(uncovered[:_SHOWN])}{more}; end with ('', 'frozen') or "
            "('', 'trained')"
        )
    if idle := [pattern for pattern, _ in rules if pattern not in {rule[0] for rule in found.values()}]:
        raise ConfigError(
            f"parameters: the rule for {idle[0]!r} decides on nothing; there are "
            f"{', '.join(paths[:_SHOWN])} and {len(paths) - _SHOWN} more"
        )
    return {path: rule[1] for path, rule in found.items()}


def trained(rules: Rules) -> Callable[[tuple, object], bool]:
    """A filter, as Flax takes it, of what is trained: parameters, and what lies beside them as LoRA."""

    def chosen(path: tuple, value: object) -> bool:
        name = "/".join(map(str, path))
        kernel = _THIN.sub("/kernel", name)
        rule = _first(rules, kernel)
        if not isinstance(value, nnx.Param) or rule is None:
            return False
        return rule[1] == "trained" or (rule[1] == "lora" and name != kernel)

    return chosen


def lora_layers(model: nnx.Module, rules: Rules) -> list[str]:
    """Paths of the linear layers that are trained through a LoRA.

    Raises:
        ConfigError: As `treatments`; or it is asked for what is no kernel.
    """
    wanted = [path for path, treatment in treatments(model, rules).items() if treatment == "lora"]
    if wrong := [path for path in wanted if not path.endswith("/kernel")]:
        raise ConfigError(f"parameters: {wrong[0]} can have no LoRA; a linear layer's kernel can")
    return [path.removesuffix("/kernel") for path in wanted]


def _first(rules: Rules, path: str) -> tuple[str, Treatment] | None:
    return next((rule for rule in rules if re.search(rule[0], path)), None)
