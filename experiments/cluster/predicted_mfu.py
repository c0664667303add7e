"""The published tables against the time model, every model predicted from the other three."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np

from experiments.cluster import predicted_mfu_figures as drawing
from experiments.cluster.models import MODELS, PAPER_NAMES
from experiments.cluster.paper_fit import disagreements, fit_paper, leave_one_model_out, paper_rows, workload_of
from experiments.cluster.paper_tables import METHODS, Row, published_folding, table_3, table_5
from experiments.cluster.presets import PRESETS
from experiments.common.run import Run
from experiments.common.study import Result, Study
from jaxrl_suite.config import Config, field
from jaxrl_suite.moe.cost_fit import PAPER_CONSTANTS, rank_correlation
from jaxrl_suite.moe.cost_memory import Memory
from jaxrl_suite.moe.cost_model import RECOMPUTE, Workload
from jaxrl_suite.moe.cost_traffic import Link, step_traffic
from jaxrl_suite.moe.hardware import Hardware
from jaxrl_suite.moe.planner import Candidate, plan, predict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEVICES = (64, 128, 256, 512, 1024)
# Tokens of a sequence, GPUs and global batch of table 5, after a first point at 4,096 tokens.
CONTEXT = ((4096, 128, 4096), (16384, 128, 1024), (32768, 256, 512), (65536, 512, 256), (131072, 1024, 128))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictedMFUConfig(Config):
    """What is predicted besides the published rows."""

    search: bool = field(False, help="also search the best folding for every number of devices and context length")
    max_devices: int = field(256, help="largest number of devices that is searched")


def run(run: Run) -> Result:
    """Fits, leaves out, predicts memory and traffic, and searches if asked."""
    paper = run.stage("paper", _paper)
    memory = run.stage("memory", _memory)
    traffic = run.stage("traffic", _traffic)
    arrays = {**paper, **memory, **traffic}
    config = cast(PredictedMFUConfig, run.config)
    if config.search:
        limit = config.max_devices
        arrays |= run.stage("scaling", lambda: _scaling(run, limit))
        arrays |= run.stage("context", lambda: _context(run, limit))
    return Result(summary=_summary(arrays), arrays=arrays)


def _paper() -> dict[str, np.ndarray]:
    rows, fitted = fit_paper()
    left_out, _ = leave_one_model_out(rows)
    published = rows.rows
    return {
        "model": np.array(rows.models),
        "method": np.array([row.method for row in published]),
        "table": np.array([row.table for row in published]),
        "devices": np.array([row.num_devices for row in published]),
        "sequence": np.array([row.sequence for row in published]),
        "measured": rows.measured,
        "fitted": fitted.predicted,
        "left_out": left_out,
        "constants": np.array(fitted.constants),
        "wrong_order_table_3": np.array(_num_wrong(3, left_out)),
        "wrong_order_table_4": np.array(_num_wrong(4, left_out)),
    }


def _num_wrong(table: int, predicted: np.ndarray) -> int:
    return sum(pair[0].table == table for pair in disagreements(paper_rows(), predicted))


def as_run(row: Row) -> Candidate:
    """A row of table 3 with the least recomputation that fits, as its framework would hold it."""
    candidate = None
    for level in RECOMPUTE[:3]:  # nobody publishes an MFU with everything recomputed
        step = workload_of(row, recompute=level, weigh_output=True)
        candidate = predict(MODELS[row.model], row.folding, step)
        if candidate.fits:
            break
    assert candidate is not None
    return candidate


def _memory() -> dict[str, np.ndarray]:
    rows = table_3()
    held = [as_run(row) for row in rows]
    return {
        "memory_label": np.array([f"{PAPER_NAMES[row.model]}: {row.method}" for row in rows]),
        "memory_bytes": np.array([candidate.memory for candidate in held]),
        "memory_kinds": np.array(Memory._fields),
        "memory_published": np.array([row.mfu_percent is not None for row in rows]),
        "memory_fits": np.array([candidate.fits for candidate in held]),
        "memory_recompute": np.array([candidate.workload.recompute for candidate in held]),
    }


def _traffic() -> dict[str, np.ndarray]:
    rows = [row for row in table_3() if row.method.startswith("MCore")]
    candidates = [predict(MODELS[row.model], row.folding, workload_of(row)) for row in rows]
    moved = [step_traffic(c.counts.traffic, c.folding, c.workload) for c in candidates]
    return {
        "traffic_label": np.array([f"{PAPER_NAMES[row.model]}\n{row.method}" for row in rows]),
        "traffic_kinds": np.array(list(moved[0])),
        "traffic_links": np.array(Link._fields),
        "traffic_bytes": np.array([[tuple(link) for link in links.values()] for links in moved], float),
    }


def _scaling(run: Run, limit: int) -> dict[str, np.ndarray]:
    """The best folding of each model and number of devices, global batch 1,024."""
    names, found = [], []
    cases = [(name, n) for name in PAPER_NAMES for n in DEVICES if n <= limit]
    for name, number in run.progress(cases, "scaling"):
        best = _best(name, number, Workload(sequence=4096, global_batch=1024))
        names.append(str(best.folding) if best else "does not fit")
        found.append((list(PAPER_NAMES).index(name), number, best.mfu if best else np.nan))
    return {"scaling_best": np.array(found, float).reshape(-1, 3), "scaling_folding": np.array(names)}


def _context(run: Run, limit: int) -> dict[str, np.ndarray]:
    """The best folding of two models as the context grows, tokens of a global batch constant."""
    names, found = [], []
    models = ("mixtral-8x22b", "qwen2-57b-a14b")
    cases = [(name, *point) for name in models for point in CONTEXT if point[1] <= limit]
    for name, sequence, number, batch in run.progress(cases, "context"):
        best = _best(name, number, Workload(sequence=sequence, global_batch=batch))
        names.append(str(best.folding) if best else "does not fit")
        found.append((models.index(name), sequence, best.mfu if best else np.nan))
    return {"context_best": np.array(found, float).reshape(-1, 3), "context_folding": np.array(names)}


def _best(name: str, num_devices: int, workload: Workload) -> Candidate | None:
    fitting = plan(MODELS[name], num_devices, workload, constants=PAPER_CONSTANTS).fitting
    return fitting[0] if fitting else None


def unfolded_context_gain() -> float:
    """Largest predicted gain of folding in table 5, ratio of MFU."""
    pairs: dict[int, dict[str, float]] = {}
    for row in table_5():
        pairs.setdefault(row.sequence, {})[row.method] = predict(
            MODELS[row.model], row.folding, workload_of(row), hardware=Hardware()
        ).mfu
    return max(pair[METHODS[4]] / pair[METHODS[3]] for pair in pairs.values())


def _summary(arrays: Mapping[str, np.ndarray]) -> dict[str, float | int | str | bool | None]:
    error = np.abs(arrays["left_out"] / arrays["measured"] - 1)
    gate = arrays["table"] < 5
    summary: dict[str, float | int | str | bool | None] = {
        "left_out/error_percent": float(100 * error[gate].mean()),
        **{
            f"left_out/error_percent/{name}": float(100 * error[gate & (arrays["model"] == name)].mean())
            for name in PAPER_NAMES
        },
        "left_out/rank_correlation": rank_correlation(arrays["left_out"][gate], arrays["measured"][gate]),
        "left_out/wrong_order_table_3": int(arrays["wrong_order_table_3"]),
        "left_out/wrong_order_table_4": int(arrays["wrong_order_table_4"]),
        "fitted/error_percent": float(100 * np.abs(arrays["fitted"] / arrays["measured"] - 1).mean()),
        "memory/out_of_memory_rows_flagged": int(np.sum(~arrays["memory_published"] & ~arrays["memory_fits"])),
        "memory/published_rows_that_fit": int(np.sum(arrays["memory_published"] & arrays["memory_fits"])),
        "context/largest_gain_of_folding_percent": float(100 * (unfolded_context_gain() - 1)),
    }
    return summary


def figures(result: Result) -> dict[str, "Figure"]:
    """Predicted against published, scaling, context, memory, traffic."""
    arrays = result.arrays
    return {
        "predicted_against_published": drawing.scatter(arrays),
        "scaling": drawing.scaling(arrays),
        "context": drawing.context(arrays, _predicted_context()),
        "memory": drawing.memory(arrays, Hardware().memory_bytes),
        "traffic": drawing.traffic(arrays),
    }


def _predicted_context() -> dict[str, list[tuple[int, float]]]:
    """Sequence and MFU by method of the mappings of table 5, and of the same without CP at 4,096 tokens."""
    lines: dict[str, list[tuple[int, float]]] = {}
    rows = table_5()
    for method, mapping in ((METHODS[3], (1, 2, 4, 8, None)), (METHODS[4], (1, 2, 8, 8, 1))):
        rows.append(Row(5, "mixtral-8x22b", method, 128, 4096, 4096, published_folding(mapping, 128), None))
    for row in sorted(rows, key=lambda row: row.sequence):
        candidate = predict(MODELS[row.model], row.folding, workload_of(row))
        lines.setdefault(row.method, []).append((row.sequence, candidate.mfu))
    return lines


STUDY = Study(
    name="predicted_mfu",
    summary="An analytical model predicts the published MFU of a model that it was not fitted to.",
    config=PredictedMFUConfig,
    run=run,
    figures=figures,
    presets=PRESETS["predicted_mfu"],
    headline=("left_out/error_percent", "left_out/rank_correlation", "memory/out_of_memory_rows_flagged"),
    tour=True,
)
