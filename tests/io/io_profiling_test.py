"""Timing and the description of the machine."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.io import profiling


def test_compile_and_run_time_are_apart():
    def slow_to_trace(x):
        time.sleep(0.3)  # runs while tracing only
        jax.debug.callback(lambda _: time.sleep(0.02), x)
        return x + 1

    timing = profiling.compile_and_run_seconds(slow_to_trace, jnp.zeros(3), repeats=3)
    jax.effects_barrier()
    assert timing.compile_seconds >= 0.3 > timing.max_seconds
    assert 0 <= timing.min_seconds <= timing.run_seconds <= timing.max_seconds and timing.repeats == 3


def test_runs_are_waited_for():
    """Timing only the dispatch would make the larger product look as cheap as the small one."""
    product = jax.jit(lambda x: x @ x @ x @ x)
    small = profiling.compile_and_run_seconds(product, jnp.ones((8, 8)), repeats=3)
    large = profiling.compile_and_run_seconds(product, jnp.ones((700, 700)), repeats=3)
    assert large.min_seconds > 5 * small.min_seconds


def test_takes_pytrees_and_jitted_functions_and_refuses_no_repeats():
    timing = profiling.compile_and_run_seconds(jax.jit(lambda tree: tree["a"][0] * 2), {"a": (jnp.ones(2),)}, repeats=1)
    assert timing.run_seconds == timing.min_seconds == timing.max_seconds
    with pytest.raises(ValueError, match="repeats=0: must be at least 1"):
        profiling.compile_and_run_seconds(lambda x: x, 1.0, repeats=0)


def test_trace_writes_a_profile(tmp_path):
    with profiling.trace(tmp_path / "profile") as folder:
        jnp.ones(3).block_until_ready()
    assert any(path.stat().st_size for path in folder.rglob("*.xplane.pb"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with what Linux says")
def test_peak_memory_is_what_the_system_says():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    assert profiling.peak_memory_bytes() == pytest.approx(int(line.split()[1]) * 1024, rel=0.02)


def test_environment_says_enough_and_not_too_much(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/launch.py", "--seed=0", "--workdir=/some/where/runs/x", "a=b"])
    found = profiling.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["argv"] == ["launch.py", "--seed=0", "--workdir=x", "a=b"]
    assert found["versions"]["jax"] == jax.__version__ and found["versions"]["numpy"] == np.__version__
    assert {"python", "jaxlib", "flax", "optax", "chex", "distrax"} <= set(found["versions"])
    assert sum(found["devices"].values()) == jax.device_count()
    text = json.dumps(found)
    assert str(Path.home()) not in text.replace('"/root"', "") and "somebody" not in text
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert found["commit"] == head.stdout.strip() and isinstance(found["dirty"], bool)


def test_environment_outside_git(monkeypatch, tmp_path):
    monkeypatch.setattr(profiling, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    assert profiling.environment()["commit"] is None
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))  # no git program
    assert profiling.environment()["dirty"] is None
