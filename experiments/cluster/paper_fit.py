"""The constants of the time model fitted to the published rows, and how well they predict a model left out."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.cluster.models import MODELS
from experiments.cluster.paper_tables import METHODS, Row, all_rows, table_3, table_4
from jaxrl_suite.moe.cost_fit import Choice, Fit, fit, leave_out
from jaxrl_suite.moe.cost_memory import device_memory
from jaxrl_suite.moe.cost_model import Workload
from jaxrl_suite.moe.cost_time import Constants, Counts, counts_of, stack_counts
from jaxrl_suite.moe.folding import Folding, foldings
from jaxrl_suite.moe.hardware import Hardware
from jaxrl_suite.moe.planner import first_problem

SEARCH_STEPS = 2  # doublings or halvings of one degree that separate a published mapping from what it was compared with


class PaperRows(NamedTuple):
    """Numeric rows of the paper, ready to fit.

    Attributes:
        rows: as published.
        counts: work and traffic of a device, arrays [num_rows].
        measured: MFU, fractions [num_rows].
        models: name of the model of each row.
    """

    rows: list[Row]
    counts: Counts
    measured: np.ndarray
    models: list[str]


def workload_of(row: Row, **changes: object) -> Workload:
    """The step of a published row; micro-batches of one sequence, which the paper does not state."""
    sharding = "fsdp" if row.method.startswith("FSDP") else "zero1"
    return Workload(sequence=row.sequence, global_batch=row.global_batch, sharding=sharding).replace(**changes)


def paper_rows(rows: Sequence[Row] | None = None) -> PaperRows:
    """Counts of the rows that have a number."""
    kept = [row for row in (all_rows() if rows is None else rows) if row.mfu_percent is not None]
    counts = stack_counts([counts_of(MODELS[row.model], row.folding, workload_of(row)) for row in kept])
    return PaperRows(kept, counts, np.array([row.mfu_percent for row in kept]) / 100, [row.model for row in kept])


@functools.cache
def paper_choices() -> tuple[Choice, ...]:
    """The folded mappings of table 3, each against its neighbours: the paper searched for the best by hand.

    Neighbours differ by at most two doublings or halvings of TP, PP, EP or ETP, keep CP, and fit 80 GB as the paper's
    framework would have held them (nothing recomputed, routing weights at the output of experts).
    """
    choices = []
    for row in table_3():
        if row.method == METHODS[-1]:
            model, step = MODELS[row.model], workload_of(row, weigh_output=True)
            near = [f for f in foldings(row.num_devices) if 0 < _steps(row, f) <= SEARCH_STEPS]
            held = [f for f in near if not first_problem(model, f, step)]
            held = [f for f in held if device_memory(model, f, step).total <= Hardware().memory_bytes]
            others = stack_counts([counts_of(model, f, step) for f in held])
            choices.append(Choice(row.model, counts_of(model, row.folding, step), others))
    return tuple(choices)


def _steps(row: Row, folding: Folding) -> float:
    if folding.cp != row.folding.cp:
        return math.inf
    kinds = ("tp", "pp", "ep", "etp")
    return sum(abs(math.log2(getattr(folding, kind) / getattr(row.folding, kind))) for kind in kinds)


def fit_paper() -> tuple[PaperRows, Fit]:
    """All numeric rows and the constants that fit them; ``PAPER_CONSTANTS`` holds the result."""
    rows = paper_rows()
    return rows, fit(rows.counts, rows.measured, Hardware(), choices=paper_choices())


def leave_one_model_out(rows: PaperRows) -> tuple[np.ndarray, dict[str, Constants]]:
    """MFU of each row predicted from the rows and choices of the three other models."""
    return leave_out(rows.counts, rows.measured, rows.models, Hardware(), choices=paper_choices())


def disagreements(rows: PaperRows, predicted: np.ndarray, *, tolerance: float = 0.05) -> list[tuple[Row, Row]]:
    """Pairs of methods in one cell of a table (model, GPUs, step) that the prediction puts in the wrong order.

    Pairs whose measurements differ by no more than ``tolerance`` are left out. Faster one first.
    """
    wrong = []
    for i, a in enumerate(rows.rows):
        for j, b in enumerate(rows.rows):
            same = (a.table, a.model, a.num_devices, a.sequence) == (b.table, b.model, b.num_devices, b.sequence)
            if same and rows.measured[i] > rows.measured[j] * (1 + tolerance) and predicted[i] <= predicted[j]:
                wrong.append((a, b))
    return wrong


def bubble_check(model: str, method: str) -> tuple[float, float]:
    """How much of a curve of table 4 the pipeline bubble alone explains.

    Fits ``MFU = c / (1 + u (PP - 1) / m)``, m micro-batches, by least squares in the logarithm.

    Returns:
        u, and the largest relative error.
    """
    rows = [row for row in table_4() if (row.model, row.method) == (model, method)]
    bubble = np.array([(row.folding.pp - 1) * row.folding.dp / row.global_batch for row in rows])
    measured = np.log([row.mfu_percent for row in rows if row.mfu_percent is not None])
    trials = np.linspace(0, 2, 2001)
    curves = measured + np.log1p(trials[:, None] * bubble)  # log c, were u right
    spread = curves - curves.mean(axis=1, keepdims=True)
    best = int(np.argmin(np.square(spread).sum(axis=1)))
    return float(trials[best]), float(np.abs(np.expm1(spread[best])).max())
