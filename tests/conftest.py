import gc
import importlib.metadata
import os
import tempfile
from pathlib import Path

# Before JAX starts. Tests compile much and run little: JAX's own switch for that takes a fifth of the time off, and
# XLA's older way of emitting fusions, which jax 0.12 no longer has, two fifths of the rest. The tour's studies and the
# float64 contracts (.ci/run) are compiled as users' programs are.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and importlib.metadata.version("jax").startswith("0.10."):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"
# One persistent compilation cache for all workers and later runs, and eight virtual CPU devices for the multi-device
# tests. No cache on jax 0.12, which was seen to abort while it wrote a folded program into it.
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 12):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".cache" / "xla"))
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
# XLA's CPU pool has a thread a device, and a collective that waits holds one: two at once can wait for each other for
# ever (seen once in a pipeline on two cores). More threads than collectives in flight rule that out.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault("MPLBACKEND", "Agg")
# Notebooks (run by nbmake, in kernels that inherit this): small, and away from the checkout.
os.environ.setdefault("JAXRL_PRESET", "smoke")
os.environ.setdefault("JAXRL_ONLY", "pareto/deep_sea_treasure")
os.environ.setdefault("JAXRL_WORKDIR", os.path.join(tempfile.mkdtemp(prefix="jaxrl-notebook-"), "run"))

import jax
import pytest
from absl import flags

MOST_MAPS = 30_000  # of 65,530, the usual limit of Linux

if not flags.FLAGS.is_parsed():  # pytest does not parse absl flags, and absl.testing reads them
    flags.FLAGS.mark_as_parsed()


def pytest_collection_finish():
    """Tracing makes many small objects that live long: looking for garbage among them took 6 % of the time."""
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_runtest_teardown(item, nextitem):
    """Every compiled program maps memory: forty tests of ``together`` an eighth of what Linux lets a process map. A
    worker that had run a thousand crashed in XLA's compiler (jax 0.12). Between two files programs are let go in time.
    """
    maps = Path("/proc/self/maps")
    if (nextitem is not None and nextitem.path == item.path) or not maps.exists():
        return
    if maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if "slow" in item.keywords]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Float64 for one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def optimised():
    """Compiles as users' programs are: for tests that compute much, and for a search of many steps that rounding leads
    elsewhere than its oracle (seen on jax 0.12, unoptimised)."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1")
