"""What the compile command prints: memory, collectives, FLOPs and roofline of a compiled program."""

from typing import Any

from experiments.cluster.aot import Compiled, once
from experiments.cluster.plan_report import print_table
from jaxrl_suite.moe.cost_roofline import mfu_bound, roofline, sent_by_link, sent_in_all
from jaxrl_suite.moe.hardware import Hardware

_REMEDY = "Try --remat=full, more stages (PP), more expert ranks (EP), or --sharding=fsdp"
_SHORT = "not in the formula (on GPUs XLA_FLAGS=--xla_gpu_memory_limit_slop_factor=125 raises its limit, by default 95)"


def print_memory(found: Compiled, limit: float) -> None:
    """Memory of a device by kind, and by how much it misses ``limit`` GB."""
    total = found.total_bytes / 1e9
    rows = []
    for name, size in found.memory_bytes.items():
        rows.append([name, f"{size / 1e9:.2f}"])
        parts = {"arguments": found.state_bytes, "temporaries": found.temporary_bytes}.get(name, {})
        rows += [[f"  of them {part}", f"{part_size / 1e9:.2f}"] for part, part_size in parts.items()]
    print_table([*rows, ["total", f"{total:.2f}"]], ("memory of a device", "GB"))
    over = total - limit
    print(f"fits {limit:g} GB" if over <= 0 else f"does not fit {limit:g} GB: {over:.1f} GB too much. {_REMEDY}")


_TRAFFIC_COLUMNS = (
    "collective",
    "group",
    "first group",
    "leave the node",
    "runs",
    "GB in the node",
    "GB between nodes",
)


def print_traffic(found: Compiled) -> None:
    """Every collective of a megabyte or more."""
    rows = [_traffic_cells(row) for row in found.traffic if row["bytes"] >= 1e6]
    if rows:
        print("\nsent by a device in a step:")
        print_table(rows, (*_TRAFFIC_COLUMNS, *(["of the formula"] if len(rows[0]) > len(_TRAFFIC_COLUMNS) else [])))
    repeated = sum(row.get("repeated", 0.0) for row in found.traffic)
    if repeated >= 1e6:
        print(f"{repeated / 1e9:.3f} GB of it the compiler sends again, since it takes memory for short; {_SHORT}")
    if found.unknown_runs:
        print(f"{found.unknown_runs} collectives lie in loops whose length is not in the compiled text: counted once")


def _traffic_cells(row: dict[str, Any]) -> list[str]:
    first = " ".join(map(str, row["first_group"])) + (" …" if row["group_size"] > 8 else "")
    leaving, sent = f"{row['groups_leaving_node']} of {row['num_groups']}", sent_by_link(row)
    size = [f"{sent.node / 1e9:.3f}", f"{sent.network / 1e9:.3f}"]
    formula = [f"{once(row) / row['formula']:.3f}" if row["formula"] else "-"] if "formula" in row else []
    return [row["kind"], str(row["group_size"]), first, leaving, str(row["runs"]), *size, *formula]


def print_flops(found: Compiled) -> None:
    """FLOPs counted from the jaxpr beside those of the model and those known to be spent besides."""
    if not found.flops:
        return
    print(f"\nFLOPs of products, all devices: {found.flops:.4g}")
    if found.model_flops:
        reasons = [f"{name.replace('_', ' ')} {size / found.model_flops:.3f}" for name, size in found.declared.items()]
        unexplained = found.flops / sum(found.declared.values())
        print(f"{found.flops / found.model_flops:.3f} of the model's {found.model_flops:.4g}: {', '.join(reasons)};")
        print(f"{unexplained:.3f} of what these add up to")
    if found.xla_flops:
        ours = found.flops / found.num_devices
        print(f"XLA counts {found.xla_flops:.4g} a device, bodies of loops once; with their turns it is {ours:.4g}")


def print_roofline(found: Compiled, hardware: Hardware) -> None:
    """Least times at peak rates, which of them dominates, and what that allows."""
    sent = sent_in_all(found.traffic)
    times = roofline(found.flops / found.num_devices, found.product_bytes / found.num_devices, sent, hardware)
    if not times.bound:
        return
    names = ("products", "operands and results of products", "network inside the node", "network between nodes")
    print(f"\nleast seconds of a step at the peak rates of {hardware.name}:")
    rows = [[name, f"{seconds:.4g}"] for name, seconds in zip(names, times)]
    print_table(rows, ("of", "seconds"))
    print(f"{names[times._fields.index(times.dominant)]} take longest", end="")
    if found.model_flops:
        print(f": MFU at most {mfu_bound(times, found.model_flops, found.num_devices, hardware):.1%}", end="")
    print("; what is slower than its peak or not hidden comes on top")
