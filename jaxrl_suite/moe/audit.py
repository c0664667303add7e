"""What a compiled program really sends: its collectives by kind, group, bytes and how often they run.

Works on the text of any compiled JAX program, not only of this package. Replica groups come in three written forms, all
read here: explicit lists ``{{0,1},{2,3}}``, the iota form ``[2,4]<=[4,2]T(1,0)``, and mesh axes
``mesh['a'=2,'b'=4] {'b'}``.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

KINDS = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute", "ragged-all-to-all")
_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
}
_BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_OPERATION = re.compile(rf"^(?:ROOT )?%?(\S+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"^(?:ROOT )?%?(\S+) = (\(.*?\)) while\(")
_ARGUMENT = re.compile(r" parameter\(\d+\)")
_SHAPE = re.compile(r"\w+\[[\d,]*\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

Group = tuple[int, ...]


class Collective(NamedTuple):
    """One collective operation of a compiled program.

    Attributes:
        name: its name in the program.
        kind: one of ``KINDS``.
        groups: the ranks that exchange, each group sorted; for collective-permute the (source, target) pairs.
        num_bytes: size of the larger of operand and result on one device.
        runs: how often it runs in one call of the program, or None where a loop's length is not in the text.
        loops: names of the loops around it, outermost first.
        scope: where in the Python program it comes from.
    """

    name: str
    kind: str
    groups: tuple[Group, ...]
    num_bytes: int
    runs: int | None
    loops: tuple[str, ...]
    scope: str

    def wire_bytes(self) -> float:
        """Bytes that one device sends in one run: the share of the operand that leaves it."""
        size = len(self.groups[0]) if self.groups else 1
        if self.kind == "collective-permute":
            return self.num_bytes
        share = (size - 1) / size
        return self.num_bytes * share * (2 if self.kind == "all-reduce" else 1)


def audit(compiled: Any) -> list[Collective]:
    """Collectives of a compiled program, in the order of the text; groups of single ranks are left out.

    Args:
        compiled: ``jax.jit(f).lower(...).compile()``, or its text.

    Returns:
        One entry an operation. Asynchronous pairs count once, at their start.

    >>> text = "ENTRY %main (p: f32[4]) -> f32[4] {" + chr(10) + "  %r = f32[4]{0} all-reduce(%p), "
    >>> text += "replica_groups=[2,2]<=[4], to_apply=%add" + chr(10) + "}"
    >>> audit(text)[0].groups
    ((0, 1), (2, 3))
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations, entry = _computations(text)
    callers = _callers(computations)
    found = []
    for computation, lines in computations.items():
        runs, loops = _repetitions(computation, entry, callers)
        for line in lines:
            match = _OPERATION.match(line)
            if match is None:
                continue
            groups = _groups_of(line, match[3])
            if all(len(set(group)) < 2 for group in groups):
                continue
            scope = re.search(r'op_name="([^"]*)"', line)
            size = _size_of(match[2], match[4] is not None and not _is_plain_reduction(match[3], match[2]))
            if match[3] == "reduce-scatter" and not match[4]:  # the text shows the result, a share of what goes in
                size *= max(map(len, groups))
            found.append(Collective(match[1], match[3], groups, size, runs, loops, scope[1] if scope else ""))
    return found


