"""Bytes of every collective of the train step by formula, to hold beside what the compiler put into the program."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxrl_suite.lm import parameter_shapes
from jaxrl_suite.moe.atoms import groups_of
from jaxrl_suite.moe.capacity import expert_capacity
from jaxrl_suite.moe.config import MoEConfig
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.partition import Placement, is_multiplied, logical_axes, placements
from jaxrl_suite.moe.pipeline import num_ticks, repeats_exchanges, repeats_stages

Key = tuple[str, tuple[int, ...]]  # kind of collective, first eight ranks of its first group; a sorted pair


def key_of(row: dict[str, Any]) -> Key:
    """Key of a row of a compiled report."""
    first = tuple(row["first_group"])
    return row["kind"], tuple(sorted(first)) if row["kind"] == "collective-permute" else first


def declared_traffic(config: MoEConfig, folding: Folding, *, sequence: int, global_batch: int) -> dict[Key, float]:
    """Bytes that one device sends in a step, by kind and group; what is below a thousandth of the rest is left out.

    A layer runs forward F times a micro-batch (2 where 1F1B repeats the forward pass of a stage, else 1), R times again
    in the backward pass (``remat="full"``: 1), and backward once; a pipeline does so m + PP - 1 times for m
    micro-batches. Inputs of column splits are gathered G times again: with ``remat="elementwise"`` once, else R times.
    With A the bytes of a micro-batch between layers (gathered over TP), C the slots of an expert (each has a row and
    a combine weight of 4 bytes) and l the layers of a stage, each time sends

        TP   (TP-1)/TP A (l (F + G + 1) + 2) gathered, A (l (F + R + 1) + 1) scattered, and F embeddings in float32
        CP   (CP-1) (F + R + 1) l times the keys and values of a rank, and (F + R) l times its positions and segments
        EP   (EP-1)/EP (2 F + X + 2) l E C D, rows are sent out X times more: R where inputs of layers are all that is
             kept, else 0; and (EP-1)/EP (F + X + 1) l E C of combine weights and their gradients
        ETP  (ETP-1) (F + X + 1) l E C D gathered and (F + 1) l E C D scattered; (F + X) l E C of combine weights
             gathered, and l E C of their gradients scattered
        PP   A / TP forward and as much backward

    Each step gathers the stored weights (matrices in the dtype of products, all else as stored) and scatters their
    gradients: with ZeRO-1 once; with FSDP in each time, weights of layers as often as these run forward.
    Where no dimension divides by all data ranks, over those by which one does, and gradients of the shares are summed
    over the others once; of the two tables each rank sums its share over the stages besides.

    Raises:
        ValueError: dispatch, schedule, sharding or context kernel other than drop_pad, 1f1b, zero1 or fsdp, and ring.
    """
    _check(config, folding)
    model, stages = config.model, folding.pp
    wide = 2 if "bfloat16" in (model.compute_dtype, model.param_dtype) else 4
    ticks = num_ticks(config.num_microbatches, stages)
    layers = model.num_layers // stages
    forward, again = 1 + repeats_stages(config, stages), int(config.remat == "full")
    gathers = layers * (forward + _gathers_again(config) + 1)
    passes = layers * (forward + again + 1)
    rows = global_batch // (folding.dp * config.num_microbatches)
    tokens = rows * sequence // folding.cp
    whole = tokens * model.width  # numbers of a micro-batch between layers, over all tensor ranks
    sent: dict[Key, float] = {}

    def add(kind: str, role: str | tuple[str, ...], size: float) -> None:
        groups = [list(map(int, group)) for group in _groups(folding, role)]
        if size and len(groups[0]) > 1:
            first = groups[0][:2] if kind == "collective-permute" else groups[0][:8]
            sent[kind, tuple(first)] = sent.get((kind, tuple(first)), 0.0) + size

    tensor = (folding.tp - 1) / folding.tp * whole
    splits = 1 + bool(model.shared_width)  # columns, then rows, of each layer: attention and a shared expert
    add("all-gather", "tp", ticks * tensor * wide * (splits * gathers + 2))
    add("reduce-scatter", "tp", ticks * tensor * (wide * (splits * passes + 1) + 4 * forward))
    keys = tokens * max(1, model.num_kv_heads // folding.tp) * model.head_dim
    places = layers * (forward + again) * 2 * 4 * tokens  # int32 positions and segments, which have no gradient
    add("collective-permute", "cp", ticks * (folding.cp - 1) * (passes * 2 * keys * wide + places))
    slots = expert_capacity(
        tokens // folding.tp, model.num_experts, model.experts_per_token, config.capacity_factor or 1
    )
    out = forward + repeats_exchanges(config, stages)
    copies, row, weight = ticks * layers * model.num_experts * slots, model.width * wide, 4
    exchanged = copies * (row * (out + forward + 2) + weight * (out + 1))
    add("all-to-all", "ep", exchanged * (folding.ep - 1) / folding.ep)
    add("all-gather", "etp", (folding.etp - 1) * copies * (row * (out + 1) + weight * out))
    add("reduce-scatter", "etp", (folding.etp - 1) * copies * (row * (forward + 1) + weight))
    sends = 2 * ticks - (stages == 2)  # the last tick's gradient is for nobody; a loop of one tick drops it
    add("collective-permute", "pp", sends * whole / folding.tp * wide)
    for path, place in placements(config, folding).items():
        for kind, role, size in _of_weight(path, place, config, folding, wide):
            add(kind, role, size)
    largest = max(sent.values(), default=0.0)
    return {key: size for key, size in sent.items() if size > 1e-3 * largest}


def _check(config: MoEConfig, folding: Folding) -> None:
    wanted = {"dispatch": ("drop_pad",), "sharding": ("zero1", "fsdp")}
    wanted |= {"remat": ("none", "norms", "elementwise", "full")}
    wanted |= {"schedule": ("1f1b",)} if folding.pp > 1 else {}
    wanted |= {"context": ("ring",)} if folding.cp > 1 else {}
    for name, allowed in wanted.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r}: bytes are declared for {' or '.join(allowed)} only.")


def _gathers_again(config: MoEConfig) -> int:
    """How often the backward pass gathers what enters a column split, and weights under FSDP, again."""
    return int(config.remat in ("full", "elementwise"))


def _groups(folding: Folding, role: str | tuple[str, ...]) -> list[list[int]]:
    """Groups of one of the seven roles, of all data ranks ("dense"), of whole stages ("stage"), or over some atoms."""
    if isinstance(role, tuple):
        sizes = (folding.pp, *folding.atoms.sizes)
        axes = [1 + folding.atoms.names.index(atom) for atom in role]
        ranks = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), axes, range(-len(axes), 0))
        return ranks.reshape(-1, math.prod(sizes[axis] for axis in axes)).tolist()
    data = folding.cp * folding.dp
    if role == "dense":
        return groups_of(1, [folding.tp, data, folding.pp])
    return groups_of(0, [folding.tp * data, folding.pp]) if role == "stage" else folding.groups(role)


def _of_weight(
    path: str, place: Placement, config: MoEConfig, folding: Folding, wide: int
) -> Iterator[tuple[str, str | tuple[str, ...], float]]:
    """Kind, role and bytes of what a device sends for one float32 weight in a step."""
    shape = parameter_shapes(config.model)[path]
    axes = [axis for axis in logical_axes(path, config.model, folding.tp) if axis]
    local = math.prod(shape) / math.prod(getattr(folding, axis) for axis in axes)
    role = "edp" if place.is_expert else "dense"
    degree = len(_groups(folding, place.gather)[0])
    if place.gather:
        forth, back = _turns(path, config, folding.pp)
        share = (degree - 1) / degree
        yield "all-gather", place.gather, forth * share * local * (wide if is_multiplied(path) else 4)
        yield "reduce-scatter", place.gather, back * share * local * 4
        rest = tuple(atom for atom in folding.roles[role] if atom not in place.gather)
        others = len(_groups(folding, rest)[0])
        yield "all-reduce", rest, 2 * (others - 1) / others * local / degree * 4
    else:
        role = role if place.is_expert or folding.tp == 1 or "tp" in axes else "stage"
        size = len(_groups(folding, role)[0])
        yield "all-reduce", role, 2 * (size - 1) / size * local * 4
    if "pp" not in axes:  # the same on all stages
        yield "all-reduce", "pp", 2 * (folding.pp - 1) / folding.pp * local / degree * 4


def _turns(path: str, config: MoEConfig, stages: int) -> tuple[int, int]:
    """How often a step gathers a weight and scatters its gradient.

    Under FSDP a weight is gathered wherever it is used: layers in each of their forward passes, tables and last norm
    once a micro-batch. Where 1F1B repeats stages it embeds in both passes of a tick, which share a gather; PP - 1 ticks
    have but the forward.
    """
    if config.sharding == "zero1":
        return 1, 1
    ticks, repeated = num_ticks(config.num_microbatches, stages), repeats_stages(config, stages)
    if path.startswith("layers/"):
        return ticks * (1 + repeated + _gathers_again(config)), ticks
    return ticks + repeated * (stages - 1) * (path == "embed/table"), ticks
