"""Compiling ahead of time for devices that are not there, and what the compiler says of a program."""

import argparse
import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.cluster.models import find_model
from experiments.cluster.topology import standing_in


class Compiled(NamedTuple):
    """What the compiler says of a program.

    Attributes:
        platform: cuda or tpu.
        num_devices: devices compiled for.
        memory_bytes: of one device: arguments, outputs that are not arguments' memory, temporaries, program.
        state_bytes: arguments of one device by kind, where known.
        temporary_bytes: temporaries of one device by kind, as far as the loops of the compiled text tell.
        traffic: collectives by kind and group: operations, runs, bytes of a device, those of them that the compiler
            repeats to save memory, whether a group leaves its node, and for the train step the bytes that a formula
            gives them.
        unknown_runs: collectives in loops whose length is not in the compiled text; counted once.
        flops: counted from the jaxpr, over all devices; 0 where not counted.
        product_bytes: what those products read and write, over all devices.
        xla_flops: XLA's own count of one device, where the compiler has one; bodies of loops once. 0 elsewhere.
        declared: FLOPs over all devices that the step is known to compute, by reason; empty for other functions.
        model_flops: what the model needs, without recomputation; 0 for other functions.
        lower_seconds: time to trace and lower.
        compile_seconds: time to compile.
    """

    platform: str
    num_devices: int
    memory_bytes: dict[str, int]
    state_bytes: dict[str, int]
    temporary_bytes: dict[str, int]
    traffic: list[dict[str, Any]]
    unknown_runs: int
    flops: float
    product_bytes: float
    xla_flops: float
    declared: dict[str, float]
    model_flops: float
    lower_seconds: float
    compile_seconds: float

    @property
    def total_bytes(self) -> int:
        """Memory of one device."""
        return sum(self.memory_bytes.values())


def compile_for(
    platform: str,
    devices: Sequence[Any],
    function: Any,
    arguments: Sequence[Any],
    keywords: dict[str, Any] | None = None,
    *,
    node_size: int = 8,
) -> Compiled:
    """Lowers and compiles a jitted function for devices that are not there.

    Args:
        platform: what they are, for the report.
        devices: from ``topology_devices``.
        function: a jitted function.
        arguments: shapes with shardings on these devices.
        keywords: the same, by name.
        node_size: consecutive devices on one fast network.
    """
    from jaxrl_suite.moe.audit import audit, carried_bytes, summarize
    from jaxrl_suite.moe.cost_flops import jaxpr_flops

    began = time.perf_counter()
    with standing_in(list(devices)):
        traced = function.trace(*arguments, **(keywords or {}))
        counted = jaxpr_flops(traced.jaxpr.jaxpr)
        lowered = traced.lower()
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    text, memory = compiled.as_text(), _memory(compiled)
    collectives = audit(text)
    return Compiled(
        platform=platform,
        num_devices=len(devices),
        memory_bytes=memory,
        state_bytes={},
        temporary_bytes=_temporaries(carried_bytes(text), memory["temporaries"]),
        traffic=[_traffic_row(row, node_size) for row in summarize(collectives)],
        unknown_runs=sum(item.runs is None for item in collectives),
        flops=counted.total,
        product_bytes=counted.product_bytes,
        xla_flops=_xla_flops(compiled),
        declared={},
        model_flops=0.0,
        lower_seconds=lowered_at - began,
        compile_seconds=done - lowered_at,
    )


def _memory(compiled: Any) -> dict[str, int]:
    sizes = compiled.memory_analysis()
    return {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
    }


def _temporaries(carried: Sequence[int], total: int) -> dict[str, int]:
    """Temporaries by kind, from what loops carry; loops may share memory with others, so parts end at the total."""
    parts, left = {}, total
    for name, size in zip(("carried by the outer loop", "activations for a backward pass"), carried):
        parts[name] = min(size, left)
        left -= parts[name]
    return {**parts, "buffers and the rest": left} if parts else {}


def _xla_flops(compiled: Any) -> float:
    """XLA's count, 0 where the compiler does not count ahead of time (CUDA)."""
    try:
        return float((compiled.cost_analysis() or {}).get("flops", 0.0))
    except Exception:  # the plugins raise what they like
        return 0.0