def summarize(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Totals by kind and groups: operations, runs and bytes on the wire of one device, largest first.

    ``repeated`` are those of the bytes that only the compiler asks for: short of memory, it drops what a collective
    brought and fetches it again, under the old name with ``.remat`` behind.
    """
    fetched: set[str] = set()
    totals: dict[tuple[str, tuple[Group, ...]], dict[str, Any]] = {}
    for item in collectives:
        row = totals.setdefault(
            (item.kind, item.groups),
            {"kind": item.kind, "groups": item.groups, "operations": 0, "runs": 0, "bytes": 0.0, "repeated": 0.0},
        )
        row["operations"] += 1
        row["runs"] += item.runs or 1
        size, origin = item.wire_bytes() * (item.runs or 1), item.name.partition(".remat")[0]
        row["bytes"] += size
        row["repeated"] += size if origin in fetched else 0.0
        fetched.add(origin)
    return sorted(totals.values(), key=lambda row: -row["bytes"])


def carried_bytes(compiled: Any) -> list[int]:
    """What the largest loop of a program carries from turn to turn, then the largest loop inside it, and so on.

    An inner loop is handed most of what the outer one carries; only what has another shape counts for it, which in a
    train step is what its backward pass needs of the forward pass. Arguments of the program do not count.

    Args:
        compiled: ``jax.jit(f).lower(...).compile()``, or its text.

    Returns:
        Bytes on one device by depth; empty without loops.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations, entry = _computations(text)
    callers = _callers(computations)
    loops: dict[tuple[str, ...], list[tuple[str, Counter[str]]]] = {}
    for computation, lines in computations.items():
        for line in lines:
            if match := _LOOP.match(line):
                around = _repetitions(computation, entry, callers)[1]
                loops.setdefault(around, []).append((match[1], Counter(_SHAPE.findall(match[2]))))
    known = Counter(shape for line in computations.get(entry, ()) if _ARGUMENT.search(line) for shape in _first(line))
    found: list[int] = []
    around: tuple[str, ...] = ()
    while inner := loops.get(around):
        name, shapes = max(inner, key=lambda loop: _sum_of_shapes(loop[1] - known))
        found.append(_sum_of_shapes(shapes - known))
        known, around = known | shapes, (*around, name)
    return found


def _first(line: str) -> list[str]:
    return _SHAPE.findall(line.split(" = ", 1)[1])[:1]


def _sum_of_shapes(shapes: Counter[str]) -> int:
    return sum(_size_of(shape, False) * number for shape, number in shapes.items())


def parse_groups(text: str, num_ranks: int | None = None) -> tuple[Group, ...]:
    """Replica groups from any of the three written forms.

    >>> parse_groups("{{0,2},{1,3}}")
    ((0, 2), (1, 3))
    >>> parse_groups("[2,2]<=[2,2]T(1,0)")
    ((0, 2), (1, 3))
    >>> parse_groups("mesh['a'=2,'b'=2] {'a'}")
    ((0, 2), (1, 3))
    """
    text = text.strip()
    if text.startswith("{"):
        groups = re.findall(r"\{([\d, ]+)\}", text)
        if not groups:
            return (tuple(range(num_ranks)),) if num_ranks else ()
        return tuple(sorted(tuple(sorted(int(n) for n in group.split(","))) for group in groups))
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims = _integers(iota[1]), _integers(iota[2])
        ranks = np.arange(math.prod(dims)).reshape(dims)
        ranks = ranks.transpose(_integers(iota[3])) if iota[3] else ranks
        return _rows(ranks.reshape(shape))
    mesh = re.match(r"@?\w*\[([^\]]*)\](?:, device_ids=\((.*?)\))?\s*\{([^}]*)\}", text)
    if mesh is None:
        raise ValueError(f"replica_groups={text!r}: not one of the three known forms.")
    return _mesh_groups(mesh[1], mesh[2], mesh[3])


def _mesh_groups(axes: str, device_ids: str | None, chosen: str) -> tuple[Group, ...]:
    """Groups over chosen axes of a mesh; a chosen entry ``'a':(2)4`` is the middle part of size 4 of axis a."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts: list[tuple[str, int]] = []  # every axis split into the parts that are named
    selected: list[int] = []
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    for name, size in sizes.items():
        cuts = {1, size}
        for other, before, width in wanted:
            if other == name:
                low = int(before) if before else 1
                cuts |= {low, low * (int(width) if width else size)}
        edges = sorted(cuts)
        for low, high in zip(edges, edges[1:]):  # noqa: RUF007
            inside = any(
                other == name and (not before or int(before) <= low < int(before) * int(width))
                for other, before, width in wanted
            )
            if inside:
                selected.append(len(parts))
            parts.append((name, high // low))
    shape = [size for _, size in parts] or [1]
    ids = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids) if device_ids else None
    ranks = np.arange(math.prod(shape))
    if ids:
        ranks = ranks.reshape(_integers(ids[1]))
        ranks = ranks.transpose(_integers(ids[2])) if ids[2] else ranks
    ranks = ranks.reshape(shape)
    rest = [index for index in range(len(shape)) if index not in selected]
    width = math.prod(shape[index] for index in selected)
    return _rows(ranks.transpose([*rest, *selected]).reshape(-1, width))


def _rows(ranks: np.ndarray) -> tuple[Group, ...]:
    return tuple(sorted(tuple(sorted(int(n) for n in row)) for row in ranks))


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and not line.startswith(" "):
            current = header[1]
            computations[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            computations[current].append(line.strip())
    return computations, entry


def _callers(computations: dict[str, list[str]]) -> dict[str, list[tuple[str, int | None, str | None]]]:
    """Computation -> (caller, repetitions, name of the loop if it is a loop's body)."""
    callers: dict[str, list[tuple[str, int | None, str | None]]] = {}
    for caller, lines in computations.items():
        for line in lines:
            called = _CALLED.findall(line)
            branches = _BRANCHES.search(line)
            called += [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
            is_loop = " while(" in line
            trips = _TRIPS.search(line)
            name = line.split(" = ")[0].removeprefix("ROOT ").lstrip("%")
            for target in called:
                repeat = (int(trips[1]) if trips else None) if is_loop else 1
                callers.setdefault(target, []).append((caller, repeat, name if is_loop else None))
    return callers


def _repetitions(
    computation: str, entry: str, callers: dict[str, list[tuple[str, int | None, str | None]]]
) -> tuple[int | None, tuple[str, ...]]:
    runs: int | None = 1
    loops: list[str] = []
    seen = set()
    while computation != entry and computation in callers and computation not in seen:
        seen.add(computation)
        computation, repeat, loop = callers[computation][0]
        runs = None if runs is None or repeat is None else runs * repeat
        if loop:
            loops.insert(0, loop)
    return runs, tuple(loops)


def _groups_of(line: str, kind: str) -> tuple[Group, ...]:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
        return tuple(
            (int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0] if pairs else "") if int(a) != int(b)
        )
    match = re.search(
        r"replica_groups=(.*?)(?:, (?:dimensions|use_global|to_apply|metadata|constrain|split|backend)|$)", line
    )
    return parse_groups(match[1]) if match else ()


def _is_plain_reduction(kind: str, shape: str) -> bool:
    """Whether the start of an all-reduce shows its results alone; newer compilers write ((operands), results)."""
    return kind == "all-reduce" and not shape.startswith("((")


def _size_of(shape: str, is_start: bool) -> int:
    """Bytes of a result, the sum of a tuple; of an asynchronous start, operands or results, whichever is larger."""
    if not is_start or not shape.startswith("("):
        return _sum_of_parts(shape)
    # ((operands), results) or (operand, result, …): parts of the outermost tuple.
    parts, depth, begin = [], 0, 1
    for place, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(shape[begin:place])
            begin = place + 1
    return max(map(_sum_of_parts, parts), default=0)


def _sum_of_parts(shape: str) -> int:
    sizes = [
        math.prod(_integers(dims)) * _BYTES[dtype] if dims else _BYTES[dtype]
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        if dtype in _BYTES
    ]
    return int(sum(sizes))
