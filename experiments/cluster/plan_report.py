"""A plan in words, as a table and as JSON."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from experiments.cluster.confirm import REMAT, Confirmed, pending_of
from experiments.cluster.models import MODELS
from experiments.cluster.paper_tables import all_rows
from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.cost_fit import Fit
from jaxrl_suite.moe.cost_memory import MemoryModel
from jaxrl_suite.moe.cost_time import Constants
from jaxrl_suite.moe.cost_traffic import step_traffic
from jaxrl_suite.moe.hardware import Hardware
from jaxrl_suite.moe.planner import Candidate, Plan
from jaxrl_suite.moe.planner_explain import PARTS, explain, folding_gain, shares


def as_json(
    name: str,
    found: Plan,
    asked: Candidate | None,
    hardware: Hardware,
    constants: Constants,
    top: int,
    confirmed: Sequence[Confirmed] = (),
) -> dict[str, Any]:
    """The plan as plain numbers; units are in the names."""
    return {
        "model": name,
        "hardware": hardware.to_dict(),
        "constants": constants._asdict(),
        "num_enumerated": found.num_enumerated,
        "num_usable": len(found.candidates),
        "num_fitting": len(found.fitting),
        "rejected": found.rejected,
        "candidates": [_candidate_json(name, c, hardware, constants, found.memory_model) for c in found.fitting[:top]],
        "asked": _candidate_json(name, asked, hardware, constants, found.memory_model) if asked else None,
        "confirmed": [
            {
                "folding": str(item.candidate.folding),
                "sharding": item.candidate.workload.sharding,
                "recompute": item.candidate.workload.recompute,
                "compiled_bytes": item.compiled_bytes,
                "fits": item.fits,
            }
            for item in confirmed
        ],
    }


def _candidate_json(
    name: str, candidate: Candidate, hardware: Hardware, constants: Constants, memory_model: MemoryModel
) -> dict[str, Any]:
    moved = step_traffic(candidate.counts.traffic, candidate.folding, candidate.workload)
    return {
        "folding": str(candidate.folding),
        "sharding": candidate.workload.sharding,
        "recompute": candidate.workload.recompute,
        "mfu_percent": 100 * candidate.mfu,
        "step_seconds": candidate.seconds.total,
        "seconds": candidate.seconds._asdict(),
        "fits": candidate.fits,
        "memory_bytes": {**candidate.memory._asdict(), "total": candidate.memory.total},
        "traffic_bytes": {kind: link._asdict() for kind, link in moved.items()},
        "groups_leaving_node": candidate.folding.leaving_node(hardware.node_size),
        "explanation": _words(MODELS[name], candidate, hardware, constants, memory_model),
    }


def _words(
    model: LanguageModelConfig,
    candidate: Candidate,
    hardware: Hardware,
    constants: Constants,
    memory_model: MemoryModel,
) -> list[str]:
    """What bounds a candidate, and what it would be without folding."""
    gain = folding_gain(model, candidate, hardware, constants, memory_model)
    return [*explain(model, candidate, hardware, memory_model), *([gain] if gain else [])]


def print_report(
    options: argparse.Namespace,
    model: LanguageModelConfig,
    found: Plan,
    asked: Candidate | None,
    hardware: Hardware,
    constants: Constants,
    refit: Fit | None,
) -> None:
    """The table, then what bounds each, then where a folding of the user's stands."""
    fitting = found.fitting
    print(
        f"{options.model} on {options.gpus} {hardware.name}, {options.sequence:,} tokens, global batch "
        f"{options.global_batch}: {found.num_enumerated:,} foldings, {len(found.candidates):,} usable with "
        f"sharding, {len(fitting):,} fit {hardware.memory_bytes / 1e9:.0f} GB."
    )
    if refit:
        print(f"Constants refitted to {refit.errors.size} rows, mean error {refit.errors.mean():.1%}.")
    shown = fitting[: options.top]
    if asked is not None and asked not in shown:
        shown = [*shown, asked]
    ranks = [str(fitting.index(c) + 1) if c in fitting else "-" for c in shown]
    print_table([[rank, *cells(c)] for rank, c in zip(ranks, shown)])
    for rank, candidate in zip(ranks, shown):
        title = f"{rank}. {candidate.folding}" if rank != "-" else f"Does not fit: {candidate.folding}"
        print(f"\n{title}")
        for line in _words(model, candidate, hardware, constants, found.memory_model):
            print(f"   {line}")
    if asked is not None and asked.fits:
        slower = asked.seconds.total / fitting[0].seconds.total - 1
        why = difference(asked, fitting[0]) if asked != fitting[0] else "it is the best."
        print(f"\nThe folding you named is {slower:.1%} slower than the best; {why}")
    if fitting and (note := beyond_published(fitting)):
        print(f"\n{note}")


