"""The conversion engine: tables of rules that map PyTorch's keys to the parameters of our modules, and back.

A table is a list of `Rule(source, target, transform)`. Both sides are templates, in which `{name}` stands for
an index. An index that the target does not repeat is the position in a stack of layers (axis 0 of the
target), so `blocks.{layer}.ffn.0.weight -> blocks/mlp_in/kernel` fills one array from all layers. Several
keys can each fill a part of one array, such as a fused projection of queries, keys and values.

`make_plan` matches a table against the shapes of a file and of a module. It finds all problems before any
weights are read: keys that match no rule or several, parameters that nothing fills, missing layers, wrong
shapes. The same table is used backwards for export.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fantasy_jax.errors import ConversionError, WeightsError
from fantasy_jax.typing import DType

_INDEX = re.compile(r"\{(\w+)\}")

STORED = nnx.Any(nnx.Param, nnx.BatchStat)
"""Variables of a module that weight files hold: parameters and the statistics of batch norms."""

Parameter = jax.Array | jax.ShapeDtypeStruct
"""A parameter of a module, or its shape and dtype only."""

Part = tuple[int, int]
"""Index and number of equal parts of the last axis."""


@dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse, on NumPy arrays. Only that of a LoRA also changes values.

    Both must return views where possible: shapes are computed by running them on arrays of stride zero.

    Attributes:
        name: For messages.
        forward: From PyTorch's layout to ours.
        inverse: From ours to PyTorch's.
        dtype: Dtype of the tensor in files; None: that of the network.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    dtype: np.dtype | None = None


def permute(*axes: int) -> Transform:
    """Permutes the axes; `axes` are those of PyTorch in our order."""
    return Transform(f"permute{axes}", lambda x: x.transpose(axes), lambda x: x.transpose(np.argsort(axes)))


def reshape(source: Sequence[int], target: Sequence[int]) -> Transform:
    """Reshapes; -1 as in `numpy.reshape`."""
    return Transform(
        f"reshape{tuple(source)}{tuple(target)}", lambda x: x.reshape(target), lambda x: x.reshape(source)
    )


def chain(first: Transform, second: Transform) -> Transform:
    """Applies `first`, then `second`."""
    return Transform(
        f"{first.name} {second.name}",
        lambda x: second.forward(first.forward(x)),
        lambda x: first.inverse(second.inverse(x)),
        first.dtype,
    )


IDENTITY = Transform("identity", lambda x: x, lambda x: x)
LINEAR = permute(1, 0)
"""`[out, in]` to `[in, out]`."""
CONV1D = permute(2, 1, 0)
CONV2D = permute(2, 3, 1, 0)
CONV3D = permute(2, 3, 4, 1, 0)


def _to_int32(x: np.ndarray) -> np.ndarray:
    small = x.astype(np.int32)
    if not np.array_equal(small, x):
        raise WeightsError(f"a counter has the value {x}, which is no integer of 32 bits")
    return small


COUNTER = Transform("int64", _to_int32, lambda x: x.astype(np.int64), np.dtype(np.int64))
"""int64 to int32, since JAX has no int64 by default; WeightsError if a value does not fit."""


@dataclass(frozen=True)
class Rule:
    """One row of a table.

    Attributes:
        source: Key in the PyTorch file, for example `blocks.{layer}.norm3.weight`.
        target: Path in our module, for example `blocks/norm3/scale`.
        transform: Layout change from source to target.
        part: `(index, count)`: fills only this one of `count` equal parts of the target's last axis.
    """

    source: str
    target: str
    transform: Transform = IDENTITY
    part: Part | None = None


def affine(source: str, target: str, weight: Transform = LINEAR, *, part: Part | None = None) -> list[Rule]:
    """Rules for weight and bias of a linear layer or a convolution."""
    return [
        Rule(f"{source}.weight", f"{target}/kernel", weight, part),
        Rule(f"{source}.bias", f"{target}/bias", part=part),
    ]


def norm(source: str, target: str) -> list[Rule]:
    """Rules for scale and bias of a norm."""
    return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


BATCH_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
"""Names of a batch norm's tensors in PyTorch, in the order of ONNX's inputs, and ours."""


def batch_norm(source: str, target: str) -> list[Rule]:
    """Rules for scale, bias and statistics of a batch norm, without its counter."""
    return [Rule(f"{source}.{theirs}", f"{target}/{ours}") for theirs, ours in BATCH_NORM.items()]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class Entry:
    """One source tensor and its place: all of the parameter `path`, one layer of it, or a part of either."""

    key: str
    path: str
    layer: int | None
    transform: Transform
    part: Part | None = None

    def place(self, value: np.ndarray, *, of_layer: bool = False) -> np.ndarray:
        """Returns the place of the tensor as a view.

        Args:
            value: The parameter at `path`.
            of_layer: Whether `value` is the layer's part of a stack only.
        """
        value = value[... if self.layer is None or of_layer else self.layer]
        if self.part is None:
            return value
        index, count = self.part
        width = value.shape[-1] // count
        return value[..., index * width : (index + 1) * width]


ProblemKind = Literal["missing", "unexpected", "wrong shape", "wrong type", "ambiguous"]


@dataclass(frozen=True)
class Problem:
    """One reason why a file does not fit a module; `str()` is the message.

    Attributes:
        kind: A parameter is missing; a key matches no parameter; a shape is wrong; integers are given for a
            parameter of fractions; a key or a parameter is mapped more than once.
        key: Key in the file; empty for a parameter that is missing.
        path: Path of the parameter, with its layer in a stack; empty where there is none.
        detail: The rest of the message.
        where: The file; empty where there is none.
    """

    kind: ProblemKind
    key: str
    path: str
    detail: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.where + ': ' if self.where else ''}{self.kind}: {self.detail}"


@dataclass(frozen=True)
class Plan:
    """How a file fills a module.

    Attributes:
        entries: One for each source tensor that is used, in the order of the module's paths.
        target: Shape and dtype of every parameter of the module by path.
        ignored: Source keys that are not needed, each with the pattern that it matches.
        problems: All problems; empty if the file fits.
    """

    entries: list[Entry]
    target: dict[str, Parameter]
    ignored: dict[str, str]
    problems: list[Problem]


Place = tuple[str, int | None, Part | None]
"""Path, layer and part that a tensor fills."""


def flat_parameters(module: nnx.Module) -> dict[str, Parameter]:
    """Returns all parameters of a module, or of its `nnx.eval_shape`, by path: `blocks/norm3/scale`."""
    flat = nnx.to_flat_state(nnx.state(module, STORED))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def make_plan(
    rules: Iterable[Rule],
    source: Mapping[str, TensorSpec],
    target: Mapping[str, Parameter],
    *,
    ignore: Sequence[str] = (),
) -> Plan:
    """Matches a table against a file and a module; reads no weights.

    Args:
        rules: The table.
        source: Shapes of the file's tensors by key.
        target: Parameters of the module, from `flat_parameters`.
        ignore: Shell patterns of source keys that are not needed.
    """
    compiled = [(rule, _pattern(rule.source)) for rule in rules]
    problems: list[Problem] = []
    ignored: dict[str, str] = {}
    filled: dict[Place, list[Entry]] = {}
    for key in source:
        if pattern := next((p for p in ignore if fnmatchcase(key, p)), None):
            ignored[key] = pattern
            continue
        matches = [_entry(key, rule, match) for rule, regex in compiled if (match := regex.fullmatch(key))]
        if len(matches) > 1:
            paths = ", ".join(sorted({entry.path for entry in matches}))
            problems.append(Problem("ambiguous", key, "", f"{key} matches {len(matches)} rules, for {paths}"))
        elif matches:
            entry = matches[0]
            filled.setdefault((entry.path, entry.layer, entry.part), []).append(entry)
        else:
            detail = f"{key} {list(source[key].shape)} matches no parameter"
            problems.append(Problem("unexpected", key, "", detail))
    entries: list[Entry] = []
    for path, spec in target.items():
        entries += _fill_one(path, spec, filled, source, problems)
    problems += [
        Problem("unexpected", entry.key, path, f"{entry.key} is for {path}, which the model does not have")
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
    problems: list[Problem],
) -> list[Entry]:
    """Returns the entries that fill one parameter, and appends to `problems`."""
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
            problems.append(Problem("missing", "", place, f"nothing fills {place} {list(shape)}"))
            continue
        if len(group) > 1:
            keys = ", ".join(e.key for e in group)
            problems.append(Problem("ambiguous", group[0].key, place, f"{keys} are all for {place}"))
        entry = group[0]
        got = source[entry.key].shape
        # The inverse is checked, too: a reshape accepts any shape of the same size.
        expected = _shape_after(entry.transform.inverse, shape)
        if got != expected or _shape_after(entry.transform.forward, got) != shape:
            wanted_shape = "another" if expected is None else list(expected)
            detail = f"{entry.key} has shape {list(got)}, {place} needs {wanted_shape}"
            problems.append(Problem("wrong shape", entry.key, place, detail))
        dtype = source[entry.key].dtype
        if dtype.kind in "iub" and not jnp.issubdtype(spec.dtype, jnp.integer):
            detail = f"{entry.key} is {dtype}, of a quantised format that is not supported"
            problems.append(Problem("wrong type", entry.key, place, detail))
        entries.append(entry)
    problems += [
        Problem(
            "unexpected",
            entry.key,
            path,
            f"{entry.key} is for layer {layer}, but {path} has {spec.shape[0]}",
        )
        for (filled_path, layer, _), group in filled.items()
        if filled_path == path and layer not in wanted
        for entry in group
    ]
    return entries


def _shape_after(
    change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Returns the shape after one direction of a transform, without allocating; None if it does not apply."""
    try:
        return change(np.broadcast_to(np.int8(0), shape)).shape
    except ValueError:
        return None


