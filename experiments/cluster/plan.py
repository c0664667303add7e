"""Which folding to launch: python -m experiments.cluster.plan --model=qwen2-57b-a14b --gpus=64 --sequence=32768."""

import argparse
import csv
import difflib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from experiments.cluster.models import MODELS
from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.cost_fit import PAPER_CONSTANTS, Fit
from jaxrl_suite.moe.cost_model import RECOMPUTE, Workload
from jaxrl_suite.moe.cost_time import Constants
from jaxrl_suite.moe.cost_traffic import step_traffic
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.hardware import Hardware, named_hardware
from jaxrl_suite.moe.planner import Candidate, Plan, plan, predict, smallest_fitting_count
from jaxrl_suite.moe.planner_explain import PARTS, explain, folding_gain, shares
from jaxrl_suite.moe.planner_rows import fit_rows, parse_rows

_EPILOG = """examples:
  python -m experiments.cluster.plan --model=qwen2-57b-a14b --gpus=64 --sequence=32768 --global_batch=128
  python -m experiments.cluster.plan --model=mixtral-8x22b --gpus=128 --folding="attention=tp2 experts=ep8 pipeline=8"
  python -m experiments.cluster.plan --model=mixtral-8x22b --gpus=128 --csv=rows.csv

--csv refits the constants of the time model to rows that you measured. Header, and one line a measurement:
  model,gpus,sequence,global_batch,folding,step_seconds
  mixtral-8x22b,128,4096,256,attention=tp2 experts=ep8 pipeline=8,5.1
mfu_percent may stand in place of step_seconds; micro_batch, sharding and recompute are optional columns."""


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        _fail(message.removeprefix("argument "))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, plans, prints; returns the exit code: 0 with a plan, 2 for input that cannot be."""
    options = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        model, hardware = find_model(options.model), _hardware(options)
        workload = Workload(
            sequence=options.sequence,
            global_batch=options.global_batch,
            micro_batch=options.micro_batch,
            context=options.context,
        )
        refit = _refit(Path(options.csv), hardware) if options.csv else None
        constants = refit.constants if refit else PAPER_CONSTANTS
        found = _plan(model, options, workload, hardware, constants)
        asked = _asked(model, options, found, workload, hardware, constants) if options.folding else None
    except (ValueError, OSError) as error:
        _fail(str(error))
    if options.json:
        print(json.dumps(as_json(options.model, found, asked, hardware, constants, options.top), indent=2))
        return 0
    _print_report(options, model, found, asked, hardware, constants, refit)
    if options.confirm:
        try:
            _confirm(options, model, found.fitting[: options.confirm], hardware)
        except (ValueError, ImportError) as error:
            _fail(str(error))
    return 0


# What the train step repeats for a level of the planner; it has no level for activation functions alone.
_REMAT: dict[str, Any] = {"none": "none", "activation": "experts", "moe": "experts", "full": "full"}


def _confirm(
    options: argparse.Namespace, model: LanguageModelConfig, best: Sequence[Candidate], hardware: Hardware
) -> None:
    """Compiles the real train step of the best few and compares its memory with the planner's.

    Weights are float32 with bfloat16 products there, split over data ranks between steps: not the bytes of the
    planner's bfloat16 framework, which the sum nevertheless should be near.
    """
    from experiments.cluster.compile import compile_train_step
    from experiments.cluster.topology import topology_devices
    from jaxrl_suite.moe.config import MoEConfig

    if options.gpus % hardware.node_size:
        raise ValueError(f"--confirm: --gpus={options.gpus} must be whole nodes of {hardware.node_size}.")
    devices = topology_devices("cuda", f"1x{options.gpus // hardware.node_size}x{hardware.node_size}")
    print("\nCompiled for H100s (the real train step, capacity factor 1):")
    for candidate in best:
        folding, workload = candidate.folding, candidate.workload
        config = MoEConfig(
            model=model.replace(param_dtype="float32", compute_dtype="bfloat16"),
            dispatch="drop_pad",
            capacity_factor=workload.capacity_factor,
            num_microbatches=workload.global_batch // (folding.dp * workload.micro_batch),
            schedule="1f1b" if folding.pp > 1 else "gpipe",
            sharding=workload.sharding,
            remat=_REMAT[workload.recompute],
            context=workload.context,
        )
        shape = {"sequence": workload.sequence, "global_batch": workload.global_batch}
        found = compile_train_step(config, folding, devices, **shape, node_size=hardware.node_size)
        verdict = "fits" if found.total_bytes <= hardware.memory_bytes else "does not fit"
        print(
            f"   {folding}, remat={config.remat}: {found.total_bytes / 1e9:.1f} GB, {verdict} "
            f"(planned {candidate.memory.total / 1e9:.1f} GB; compiled in {found.compile_seconds:.0f} s)",
            flush=True,
        )


def find_model(name: str) -> LanguageModelConfig:
    """A known model, by name.

    Raises:
        ValueError: unknown; the message has the nearest name.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.4)
        guess = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"--model={name}: unknown.{guess} Known: {', '.join(MODELS)}.")
    return MODELS[name]


