"""The published tables, compiled: python -m experiments.cluster.compile_table --out=compiled.jsonl (resumes).

Every row of tables 3, 4 and 5 is compiled for H100s as ``experiments.cluster.compile`` does, each in a process of its
own, and appended to a file of JSON lines; rows already there are not compiled again. Then the file is read back and
printed: what fits, what moves over which network, folded beside unfolded. ``--report`` prints without compiling.

Needs the CUDA compiler, see ``python -m experiments.cluster.compile --help``.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from experiments.cluster.aot import once
from experiments.cluster.models import MODELS, PAPER_NAMES
from experiments.cluster.paper_tables import METHODS, Row, table_3, table_4, table_5
from experiments.cluster.plan_report import print_table
from experiments.cluster.topology import topology_devices
from jaxrl_suite.moe.cost_model import Workload
from jaxrl_suite.moe.cost_roofline import mfu_bound, roofline, sent_in_all
from jaxrl_suite.moe.cost_step import step_memory
from jaxrl_suite.moe.cost_traffic import Link
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.hardware import Hardware, named_hardware

PAIR = METHODS[3:]  # without folding (ETP = TP, EP at stride TP) and with it


def ordered_rows() -> list[Row]:
    """All 89 rows, the most telling first.

    Each model folded and unfolded at its base size, then the long contexts, then the largest clusters, then what lies
    between, and last the methods without a pipeline.
    """
    core = [row for row in table_4() if row.method in PAIR]
    largest = [row for row in core if row.num_devices == 1024]
    rows = [row for row in table_3() if row.method in PAIR] + table_5() + largest + core + table_3() + table_4()
    return list(dict.fromkeys(rows))


def name_of(row: Row, remat: str) -> str:
    """What identifies a compiled row in the file."""
    return f"table {row.table}, {row.model}, {row.method}, {row.num_devices}, {row.sequence}, remat={remat}"


def compile_arguments(row: Row, remat: str) -> list[str]:
    """Flags of ``experiments.cluster.compile`` for a published row: its capacity 1, micro-batches of one sequence."""
    hosts = row.num_devices // Hardware().node_size
    flags = {
        "topology": f"1x{hosts}x{Hardware().node_size}",
        "model": row.model,
        "folding": str(row.folding),
        "sequence": row.sequence,
        "global_batch": row.global_batch,
        "sharding": "fsdp" if row.method.startswith("FSDP") else "zero1",
        "remat": remat,
    }
    return [f"--{name}={value}" for name, value in flags.items()]


def compile_rows(rows: Iterable[Row], path: Path, *, remat: str, timeout: float, jobs: int = 1) -> None:
    """Compiles what the file does not hold yet (or holds as a failure) and appends it, a line a row as it is ready."""
    done = {line["name"] for line in read_lines(path) if "error" not in line}
    missing = [row for row in rows if name_of(row, remat) not in done]

    def compiled(row: Row) -> dict[str, Any]:
        return {"name": name_of(row, remat), **_published(row), "remat": remat, **_compiled(row, remat, timeout)}

    with ThreadPoolExecutor(jobs) as pool:  # the threads only wait: every row is a process of its own
        for ready in as_completed([pool.submit(compiled, row) for row in missing]):
            line = ready.result()
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            result = line.get("error") or f"{line['total_bytes'] / 1e9:.1f} GB, {line['compile_seconds']:.0f} s"
            print(f"{line['name']}: {result}", flush=True)


def _published(row: Row) -> dict[str, Any]:
    return {**row._asdict(), "folding": str(row.folding)}


def _compiled(row: Row, remat: str, timeout: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.cluster.compile", "--json", *compile_arguments(row, remat)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled in {timeout:g} s"}
    if ended.returncode:
        return {"error": (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1][:300]}
    return json.loads(ended.stdout)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The last line of each row; one that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = _whole_lines(path.read_text(encoding="utf-8").splitlines())
    return list({line["name"]: line for line in lines}.values())


def _whole_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


_COLUMNS = (
    ("table", "model", "GPUs", "tokens", "method", "folding", "GB", "fits", "NVLink GB", "InfiniBand GB")
    + ("FLOPs/model", "unexplained", "bound by", "MFU <=", "paper", "compile s")
)  # fmt: skip


def table_cells(line: dict[str, Any], hardware: Hardware) -> list[str]:
    """One row of the printed table."""
    head = [str(line["table"]), PAPER_NAMES[line["model"]], str(line["num_devices"]), f"{line['sequence']:,}"]
    head += [line["method"], line["folding"]]
    if "error" in line:
        return [*head, line["error"], *[""] * (len(_COLUMNS) - len(head) - 1)]
    sent, total, devices = moved(line), line["total_bytes"], line["num_devices"]
    times = roofline(line["flops"] / devices, line["product_bytes"] / devices, sent, hardware)
    paper = line["mfu_percent"]
    return [
        *head,
        f"{total / 1e9:.1f}",
        "yes" if total <= hardware.memory_bytes else f"no, {(total - hardware.memory_bytes) / 1e9:.1f} over",
        f"{sent.node / 1e9:.1f}",
        f"{sent.network / 1e9:.1f}",
        f"{line['flops'] / line['model_flops']:.2f}",
        f"{line['flops'] / sum(line['declared'].values()):.3f}",
        times.dominant,
        f"{mfu_bound(times, line['model_flops'], devices, hardware):.0%}",
        f"{paper}%" if paper is not None else "out of memory",
        f"{line['lower_seconds'] + line['compile_seconds']:.0f}",
    ]


def moved(line: dict[str, Any]) -> Link:
    """Bytes of a step that one device sends over each network."""
    return sent_in_all(line["traffic"])


def over_formula(line: dict[str, Any]) -> list[tuple[str, float]]:
    """Name of each collective of a row that has a formula, and its bytes over it."""
    return [
        (f"{line['name']}, {row['kind']} of {row['group_size']}", once(row) / row["formula"])
        for row in line.get("traffic", ())
        if row.get("formula")
    ]


def estimated_memory(line: dict[str, Any]) -> float:
    """Bytes that :func:`step_memory` gives a row that recomputes everything."""
    workload = Workload(
        sequence=line["sequence"],
        global_batch=line["global_batch"],
        sharding="fsdp" if line["method"].startswith("FSDP") else "zero1",
        recompute="full",
    )
    folding = Folding.parse(line["folding"], line["num_devices"])
    return float(step_memory(MODELS[line["model"]], folding, workload).total)


def pairs(lines: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Compiled rows of one cell of the tables, (unfolded, folded)."""
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for line in lines:
        if "error" not in line and line["method"] in PAIR:
            key = tuple(line[name] for name in ("table", "model", "num_devices", "sequence", "global_batch", "remat"))
            cells.setdefault(key, {})[line["method"]] = line
    return [(cell[PAIR[0]], cell[PAIR[1]]) for cell in cells.values() if len(cell) == len(PAIR)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles what is missing and prints the table."""
    options = _parser().parse_args(arguments)
    if options.jobs < 1:
        print(f"--jobs={options.jobs}: must be at least 1.", file=sys.stderr)
        return 2
    rows = [row for row in ordered_rows() if row.model in (options.model or PAPER_NAMES)]
    rows = [row for row in rows if row.num_devices <= options.max_gpus][: options.first]
    if not options.report:
        try:
            topology_devices("cuda", "1x1x8")
        except (ValueError, ImportError) as error:
            print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
            return 2
        compile_rows(rows, options.out, remat=options.remat, timeout=options.timeout, jobs=options.jobs)
    lines = [line for line in read_lines(options.out) if line["model"] in (options.model or PAPER_NAMES)]
    if not lines:
        print(f"--out={options.out}: no compiled rows yet. Leave out --report to compile them.", file=sys.stderr)
        return 2
    print_report(lines)
    if options.figure:
        save_figure(lines, options.figure)
    return 0


def save_figure(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the pairs; needs matplotlib."""
    from experiments.cluster.compiled_figures import compiled

    found = pairs(ordered_lines(lines))
    if found:
        compiled(found, named_hardware("h100").memory_bytes).savefig(path, dpi=150)


def ordered_lines(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines in the order of the published tables."""
    place = {name_of(row, ""): index for index, row in enumerate(table_3() + table_4() + table_5())}
    return sorted(lines, key=lambda line: place.get(line["name"].rpartition("=")[0] + "=", len(place)))


def print_report(lines: Sequence[dict[str, Any]]) -> None:
    """The table, then each folded row beside its unfolded one."""
    hardware = named_hardware("h100")
    lines = ordered_lines(lines)
    print_table([table_cells(line, hardware) for line in lines], _COLUMNS)
    print(
        "\nMFU <= holds for this program at peak rates: recomputation, idle ticks, attention in blocks whose scores "
        "pass through device memory. What the paper measured comes from other kernels."
    )
    compared = [ratio for line in lines for ratio in over_formula(line)]
    apart = [ratio for ratio in compared if abs(ratio[1] - 1) > 0.01]
    print(f"\nBytes over their formula: {len(compared) - len(apart)} of {len(compared)} collectives within 1 %.")
    for name, ratio in apart:
        print(f"   {name}: {ratio:.3f}")
    errors = [
        abs(estimated_memory(line) / line["total_bytes"] - 1)
        for line in lines
        if line["remat"] == "full" and "error" not in line
    ]
    if errors:
        mean = sum(errors) / len(errors)
        print(f"\nEstimated memory over compiled: {mean:.1%} off on average, {max(errors):.1%} at most.")
    print("\nBytes of one device in a step. Folded beside unfolded (InfiniBand GB, GB of memory):")
    for plain, folded in pairs(lines):
        before, after = moved(plain), moved(folded)
        verdict = "no more" if after.network <= before.network * (1 + 1e-9) else "MORE"
        print(
            f"   table {folded['table']}, {PAPER_NAMES[folded['model']]}, {folded['num_devices']} GPUs, "
            f"{folded['sequence']:,} tokens: {before.network / 1e9:.1f} -> {after.network / 1e9:.1f} ({verdict}), "
            f"{plain['total_bytes'] / 1e9:.1f} -> {folded['total_bytes'] / 1e9:.1f}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.cluster.compile_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("compiled.jsonl"), help="file of JSON lines (default compiled.jsonl)")
    add("--model", action="append", choices=tuple(PAPER_NAMES), help="only this model; may be repeated")
    add("--max_gpus", type=int, default=1024, help="only rows of at most so many GPUs (default 1024)")
    add("--first", type=int, default=None, help="only the first N rows, the most telling first")
    add("--remat", default="full", help="what the backward pass repeats (default full)")
    add("--jobs", type=int, default=1, help="rows compiled at once, about 2 GB of memory each (default 1)")
    add("--timeout", type=float, default=1800.0, help="seconds a row may take (default 1800)")
    add("--figure", type=Path, help="also draw the pairs into this file")
    add("--report", action="store_true", help="print what the file holds, compile nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
