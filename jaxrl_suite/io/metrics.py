"""Metrics over time: console, JSONL, CSV and, as extras, tensorboardX and wandb.

A metric is a path with its unit (``coupling/rate_bits``, ``time/step_seconds``). Values are numbers, or arrays
``[num_seeds]`` or ``[num_sweep, num_seeds]``, which become one line for each entry; a number beside arrays is repeated
on each line. Not-a-number and the infinities are written as the strings "NaN", "Infinity" and "-Infinity" in JSONL
(strict JSON has no such numbers; :func:`read_jsonl` turns them back) and as ``nan``, ``inf`` and ``-inf`` in CSV.
"""

import itertools
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from jaxrl_suite.extras import require
from jaxrl_suite.io import files
from jaxrl_suite.io.tables import (
    LABELS,
    CsvWriter,
    JsonlWriter,
    Labels,
    expand,
    read_jsonl,
    truncate_csv,
    truncate_jsonl,
)

__all__ = [
    "ConsoleWriter",
    "CsvWriter",
    "JsonlWriter",
    "MetricsWriter",
    "MultiWriter",
    "TensorboardWriter",
    "WandbWriter",
    "expand",
    "make_writer",
    "read_jsonl",
    "truncate_csv",
    "truncate_jsonl",
]


class MetricsWriter(Protocol):
    """What all writers offer."""

    def write(self, step: int, metrics: Mapping[str, Any], *, seed: Labels = None, sweep: Labels = None) -> None:
        """Records the metrics of one step.

        Args:
            step: number of the step.
            metrics: path -> number, or array ``[num_seeds]`` or ``[num_sweep, num_seeds]``.
            seed: number of the seed, or one for each column of the arrays; 0, 1, ... by default where there are arrays.
            sweep: the same for the points of a sweep.
        """
        ...

    def close(self) -> None:
        """Flushes and lets go of files. More calls do nothing."""
        ...


# --- people and services ---------------------------------------------------------------------------------------------


class ConsoleWriter:
    """A compact line on standard output, at most one every ``every_seconds``; the last one is never swallowed."""

    def __init__(self, every_seconds: float = 5.0, max_metrics: int = 6):
        self._every, self._max, self._printed, self._pending = every_seconds, max_metrics, -float("inf"), ""

    def write(self, step: int, metrics: Mapping[str, Any], *, seed: Labels = None, sweep: Labels = None) -> None:
        """See :class:`MetricsWriter`; arrays show as their mean over seeds and sweep points."""
        parts = [f"{name} {_short(value)}" for name, value in itertools.islice(metrics.items(), self._max)]
        more = len(metrics) - self._max
        label = "" if seed is None or isinstance(seed, Sequence) else f" seed {seed}"
        self._pending = f"step {step:,}{label}  " + "  ".join(parts) + (f"  (+{more})" if more > 0 else "")
        if time.monotonic() - self._printed >= self._every:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            sys.stdout.write(self._pending + "\n")
            sys.stdout.flush()
            self._pending, self._printed = "", time.monotonic()

    def close(self) -> None:
        """See :class:`MetricsWriter`."""
        self._flush()


def _short(value: Any) -> str:
    array = np.asarray(value, np.float64)
    mean = float(array.mean()) if array.size else float("nan")
    text = f"{mean:,.0f}" if mean.is_integer() and abs(mean) < 1e9 else f"{mean:.4g}"
    return f"{text} ±{array.std():.2g}" if array.size > 1 else text


class TensorboardWriter:
    """tensorboardX event files; each sweep point and seed is a run of its own, so that their curves overlay."""

    def __init__(self, folder: str | os.PathLike[str]):
        self._module = require("tensorboardX", "tensorboard")
        self._folder, self._writers = Path(folder), {}

    def write(self, step: int, metrics: Mapping[str, Any], *, seed: Labels = None, sweep: Labels = None) -> None:
        """See :class:`MetricsWriter`."""
        for row in expand(step, metrics, seed=seed, sweep=sweep):
            run = "_".join(f"{label}_{row[label]}" for label in ("sweep", "seed") if label in row)
            if run not in self._writers:
                # purge_step hides what a killed run had logged from this step on.
                self._writers[run] = self._module.SummaryWriter(str(self._folder / run), purge_step=step)
            for name, value in row.items():
                if name not in LABELS:
                    self._writers[run].add_scalar(name, value, step)
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """See :class:`MetricsWriter`."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


class WandbWriter:
    """Weights & Biases; ``WANDB_PROJECT`` and ``WANDB_MODE`` apply. A resumed workdir continues its run."""

    def __init__(self, workdir: str | os.PathLike[str]):
        wandb = require("wandb", "wandb")
        workdir = Path(workdir)
        identity = workdir / "wandb_id.txt"
        if not identity.exists():
            files.atomic_write(identity, secrets.token_hex(8))
        project = os.environ.get("WANDB_PROJECT", "jaxrl-suite")
        name = identity.read_text().strip()
        self._run = wandb.init(project=project, id=name, name=workdir.name, dir=str(workdir), resume="allow")

    def write(self, step: int, metrics: Mapping[str, Any], *, seed: Labels = None, sweep: Labels = None) -> None:
        """See :class:`MetricsWriter`; sweep point and seed become the end of the name."""
        rows = expand(step, metrics, seed=seed, sweep=sweep)
        flat = {}
        for row in rows:
            suffix = "".join(f"/{label}_{row[label]}" for label in ("sweep", "seed") if label in row)
            flat |= {name + suffix: value for name, value in row.items() if name not in LABELS}
        self._run.log(flat, step=step)

    def close(self) -> None:
        """See :class:`MetricsWriter`."""
        self._run.finish()


class MultiWriter:
    """Hands everything to several writers; a context manager."""

    def __init__(self, writers: Sequence[MetricsWriter]):
        self.writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, Any], *, seed: Labels = None, sweep: Labels = None) -> None:
        """See :class:`MetricsWriter`."""
        for writer in self.writers:
            writer.write(step, metrics, seed=seed, sweep=sweep)

    def close(self) -> None:
        """See :class:`MetricsWriter`."""
        for writer in self.writers:
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_WRITERS = {
    "console": lambda workdir: ConsoleWriter(),
    "jsonl": lambda workdir: JsonlWriter(workdir / "metrics.jsonl"),
    "csv": lambda workdir: CsvWriter(workdir / "metrics.csv"),
    "tensorboard": lambda workdir: TensorboardWriter(workdir / "tensorboard"),
    "wandb": WandbWriter,
}


def make_writer(spec: str, workdir: str | os.PathLike[str]) -> MultiWriter:
    """A writer from a comma list.

    Args:
        spec: some of console, jsonl, csv, tensorboard, wandb, separated by commas; empty or "none" for silence.
        workdir: folder in which ``metrics.jsonl``, ``metrics.csv`` and ``tensorboard/`` are written.

    Returns:
        The writer, also a context manager.

    Raises:
        ValueError: an unknown or repeated name.
        ImportError: the module of a service is not installed.
        FileError: the workdir cannot be written, or a CSV file in it is damaged.
    """
    names = [name.strip() for name in spec.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in _WRITERS:
            raise ValueError(f"metrics={spec!r}: {name!r} is unknown. Choose from: {', '.join(_WRITERS)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"metrics={spec!r}: a name is repeated. Name each writer once.")
    writers: list[MetricsWriter] = []
    try:
        for name in names:
            writers.append(_WRITERS[name](Path(workdir)))
    except BaseException:
        MultiWriter(writers).close()
        raise
    return MultiWriter(writers)
