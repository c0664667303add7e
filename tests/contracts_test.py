"""Every algorithm of the toolkit under the same laws. A new algorithm is one line in its family's list.

``JAX_ENABLE_X64=1 python -m pytest tests/contracts_test.py`` holds them to the same laws in float64. Checked gradients
are in ``differentiable_test.py``.
"""

import importlib

import pytest

from jaxrl_suite import testing

FAMILIES = ("mdp", "coupling", "reward_free", "pareto", "alignment", "lm", "moe")
ALGORITHMS = []
for _family in FAMILIES:
    try:
        ALGORITHMS += importlib.import_module(f"tests.{_family}.{_family}_contracts").ALGORITHMS
    except ModuleNotFoundError as error:
        if error.name not in (f"tests.{_family}.{_family}_contracts", f"tests.{_family}"):
            raise


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_laws(algorithm, key):
    """One test an algorithm, so that its checks share one compiled function."""
    testing.check_jit_equals_eager(algorithm, key)
    if algorithm.vmap:
        testing.check_vmap_equals_loop(algorithm, key)
    testing.check_one_trace(algorithm, key)
    testing.check_dtype_kept(algorithm, key)
