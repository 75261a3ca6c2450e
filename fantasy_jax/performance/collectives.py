"""What devices exchange, read off a compiled program."""

import itertools
import math
import re
from collections import defaultdict
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.* -> .*\{$", re.MULTILINE)
_COLLECTIVE = re.compile(
    r" = (.+?) (all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
    r"|reduce-scatter)(-start)?\(([^)]*)"
)
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)(?:e\w+)?\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)(.*)")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_KNOWN_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"s32\[\]\S* constant\((\d+)\)")


@dataclass(frozen=True)
class Exchange:
    """Collectives of one kind.

    Attributes:
        count: How many are run.
        bytes: Of their results, on one device; of reduce-scatters, of what goes in.
    """

    count: int
    bytes: int


def exchanges(program: str) -> dict[str, Exchange]:
    """Every kind of collective of a compiled program, a loop's body counted as often as it runs.

    Args:
        program: `compiled.as_text()`.

    Raises:
        ValueError: How often a loop with collectives runs cannot be told.
    """
    bodies, entry = {}, ""
    heads = list(_COMPUTATION.finditer(program))
    # Up to the next head: kernels bring notes with braces of their own.
    for head, following in itertools.zip_longest(heads, heads[1:]):
        bodies[head[2]] = program[head.end() : following.start() if following else None]
        entry = head[2] if head[1] else entry
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    _add_up(entry, 1, bodies, totals)
    return {kind: Exchange(count, size) for kind, (count, size) in sorted(totals.items())}


def _add_up(name: str, times: int, bodies: dict[str, str], totals: dict[str, list[int]]) -> None:
    body = bodies.get(name, "")
    for result, kind, started, operands in _COLLECTIVE.findall(body):
        scattered = kind == "reduce-scatter"
        size = _operand_bytes(operands, body) if scattered else _result_bytes(result, kind, bool(started))
        # TPUs' compiler may write it as a kernel of this name: an all-reduce, of which a part is kept.
        total = totals["reduce-scatter" if name.startswith("all-reduce-scatter") else kind]
        total[0] += times
        total[1] += times * size
    for condition, looped, rest in _WHILE.findall(body):
        inside: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        _add_up(looped, 1, bodies, inside)
        if inside:
            trips = _trips(bodies.get(condition, ""), rest)
            for kind, (count, size) in inside.items():
                totals[kind][0] += times * trips * count
                totals[kind][1] += times * trips * size
    for called, branches in _CALLED.findall(body):
        for inner in (called, *re.findall(r"[\w.\-]+", branches)):
            _add_up(inner, times, bodies, totals)


def _trips(condition: str, rest: str) -> int:
    if known := _KNOWN_TRIPS.search(rest):
        return int(known[1])
    bounds = set(map(int, _CONSTANT.findall(condition)))
    if len(bounds) != 1:
        raise ValueError(f"a loop with collectives in it: how often it runs is not in {condition[:200]!r}")
    return bounds.pop()


def _result_bytes(result: str, kind: str, started: bool) -> int:
    sizes = [_bytes(*found) for found in _SHAPE.findall(result)]
    # What starts a gather or a permute holds its input, too, and bookkeeping; the result is the largest.
    return max(sizes) if started and kind != "all-reduce" else sum(sizes)


def _operand_bytes(operands: str, body: str) -> int:
    """Operands are named, and their types stand where they are made."""
    made = (re.search(rf"{re.escape(name)} = (\S+)", body) for name in re.findall(r"%[\w.\-]+", operands))
    return sum(_bytes(*_SHAPE.search(found[1]).groups()) for found in made)


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8
