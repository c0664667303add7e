"""Runs studies, each in a process of its own, and writes one self-contained page about them.

A process of its own, because the number of devices and float64 are fixed when JAX starts.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from experiments.common.flags import Settings, UsageError
from experiments.common.run import choose_workdir
from experiments.common.study import Study, all_studies
from jaxrl_suite.io import files, plots, profiling, report

_INTRO = (
    "jaxrl-suite makes four recent papers real in JAX: reward-free exploration in linear mixture MDPs, parallel "
    "folding of mixture-of-experts models, reward weights that learn, and minimum entropy couplings with a bottleneck. "
    "Each section below was computed on this machine by the command that it shows."
)


class Outcome(NamedTuple):
    """How one study ended."""

    family: str
    study: Study
    preset: str
    seed: int
    workdir: Path
    status: str  # "done", "kept" (finished before) or "failed"
    seconds: float
    error: str | None


def main(arguments: Sequence[str]) -> int:
    """Runs the tour; returns the exit code: 0 all well, 1 a study failed, 2 bad usage."""
    options = _parse(arguments)
    try:
        selected = select(all_studies(), everything=options.all, only=options.only)
        if options.jobs < 1:
            raise UsageError(f"--jobs={options.jobs}: must be at least 1.")
        for _, study in selected:
            preset = _preset_of(study, options)
            if preset not in study.presets:
                raise UsageError(f"--preset={preset}: {study.name} has {', '.join(study.presets)}.")
        workdir = _enter(
            choose_workdir(Settings(workdir=options.workdir, resume=options.resume), "tour"), options.resume
        )
    except (UsageError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    outcomes: list[Outcome] = []
    processes: list[subprocess.Popen] = []

    def run(number: int, family: str, study: Study) -> Outcome:
        name = f"[{number}/{len(selected)}] {family}/{study.name}"
        print(f"{name}: {study.summary}", flush=True)
        preset, folder = _preset_of(study, options), workdir / family / study.name
        ended = _run(family, study, preset, options.seed, folder, processes, bars=options.jobs == 1)
        place = "     " if options.jobs == 1 else name
        reason = f": {ended.error}" if ended.error else ""
        print(f"{place} {ended.status} in {ended.seconds:.0f} s{reason}", flush=True)
        return ended

    with ThreadPoolExecutor(options.jobs) as pool:
        numbers = range(1, len(selected) + 1)
        try:
            for outcome in pool.map(run, numbers, *zip(*selected, strict=True)):
                outcomes.append(outcome)
                _write(workdir, outcomes)  # after each study, so that an interrupted tour leaves a page
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # before a free worker starts the next study
            for process in processes:
                process.terminate()
            print(f"\ninterrupted: --workdir={workdir} --resume continues", file=sys.stderr)
            return 130
    report.terminal_table([_section(outcome) for outcome in outcomes])
    print(f"{time.perf_counter() - began:.0f} s in all. Open {os.path.relpath(workdir / 'report.html')}")
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


def select(studies, *, everything: bool = False, only: str = "") -> list[tuple[str, Study]]:
    """The studies to run.

    Args:
        studies: pairs of family and study.
        everything: all studies rather than those of the default tour.
        only: comma list of ``family`` or ``family/study``; empty means no restriction.

    Raises:
        UsageError: a name in ``only`` that is no family and no study.
    """
    pairs = list(studies)
    if not only:
        return [(family, study) for family, study in pairs if everything or study.tour]
    chosen = []
    for name in only.split(","):
        named = [(family, study) for family, study in pairs if name in (family, f"{family}/{study.name}")]
        if not named:
            known = sorted({family for family, _ in pairs}) + [f"{family}/{study.name}" for family, study in pairs]
            raise UsageError(f"--only={name}: no such family or study. Known: {', '.join(known)}.")
        shown = [pair for pair in named if "/" in name or everything or pair[1].tour]
        chosen += [pair for pair in shown or named if pair not in chosen]
    return chosen


def module_of(family: str) -> str:
    """The module that launches the studies of a family."""
    return f"experiments.{family}.launch"


def command_of(family: str, study: Study, preset: str, seed: int) -> list[str]:
    """The command that repeats a study by itself."""
    words = ["python", "-m", module_of(family), f"--study={study.name}", f"--preset={preset}"]
    return words + ([f"--seed={seed}"] if seed else [])


def _preset_of(study: Study, options: argparse.Namespace) -> str:
    """The preset asked for; else smoke for all studies, and a preset of its own for the tour where a study has one."""
    return options.preset or ("smoke" if options.all else "tour" if "tour" in study.presets else "default")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tour",
        description="Runs one study of each family and writes WORKDIR/report.html, a page with a figure, the numbers "
        "and the exact command of each. A few minutes on two cores.",
        epilog="Example: python -m experiments.tour --only=coupling,pareto --preset=smoke",
    )
    parser.add_argument("--all", action="store_true", help="every study of the toolkit, at smoke size unless --preset")
    parser.add_argument("--only", default="", help="comma list of family or family/study")
    parser.add_argument("--preset", default="", help="smoke, default or paper; default without --all")
    parser.add_argument("--workdir", default="", help="folder to write; by default the first free runs/tour[-N]")
    parser.add_argument("--resume", action="store_true", help="continue: a finished study is not run again")
    parser.add_argument("--jobs", type=int, default=1, help="studies at once; above 1 without progress bars")
    parser.add_argument("--seed", type=int, default=0, help="base seed of every study")
    parser.add_argument("--helpshort", action="help", help="the same as --help, as the launchers have it")
    return parser.parse_args(arguments)


def _enter(workdir: Path, resume: bool) -> Path:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"--workdir={workdir}: cannot be written ({error.strerror}). Choose a folder that you may write."
        ) from None
    if any(workdir.iterdir()) and not resume:
        raise UsageError(
            f"--workdir={workdir}: the folder is not empty. Add --resume to continue the tour in it, or choose another."
        )
    if resume and any(workdir.iterdir()) and not (workdir / "tour.json").exists():
        raise UsageError(f"--workdir={workdir}: holds no tour to resume. Choose an empty or a new folder.")
    files.write_json(workdir / "tour.json", {"environment": profiling.environment()})
    return workdir


def _run(family: str, study: Study, preset: str, seed: int, workdir: Path, processes: list, *, bars: bool) -> Outcome:
    finished = (workdir / "summary.json").exists()
    resume = ["--resume"] if (workdir / "config.json").exists() else []
    words = [*command_of(family, study, preset, seed), f"--workdir={workdir}", *resume]
    began = time.perf_counter()
    code, tail = _call([sys.executable, *words[1:]], processes, bars=bars)
    seconds = time.perf_counter() - began
    if code == 0:
        seconds = float(files.read_json(workdir / "summary.json")["seconds"]) if finished else seconds
        return Outcome(family, study, preset, seed, workdir, "kept" if finished else "done", seconds, None)
    return Outcome(family, study, preset, seed, workdir, "failed", seconds, tail or f"exit code {code}")


def _call(words: list[str], processes: list, *, bars: bool) -> tuple[int, str]:
    """Runs a command, adds its process to ``processes``, passes its progress bars on if asked, and keeps the end of its
    standard error for the page."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # One compilation cache for the whole tour, kept beside the user's other caches.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxrl-suite" / "xla"))
    terminal = bars and sys.stderr.isatty()
    if terminal:  # rich draws into a pipe only when told that a terminal is behind it
        columns = os.get_terminal_size(2).columns or 100
        environment |= {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "COLUMNS": str(columns)}
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        processes.append(process)
        tail = b""
        while piece := os.read(process.stderr.fileno(), 4096):
            tail = (tail + piece)[-8192:]
            if terminal:
                sys.stderr.buffer.write(piece)
                sys.stderr.buffer.flush()
        code = process.wait()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", tail.decode(errors="replace")).replace("\r", "\n")
    return code, "\n".join(line for line in text.splitlines() if line.strip())


def _section(outcome: Outcome) -> report.Section:
    """What the page and the table say of a study."""
    numbers, figures, study = {}, {}, outcome.study
    if outcome.error is None:
        numbers = files.read_json(outcome.workdir / "summary.json")["summary"]
        for path in sorted((outcome.workdir / "plots").glob("*.svg")):
            figures[path.stem.replace("_", " ")] = plots.file_to_data_uri(path)
    return report.Section(
        title=f"{outcome.family} / {study.name}",
        summary=study.summary,
        command=shlex.join(command_of(outcome.family, study, outcome.preset, outcome.seed)),
        status="failed" if outcome.error else "finished",
        seconds=outcome.seconds,
        figures=figures,
        numbers=numbers,
        error=outcome.error,
        headline=study.headline,
    )


def _write(workdir: Path, outcomes: Sequence[Outcome]) -> None:
    sections = [_section(outcome) for outcome in outcomes]
    environment = files.read_json(workdir / "tour.json")["environment"]
    report.write_report(workdir / "report.html", "jaxrl-suite: a tour", sections, intro=_INTRO, environment=environment)
