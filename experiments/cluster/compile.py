"""Compile for a cluster that is not there: python -m experiments.cluster.compile --topology=1x16x8.

Needs a compiler plugin in an environment of its own, see --help; no accelerator, no driver.
"""

import argparse
import difflib
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from experiments.cluster.plan import find_model, print_table
from experiments.cluster.topology import standing_in, topology_devices
from jaxrl_suite.moe.folding import Folding

_EPILOG = """the compilers, in an environment of their own (VERSION is that of jax):
  cuda: python -m pip install --no-deps jax-cuda13-pjrt==VERSION jax-cuda13-plugin==VERSION
  tpu:  python -m pip install "jax[tpu]==VERSION"

examples:
  python -m experiments.cluster.compile --topology=1x16x8 --model=mixtral-8x22b \\
      --folding="attention=tp2 experts=ep8 pipeline=8" --global_batch=256 --remat=full
  python -m experiments.cluster.compile --platform=tpu --topology=v5p:2x2x4 --model=mixtral-8x22b --shrink \\
      --folding="attention=tp2 experts=ep8"
  python -m experiments.cluster.compile --topology=1x2x8 --function=my_package.my_module:make

--function compiles anything: make(devices) returns a jitted function and a tuple of its arguments, shapes with
shardings (jax.ShapeDtypeStruct) that lie on those devices."""


class Compiled(NamedTuple):
    """What the compiler says of a program.

    Attributes:
        platform: cuda or tpu.
        num_devices: devices compiled for.
        memory_bytes: of one device: arguments, outputs that are not arguments' memory, temporaries, program.
        state_bytes: arguments of one device by kind, where known.
        traffic: collectives by kind and group: operations, runs, bytes of a device, whether a group leaves its node.
        unknown_runs: collectives in loops whose length is not in the compiled text; counted once.
        flops: counted from the jaxpr, over all devices; 0 where not counted.
        model_flops: what the model needs, without recomputation; 0 for other functions.
        lower_seconds: time to trace and lower.
        compile_seconds: time to compile.
    """

    platform: str
    num_devices: int
    memory_bytes: dict[str, int]
    state_bytes: dict[str, int]
    traffic: list[dict[str, Any]]
    unknown_runs: int
    flops: float
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
        devices: from :func:`topology_devices`.
        function: a jitted function.
        arguments: shapes with shardings on these devices.
        keywords: the same, by name.
        node_size: consecutive devices on one fast network.
    """
    from jaxrl_suite.moe.audit import audit, summarize
    from jaxrl_suite.moe.cost_flops import jaxpr_flops

    began = time.perf_counter()
    with standing_in(list(devices)):
        traced = function.trace(*arguments, **(keywords or {}))
        flops = jaxpr_flops(traced.jaxpr.jaxpr).total
        lowered = traced.lower()
    lowered_at = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    sizes = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
    }
    collectives = audit(compiled)
    rows = [_traffic_row(row, node_size) for row in summarize(collectives)]
    unknown = sum(item.runs is None for item in collectives)
    return Compiled(
        platform, len(devices), memory, {}, rows, unknown, flops, 0.0, lowered_at - began, done - lowered_at
    )


def _traffic_row(row: dict[str, Any], node_size: int) -> dict[str, Any]:
    groups = row["groups"]
    leaving = sum(len({rank // node_size for rank in group}) > 1 for group in groups)
    return {
        "kind": row["kind"],
        "group_size": len(groups[0]),
        "first_group": list(groups[0][:8]),
        "num_groups": len(groups),
        "groups_leaving_node": leaving,
        "operations": row["operations"],
        "runs": row["runs"],
        "bytes": row["bytes"],
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
        devices: from :func:`topology_devices`.
        sequence: tokens of a sequence.
        global_batch: sequences of a step.
        platform: what the devices are, for the report.
        node_size: consecutive devices on one fast network.
    """
    import jax

    from experiments.cluster.abstract_step import abstract_batch, abstract_hparams, abstract_state, donating_step
    from jaxrl_suite.lm import flatten
    from jaxrl_suite.moe.cost_model import token_flops

    with standing_in(list(devices)):
        state = abstract_state(config, folding)
        batch = abstract_batch(folding, global_batch, sequence)
        keywords = {"hparams": abstract_hparams(folding)}
    found = compile_for(platform, devices, donating_step(), (state, batch), keywords, node_size=node_size)
    held = {
        "parameters": _local_bytes(flatten(state.params).values()),
        "optimizer": _local_bytes(jax.tree.leaves(state.moments)),
        "batch": _local_bytes(batch),
    }
    needed = token_flops(config.model, sequence).train * sequence * global_batch
    return found._replace(state_bytes=held, model_flops=needed)


