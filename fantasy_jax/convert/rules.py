"""The conversion engine: tables of rules that carry weights between PyTorch's key names and our modules.

A table is a list of `Rule(source, target, transform)`. Both sides are templates: `{name}` stands for an
index. An index that the target does not repeat is the position in a stack of layers (axis 0 of the
target), so `blocks.{layer}.ffn.0.weight -> blocks/mlp_in/kernel` fills one array from all layers. Several
keys can each fill a part of one array, as queries, keys and values do where we keep them fused.

`make_plan` matches a table with the shapes of a file and of a module and finds every fault before a byte of
weights is read: keys that no rule takes or that two rules take, parameters that nothing fills, layers
missing from a stack, shapes that differ. The same table read backwards exports.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.typing import DType

_INDEX = re.compile(r"\{(\w+)\}")


STORED = nnx.Any(nnx.Param, nnx.BatchStat)
"""What of a module is in files: its parameters, and the statistics that batch norms have recorded."""

Parameter = jax.Array | jax.ShapeDtypeStruct
"""A module's parameter, or its shape and type alone."""

Part = tuple[int, int]
"""Which of how many equal parts of a last axis."""


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse, on NumPy arrays; values are not touched, but for a LoRA's factor.

    Both must keep to views where they can: shapes are found by running them on arrays of stride zero.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def permute(*axes: int) -> Transform:
    """PyTorch's axis order to ours."""
    return Transform(f"permute{axes}", lambda x: x.transpose(axes), lambda x: x.transpose(np.argsort(axes)))


def reshape(source: Sequence[int], target: Sequence[int]) -> Transform:
    """From one shape to another of the same size; -1 as in `numpy.reshape`."""
    return Transform(
        f"reshape{tuple(source)}{tuple(target)}", lambda x: x.reshape(target), lambda x: x.reshape(source)
    )


def chain(first: Transform, second: Transform) -> Transform:
    """One transform after another."""
    return Transform(
        f"{first.name} {second.name}",
        lambda x: second.forward(first.forward(x)),
        lambda x: first.inverse(second.inverse(x)),
    )


IDENTITY = Transform("identity", lambda x: x, lambda x: x)
LINEAR = permute(1, 0)
"""`[out, in]` to `[in, out]`."""
CONV1D = permute(2, 1, 0)
CONV2D = permute(2, 3, 1, 0)
CONV3D = permute(2, 3, 4, 1, 0)


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        source: Key in the PyTorch file, for example `blocks.{layer}.norm3.weight`.
        target: Path in our module, for example `blocks/norm3/scale`.
        transform: Layout change from source to target.
        part: `(index, count)`: fills only this one of equal parts of the target's last axis.
    """

    source: str
    target: str
    transform: Transform = IDENTITY
    part: Part | None = None


def affine(source: str, target: str, weight: Transform = LINEAR, *, part: Part | None = None) -> list[Rule]:
    """Weight and bias of a linear layer or a convolution."""
    return [
        Rule(f"{source}.weight", f"{target}/kernel", weight, part),
        Rule(f"{source}.bias", f"{target}/bias", part=part),
    ]


def norm(source: str, target: str) -> list[Rule]:
    """Scale and bias of a norm."""
    return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a tensor in a file, without its values."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Entry:
    """One source tensor and the place it goes: all of `path`, its `layer`-th slice, or a part of either."""

    key: str
    path: str
    layer: int | None
    transform: Transform
    part: Part | None = None

    def place(self, value: np.ndarray, *, of_layer: bool = False) -> np.ndarray:
        """Where in the array of all of `path`, or in its layer's alone, the tensor lies; a view."""
        value = value[... if self.layer is None or of_layer else self.layer]
        if self.part is None:
            return value
        index, count = self.part
        width = value.shape[-1] // count
        return value[..., index * width : (index + 1) * width]


@dataclass(frozen=True)
class Plan:
    """How a file fills a module.

    Attributes:
        entries: One for each source tensor that is used, in the order of the module's paths.
        target: Shape and type of every parameter of the module by path.
        ignored: Source keys that are known and not needed, by the pattern that names them.
        problems: Everything that is wrong, one sentence each; empty if the file fits.
    """

    entries: list[Entry]
    target: dict[str, Parameter]
    ignored: dict[str, str]
    problems: list[str]