def check(plan: Plan, where: str | Path = "") -> Plan:
    """Returns a plan that has no problems; otherwise raises a ConversionError with all of them.

    Args:
        plan: The plan.
        where: The file, for the messages.
    """
    if plan.problems:
        raise ConversionError([replace(problem, where=str(where)) for problem in plan.problems])
    return plan


def stored_dtype(parameter: Parameter, dtype: DType) -> np.dtype:
    """Returns the dtype of a parameter in a network of a dtype: integers keep their own."""
    return np.dtype(parameter.dtype if np.issubdtype(parameter.dtype, np.integer) else dtype)


def load(
    plan: Plan, read: Callable[[str], np.ndarray], *, dtype: DType | None = None
) -> dict[str, np.ndarray]:
    """Reads every tensor of a plan into place.

    Args:
        plan: A plan without problems.
        read: Returns one source tensor by key.
        dtype: Dtype of all parameters but integers; None: that of the module's parameters.

    Returns:
        All parameters by path.

    Raises:
        ConversionError: The plan has problems.
    """
    check(plan)
    values: dict[str, np.ndarray] = {}
    for entry in plan.entries:
        spec = plan.target[entry.path]
        value = entry.transform.forward(read(entry.key))
        if entry.path not in values:
            values[entry.path] = np.empty(spec.shape, stored_dtype(spec, dtype or spec.dtype))
        entry.place(values[entry.path])[...] = value
    return values


