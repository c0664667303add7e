"""Which folding to launch: python -m experiments.cluster.plan --model=qwen2-57b-a14b --gpus=64 --sequence=32768."""

import argparse
import csv
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from experiments.cluster.confirm import Confirmed, compiler_of, confirm
from experiments.cluster.models import MODELS, find_model
from experiments.cluster.plan_report import as_json, print_confirmed, print_launch, print_report
from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.cost_fit import PAPER_CONSTANTS, Fit
from jaxrl_suite.moe.cost_memory import FRAMEWORK
from jaxrl_suite.moe.cost_model import RECOMPUTE, Workload
from jaxrl_suite.moe.cost_step import TRAIN_STEP
from jaxrl_suite.moe.cost_time import Constants
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.hardware import Hardware, named_hardware
from jaxrl_suite.moe.planner import Candidate, Plan, plan, predict, smallest_fitting_count
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
            weigh_output=options.weigh_output,
        )
        refit = _refit(Path(options.csv), hardware) if options.csv else None
        constants = refit.constants if refit else PAPER_CONSTANTS
        found = _plan(model, options, workload, hardware, constants)
        asked = _asked(model, options, found, workload, hardware, constants) if options.folding else None
    except (ValueError, OSError) as error:
        _fail(str(error))
    if not options.json:
        print_report(options, model, found, asked, hardware, constants, refit)
    confirmed = _confirm(options, model, found, hardware, constants) if options.confirm else []
    if options.json:
        print(json.dumps(as_json(options.model, found, asked, hardware, constants, options.top, confirmed), indent=2))
        return 0
    fitting = [item.candidate for item in confirmed if item.fits]
    if confirmed and not fitting:
        _fail(
            f"none of the {len(confirmed)} compiled fits {hardware.memory_bytes / 1e9:.0f} GB: try a larger --confirm, "
            "more --gpus or a shorter --sequence."
        )
    best = min(fitting, key=lambda c: c.seconds.total) if fitting else found.fitting[0]
    print_launch(options, best, hardware, confirmed=bool(fitting))
    return 0


def _confirm(
    options: argparse.Namespace,
    model: LanguageModelConfig,
    found: Plan,
    hardware: Hardware,
    constants: Constants,
) -> list[Confirmed]:
    """Compiles the real train step of the best until enough of them fit, and prints each as it is done.

    Weights are float32 with bfloat16 products there, split over data ranks between steps: not the bytes of the
    planner's bfloat16 framework, which the sum nevertheless should be near.
    """
    confirmed = []
    try:
        compile_candidate = compiler_of(model, options.gpus, hardware)
        if not options.json:
            print("\nCompiled for H100s (the real train step, capacity factor 1):")
        for item in confirm(
            model,
            found.fitting,
            options.confirm,
            compile_candidate,
            hardware=hardware,
            constants=constants,
            memory_model=found.memory_model,
        ):
            confirmed.append(item)
            if not options.json:
                print_confirmed(item)
    except (ValueError, ImportError) as error:
        _fail(str(error).splitlines()[0])
    return confirmed


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
    parser.add_argument(
        "--weigh_output",
        action="store_true",
        help="the paper's framework: routing weights multiply the output of experts, which is then kept "
        "(--train_step weighs before the last product)",
    )
    parser.add_argument(
        "--train_step",
        action="store_true",
        help="by memory and pipeline (1F1B, not interleaved) of this package's train step, not of the paper's "
        "framework (recompute: activation or full)",
    )
    parser.add_argument("--folding", help="also predict this one and compare it with the best")
    parser.add_argument("--top", type=int, default=5, help="rows to show and explain (default 5)")
    parser.add_argument("--csv", help="measured rows to refit the constants to")
    parser.add_argument(
        "--confirm", type=int, default=0, help="compile for H100s until N foldings are found whose compiled memory fits"
    )
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
    memory_model = TRAIN_STEP if options.train_step else FRAMEWORK
    settings = {
        "hardware": hardware,
        "constants": constants,
        "recompute": options.recompute,
        "memory_model": memory_model,
    }
    settings["shardings"] = ("zero1", "fsdp") if options.sharding == "any" else (options.sharding,)
    if options.recompute not in ("auto", *memory_model.levels):
        levels = ", ".join(memory_model.levels)
        raise ValueError(f"--recompute={options.recompute}: the memory of the train step is known for {levels} only.")
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
            model,
            options.gpus,
            workload,
            hardware=hardware,
            shardings=settings["shardings"],
            memory_model=memory_model,
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
    step = workload.replace(recompute=found.memory_model.levels[0])
    return (
        same[0]
        if same
        else predict(model, folding, step, hardware=hardware, constants=constants, memory_model=found.memory_model)
    )


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