Place = tuple[str, int | None, Part | None]
"""Path, layer and part that a tensor fills."""


class ConversionError(ValueError):
    """Weights that do not fit; the message lists all that is wrong, a line each."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def flat_parameters(module: nnx.Module) -> dict[str, Parameter]:
    """All parameters of a module, or of its `nnx.eval_shape`, by path such as `blocks/norm3/scale`."""
    flat = nnx.to_flat_state(nnx.state(module, STORED))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def make_plan(
    rules: Iterable[Rule],
    source: Mapping[str, TensorSpec],
    target: Mapping[str, Parameter],
    *,
    ignore: Sequence[str] = (),
) -> Plan:
    """Matches a table with what a file holds and what a module needs; reads no weights.

    Args:
        rules: The table.
        source: What the file holds.
        target: What the module needs, from `flat_parameters`.
        ignore: Shell patterns of source keys that are known and not needed.
    """
    compiled = [(rule, _pattern(rule.source)) for rule in rules]
    problems: list[str] = []
    ignored: dict[str, str] = {}
    filled: dict[Place, list[Entry]] = {}
    for key in source:
        if pattern := next((p for p in ignore if fnmatchcase(key, p)), None):
            ignored[key] = pattern
            continue
        matches = [_entry(key, rule, match) for rule, regex in compiled if (match := regex.fullmatch(key))]
        if len(matches) > 1:
            paths = ", ".join(sorted({entry.path for entry in matches}))
            problems.append(f"doubly mapped: {key} is taken by {len(matches)} rules, to {paths}")
        elif matches:
            entry = matches[0]
            filled.setdefault((entry.path, entry.layer, entry.part), []).append(entry)
        else:
            problems.append(f"unexpected: {key} {list(source[key].shape)} has no place in the model")
    entries: list[Entry] = []
    for path, spec in target.items():
        entries += _fill_one(path, spec, filled, source, problems)
    problems += [
        f"unexpected: {entry.key} would go to {path}, which the model lacks"
        for (path, *_), group in filled.items()
        if path not in target
        for entry in group
    ]
    return Plan(entries, dict(target), ignored, problems)


def _pattern(template: str) -> re.Pattern[str]:
    parts = _INDEX.split(template)
    return re.compile("".join(rf"(?P<{p}>\d+)" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


def _entry(key: str, rule: Rule, match: re.Match[str]) -> Entry:
    indices = match.groupdict()
    stacked = [name for name in indices if f"{{{name}}}" not in rule.target]
    if len(stacked) > 1:
        raise ValueError(f"rule {rule.source}: {stacked} cannot all be positions in one stack")
    layer = int(indices[stacked[0]]) if stacked else None
    return Entry(key, rule.target.format(**indices), layer, rule.transform, rule.part)


def _fill_one(
    path: str,
    spec: Parameter,
    filled: Mapping[Place, list[Entry]],
    source: Mapping[str, TensorSpec],
    problems: list[str],
) -> list[Entry]:
    """The entries that fill one parameter; adds to `problems` what is missing, doubled or misshapen."""
    layers = [layer for filled_path, layer, _ in filled if filled_path == path]
    is_stack = any(layer is not None for layer in layers)
    wanted: Sequence[int | None] = range(spec.shape[0]) if is_stack else [None]
    count = max((part[1] for filled_path, _, part in filled if filled_path == path and part), default=0)
    parts = [(i, count) for i in range(count)] or [None]
    whole = np.broadcast_to(np.int8(0), spec.shape)
    entries = []
    for layer, part in product(wanted, parts):
        place = path if layer is None else f"{path}[{layer}]"
        shape = Entry("", path, layer, IDENTITY, part).place(whole).shape
        group = filled.get((path, layer, part), [])
        if not group:
            problems.append(f"missing: nothing fills {place} {list(shape)}")
            continue
        if len(group) > 1:
            problems.append(f"doubly mapped: {', '.join(e.key for e in group)} all go to {place}")
        entry = group[0]
        got = source[entry.key].shape
        # Backwards too: a reshape forwards takes any shape of the same size.
        expected = _shape_after(entry.transform.inverse, shape)
        if got != expected or _shape_after(entry.transform.forward, got) != shape:
            wanted_shape = "no shape" if expected is None else list(expected)
            problems.append(f"wrong shape: {entry.key} is {list(got)}, but {place} takes {wanted_shape}")
        entries.append(entry)
    problems += [
        f"unexpected: {entry.key} is layer {layer}, but {path} has {spec.shape[0]}"
        for (filled_path, layer, _), group in filled.items()
        if filled_path == path and layer not in wanted
        for entry in group
    ]
    return entries


def _shape_after(
    change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Shape after half a transform, found without memory; None where it does not even apply."""
    try:
        return change(np.broadcast_to(np.int8(0), shape)).shape
    except ValueError:
        return None