def assign(
    module: nnx.Module, values: Mapping[str, np.ndarray | jax.Array], *, consume: bool = False
) -> None:
    """Sets all parameters of a module, in place.

    Args:
        module: The module, or its `nnx.eval_shape`.
        values: All parameters by path.
        consume: Whether each is removed from `values`, a dict, once it is set.

    Raises:
        ConversionError: A parameter is missing or unexpected.
    """
    state = nnx.state(module, STORED)
    flat = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    if flat.keys() != values.keys():
        raise ConversionError(
            [
                Problem("missing" if path in flat else "unexpected", "", path, path)
                for path in sorted(flat.keys() ^ values.keys())
            ]
        )
    for path, variable in flat.items():
        value = values.pop(path) if consume else values[path]
        # JAX refuses to put an array with shards of other processes where it is already.
        variable.set_value(value if isinstance(value, jax.Array) else jax.device_put(value))
    nnx.update(module, state)


def export_entries(rules: Iterable[Rule], target: Mapping[str, Any]) -> Iterator[Entry]:
    """Yields the tensors of a file with their places in the module's parameters: the table used backwards.

    Args:
        rules: The table.
        target: Parameters, or their shapes, by path.

    Raises:
        ConversionError: A parameter matches no rule, or more than one.
    """
    compiled = [(rule, _pattern(rule.target)) for rule in rules]
    for path, value in target.items():
        matches = [(rule, m) for rule, regex in compiled if (m := regex.fullmatch(path))]
        parts = [rule.part for rule, _ in matches]
        if parts not in ([None], [(i, len(parts)) for i in range(len(parts))]) or not parts:
            kind = "ambiguous" if matches else "missing"
            raise ConversionError([Problem(kind, "", path, f"{len(matches)} rules export {path}, not one")])
        for rule, match in matches:
            stacked = [n for n in _INDEX.findall(rule.source) if n not in match.groupdict()]
            for layer in range(value.shape[0]) if stacked else [None]:
                indices = match.groupdict() | dict.fromkeys(stacked, layer)
                key = rule.source.format(**indices)
                yield Entry(key, path, layer, rule.transform, rule.part)


def export(
    rules: Iterable[Rule], values: Mapping[str, np.ndarray | jax.Array]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields keys and tensors of a file from parameters by path; raises as `export_entries`."""
    for entry in export_entries(rules, values):
        yield entry.key, entry.transform.inverse(entry.place(np.asarray(values[entry.path])))
