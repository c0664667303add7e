"""Folding: one set of ranks, two parallel layouts.

Attention layers see the ranks as (pp, dp, cp, tp), expert layers see the same ranks as (pp, edp, ep, etp). Ranks are
numbered with the pipeline as most significant digit in both views:

    attention: rank = ((p · DP + d) · CP + c) · TP + t        experts: rank = ((p · EDP + x) · EP + e) · ETP + u

The only equality required is that of the product inside a stage, TP · CP · DP = ETP · EP · EDP. With the pipeline
outermost the pipeline groups of both views coincide for every such pair (Differs: the paper's listing puts it second,
which breaks that rule for most mappings, its own best one included).

References:
    Liu et al. (2025), MoE Parallel Folding, arXiv:2504.14960, section 3 and appendix (rank generation).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_suite.config import Config, check, check_count, field
from jaxrl_suite.moe.atoms import Atoms, digits, groups_of, ordered_factorisations, refine

ATTENTION_AXES = ("tp", "cp", "dp")  # innermost first
EXPERT_AXES = ("etp", "ep", "edp")
KINDS = (*ATTENTION_AXES, *EXPERT_AXES, "pp")
_SECTIONS = {"attention": ATTENTION_AXES, "experts": EXPERT_AXES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folding(Config):
    """Parallel degrees of attention and experts over the same ranks.

    Raises:
        ValueError: a degree is not a positive integer, the products of the two views inside a pipeline stage differ,
            or the views have no common refinement; the message names the nearest foldings that work.

    >>> folding = Folding.parse("attention=tp2.cp2.dp2 experts=ep8")
    >>> folding.groups("ep")
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    >>> folding.roles["ep"]
    ('a2', 'a1', 'a0')
    """

    tp: int = field(1, help="tensor (and sequence) parallel degree of attention")
    cp: int = field(1, help="context parallel degree of attention")
    dp: int = field(1, help="data parallel degree of attention")
    etp: int = field(1, help="tensor parallel degree inside an expert")
    ep: int = field(1, help="expert parallel degree")
    edp: int = field(1, help="data parallel degree of experts")
    pp: int = field(1, help="pipeline stages")

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in KINDS:
            check(getattr(self, kind) >= 1, argument=kind, value=getattr(self, kind), rule="must be at least 1")
        attention, experts = self._stage_products()
        check(
            attention == experts,
            argument="folding",
            value=_text(self),
            rule=f"tp·cp·dp = {self.tp}·{self.cp}·{self.dp} = {attention} must equal "
            f"etp·ep·edp = {self.etp}·{self.ep}·{self.edp} = {experts}",
            remedy=_nearest_text(self, {attention, experts}) if attention != experts else "",
        )
        check(
            self._refinement() is not None,
            argument="folding",
            value=_text(self),
            rule=f"boundaries 1, {self.tp}, {self.tp * self.cp} of attention and 1, {self.etp}, {self.etp * self.ep} "
            "of experts have no common refinement (sorted together, each must divide the next)",
            remedy=_nearest_text(self, {attention}) if self._refinement() is None else "",
        )

    @classmethod
    def parse(cls, text: str, num_devices: int | None = None) -> "Folding":
        """Reads ``attention=tp2.cp2.dp2 experts=etp1.ep8.edp1 pipeline=1``.

        Degrees left out are 1, except dp and edp: these follow from ``num_devices``, or without it from the smallest
        number of ranks that serves both views.

        Args:
            text: parts in any order, separated by blanks.
            num_devices: number of ranks in all, pipeline stages included.

        Raises:
            ValueError: the text does not follow the form, or no such folding exists.
        """
        if num_devices is not None:
            check_count(1, num_devices=num_devices)
        degrees = _parse_degrees(text)
        pipeline = degrees.get("pp", 1)
        if num_devices is None:
            sides = [_known_product(degrees, axes) for axes in (ATTENTION_AXES, EXPERT_AXES)]
            free = ["dp" not in degrees, "edp" not in degrees]
            stage = math.lcm(*sides) if all(free) else sides[free.index(False)]
        else:
            check(
                num_devices % pipeline == 0,
                argument="pipeline",
                value=pipeline,
                rule=f"must divide the {num_devices} devices",
            )
            stage = num_devices // pipeline
        for axes in (ATTENTION_AXES, EXPERT_AXES):
            known = _known_product(degrees, axes)
            if axes[-1] not in degrees and stage % known == 0:
                degrees[axes[-1]] = stage // known
        folding = cls(**degrees)
        check(
            num_devices in (None, folding.num_ranks),
            argument="folding",
            value=_text(folding),
            rule=f"takes {folding.num_ranks} ranks, there are {num_devices}",
            remedy=_nearest_text(folding, {stage}) if num_devices not in (None, folding.num_ranks) else "",
        )
        return folding

    @property
    def num_ranks(self) -> int:
        """Ranks in all."""
        return self.pp * self._stage_products()[0]

    @functools.cached_property
    def atoms(self) -> Atoms:
        """Common refinement of the two views inside a stage."""
        found = self._refinement()
        if found is None:
            raise ValueError(f"folding={_text(self)!r}: no common refinement.")
        return found

    @functools.cached_property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Role table: logical axis -> axes of the fine mesh, major to minor.

        Besides the seven kinds: ``tokens`` (dp, cp, tp: every rank of a stage), ``sequence`` (cp, tp) and ``dense``
        (dp, cp: where gradients of dense weights are summed). An axis of degree 1 has no atoms.
        """
        roles = dict(self.atoms.roles)
        roles["pp"] = ("pp",) if self.pp > 1 else ()
        roles["tokens"] = roles["dp"] + roles["cp"] + roles["tp"]
        roles["sequence"] = roles["cp"] + roles["tp"]
        roles["dense"] = roles["dp"] + roles["cp"]
        return roles

    def groups(self, kind: str) -> list[list[int]]:
        """Groups of ranks that agree on every digit except that of ``kind``, one of tp, cp, dp, etp, ep, edp, pp."""
        check(kind in KINDS, argument="kind", value=kind, rule=f"must be one of {', '.join(KINDS)}")
        axes = (*(EXPERT_AXES if kind in EXPERT_AXES else ATTENTION_AXES), "pp")
        return groups_of(axes.index(kind), [getattr(self, axis) for axis in axes])

    def coordinates(self, rank: int) -> dict[str, int]:
        """Digit of a rank on each of the seven axes."""
        result = {}
        for axes in (ATTENTION_AXES, EXPERT_AXES):
            axes = (*axes, "pp")
            result |= dict(zip(axes, digits(rank, [getattr(self, axis) for axis in axes])))
        return {kind: result[kind] for kind in KINDS}

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The fine mesh, axes ``("pp", a_n, …, a_0)``, over a device array that is built once and never reordered."""
        return Mesh(self._device_array(devices, (self.pp, *self.atoms.sizes)), ("pp", *self.atoms.names))

    def attention_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The same devices as attention sees them, axes (pp, dp, cp, tp)."""
        return Mesh(self._device_array(devices, (self.pp, self.dp, self.cp, self.tp)), ("pp", "dp", "cp", "tp"))

    def expert_mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The same devices as experts see them, axes (pp, edp, ep, etp)."""
        return Mesh(self._device_array(devices, (self.pp, self.edp, self.ep, self.etp)), ("pp", "edp", "ep", "etp"))

    def spec(self, *logical: str | tuple[str, ...] | None) -> PartitionSpec:
        """A partition spec over the fine mesh from logical axes (names of the role table), one entry a dimension."""
        entries = []
        for entry in logical:
            kinds = () if entry is None else (entry,) if isinstance(entry, str) else entry
            atoms = tuple(atom for kind in kinds for atom in self.roles[kind])
            entries.append(None if not atoms else atoms[0] if len(atoms) == 1 else atoms)
        while entries and entries[-1] is None:
            entries.pop()
        return PartitionSpec(*entries)

    def sharding(self, *logical: str | tuple[str, ...] | None, devices: Sequence[Any] | None = None) -> NamedSharding:
        """:meth:`spec` as a sharding over the fine mesh."""
        return NamedSharding(self.mesh(devices), self.spec(*logical))

    def leaving_node(self, node_size: int = 8) -> dict[str, int]:
        """Number of groups of each kind whose ranks lie on more than one node of ``node_size`` consecutive ranks."""
        return {
            kind: sum(len({rank // node_size for rank in group}) > 1 for group in self.groups(kind)) for kind in KINDS
        }

    def describe(self, node_size: int = 8) -> str:
        """Rank map and node crossings as text, for people."""
        atoms = ", ".join(f"{name}={size}" for name, size in zip(self.atoms.names, self.atoms.sizes)) or "none"
        lines = [f"{_text(self)}: {self.num_ranks} ranks, fine mesh pp={self.pp}, {atoms}", ""]
        lines.append("kind  degree  groups  leave a node  axes      first group")
        crossing = self.leaving_node(node_size)
        for kind in KINDS:
            groups = self.groups(kind)
            axes = ",".join(self.roles[kind]) or "-"
            first = " ".join(map(str, groups[0][:8])) + (" …" if len(groups[0]) > 8 else "")
            lines.append(
                f"{kind:<4}  {getattr(self, kind):>6}  {len(groups):>6}  {crossing[kind]:>12}  {axes:<8}  {first}"
            )
        lines += ["", "rank  " + "  ".join(f"{kind:>3}" for kind in KINDS)]
        for rank in range(min(self.num_ranks, 64)):
            where = self.coordinates(rank)
            lines.append(f"{rank:>4}  " + "  ".join(f"{where[kind]:>3}" for kind in KINDS))
        if self.num_ranks > 64:
            lines.append(f"… {self.num_ranks - 64} more ranks")
        return "\n".join(lines)

    def __str__(self) -> str:
        return _text(self)

    def _stage_products(self) -> tuple[int, int]:
        return self.tp * self.cp * self.dp, self.etp * self.ep * self.edp

    def _refinement(self) -> Atoms | None:
        views = [{axis: getattr(self, axis) for axis in axes} for axes in (ATTENTION_AXES, EXPERT_AXES)]
        return refine(*views)

    def _device_array(self, devices: Sequence[Any] | None, shape: tuple[int, ...]) -> np.ndarray:
        devices = list(np.asarray(jax.devices() if devices is None else devices, dtype=object).flat)
        check(
            len(devices) >= self.num_ranks,
            argument="devices",
            value=len(devices),
            rule=f"folding {self} needs {self.num_ranks}",
            remedy="On a CPU: XLA_FLAGS=--xla_force_host_platform_device_count=N before JAX starts",
        )
        array = np.empty(self.num_ranks, dtype=object)
        array[:] = devices[: self.num_ranks]
        return array.reshape(shape)


@functools.lru_cache(maxsize=64)
def foldings(num_devices: int) -> tuple[Folding, ...]:
    """Every valid folding of a number of devices over all five dimensions.

    >>> len(foldings(8))
    146
    """
    found = []
    for pipeline in [d for d in range(1, num_devices + 1) if num_devices % d == 0]:
        views = ordered_factorisations(num_devices // pipeline, 3)
        for attention in views:
            for experts in views:
                degrees = dict(zip((*ATTENTION_AXES, *EXPERT_AXES), (*attention, *experts)))
                if _refines(degrees):
                    found.append(Folding(**degrees, pp=pipeline))
    return tuple(found)


def nearest_foldings(degrees: dict[str, int], candidates: Sequence[Folding], count: int = 3) -> list[Folding]:
    """Foldings whose degrees differ least, in the sum of |log2 ratios|."""

    def distance(folding: Folding) -> tuple[float, int]:
        ratios = [abs(math.log2(getattr(folding, kind) / max(1, degrees.get(kind, 1)))) for kind in KINDS]
        return sum(ratios), folding.num_ranks

    return sorted(candidates, key=distance)[:count]


def _refines(degrees: dict[str, int]) -> bool:
    views = [{axis: degrees[axis] for axis in axes} for axes in (ATTENTION_AXES, EXPERT_AXES)]
    return refine(*views) is not None


def _nearest_text(folding: Folding, stages: set[int]) -> str:
    degrees = {kind: getattr(folding, kind) for kind in KINDS}
    candidates = [
        dataclasses.replace(inner, pp=folding.pp)
        for stage in sorted(stages)
        for inner in foldings(stage)
        if inner.pp == 1
    ]
    return "Nearest that work: " + "; ".join(map(str, nearest_foldings(degrees, candidates)))


def _text(folding: Folding) -> str:
    attention = f"attention=tp{folding.tp}.cp{folding.cp}.dp{folding.dp}"
    return f"{attention} experts=etp{folding.etp}.ep{folding.ep}.edp{folding.edp} pipeline={folding.pp}"


def _known_product(degrees: dict[str, int], axes: Sequence[str]) -> int:
    return math.prod(degrees.get(axis, 1) for axis in axes)


def _parse_degrees(text: str) -> dict[str, int]:
    degrees: dict[str, int] = {}
    form = "The form is: attention=tp2.cp2.dp2 experts=etp1.ep8.edp1 pipeline=1"
    for part in text.split():
        section, _, values = part.partition("=")
        if section == "pipeline":
            check(bool(re.fullmatch(r"[1-9]\d*", values)), argument="pipeline", value=values, rule="must be a count")
            degrees["pp"] = int(values)
            continue
        check(section in _SECTIONS and bool(values), argument="folding", value=part, rule="cannot be read", remedy=form)
        for item in values.split("."):
            match = re.fullmatch(r"([a-z]+)([1-9]\d*)", item)
            known = match is not None and match[1] in _SECTIONS[section] and match[1] not in degrees
            axes = ", ".join(_SECTIONS[section])
            rule = f"{section} takes each of {axes} once, with a positive degree"
            check(known, argument="folding", value=item, rule=rule, remedy=form)
            if match is not None:
                degrees[match[1]] = int(match[2])
    return degrees