def print_confirmed(item: Confirmed) -> None:
    """One line of what the compiler says."""
    candidate, planned = item.candidate, item.candidate.memory.total
    print(
        f"   {candidate.folding}, {candidate.workload.sharding}, remat={REMAT[candidate.workload.recompute]}: "
        f"{item.compiled_bytes / 1e9:.1f} GB, {'fits' if item.fits else 'does not fit, dropped'} (planned "
        f"{planned / 1e9:.1f} GB; {100 * candidate.mfu:.1f} % MFU predicted; compiled in {item.compile_seconds:.0f} s)",
        flush=True,
    )


def print_launch(options: argparse.Namespace, candidate: Candidate, hardware: Hardware, *, confirmed: bool) -> None:
    """How to launch a candidate, and how to look closer at it."""
    folding, workload = candidate.folding, candidate.workload
    per_rank = int(workload.global_batch // (folding.dp * workload.micro_batch))
    pending = pending_of(workload)
    schedule = f', schedule="1f1b", pending="{pending}"' if folding.pp > 1 else ""
    context = f', context="{workload.context}"' if folding.cp > 1 else ""
    print(f'\nTo launch {"the fastest that fits" if confirmed else "the first"}: --folding="{folding}"')
    print(
        f'   MoEConfig(num_microbatches={per_rank}, sharding="{workload.sharding}", '
        f'remat="{REMAT[workload.recompute]}"{schedule}{context})'
    )
    if not confirmed and options.gpus % hardware.node_size == 0:
        print(
            "To have its memory and traffic from the compiler:\n"
            f"   python -m experiments.cluster.compile --topology=1x{options.gpus // hardware.node_size}x"
            f'{hardware.node_size} --model={options.model} --folding="{folding}" --sequence={workload.sequence} '
            f"--global_batch={workload.global_batch} --micro_batch={workload.micro_batch} "
            f"--sharding={workload.sharding} --remat={REMAT[workload.recompute]} --pending={pending} "
            f"--context={workload.context}"
        )
    print("Times are predictions: measure the first few and refit (--csv).")


def difference(slow: Candidate, fast: Candidate) -> str:
    """Where one candidate spends more of a step than another, and where less; what is below 0.2 % is left out."""
    least = 2e-3 * fast.seconds.total
    apart = {name: a - b for (name, a), b in zip(slow.seconds._asdict().items(), fast.seconds)}
    apart = {name: apart[name] for name in sorted(apart, key=lambda part: -abs(apart[part]))}
    sides = [
        ("more", {n: d for n, d in apart.items() if d > least}),
        ("less", {n: d for n, d in apart.items() if d < -least}),
    ]
    words = [
        f"{side} on " + ", ".join(f"{PARTS[name]} ({seconds:+.2f} s)" for name, seconds in parts.items())
        for side, parts in sides
        if parts
    ]
    return f"it spends {' and '.join(words)} a step." if words else "it takes the same."


def beyond_published(fitting: Sequence[Candidate], measured: int | None = None) -> str:
    """Says when the first of a ranking rests on context parallelism at lengths that nobody has published.

    Args:
        fitting: the ranking, fastest first.
        measured: shortest sequence of a published row with CP > 1; that of the paper's tables by default.

    Returns:
        What is extrapolated, and the first mapping without it; empty where nothing is.
    """
    if measured is None:
        measured = min(row.sequence for row in all_rows() if row.folding.cp > 1 and row.mfu_percent is not None)
    best = fitting[0]
    plain = next((place for place, c in enumerate(fitting) if c.folding.cp == 1), None)
    if best.folding.cp == 1 or best.workload.sequence >= measured or plain is None:
        return ""
    other = fitting[plain]
    return (
        f"No published row has CP > 1 below {measured:,} tokens: what CP costs at {best.workload.sequence:,.0f} is "
        f"extrapolated, without latencies or smaller products. The first with CP = 1 is {plain + 1}. {other.folding}, "
        f"{other.seconds.total / best.seconds.total - 1:.1%} slower; {difference(other, best)} Measure both."
    )


COLUMNS = ("rank", "attention", "experts", "pp", "sharding", "recompute", "MFU %", "step s", "memory GB", "bound by")


def cells(candidate: Candidate) -> list[str]:
    """A row of the table: degrees, what was chosen, what is predicted."""
    folding, (name, share) = candidate.folding, next(iter(shares(candidate).items()))
    return [
        f"tp{folding.tp} cp{folding.cp} dp{folding.dp}",
        f"etp{folding.etp} ep{folding.ep} edp{folding.edp}",
        str(folding.pp),
        candidate.workload.sharding,
        candidate.workload.recompute,
        f"{100 * candidate.mfu:.1f}",
        f"{candidate.seconds.total:.2f}",
        f"{candidate.memory.total / 1e9:.1f}",
        f"{name} {share:.0%}",
    ]


def print_table(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> None:
    """A table: drawn by rich on a terminal that is wide enough, aligned columns elsewhere."""
    if sys.stdout.isatty() and shutil.get_terminal_size().columns >= 110:
        try:
            from rich.console import Console
            from rich.table import Table
        except ModuleNotFoundError:
            pass
        else:
            table = Table()
            for column in columns:
                table.add_column(column, justify="left" if column in ("attention", "experts", "bound by") else "right")
            for row in rows:
                table.add_row(*row)
            Console().print(table)
            return
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
