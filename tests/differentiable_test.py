"""The differentiable kernels: grad, jvp and vmap(grad) against central differences in float64.

Linear mixture regression, Pareto weighting and entropy coupling were asked for as differentiable kernels; the names
below must be among what is checked, whatever else the families list.
"""

import pytest

from jaxrl_suite import testing
from tests.contracts_test import ALGORITHMS

DIFFERENTIABLE = {algorithm.name: algorithm for algorithm in ALGORITHMS if algorithm.differentiable}
REQUIRED = (
    "reward_free.weighted_ridge",
    "pareto.hypervolume",
    "coupling.greedy_coupling",
    "coupling.ebim_greedy",
    "coupling.ebim_refine",
    "coupling.mecb",
    "coupling.soft_coupling",
)


@pytest.mark.parametrize("name", REQUIRED)
def test_the_kernels_that_were_asked_for_are_checked(name):
    assert any(listed.startswith(name) for listed in DIFFERENTIABLE), f"{name} is not among {sorted(DIFFERENTIABLE)}"


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_derivatives_equal_finite_differences(name, key, x64):
    testing.check_gradients(DIFFERENTIABLE[name], key)
