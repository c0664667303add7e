"""Lower bounds on joint entropies against loops over their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.coupling import coupling_bounds, coupling_bounds_multi
from tests.reference import coupling_bounds as oracle


@pytest.mark.parametrize("concentration", [0.1, 1.0, 10.0])
def test_agrees_with_the_definitions(concentration, x64):
    """Reference: four bounds, skewed to flat marginals."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(6, concentration), size=20)
    q = rng.dirichlet(np.full(5, concentration), size=20)
    bounds = jax.jit(jax.vmap(coupling_bounds))(p, q)
    for row, laws in enumerate(zip(p, q)):
        expected = (oracle.majorization(*laws), oracle.profile(*laws), oracle.majorize_profile(*laws)[0])
        np.testing.assert_allclose([bound[row] for bound in bounds[1:]], expected, atol=1e-9)


def test_number_of_states_of_the_majorize_profile_bound():
    """The scan is one step longer than all marginals together; the loop never needs more."""
    rng = np.random.default_rng(1)
    for size in ((2, 2), (5, 3), (16, 16), (1, 7)):
        for concentration in (0.1, 1.0, 100.0):
            for _ in range(30):
                laws = [rng.dirichlet(np.full(n, concentration)) for n in size]
                assert oracle.majorize_profile(*laws)[1] <= sum(size) + 1


def test_three_marginals_and_padding(x64):
    """Each bound over three marginals is at least that over two of them; zeros change nothing."""
    rng = np.random.default_rng(2)
    marginals = rng.dirichlet(np.ones(5), size=3)
    three, two = coupling_bounds_multi(marginals), coupling_bounds_multi(marginals[:2])
    assert all(float(a) >= float(b) - 1e-12 for a, b in zip(three, two))
    expected = oracle.majorize_profile(*marginals)[0]
    assert float(three.majorize_profile) == pytest.approx(expected, abs=1e-9)
    padded = coupling_bounds_multi(np.pad(marginals[:2], ((0, 0), (0, 3))))
    np.testing.assert_allclose([float(b) for b in padded], [float(b) for b in two], atol=1e-9)


def test_bad_input():
    with pytest.raises(ValueError, match="negative"):
        coupling_bounds(jnp.array([1.5, -0.5]), jnp.array([0.5, 0.5]))
    with pytest.raises(ValueError, match=r"marginals\[1\]"):
        coupling_bounds_multi(jnp.array([[0.5, 0.5], [0.9, 0.0]]))
    bounds = jax.jit(coupling_bounds)(jnp.array([1.5, -0.5]), jnp.array([0.5, 0.5]))
    assert all(bool(jnp.isnan(bound)) for bound in bounds)