def _traffic_row(row: dict[str, Any], node_size: int) -> dict[str, Any]:
    from jaxrl_suite.moe.cost_roofline import peers_in_node

    groups = row["groups"]
    leaving = sum(len({rank // node_size for rank in group}) > 1 for group in groups)
    return {
        "kind": row["kind"],
        "group_size": len(groups[0]),
        "first_group": list(groups[0][:8]),
        "num_groups": len(groups),
        "groups_leaving_node": leaving,
        "peers": peers_in_node(groups, node_size),
        "operations": row["operations"],
        "runs": row["runs"],
        "bytes": row["bytes"],
        "repeated": row["repeated"],
    }


def compile_train_step(
    config: Any,
    folding: Any,
    devices: Sequence[Any],
    *,
    sequence: int,
    global_batch: int,
    platform: str = "cuda",
    node_size: int = 8,
) -> Compiled:
    """The real train step of ``moe``.

    Args:
        config: ``MoEConfig``, its micro-batches included.
        folding: degrees over these devices.
        devices: from ``topology_devices``.
        sequence: tokens of a sequence.
        global_batch: sequences of a step.
        platform: what the devices are, for the report.
        node_size: consecutive devices on one fast network.
    """
    import jax

    from experiments.cluster.abstract_step import abstract_batch, abstract_hparams, abstract_state
    from experiments.cluster.declared import declared_flops
    from jaxrl_suite.lm import flatten
    from jaxrl_suite.moe.cost_model import token_flops
    from jaxrl_suite.moe.train import train_step_in_place

    with standing_in(list(devices)):
        state = abstract_state(config, folding)
        batch = abstract_batch(folding, global_batch, sequence)
        keywords = {"hparams": abstract_hparams(folding)}
    found = compile_for(platform, devices, train_step_in_place, (state, batch), keywords, node_size=node_size)
    held = {
        "parameters": _local_bytes(flatten(state.params).values()),
        "optimizer": _local_bytes(jax.tree.leaves(state.moments)),
        "batch": _local_bytes(batch),
    }
    needed = token_flops(config.model, sequence).train * sequence * global_batch
    declared = declared_flops(config, folding, sequence=sequence, global_batch=global_batch)
    traffic = _beside_formula(found.traffic, config, folding, sequence=sequence, global_batch=global_batch)
    return found._replace(state_bytes=held, model_flops=needed, declared=declared, traffic=traffic)


def _beside_formula(rows: list[dict[str, Any]], config: Any, folding: Any, **shape: int) -> list[dict[str, Any]]:
    """Rows of one kind and group get the bytes that the formula gives them, where there is one for the step."""
    from experiments.cluster.declared_traffic import declared_traffic, key_of

    try:
        formula = declared_traffic(config, folding, **shape)
    except ValueError:  # a dispatcher or schedule without formula
        return rows
    total: dict[Any, float] = {}
    for row in rows:
        total[key_of(row)] = total.get(key_of(row), 0.0) + once(row)
    return [{**row, "formula": formula.get(key_of(row), 0.0) * once(row) / total[key_of(row)]} for row in rows]


def once(row: dict[str, Any]) -> float:
    """Bytes of a row of the report without what the compiler fetches again to save memory; older files lack those."""
    return row["bytes"] - row.get("repeated", 0.0)


def _local_bytes(shapes: Any) -> int:
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in shapes)


def step_config(options: argparse.Namespace, folding: Any) -> Any:
    """Model and step from the command line: float32 weights, bfloat16 products."""
    from jaxrl_suite.moe.config import MoEConfig

    model = find_model(options.model).replace(param_dtype="float32", compute_dtype="bfloat16")
    if options.shrink:
        model = shrunk(model, folding)
    if options.num_layers:
        model = model.replace(num_layers=options.num_layers)
    micro = folding.dp * options.micro_batch
    if options.global_batch < 1 or options.global_batch % micro:
        raise ValueError(f"--global_batch={options.global_batch}: must divide by DP times the micro-batch, {micro}.")
    return MoEConfig(
        model=model,
        dispatch=options.dispatch,
        capacity_factor=options.capacity_factor if options.dispatch == "drop_pad" else None,
        num_microbatches=options.global_batch // micro,
        schedule=options.schedule if folding.pp > 1 else "gpipe",
        pending=options.pending,
        sharding=options.sharding,
        remat=options.remat,
        context=options.context,
    )


def shrunk(model: Any, folding: Any) -> Any:
    """A small model of the same kind that the folding still divides: two layers a stage, narrow."""
    heads = max(model.num_kv_heads, folding.tp)
    return model.replace(
        num_layers=2 * folding.pp,
        width=256,
        num_heads=2 * heads,
        num_kv_heads=heads,
        head_dim=64,
        ffn_width=512,
        expert_width=256 if model.expert_width else 0,
        shared_width=512 if model.shared_width else 0,
        vocab_size=1024,
    )


def compile_named(name: str, platform: str, devices: Sequence[Any], node_size: int) -> Compiled:
    """A function of the user's, named ``package.module:make``."""
    module, _, attribute = name.partition(":")
    try:
        make: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--function={name}: cannot be imported as package.module:function ({error}).") from None
    with standing_in(list(devices)):
        function, arguments = make(devices)
    return compile_for(platform, devices, function, arguments, node_size=node_size)
