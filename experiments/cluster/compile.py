"""Compile for a cluster that is not there: python -m experiments.cluster.compile --topology=1x16x8.

Needs a compiler plugin in an environment of its own, see --help; no accelerator, no driver.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from experiments.cluster.aot import Compiled, compile_named, compile_train_step, step_config
from experiments.cluster.compile_report import print_flops, print_memory, print_roofline, print_traffic
from experiments.cluster.models import find_model
from experiments.cluster.topology import check_topology, topology_devices
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.hardware import Hardware, named_hardware

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


# What the compiler's topologies are made of, for the roofline.
_MACHINES = {"cuda": "h100", "v5p": "tpu-v5p", "v5e": "tpu-v5e", "v5litepod": "tpu-v5e", "v6e": "tpu-v6e"}


def machine(options: argparse.Namespace) -> Hardware:
    """The machine that is compiled for, with what the command line changes of it.

    Raises:
        ValueError: unknown, or a number that is not positive.
    """
    generation = options.topology.partition(":")[0] if options.platform == "tpu" else options.platform
    name = options.hardware or _MACHINES.get(generation)
    if name is None:
        raise ValueError(f"--hardware is missing: the peak rates of {generation} are not known here.")
    changes = {"node_size": options.node_size}
    if options.memory_gb is not None:
        changes["memory_bytes"] = options.memory_gb * 1e9
    return named_hardware(name, **{key: value for key, value in changes.items() if value is not None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, compiles, prints; returns the exit code."""
    options = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        if not options.function:
            find_model(options.model)
        check_topology(options.platform, options.topology)
        hardware = machine(options)
        devices = topology_devices(options.platform, options.topology)
        if options.function:
            found = compile_named(options.function, options.platform, devices, hardware.node_size)
        else:
            folding = Folding.parse(options.folding, len(devices))
            found = compile_train_step(
                step_config(options, folding),
                folding,
                devices,
                sequence=options.sequence,
                global_batch=options.global_batch,
                platform=options.platform,
                node_size=hardware.node_size,
            )
    except (ValueError, ImportError) as error:
        _fail(str(error).splitlines()[0])
    if options.json:
        print(json.dumps({**found._asdict(), "total_bytes": found.total_bytes}, indent=2))
    else:
        _print_report(options, found, hardware)
    return 0


def _print_report(options: argparse.Namespace, found: Compiled, hardware: Hardware) -> None:
    print(
        f"compiled for {found.num_devices} {found.platform} devices ({options.topology}): "
        f"lowered in {found.lower_seconds:.1f} s, compiled in {found.compile_seconds:.1f} s"
    )
    print_memory(found, hardware.memory_bytes / 1e9)
    print_traffic(found)
    print_flops(found)
    print_roofline(found, hardware)


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
    add("--remat", default="full", help="what the backward pass repeats: full, elementwise, none, … (default full)")
    add("--schedule", default="1f1b", help="gpipe or 1f1b (default 1f1b)")
    add(
        "--pending", default="inputs", help="inputs or all: what 1F1B keeps of micro-batches that wait (default inputs)"
    )
    add("--context", default="ring", help="ring or all_gather (default ring)")
    add("--num_layers", type=int, default=0, help="fewer layers than the model has")
    add("--shrink", action="store_true", help="a small model of the same kind")
    add("--hardware", help="peak rates for the roofline: h100, …, tpu-v5p (default: by platform and topology)")
    add("--node_size", type=int, help="devices on one fast network (default: the hardware's)")
    add("--memory_gb", type=float, help="memory of a device, 1e9 bytes (default: the hardware's)")
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
