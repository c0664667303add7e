"""Rows that a user measured: read from a table of text, checked cell by cell, and turned into constants."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, get_args

import numpy as np

from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.cost_fit import PAPER_CONSTANTS, Fit, fit
from jaxrl_suite.moe.cost_model import RECOMPUTE, Workload
from jaxrl_suite.moe.cost_time import counts_of, model_flops_utilisation, stack_counts
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.hardware import Hardware
from jaxrl_suite.moe.planner import Sharding, first_problem

REQUIRED = ("model", "gpus", "sequence", "global_batch", "folding")
MEASURED = ("step_seconds", "mfu_percent")  # one of the two
OPTIONAL = {"micro_batch": "1", "sharding": "zero1", "recompute": "none"}


class MeasuredRow(NamedTuple):
    """One measurement.

    Attributes:
        line: line of the file, for messages.
        model: shapes.
        folding: degrees.
        workload: the step.
        mfu: measured MFU, a fraction.
    """

    line: int
    model: LanguageModelConfig
    folding: Folding
    workload: Workload
    mfu: float


def parse_rows(
    rows: Iterable[Mapping[str, str | None]],
    models: Mapping[str, LanguageModelConfig],
    hardware: Hardware | None = None,
    *,
    source: str = "rows",
) -> list[MeasuredRow]:
    """Checks rows of text, for example from ``csv.DictReader``.

    Columns: model, gpus, sequence, global_batch, folding ("attention=tp2.dp8 experts=ep8.edp2 pipeline=8"), and
    step_seconds or mfu_percent; micro_batch, sharding and recompute may be left out.

    Args:
        rows: column -> text, one mapping a line after the header.
        models: known models by name.
        hardware: the machine they were measured on; the paper's by default.
        source: name of the file, for messages.

    Raises:
        ValueError: the first cell that cannot be, with its line, column, value, rule and remedy.
    """
    hardware = Hardware() if hardware is None else hardware
    parsed = []
    for line, row in enumerate(rows, start=2):  # the header is line 1
        if line == 2:
            _check_columns(row, source)
        parsed.append(_parse_row(line, row, models, hardware, source))
    if not parsed:
        raise ValueError(f"{source}: no rows. Write a header ({_header()}) and one line a measurement.")
    return parsed


def fit_rows(rows: list[MeasuredRow], hardware: Hardware | None = None) -> Fit:
    """Constants from measured rows, with those of the paper as the prior: what no row informs stays as it was."""
    hardware = Hardware() if hardware is None else hardware
    counts = stack_counts([counts_of(r.model, r.folding, r.workload, node_size=hardware.node_size) for r in rows])
    return fit(counts, np.array([row.mfu for row in rows]), hardware, prior=PAPER_CONSTANTS)


def _header() -> str:
    return ",".join(REQUIRED) + ",step_seconds"


def _check_columns(row: Mapping[str, str | None], source: str) -> None:
    names = [name for name in row if name is not None]
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise ValueError(f"{source}: column {missing[0]!r} is missing. The header is: {_header()}.")
    if not set(MEASURED) & set(names):
        raise ValueError(f"{source}: neither step_seconds nor mfu_percent is a column. The header is: {_header()}.")
    known = (*REQUIRED, *MEASURED, *OPTIONAL)
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(f"{source}: column {strange[0]!r} is unknown. Columns: {', '.join(known)}.")


class _Cell(NamedTuple):
    """Where a value stands, to word errors."""

    source: str
    line: int

    def error(self, column: str, value: str, rule: str, remedy: str = "") -> ValueError:
        remedy = f" {remedy}." if remedy else ""
        return ValueError(f"{self.source} line {self.line}, {column}={value!r}: {rule}.{remedy}")


def _parse_row(
    line: int,
    row: Mapping[str, str | None],
    models: Mapping[str, LanguageModelConfig],
    hardware: Hardware,
    source: str,
) -> MeasuredRow:
    cell = _Cell(source, line)
    if None in row:
        raise ValueError(f"{source} line {line}: more cells than columns. Put text that holds commas into quotes.")
    text = {name: (value or "").strip() for name, value in row.items()}
    text = OPTIONAL | {name: value for name, value in text.items() if value}
    for name in REQUIRED:
        if name not in text:
            raise cell.error(name, "", "is empty", "Every row needs it")
    if text["model"] not in models:
        raise cell.error("model", text["model"], "unknown model", f"Known: {', '.join(models)}")
    for name, allowed in (("sharding", get_args(Sharding)), ("recompute", RECOMPUTE)):
        if text[name] not in allowed:
            raise cell.error(name, text[name], f"must be one of {', '.join(allowed)}")
    gpus, sequence, batch, micro = (
        _count(cell, n, text[n]) for n in ("gpus", "sequence", "global_batch", "micro_batch")
    )
    try:
        folding = Folding.parse(text["folding"], gpus)
    except ValueError as error:
        raise cell.error("folding", text["folding"], "cannot be", str(error).rstrip(".")) from None
    workload = Workload(
        sequence=sequence,
        global_batch=batch,
        micro_batch=micro,
        sharding="fsdp" if text["sharding"] == "fsdp" else "zero1",
        recompute=next(level for level in RECOMPUTE if level == text["recompute"]),
    )
    problem = first_problem(models[text["model"]], folding, workload)
    if problem:
        raise cell.error("folding", text["folding"], f"breaks the rule: {problem}", "Check the degrees and the batch")
    return MeasuredRow(
        line, models[text["model"]], folding, workload, _utilisation(cell, text, models, folding, workload, hardware)
    )


def _count(cell: _Cell, name: str, value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        raise cell.error(name, value, "must be a whole number") from None
    if number < 1:
        raise cell.error(name, value, "must be at least 1")
    return number


def _utilisation(
    cell: _Cell,
    text: Mapping[str, str],
    models: Mapping[str, LanguageModelConfig],
    folding: Folding,
    workload: Workload,
    hardware: Hardware,
) -> float:
    given = [name for name in MEASURED if name in text]
    if len(given) != 1:
        value = ",".join(text[name] for name in given)
        raise cell.error(" or ".join(MEASURED), value, "exactly one of the two must be given", "Leave the other empty")
    name = given[0]
    try:
        number = float(text[name])
    except ValueError:
        raise cell.error(name, text[name], "must be a number") from None
    if not (np.isfinite(number) and number > 0):
        raise cell.error(name, text[name], "must be positive")
    if name == "mfu_percent":
        if number > 100:
            raise cell.error(name, text[name], "must be at most 100", "It is a percentage of the peak")
        return number / 100
    counts = counts_of(models[text["model"]], folding, workload, node_size=hardware.node_size)
    mfu = float(model_flops_utilisation(counts, number, hardware))
    if mfu > 1:
        rule = f"would be {mfu:.0%} of the peak of {hardware.name}, faster than the machine"
        raise cell.error(name, text[name], rule, "Check the unit (seconds a step) and --hardware")
    return mfu