def step_config(options: argparse.Namespace, folding: Any) -> Any:
    """Model and step from the command line: float32 weights, bfloat16 products."""
    from jaxrl_suite.moe.config import MoEConfig

    model = find_model(options.model).replace(param_dtype="float32", compute_dtype="bfloat16")
    if options.shrink:
        model = shrunk(model, folding)
    if options.num_layers:
        model = model.replace(num_layers=options.num_layers)
    micro = folding.dp * options.micro_batch
    if options.global_batch % micro:
        raise ValueError(f"--global_batch={options.global_batch}: must divide by DP times the micro-batch, {micro}.")
    return MoEConfig(
        model=model,
        dispatch=options.dispatch,
        capacity_factor=options.capacity_factor if options.dispatch == "drop_pad" else None,
        num_microbatches=options.global_batch // micro,
        schedule=options.schedule if folding.pp > 1 else "gpipe",
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


def _local_bytes(shapes: Any) -> int:
    import math

    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in shapes)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, compiles, prints; returns the exit code."""
    options = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        if not options.function:
            find_model(options.model)
        devices = topology_devices(options.platform, options.topology)
        if options.function:
            found = compile_named(options.function, options.platform, devices, options.node_size)
        else:
            folding = Folding.parse(options.folding, len(devices))
            found = compile_train_step(
                step_config(options, folding),
                folding,
                devices,
                sequence=options.sequence,
                global_batch=options.global_batch,
                platform=options.platform,
                node_size=options.node_size,
            )
    except (ValueError, ImportError) as error:
        _fail(str(error).splitlines()[0])
    if options.json:
        print(json.dumps({**found._asdict(), "total_bytes": found.total_bytes}, indent=2))
    else:
        _print_report(options, found)
    return 0


def _print_report(options: argparse.Namespace, found: Compiled) -> None:
    limit = options.memory_gb
    total = found.total_bytes / 1e9
    print(
        f"compiled for {found.num_devices} {found.platform} devices ({options.topology}): "
        f"lowered in {found.lower_seconds:.1f} s, compiled in {found.compile_seconds:.1f} s"
    )
    rows = [[name, f"{size / 1e9:.2f}"] for name, size in found.memory_bytes.items()]
    rows += [[f"  of the arguments: {name}", f"{size / 1e9:.2f}"] for name, size in found.state_bytes.items()]
    print_table([*rows, ["total", f"{total:.2f}"]], ("memory of a device", "GB"))
    over = total - limit
    print(f"fits {limit:g} GB" if over <= 0 else f"does not fit {limit:g} GB: {over:.1f} GB too much. {_REMEDY}")
    if found.traffic:
        print()
        print_table([_traffic_cells(row) for row in found.traffic if row["bytes"] >= 1e6], _TRAFFIC_COLUMNS)
    if found.unknown_runs:
        print(f"{found.unknown_runs} collectives lie in loops whose length is not in the compiled text: counted once")
    if found.flops:
        print(f"\nFLOPs of products, all devices: {found.flops:.4g}", end="")
        ratio = f", {found.flops / found.model_flops:.2f} of the model's {found.model_flops:.4g}"
        print(ratio if found.model_flops else "")


_REMEDY = "Try --remat=full, more stages (PP), more expert ranks (EP), or --sharding=fsdp"
_TRAFFIC_COLUMNS = ("collective", "group", "first group", "leave the node", "runs", "GB sent")


def _traffic_cells(row: dict[str, Any]) -> list[str]:
    first = " ".join(map(str, row["first_group"])) + (" …" if row["group_size"] > 8 else "")
    leaving = f"{row['groups_leaving_node']} of {row['num_groups']}"
    return [row["kind"], str(row["group_size"]), first, leaving, str(row["runs"]), f"{row['bytes'] / 1e9:.3f}"]


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        _fail(message.removeprefix("argument "))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m experiments.cluster.compile",
        description="Compiles the train step (or any JAX function) for a cluster that is not there, and reports the "
        "memory of a device, every collective, and FLOPs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--platform", default="cuda", help="cuda (H100) or tpu (default cuda)")
    add("--topology", required=False, help="1x16x8: partitions, hosts, GPUs of a host; or v5p:4x4x4")
    add("--model", default="mixtral-8x22b", help="model (default mixtral-8x22b)")
    add("--folding", default="experts=ep8", help="degrees (default experts=ep8)")
    add("--sequence", type=int, default=4096, help="tokens of a sequence (default 4096)")
    add("--global_batch", type=int, default=256, help="sequences of a step (default 256)")
    add("--micro_batch", type=int, default=1, help="sequences of a micro-batch (default 1)")
    add("--dispatch", default="drop_pad", help="how tokens reach experts (default drop_pad)")
    add("--capacity_factor", type=float, default=1.0, help="slots over the even share (default 1)")
    add("--sharding", default="zero1", help="none, zero1 or fsdp (default zero1)")
    add("--remat", default="full", help="what the backward pass repeats (default full)")
    add("--schedule", default="1f1b", help="gpipe or 1f1b (default 1f1b)")
    add("--context", default="ring", help="ring or all_gather (default ring)")
    add("--num_layers", type=int, default=0, help="fewer layers than the model has")
    add("--shrink", action="store_true", help="a small model of the same kind")
    add("--node_size", type=int, default=8, help="devices on one fast network (default 8)")
    add("--memory_gb", type=float, default=80.0, help="memory of a device, 1e9 bytes (default 80)")
    add("--function", help="package.module:make, see below")
    add("--json", action="store_true", help="print JSON")
    options, strange = parser.parse_known_args(arguments)
    if strange:
        near = difflib.get_close_matches(strange[0].split("=")[0], parser._option_string_actions, n=1)
        _fail(f"{strange[0]} is no flag of compile." + (f" Did you mean {near[0]}?" if near else " --help lists them."))
    if not options.topology:
        _fail("--topology is missing. Example: --platform=cuda --topology=1x16x8")
    return options


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
