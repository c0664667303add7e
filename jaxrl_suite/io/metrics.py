"""Metrics over time: console, JSONL, CSV and, as extras, tensorboardX and wandb.

A metric is a path with its unit (``coupling/rate_bits``, ``time/step_seconds``). Values are numbers, or arrays
``[num_seeds]`` or ``[num_sweep, num_seeds]``, which become one line for each entry; a number beside arrays is repeated
on each line. Not-a-number and the infinities are written as the strings "NaN", "Infinity" and "-Infinity" in JSONL
(strict JSON has no such numbers; :func:`read_jsonl` turns them back) and as ``nan``, ``inf`` and ``-inf`` in CSV.
"""

import csv
import io
import itertools
import json
import logging
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

_log = logging.getLogger(__name__)
_LABELS = ("step", "sweep", "seed")
_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}

Labels = int | Sequence[int] | None


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


def expand(step: int, metrics: Mapping[str, Any], *, seed: Labels = None, sweep: Labels = None) -> list[dict[str, Any]]:
    """One dict for each sweep point and seed, with the keys step, sweep and seed (where they apply) first.

    Raises:
        ValueError: an entry has more than two axes, shapes that do not agree, or a reserved name.

    >>> expand(3, {"loss": np.array([0.5, 0.25]), "rate_bits": 2.0})[1]
    {'step': 3, 'seed': 1, 'loss': 0.25, 'rate_bits': 2.0}
    """
    arrays = {name: _numbers(name, value) for name, value in metrics.items()}
    num_axes = max((array.ndim for array in arrays.values()), default=0)
    try:
        shape = np.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        shapes = {name: array.shape for name, array in arrays.items()}
        raise ValueError(
            f"metrics={shapes}: shapes must agree. Pass numbers, or arrays of [num_seeds] or [num_sweep, num_seeds]."
        ) from None
    seeds = _labels("seed", seed, shape[-1] if num_axes >= 1 else None)
    sweeps = _labels("sweep", sweep, shape[0] if num_axes == 2 else None)
    full = (len(sweeps), len(seeds))
    columns = {name: np.broadcast_to(array, full) for name, array in arrays.items()}
    rows = []
    for (row, point), (column, label) in itertools.product(enumerate(sweeps), enumerate(seeds)):
        labels = {"step": int(step), "sweep": point, "seed": label}
        rows.append(
            {name: value for name, value in labels.items() if value is not None}
            | {name: values[row, column].item() for name, values in columns.items()}
        )
    return rows


def _numbers(name: str, value: Any) -> np.ndarray:
    if name in _LABELS:
        raise ValueError(
            f"metrics[{name!r}]: the name is reserved. Choose a path with a unit, such as time/step_seconds."
        )
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        try:
            array = array.astype(np.float64)  # bfloat16 and its kin
        except (TypeError, ValueError):
            raise ValueError(f"metrics[{name!r}]={value!r:.60}: must be a number or an array of numbers.") from None
    if array.ndim > 2:
        raise ValueError(
            f"metrics[{name!r}]: shape {array.shape}, must be (), [num_seeds] or [num_sweep, num_seeds]. "
            "Average the other axes first."
        )
    return array


def _labels(argument: str, labels: Labels, size: int | None) -> Sequence[int | None]:
    if size is None:
        if isinstance(labels, Sequence):
            raise ValueError(f"{argument}={labels!r}: must be one number, since the metrics have no such axis.")
        return [None if labels is None else int(labels)]
    if labels is None:
        return list(range(size))
    chosen = [int(label) for label in (labels if isinstance(labels, Sequence | np.ndarray) else [labels])]
    if len(chosen) != size:
        raise ValueError(f"{argument}={labels!r}: must have {size} entries, as many as the metrics have.")
    return chosen


# --- files -----------------------------------------------------------------------------------------------------------


