"""Bytes of every collective of the train step by formula, to hold beside what the compiler put into the program."""

import math
from typing import Any

from jaxrl_suite.lm import parameter_shapes
from jaxrl_suite.moe.capacity import expert_capacity
from jaxrl_suite.moe.config import MoEConfig
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.partition import is_multiplied, logical_axes, placements
from jaxrl_suite.moe.pipeline import num_ticks

Key = tuple[str, tuple[int, ...]]  # kind of collective, first eight ranks of its first group; a sorted pair


def key_of(row: dict[str, Any]) -> Key:
    """Key of a row of a compiled report."""
    first = tuple(row["first_group"])
    return row["kind"], tuple(sorted(first)) if row["kind"] == "collective-permute" else first


def declared_traffic(config: MoEConfig, folding: Folding, *, sequence: int, global_batch: int) -> dict[Key, float]:
    """Bytes that one device sends in a step, by kind and group; what is below a thousandth of the rest is left out.

    A layer runs forward F times a micro-batch (1F1B repeats the forward pass of a stage: 2, else 1), R times again in
    the backward pass (``remat="full"``: 1), and backward once; a pipeline does so m + PP - 1 times for m micro-batches.
    With A the bytes of a micro-batch between layers (gathered over TP), C the slots of an expert and l the layers of a
    stage, each time sends

        TP   (TP-1)/TP A (l (F + R + 1) + 2) gathered, as much less one scattered, and F embeddings in float32
        CP   (CP-1) (F + R + 1) l times the keys and values of a rank
        EP   (EP-1)/EP 2 (F + 1) l E C D, exchanges are not repeated
        ETP  (ETP-1) (F + 1) l E C D gathered and as much scattered
        PP   A / TP forward and as much backward

    and each step once gathers the stored weights (matrices in the dtype of products, the others in their own), scatters
    their gradients, and sums the gradients of the two tables over the stages.

    Raises:
        ValueError: dispatch, schedule, sharding or context kernel other than drop_pad, 1f1b, zero1 and ring.
    """
    _check(config, folding)
    model, stages = config.model, folding.pp
    wide = 2 if "bfloat16" in (model.compute_dtype, model.param_dtype) else 4
    ticks = num_ticks(config.num_microbatches, stages)
    layers = model.num_layers // stages
    forward, again = (2 if stages > 1 else 1), int(config.remat == "full")
    passes = layers * (forward + again + 1)
    rows = global_batch // (folding.dp * config.num_microbatches)
    tokens = rows * sequence // folding.cp
    whole = tokens * model.width  # numbers of a micro-batch between layers, over all tensor ranks
    sent: dict[Key, float] = {}

    def add(kind: str, role: str, size: float) -> None:
        groups = [list(map(int, group)) for group in _groups(folding, role)]
        if size and len(groups[0]) > 1:
            first = groups[0][:2] if kind == "collective-permute" else groups[0][:8]
            sent[kind, tuple(first)] = sent.get((kind, tuple(first)), 0.0) + size

    tensor = (folding.tp - 1) / folding.tp * whole
    shared = layers * (forward + again + 1) if model.shared_width else 0
    add("all-gather", "tp", ticks * tensor * wide * (passes + shared + 2))
    add("reduce-scatter", "tp", ticks * tensor * (wide * (passes + shared + 1) + 4 * forward))
    keys = tokens * max(1, model.num_kv_heads // folding.tp) * model.head_dim
    add("collective-permute", "cp", ticks * passes * (folding.cp - 1) * 2 * keys * wide)
    slots = expert_capacity(
        tokens // folding.tp, model.num_experts, model.experts_per_token, config.capacity_factor or 1
    )
    copies = ticks * layers * (forward + 1) * model.num_experts * slots * model.width * wide
    add("all-to-all", "ep", 2 * copies * (folding.ep - 1) / folding.ep)
    for kind in ("all-gather", "reduce-scatter"):
        add(kind, "etp", copies * (folding.etp - 1))
    add("collective-permute", "pp", 2 * ticks * whole / folding.tp * wide)
    for (kind, role), size in _weights(config, folding, wide).items():
        add(kind, role, size)
    tables = 2 * model.vocab_size * model.width * 4 / folding.tp
    add("all-reduce", "pp", 2 * tables * (stages - 1) / stages)
    largest = max(sent.values(), default=0.0)
    return {key: size for key, size in sent.items() if size > 1e-3 * largest}


def _check(config: MoEConfig, folding: Folding) -> None:
    wanted = {"dispatch": ("drop_pad",), "sharding": ("zero1",), "remat": ("none", "full")}
    wanted |= {"schedule": ("1f1b",)} if folding.pp > 1 else {}
    wanted |= {"context": ("ring",)} if folding.cp > 1 else {}
    for name, allowed in wanted.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}={getattr(config, name)!r}: bytes are declared for {' or '.join(allowed)} only.")


def _groups(folding: Folding, role: str) -> list[list[int]]:
    if role != "dense":
        return folding.groups(role)
    size = folding.tp * folding.cp * folding.dp
    return [list(range(first, size, folding.tp)) for first in range(folding.tp)]


def _weights(config: MoEConfig, folding: Folding, wide: int) -> dict[tuple[str, str], float]:
    """Bytes of float32 weights that a device gathers from others in a step, and of gradients that it scatters."""
    shapes = parameter_shapes(config.model)
    sizes: dict[tuple[str, str], float] = {}
    for path, place in placements(config, folding).items():
        if not place.gather:
            continue
        axes = logical_axes(path, config.model, folding.tp)
        local = math.prod(shapes[path]) / math.prod(getattr(folding, axis) for axis in axes if axis)
        role = "edp" if place.is_expert else "dense"
        degree = folding.edp if place.is_expert else folding.dp * folding.cp
        numbers = local * (degree - 1) / degree
        for kind, size in (("all-gather", wide if is_multiplied(path) else 4), ("reduce-scatter", 4)):
            sizes[kind, role] = sizes.get((kind, role), 0.0) + size * numbers
    return sizes