def check(plan: Plan) -> Plan:
    """Raises ConversionError with all problems of a plan, or returns it."""
    if plan.problems:
        raise ConversionError(plan.problems)
    return plan


def load(
    plan: Plan, read: Callable[[str], np.ndarray], *, dtype: DType | None = None
) -> dict[str, np.ndarray]:
    """Reads every tensor of a plan into place.

    Args:
        plan: A plan without problems.
        read: Gives one source tensor by key.
        dtype: Type of all parameters; None keeps what the module asks for.

    Returns:
        The parameters by path, complete: a stack whose layers do not all arrive raises.
    """
    check(plan)
    values: dict[str, np.ndarray] = {}
    for entry in plan.entries:
        spec = plan.target[entry.path]
        value = entry.transform.forward(read(entry.key))
        if entry.path not in values:
            values[entry.path] = np.empty(spec.shape, dtype or spec.dtype)
        entry.place(values[entry.path])[...] = value
    return values


def assign(
    module: nnx.Module, values: Mapping[str, np.ndarray | jax.Array], *, consume: bool = False
) -> None:
    """Writes parameters by path into a module, in place; every one of them must be given.

    Args:
        module: The module, or its `nnx.eval_shape`.
        values: All parameters.
        consume: Take each out of `values`, a dict, as it is written.
    """
    state = nnx.state(module, STORED)
    flat = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    if flat.keys() != values.keys():
        raise ConversionError([f"missing or unexpected: {p}" for p in sorted(flat.keys() ^ values.keys())])
    for path, variable in flat.items():
        variable.set_value(jnp.asarray(values.pop(path) if consume else values[path]))
    nnx.update(module, state)


def export_entries(rules: Iterable[Rule], target: Mapping[str, Any]) -> Iterator[Entry]:
    """Reads a table backwards: where in a module's parameters each tensor of the file lies.

    Args:
        rules: The table.
        target: Parameters, or their shapes, by path.

    Raises:
        ConversionError: A parameter has no rule, or more than one.
    """
    compiled = [(rule, _pattern(rule.target)) for rule in rules]
    for path, value in target.items():
        matches = [(rule, m) for rule, regex in compiled if (m := regex.fullmatch(path))]
        parts = [rule.part for rule, _ in matches]
        if parts not in ([None], [(i, len(parts)) for i in range(len(parts))]) or not parts:
            raise ConversionError([f"{path}: {len(matches)} rules export it, one is needed"])
        for rule, match in matches:
            stacked = [n for n in _INDEX.findall(rule.source) if n not in match.groupdict()]
            for layer in range(value.shape[0]) if stacked else [None]:
                indices = match.groupdict() | dict.fromkeys(stacked, layer)
                key = rule.source.format(**indices)
                yield Entry(key, path, layer, rule.transform, rule.part)


def export(
    rules: Iterable[Rule], values: Mapping[str, np.ndarray | jax.Array]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields source keys and tensors from parameters by path; errors as `export_entries`."""
    for entry in export_entries(rules, values):
        yield entry.key, entry.transform.inverse(entry.place(np.asarray(values[entry.path])))
