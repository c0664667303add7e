"""Time, memory and the description of the machine; compile and run time apart."""

import contextlib
import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds of one function.

    Attributes:
        compile_seconds: tracing, lowering and compilation; a hit of the persistent cache makes it small.
        run_seconds: median of the timed runs.
        min_seconds: fastest run.
        max_seconds: slowest run.
        repeats: number of timed runs; one more before them is not counted.
    """

    compile_seconds: float
    run_seconds: float
    min_seconds: float
    max_seconds: float
    repeats: int


def compile_and_run_seconds(function: Callable[..., Any], *args: Any, repeats: int = 5) -> Timing:
    """Times a function of JAX arrays, compilation and runs apart.

    Args:
        function: pure; jitted here unless it already is.
        *args: its arguments, pytrees of arrays. A jitted function with static arguments gets them bound first
            (``functools.partial``), since a compiled program takes none.
        repeats: timed runs, at least 1.

    Returns:
        The seconds.

    Raises:
        ValueError: repeats is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats!r}: must be at least 1.")
    jitted: Any = function if hasattr(function, "lower") else jax.jit(function)
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))  # the first run also pays for memory and thread pools
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    return Timing(compile_seconds, statistics.median(seconds), min(seconds), max(seconds), repeats)


@contextlib.contextmanager
def trace(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Records a profile of the block into ``folder``, readable by Perfetto, XProf and TensorBoard."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with jax.profiler.trace(str(folder)):
        yield folder


def peak_memory_bytes() -> int:
    """Largest memory in use so far: the sum over local accelerators, or this process's resident memory on a CPU."""
    statistics_ = [device.memory_stats() for device in jax.local_devices()]
    peaks = [entry["peak_bytes_in_use"] for entry in statistics_ if entry and "peak_bytes_in_use" in entry]
    if peaks:
        return sum(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_PACKAGES = ("jaxrl-suite", "jax", "jaxlib", "flax", "optax", "chex", "distrax", "orbax-checkpoint", "numpy")


def environment() -> dict[str, Any]:
    """What somebody needs to know to repeat a run; no folders, no user or host names.

    Returns:
        A dict for JSON: commit (None outside git) and whether the tree had changes, versions of Python and packages
        (None where one is absent), platform, backend, devices, number of processors, float64 or not, and the command
        with folders cut from its first word.
    """
    devices = jax.devices()
    kinds = [device.device_kind for device in devices]
    return {
        **_git(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "platform": f"{platform.system()} {platform.machine()}",
        "backend": jax.default_backend(),
        "devices": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "x64": bool(jax.config.read("jax_enable_x64")),
        "argv": [_without_folder(argument) for argument in sys.argv],
    }


def _without_folder(argument: str) -> str:
    name, equals, value = argument.rpartition("=")
    return name + equals + (Path(value).name if os.path.isabs(value) else value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    """Commit of the checkout that this file lies in; an installed copy has none."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return {"commit": None, "dirty": None}
    try:
        commit = _run_git(here, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_run_git(here, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _run_git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
