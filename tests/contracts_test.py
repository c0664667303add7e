"""Every algorithm of the toolkit under the same laws. A new algorithm is one line in its family's list.

``JAX_ENABLE_X64=1 python -m pytest tests/contracts_test.py`` holds them to the same laws in float64. Checked gradients
are in ``differentiable_test.py``.
"""

import importlib

import pytest

from jaxrl_suite import testing
from jaxrl_suite.io import checkpoint

FAMILIES = ("mdp", "coupling", "reward_free", "pareto", "alignment", "lm", "moe")
ALGORITHMS, LOOPS = [], []
for _family in FAMILIES:
    try:
        _contracts = importlib.import_module(f"tests.{_family}.{_family}_contracts")
    except ModuleNotFoundError as error:
        if error.name not in (f"tests.{_family}.{_family}_contracts", f"tests.{_family}"):
            raise
        continue
    ALGORITHMS += _contracts.ALGORITHMS
    LOOPS += getattr(_contracts, "LOOPS", [])


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_laws(algorithm, key):
    """One test an algorithm, so that its checks share one compiled function."""
    testing.check_jit_equals_eager(algorithm, key)
    if algorithm.vmap:
        testing.check_vmap_equals_loop(algorithm, key)
    testing.check_one_trace(algorithm, key)
    testing.check_dtype_kept(algorithm, key)


def _save_restore(state, path):
    checkpoint.save_checkpoint(path, 1, state)
    return checkpoint.restore_checkpoint(path, state)[0]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_loops_resume(loop, key):
    """Chunked equals whole, and saved, restored and continued equals never stopped: bit for bit."""
    state = loop.init(key)
    testing.check_chunked_equals_whole(loop.advance, state, num_steps=4, chunks=(2, 2))
    half = loop.advance(state, 0, 2)
    testing.check_save_restore(half, lambda s: loop.advance(s, 2, 2), _save_restore)


def test_there_are_loops_of_several_families():
    assert {loop.name.split(".")[0] for loop in LOOPS} >= {"reward_free", "pareto", "lm"}
