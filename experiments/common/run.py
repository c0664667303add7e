"""One run of a study: its folder, its stages and loops, its metrics, and how it resumes to the same numbers.

What is on disk of a run:

    config.json    what is run; a resume with anything else is refused
    env.json       commit, versions, devices and arguments of every start
    metrics.jsonl  one line per step and seed
    stages/        finished stages, one npz each
    checkpoints/   one folder a loop
    plots/         figures
    results.npz    what the figures are drawn from
    summary.json   the numbers; its presence means that the run is finished

Every stage and checkpoint remembers how long metrics.jsonl was when it was written. A resume cuts the file back to that
length before it writes, so that a step which is computed again does not stand there twice.

In a job of several processes the first one owns the folder; the others compute the same in a temporary one.
"""

import contextlib
import fcntl
import functools
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.flags import Settings, UsageError
from experiments.common.study import Result, Study
from jaxrl_suite.config import Config
from jaxrl_suite.io import checkpoint, files, metrics, plots, processes, profiling, progress

State = Any


class Run:
    """What a study's ``run`` function gets: configuration, randomness, and every effect it may have.

    Attributes:
        config: the study's configuration.
        hparams: the study's hyperparameters, every field an array ``[num_sweep]``, or None.
        num_sweep: number of points of the sweep, 1 without one.
        num_seeds: number of independent repetitions.
        key: base key of the run.
        keys: one key a repetition, ``[num_seeds]``.
        preset: name of the preset.
        workdir: folder of the run.
    """

    def __init__(self, study: Study, config: Config, hparams: Any, settings: Settings, workdir: Path) -> None:
        self.study, self.config, self.hparams, self.settings, self.workdir = study, config, hparams, settings, workdir
        self.preset, self.num_seeds = settings.preset, settings.num_seeds
        self.num_sweep = len(hparams[0]) if hparams is not None else 1
        self.key, seeds = jax.random.split(jax.random.key(settings.seed))
        # Repetition i draws the same whatever the number of repetitions.
        self.keys = jax.vmap(jax.random.fold_in, (None, 0))(seeds, np.arange(settings.num_seeds))
        self._metrics_bytes = 0  # length of metrics.jsonl at the latest point that a resume can start from
        self._writer: metrics.MetricsWriter | None = None
        self._names: set[str] = set()
        self._offset = 0  # steps of the loops before this one

    def stage(self, name: str, function: Callable[[], Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Runs a part of the study once; on a resume a finished part is read back instead.

        Args:
            name: lower_snake_case, unique in the run.
            function: returns a dict of arrays and scalars.

        Returns:
            The dict, as NumPy arrays.
        """
        self._claim(name)
        path = self.workdir / "stages" / f"{name}.npz"
        if path.exists():
            arrays = files.load_arrays(path)
            self._metrics_bytes = int(arrays.pop("_metrics_bytes"))
            return arrays
        arrays = {key: np.asarray(value) for key, value in function().items()}
        self._metrics_bytes = self._flushed_bytes()
        files.save_arrays(path, {**arrays, "_metrics_bytes": np.asarray(self._metrics_bytes)})
        return arrays

    def loop(
        self,
        name: str,
        *,
        init: Callable[[], State],
        advance: Callable[[State, int, int], tuple[State, Mapping[str, Any]]],
        num_steps: int,
    ) -> State:
        """A long loop with checkpoints, metrics and a progress bar.

        Args:
            name: lower_snake_case, unique in the run.
            init: returns the initial state, any pytree of arrays.
            advance: ``advance(state, start, num_steps) -> (state, {path: [num_steps, ...]})``; compiled by the study,
                with at most two different ``num_steps``. Step t draws from ``fold_in(key, t)``, so that chunks of any
                length follow the same stream.
            num_steps: steps of the whole loop.

        Returns:
            The state after the last step.
        """
        self._claim(name)
        folder = self.workdir / "checkpoints" / name
        chunk = min(self.settings.log_every or max(1, num_steps // 20), num_steps)
        every = max(chunk, self.settings.checkpoint_every or -(-num_steps // 4))
        state, start = init(), 0
        if checkpoint.latest_step(folder) is not None:
            state, saved = checkpoint.restore_checkpoint(folder, state)
            start, self._metrics_bytes = int(saved["step"]), int(saved["metrics_bytes"])
        saved_at = start
        with progress.ProgressBar(name.replace("_", " "), total=num_steps) as bar:
            bar.advance(start)
            while start < num_steps:
                length = min(chunk, num_steps - start)
                began = time.perf_counter()
                state, values = advance(state, start, length)
                state, values = jax.block_until_ready((state, {key: processes.to_host(v) for key, v in values.items()}))
                seconds = (time.perf_counter() - began) / length
                for t in range(length):
                    row = {key: value[t] for key, value in values.items()}
                    self.log(start + t, {**row, "time/step_seconds": seconds})
                start += length
                if start == num_steps or start - saved_at >= every:
                    self._metrics_bytes = self._flushed_bytes()
                    saved = {"step": start, "metrics_bytes": self._metrics_bytes}
                    checkpoint.save_checkpoint(folder, start, state, metadata=saved)
                    saved_at = start
                bar.advance(length, **_scalars(values))
        self._offset += num_steps
        return state

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes metrics of one step; arrays may be [], [num_seeds] or [num_sweep, num_seeds]."""
        if self._writer is None:
            self._writer = self._open_metrics()
        self._writer.write(self._offset + step, {key: np.asarray(value) for key, value in values.items()})

    def series(self, path: str) -> np.ndarray:
        """Values of a metric in the order in which they were logged, ``[steps]`` or ``[steps, lanes]`` with seeds."""
        lines = [line for line in metrics.read_jsonl(self.workdir / "metrics.jsonl") if path in line]
        steps = sorted({line["step"] for line in lines})
        values = np.array([line[path] for line in lines], float)
        return (
            values.reshape(len(steps), -1).squeeze(-1) if len(values) == len(steps) else values.reshape(len(steps), -1)
        )

    def progress(self, iterable: Iterable[Any], description: str) -> Iterator[Any]:
        """Iterates with a progress bar, silent when the output is not a terminal."""
        return progress.progress(iterable, description)

    def close(self) -> None:
        """Flushes and closes the metrics."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _claim(self, name: str) -> None:
        if name in self._names:
            raise ValueError(f"{self.study.name}: the name {name!r} is used by two stages or loops of one run.")
        self._names.add(name)

    def _open_metrics(self) -> metrics.MetricsWriter:
        path = self.workdir / "metrics.jsonl"
        if path.exists() and path.stat().st_size > self._metrics_bytes:
            os.truncate(path, self._metrics_bytes)
        derived = self.workdir / "metrics.csv"
        derived.unlink(missing_ok=True)
        kinds = [kind.strip() for kind in self.settings.metrics.split(",")]
        kinds = kinds if "jsonl" in kinds else ["jsonl", *kinds]  # what a resume rests on
        if not processes.is_writer():
            kinds = ["jsonl"]  # for itself, in its own folder
        return metrics.make_writer(",".join(kinds), self.workdir)

    def _flushed_bytes(self) -> int:
        path = self.workdir / "metrics.jsonl"
        if self._writer is None:  # nothing was written since the last recorded length
            return self._metrics_bytes
        return path.stat().st_size if path.exists() else 0


def run_study(
    family: str, study: Study, config: Config, hparams: Any, settings: Settings, *, command: str = ""
) -> tuple[Result, Path]:
    """Runs a study, or resumes it, in its folder. What launchers and notebooks call.

    Args:
        family: folder under ``experiments``.
        study: the study.
        config: its configuration.
        hparams: its hyperparameters from :meth:`Study.configure`, or None.
        settings: workdir, seeds and so on.
        command: the command line, for the record.

    Returns:
        The result and the folder it lies in.

    Raises:
        UsageError: the folder holds another run, or cannot be written.
    """
    identity = {
        "family": family,
        "study": study.name,
        "preset": settings.preset,
        "seed": settings.seed,
        "num_seeds": settings.num_seeds,
        "x64": jax.dtypes.canonicalize_dtype(np.float64) == np.float64,
        "config": config.to_dict(),
        "hparams": {} if hparams is None else {name: value.tolist() for name, value in hparams._asdict().items()},
    }
    choose = functools.partial(choose_workdir, settings, f"{family}/{study.name}-{settings.preset}")
    workdir = Path(processes.on_writer(lambda: str(choose())))
    with contextlib.ExitStack() as stack:
        kept = processes.on_writer(lambda: _claim(stack, workdir, identity, settings.resume), UsageError, OSError)
        # The other processes of a job work in a folder of their own, on what the writer's holds at this moment.
        folder = workdir if processes.is_writer() else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _share(folder)
        if kept:
            return load_result(folder), workdir
        began = time.perf_counter()
        starts = files.read_json(folder / "env.json")["starts"] if (folder / "env.json").exists() else []
        environment = {**profiling.environment(), "command": command}
        files.write_json(folder / "env.json", {"starts": [*starts, environment]})
        run = Run(study, config, hparams, settings, folder)
        try:
            result = study.run(run)
        finally:
            run.close()
        if processes.is_writer():
            _write_result(study, result, workdir, seconds=round(time.perf_counter() - began, 2))
        processes.broadcast_json(None)  # nobody leaves before the result is on disk
    return result, workdir


def _claim(stack: contextlib.ExitStack, workdir: Path, identity: dict[str, Any], resume: bool) -> bool:
    """Locks and checks the folder; whether a finished run lies in it."""
    stack.enter_context(_claimed(workdir))
    return _enter(workdir, identity, resume=resume)


def _write_result(study: Study, result: Result, workdir: Path, *, seconds: float) -> None:
    for name, figure in study.figures(result).items():
        plots.save_figure(figure, workdir / "plots" / name)
    files.save_arrays(workdir / "results.npz", {key: np.asarray(value) for key, value in result.arrays.items()})
    files.write_json(
        workdir / "summary.json", {"study": study.name, "seconds": seconds, "summary": _plain(result.summary)}
    )


def _share(folder: Path) -> None:
    """Gives the other processes the writer's finished stages, metrics and result; checkpoints find their own way."""
    if jax.process_count() == 1:
        return
    buffer = io.BytesIO()
    if processes.is_writer():
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("config.json", "env.json", "metrics.jsonl", "stages", "results.npz", "summary.json"):
                if (folder / name).exists():
                    archive.add(folder / name, name)
    content = processes.broadcast_bytes(buffer.getvalue())
    if not processes.is_writer():
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(folder, filter="data")


def load_result(workdir: Path) -> Result:
    """Reads the result of a finished run."""
    summary = files.read_json(workdir / "summary.json")["summary"]
    return Result(summary=summary, arrays=files.load_arrays(workdir / "results.npz"))


def choose_workdir(settings: Settings, stem: str) -> Path:
    """The folder of a run: as given, else the first free ``runs/STEM[-N]``, or the latest one on a resume."""
    if settings.workdir:
        return Path(settings.workdir).absolute()
    base = (Path("runs") / stem).absolute()
    number = 1
    while base.with_name(base.name + (f"-{number}" if number > 1 else "")).exists():
        number += 1
    number = number - 1 if settings.resume and number > 1 else number
    return base.with_name(base.name + (f"-{number}" if number > 1 else ""))


def _enter(workdir: Path, identity: dict[str, Any], *, resume: bool) -> bool:
    """Checks that the folder may be used; whether it holds a finished run, which a resume leaves as it is."""
    path = workdir / "config.json"
    if not path.exists():
        if any(entry.name != "lock" for entry in workdir.iterdir()):
            raise UsageError(
                f"--workdir={workdir}: the folder is not empty and holds no run. Choose an empty or a new one."
            )
        files.write_json(path, identity)
        return False
    before = files.read_json(path)
    if not resume:
        raise UsageError(
            f"--workdir={workdir}: holds a run of {before.get('family')}/{before.get('study')} already. "
            "Add --resume to continue it, or choose another folder."
        )
    difference = first_difference(before, identity)
    if difference:
        name, old, new = difference
        raise UsageError(
            f"--workdir={workdir}: was started with {name}={old!r}, this command has {new!r}. "
            "Use the same settings to resume it, or choose another folder."
        )
    return (workdir / "summary.json").exists()


def first_difference(before: Any, after: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name and the two values of the first entry in which two nested dicts differ; None if they are equal."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            inner = first_difference(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
            if inner:
                return inner
        return None
    before, after = (list(v) if isinstance(v, tuple) else v for v in (before, after))
    if isinstance(before, list) and isinstance(after, list):
        before, after = _lists(before), _lists(after)
    return None if before == after else (name, before, after)


class _claimed:
    """Creates the folder and holds its lock, so that no two processes write to it."""

    def __init__(self, workdir: Path) -> None:
        self.workdir = workdir

    def __enter__(self) -> None:
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._file = (self.workdir / "lock").open("w")
        except OSError as error:
            raise UsageError(
                f"--workdir={self.workdir}: cannot be written ({error.strerror}). Choose a folder that you may write."
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--workdir={self.workdir}: another process is running in it. Wait for it to end."
            ) from None

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _lists(values: Any) -> Any:
    return [_lists(value) for value in values] if isinstance(values, list | tuple) else values


def _plain(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Summary values as JSON knows them."""
    return {
        key: value.item() if isinstance(value, np.generic | np.ndarray) else value for key, value in summary.items()
    }


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Up to two metrics of the last step, averaged over seeds, to show beside the progress bar."""
    last = {key: np.mean(value[-1]) for key, value in list(values.items())[:2]}
    return {key.rsplit("/", 1)[-1]: float(value) for key, value in last.items()}
