"""Metrics in files: JSON lines and comma-separated values, appended to and flushed by each write.

A process that is killed leaves at most one half-written last line, which readers skip and writers cut off.
"""

import csv
import io
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_suite.io import files

LABELS = ("step", "sweep", "seed")
Labels = int | Sequence[int] | None
_log = logging.getLogger(__name__)


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
    if name in LABELS:
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


class JsonlWriter:
    """One JSON object a line, appended and flushed by each write; a half-written last line is repaired on opening."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        _repair_last_line(self.path)
        self._file = _open_to_append(self.path)

    def write(self, step: int, metrics: Mapping[str, Any], *, seed: Labels = None, sweep: Labels = None) -> None:
        """See :class:`jaxrl_suite.io.metrics.MetricsWriter`."""
        rows = expand(step, metrics, seed=seed, sweep=sweep)
        text = "".join(json.dumps(files.plain(row), allow_nan=False) + "\n" for row in rows)
        self._file.write(text.encode())  # unbuffered: in the hands of the system when this returns

    def close(self) -> None:
        """See :class:`jaxrl_suite.io.metrics.MetricsWriter`."""
        self._file.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a metrics file; a last line that a killed run left half-written is skipped.

    Returns:
        One dict a line, with "NaN", "Infinity" and "-Infinity" turned into floats.

    Raises:
        FileError: the file is missing, or another line is damaged; the message names file, line number and remedy.
    """
    return [files.revive(row) for _, row in _lines(Path(path))]


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
        """See :class:`jaxrl_suite.io.metrics.MetricsWriter`."""
        rows = expand(step, metrics, seed=seed, sweep=sweep)
        new = [name for name in dict.fromkeys(itertools.chain.from_iterable(rows)) if name not in self.columns]
        if new:
            self._widen(new)
        self._file.write(_csv_text(self.columns, rows).encode())

    def _widen(self, new: list[str]) -> None:
        rows = _read_csv(self.path)[1]
        columns = [*(name for name in LABELS if name in new or name in self.columns)]
        columns += [name for name in [*self.columns, *new] if name not in columns]
        self._file.close()
        header = _csv_text(columns, [dict(zip(columns, columns))])
        files.atomic_write(self.path, header + _csv_text(columns, rows))
        self.columns, self._file = columns, _open_to_append(self.path)

    def close(self) -> None:
        """See :class:`jaxrl_suite.io.metrics.MetricsWriter`."""
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