def as_json(
    name: str, found: Plan, asked: Candidate | None, hardware: Hardware, constants: Constants, top: int
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
        "candidates": [_candidate_json(name, c, hardware, constants) for c in found.fitting[:top]],
        "asked": _candidate_json(name, asked, hardware, constants) if asked else None,
    }


def _candidate_json(name: str, candidate: Candidate, hardware: Hardware, constants: Constants) -> dict[str, Any]:
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
        "explanation": [*explain(MODELS[name], candidate, hardware), *_gain(name, candidate, hardware, constants)],
    }


def _gain(name: str, candidate: Candidate, hardware: Hardware, constants: Constants) -> list[str]:
    gain = folding_gain(MODELS[name], candidate, hardware, constants)
    return [gain] if gain else []


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the flags; a word that is none is named before a flag that is missing."""
    parser = _parser()
    options, strange = parser.parse_known_args(arguments)
    if strange:
        near = difflib.get_close_matches(strange[0].split("=")[0], parser._option_string_actions, n=1)
        _fail(f"{strange[0]} is no flag of plan." + (f" Did you mean {near[0]}?" if near else " --help lists them."))
    for name in ("model", "gpus"):
        if getattr(options, name) is None:
            _fail(f"--{name} is missing. Example: python -m experiments.cluster.plan --model=qwen2-57b-a14b --gpus=64")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m experiments.cluster.plan",
        description="Enumerates foldings, predicts step time and memory, ranks them and says what bounds each.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", help=", ".join(MODELS))
    parser.add_argument("--gpus", type=int, help="devices in all")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens of a sequence (default 4096)")
    parser.add_argument("--global_batch", type=int, default=256, help="sequences of a step (default 256)")
    parser.add_argument("--micro_batch", type=int, default=1, help="sequences of a micro-batch (default 1)")
    parser.add_argument("--hardware", default="h100", help="h100, h200, a100 or b200 (default h100)")
    parser.add_argument("--memory_gb", type=float, help="memory of a device, in 1e9 bytes")
    parser.add_argument("--node_size", type=int, help="devices on one fast network")
    parser.add_argument("--network_gb", type=float, help="rate between nodes a device, in 1e9 bytes/s")
    parser.add_argument("--context", choices=("ring", "all_gather"), default="ring", help="form of context parallelism")
    parser.add_argument("--sharding", choices=("any", "zero1", "fsdp"), default="any", help="what data ranks may split")
    parser.add_argument("--recompute", choices=("auto", *RECOMPUTE), default="auto", help="auto: the least that fits")
    parser.add_argument("--folding", help="also predict this one and compare it with the best")
    parser.add_argument("--top", type=int, default=5, help="rows to show and explain (default 5)")
    parser.add_argument("--csv", help="measured rows to refit the constants to")
    parser.add_argument("--confirm", type=int, default=0, help="compile the best N for H100s to confirm their memory")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _hardware(options: argparse.Namespace) -> Hardware:
    changes = {
        "memory_bytes": options.memory_gb * 1e9 if options.memory_gb is not None else None,
        "node_size": options.node_size,
        "network_bandwidth": options.network_gb * 1e9 if options.network_gb is not None else None,
    }
    return named_hardware(options.hardware, **{name: value for name, value in changes.items() if value is not None})


def _refit(path: Path, hardware: Hardware) -> Fit:
    if not path.is_file():
        raise ValueError(f"--csv={path}: no such file.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = parse_rows(csv.DictReader(file, skipinitialspace=True), MODELS, hardware, source=path.name)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--csv={path}: is not a text file of comma-separated values ({error}).") from None
    return fit_rows(rows, hardware)


def _plan(
    model: LanguageModelConfig,
    options: argparse.Namespace,
    workload: Workload,
    hardware: Hardware,
    constants: Constants,
) -> Plan:
    settings = {"hardware": hardware, "constants": constants, "recompute": options.recompute}
    settings["shardings"] = ("zero1", "fsdp") if options.sharding == "any" else (options.sharding,)
    if options.top < 1:
        raise ValueError(f"--top={options.top}: must be at least 1.")
    try:
        found = plan(model, options.gpus, workload, **settings)
    except ValueError as error:
        raise ValueError(str(error).replace("num_devices=", "--gpus=", 1)) from None
    if not found.candidates:
        raise ValueError(f"--sharding={options.sharding}: no folding of {options.gpus} devices allows it. Try any.")
    if not found.fitting:
        least = found.candidates[0]
        enough = smallest_fitting_count(
            model, options.gpus, workload, hardware=hardware, shardings=settings["shardings"]
        )
        remedy = f"{enough} devices hold it" if enough else "a smaller batch, sequence or model is needed"
        over = (least.memory.total - hardware.memory_bytes) / 1e9
        raise ValueError(
            f"--gpus={options.gpus}: {options.model} does not fit. The folding that needs least, {least.folding} with "
            f"recompute={least.workload.recompute} and {least.workload.sharding}, takes {least.memory.total / 1e9:.1f} "
            f"of {hardware.memory_bytes / 1e9:.0f} GB a device, {over:.1f} GB too much; {remedy}."
        )
    return found


def _asked(
    model: LanguageModelConfig,
    options: argparse.Namespace,
    found: Plan,
    workload: Workload,
    hardware: Hardware,
    constants: Constants,
) -> Candidate:
    """The folding that the user named: as the plan chose its recomputation, or as it is without."""
    folding = Folding.parse(options.folding, options.gpus)
    same = [candidate for candidate in found.candidates if candidate.folding == folding]
    return same[0] if same else predict(model, folding, workload, hardware=hardware, constants=constants)


def _print_report(
    options: argparse.Namespace,
    model: LanguageModelConfig,
    found: Plan,
    asked: Candidate | None,
    hardware: Hardware,
    constants: Constants,
    refit: Fit | None,
) -> None:
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
    print_table([[rank, *_cells(c)] for rank, c in zip(ranks, shown)])
    for rank, candidate in zip(ranks, shown):
        title = f"{rank}. {candidate.folding}" if rank != "-" else f"Does not fit: {candidate.folding}"
        print(f"\n{title}")
        for line in [*explain(model, candidate, hardware), *_gain(options.model, candidate, hardware, constants)]:
            print(f"   {line}")
    if asked is not None and asked.fits:
        slower = asked.seconds.total / fitting[0].seconds.total - 1
        print(f"\nThe folding you named is {slower:.1%} slower than the best; {_difference(asked, fitting[0])}")
    print(
        f'\nTo launch the first: --folding="{fitting[0].folding}", sharding={fitting[0].workload.sharding}, '
        f"recompute={fitting[0].workload.recompute}. Predictions only: measure the first few and refit (--csv)."
    )


def _difference(slow: Candidate, fast: Candidate) -> str:
    """Where the time goes that one candidate takes more than another."""
    more = {name: a - b for (name, a), b in zip(slow.seconds._asdict().items(), fast.seconds)}
    name = max(more, key=lambda part: more[part])
    if more[name] <= 0:
        return "it is the best."
    return f"most of the difference is {PARTS[name]} ({more[name]:+.2f} s a step)."


_COLUMNS = ("rank", "attention", "experts", "pp", "sharding", "recompute", "MFU %", "step s", "memory GB", "bound by")


def _cells(candidate: Candidate) -> list[str]:
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


def print_table(rows: Sequence[Sequence[str]], columns: Sequence[str] = _COLUMNS) -> None:
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
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
