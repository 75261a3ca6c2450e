"""Collectives of a compiled program, parsed from the text of its HLO."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.* -> .*\{$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$", re.MULTILINE)
_OPERATION = re.compile(r" ([a-z][a-z\-]*)\(([^)]*)\)")
_COLLECTIVE = re.compile(
    r" = (.+?) (all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
    r"|reduce-scatter)(-start)?\(([^)]*)"
)
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)(?:e\w+)?\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*?([\w.\-]+)\), condition=%?([\w.\-]+), body=%?([\w.\-]+)(.*)")
_CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_TRIP_COUNT = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_INDEX = re.compile(r"index=(\d+)")
_DIRECTION = re.compile(r"direction=(\w\w)")
_SAME_VALUE = ("bitcast", "convert", "copy", "reshape")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind.

    Attributes:
        count: Number that run.
        bytes: Size of their results on one device; for reduce-scatters, of their operands.
    """

    count: int
    bytes: int


class UnknownTripCountError(ValueError):
    """A loop contains collectives, and its text does not say how often it runs."""


def collectives(program: str) -> dict[str, Collective]:
    """Counts the collectives of a compiled program by kind; those of a loop count once per iteration.

    Args:
        program: `compiled.as_text()`.

    Raises:
        UnknownTripCountError: The trip count of a loop with collectives cannot be determined.
    """
    computations, entry = {}, ""
    heads = list(_HEAD.finditer(program))
    # A computation extends to the next head: the text of kernels has braces of its own.
    for head, following in itertools.zip_longest(heads, heads[1:]):
        computations[head[2]] = _Computation(program[head.end() : following.start() if following else None])
        entry = head[2] if head[1] else entry
    counts, sizes = _totals(entry, computations)
    return {kind: Collective(counts[kind], sizes[kind]) for kind in sorted(counts)}


@dataclass(frozen=True)
class _Instruction:
    """An operation, the names of its operands (of a constant, its value), and its text."""

    operation: str
    operands: list[str]
    text: str


class _Computation:
    """The text of one computation and, parsed on demand, its instructions."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def instructions(self) -> dict[str, _Instruction]:
        """Instructions by name; the root is also found as `ROOT`."""
        found = {}
        for root, name, text in _INSTRUCTION.findall(self.text):
            if not (operation := _OPERATION.search(" " + text)):
                continue
            operands = re.findall(r"%([\w.\-]+)", operation[2]) or [operation[2]]
            found[name] = _Instruction(operation[1], operands, text)
            if root:
                found["ROOT"] = found[name]
        return found

    def find(self, name: str, default: str = "unknown") -> _Instruction:
        """The instruction that computes a value, seen through copies and conversions."""
        instruction = self.instructions.get(name, _Instruction(default, [], ""))
        return self.find(instruction.operands[0]) if instruction.operation in _SAME_VALUE else instruction

    def constant(self, name: str) -> int | None:
        """The value of an integer constant; None for anything else."""
        instruction = self.find(name)
        value = instruction.operands[0] if instruction.operands else ""
        return int(value) if instruction.operation == "constant" and re.fullmatch(r"-?\d+", value) else None

    def loop_variable(self, name: str) -> int | None:
        """Index of the loop's variable that a value is; None for anything else."""
        instruction = self.find(name)
        index = _INDEX.search(instruction.text)
        return int(index[1]) if instruction.operation == "get-tuple-element" and index else None

    def element(self, name: str, index: int) -> str:
        """Name of an element of a tuple."""
        instruction = self.find(name)
        return instruction.operands[index] if instruction.operation == "tuple" else ""


def _totals(name: str, computations: Mapping[str, _Computation]) -> tuple[Counter, Counter]:
    """Number and bytes of the collectives of a computation and of all that it calls, by kind."""
    counts, sizes = Counter(), Counter()
    if name not in computations:
        return counts, sizes
    here = computations[name]
    for result, kind, started, operands in _COLLECTIVE.findall(here.text):
        scattered = kind == "reduce-scatter"
        size = _operand_bytes(operands, here) if scattered else _result_bytes(result, kind, bool(started))
        # The TPU compiler may write it as a kernel of this name: an all-reduce, of which a part is kept.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
        counts[kind] += 1
        sizes[kind] += size
    calls = [(body, (start, condition, rest)) for start, condition, body, rest in _WHILE.findall(here.text)]
    for called, branches in _CALLED.findall(here.text):
        calls += [(inner, None) for inner in (called, *re.findall(r"[\w.\-]+", branches))]
    for inner, loop in calls:
        inner_counts, inner_sizes = _totals(inner, computations)
        times = _trip_count(inner, loop, here, computations) if loop and inner_counts else 1
        for kind, count in inner_counts.items():
            counts[kind] += times * count
            sizes[kind] += times * inner_sizes[kind]
    return counts, sizes


def _trip_count(
    body: str, loop: tuple[str, str, str], caller: _Computation, computations: Mapping[str, _Computation]
) -> int:
    """How often a loop runs: as the compiler notes it, or from its counter's start, step and bound."""
    initial, condition, rest = loop
    if known := _TRIP_COUNT.search(rest):
        return int(known[1])
    test, step = computations[condition], computations[body]
    compare = test.find("ROOT")
    direction = _DIRECTION.search(compare.text)
    if compare.operation == "compare" and direction and direction[1] in ("LT", "GT"):
        low, high = compare.operands if direction[1] == "LT" else reversed(compare.operands)
        counter, bound = test.loop_variable(low), test.constant(high)
        if counter is not None and bound is not None:
            start = caller.constant(caller.element(initial, counter))
            stride = _stride(step, counter)
            if start is not None and stride:
                return max(0, -(-(bound - start) // stride))
    raise UnknownTripCountError(f"trip count of the loop {body} with collectives is unknown")


def _stride(body: _Computation, counter: int) -> int | None:
    """The constant that a loop's body adds to its counter."""
    new = body.find(body.element("ROOT", counter))
    if new.operation != "add":
        return None
    added = [body.constant(name) for name in new.operands if body.loop_variable(name) != counter]
    return added[0] if len(added) == 1 else None


def _result_bytes(result: str, kind: str, started: bool) -> int:
    sizes = [_bytes(*found) for found in _SHAPE.findall(result)]
    # The start of a gather or a permute also returns its operand and bookkeeping; the result is the largest.
    return max(sizes) if started and kind != "all-reduce" else sum(sizes)


def _operand_bytes(operands: str, computation: _Computation) -> int:
    """Size of operands, whose types are where they are computed."""
    names = re.findall(r"%([\w.\-]+)", operands)
    shapes = (_SHAPE.search(computation.instructions[name].text) for name in names)
    return sum(_bytes(*shape.groups()) for shape in shapes if shape)


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