class JsonlWriter:
    """One JSON object a line, appended and flushed by each write; a half-written last line is repaired on opening."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        _repair_last_line(self.path)
        self._file = _open_to_append(self.path)

    def write(self, step: int, metrics: Mapping[str, Any], *, seed: Labels = None, sweep: Labels = None) -> None:
        """See :class:`MetricsWriter`."""
        rows = expand(step, metrics, seed=seed, sweep=sweep)
        text = "".join(json.dumps(files.plain(row), allow_nan=False) + "\n" for row in rows)
        self._file.write(text.encode())  # unbuffered: in the hands of the system when this returns

    def close(self) -> None:
        """See :class:`MetricsWriter`."""
        self._file.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a metrics file; a last line that a killed run left half-written is skipped.

    Returns:
        One dict a line, with "NaN", "Infinity" and "-Infinity" turned into floats.

    Raises:
        FileError: the file is missing, or another line is damaged; the message names file, line number and remedy.
    """
    return [
        {name: _SPECIAL.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
        for _, row in _lines(Path(path))
    ]


def truncate_jsonl(path: str | os.PathLike[str], step: int) -> int:
    """Keeps the lines whose step is smaller than ``step``, so that a resumed run repeats none; atomic.

    Args:
        path: the file; a missing one counts as empty.
        step: first step that will be written again.

    Returns:
        Number of lines dropped, a half-written last one included.

    Raises:
        FileError: a line is damaged, or the file cannot be written. The file is then as it was.
    """
    path = Path(path)
    if not path.exists():
        return 0
    content = _read_bytes(path)
    num_lines = content.count(b"\n") + (not content.endswith(b"\n") and bool(content))
    kept = [line for line, row in _lines(path) if row.get("step", -1) < step]
    if len(kept) < num_lines:
        files.atomic_write(path, b"".join(line + b"\n" for line in kept))
    return num_lines - len(kept)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    content = _read_bytes(path)
    *whole, last = content.split(b"\n")
    rows = []
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise files.FileError(
                f"{path}, line {number}: damaged ({error}). Delete that line, or move the file away and start again."
            ) from error
        rows.append((line, row))
    try:
        row = json.loads(last)
    except ValueError:
        return rows
    return [*rows, (last, row)] if isinstance(row, dict) else rows


class CsvWriter:
    """Comma-separated values with a stable header; a new metric widens the file, by an atomic rewrite."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        _repair_last_line(self.path)
        self.columns = _read_csv(self.path)[0] if self.path.exists() else []
        self._file = _open_to_append(self.path)

    def write(self, step: int, metrics: Mapping[str, Any], *, seed: Labels = None, sweep: Labels = None) -> None:
        """See :class:`MetricsWriter`."""
        rows = expand(step, metrics, seed=seed, sweep=sweep)
        new = [name for name in dict.fromkeys(itertools.chain.from_iterable(rows)) if name not in self.columns]
        if new:
            self._widen(new)
        self._file.write(_csv_text(self.columns, rows).encode())

    def _widen(self, new: list[str]) -> None:
        rows = _read_csv(self.path)[1]
        columns = [*(name for name in _LABELS if name in new or name in self.columns)]
        columns += [name for name in [*self.columns, *new] if name not in columns]
        self._file.close()
        header = _csv_text(columns, [dict(zip(columns, columns))])
        files.atomic_write(self.path, header + _csv_text(columns, rows))
        self.columns, self._file = columns, _open_to_append(self.path)

    def close(self) -> None:
        """See :class:`MetricsWriter`."""
        self._file.close()


def truncate_csv(path: str | os.PathLike[str], step: int) -> int:
    """Keeps the lines whose step is smaller than ``step``; atomic. Returns the number of lines dropped.

    Raises:
        FileError: the file is damaged or cannot be written.
    """
    path = Path(path)
    if not path.exists():
        return 0
    columns, rows = _read_csv(path)
    kept = [row for row in rows if int(row["step"]) < step]
    if len(kept) < len(rows):
        header = _csv_text(columns, [dict(zip(columns, columns))])
        files.atomic_write(path, header + _csv_text(columns, kept))
    return len(rows) - len(kept)


def _csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    csv.DictWriter(buffer, columns, restval="", lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    text = _read_bytes(path).decode(errors="replace")
    table = list(csv.reader(text.splitlines()))
    if not table:
        return [], []
    columns = table[0]
    for number, row in enumerate(table[1:], start=2):
        if len(row) != len(columns) or "step" not in columns or not row[columns.index("step")].isdigit():
            raise files.FileError(
                f"{path}, line {number}: damaged ({len(row)} cells under {len(columns)} headings). "
                "Delete that line, or move the file away and start again."
            )
    return columns, [dict(zip(columns, row)) for row in table[1:]]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise files.FileError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error


def _open_to_append(path: Path) -> Any:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab", buffering=0)
    except OSError as error:
        raise files.FileError(
            f"cannot write {path}: {error.strerror or error}. Choose a folder that you may write to."
        ) from error


def _repair_last_line(path: Path) -> None:
    """Cuts off what a killed run left of its last line: the next append must not be glued to it."""
    if not path.exists():
        return
    content = _read_bytes(path)
    whole, _, last = content.rpartition(b"\n")
    if last:
        files.atomic_write(path, whole + b"\n" if whole else b"")
        _log.warning("%s: cut off the half-written last line of a run that was stopped.", path)


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
                if name not in _LABELS:
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
            flat |= {name + suffix: value for name, value in row.items() if name not in _LABELS}
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
    return MultiWriter([_WRITERS[name](Path(workdir)) for name in names])
