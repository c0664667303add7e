"""K marginals, the large kernel, integer masses, pivots and certificates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.coupling import (
    certified_coupling,
    coupling_bounds_multi,
    greedy_coupling,
    greedy_coupling_multi,
    integer_masses,
    polished_coupling,
)
from tests.reference import coupling_greedy as oracle
from tests.reference.coupling_exact import exact_entropies


def test_three_marginals(x64):
    """Properties 1, 3, 5 and 8 for K = 3: the cells of a NumPy loop, the support, the guarantee."""
    rng = np.random.default_rng(0)
    marginals = rng.dirichlet(np.ones(5), size=(40, 3))
    couplings = jax.jit(jax.vmap(greedy_coupling_multi))(marginals)
    joints = np.asarray(jax.vmap(lambda c: c.dense((5, 5, 5)))(couplings))
    for joint, rows in zip(joints, marginals):
        np.testing.assert_allclose(joint, oracle.dense(oracle.argmax_greedy_multi(rows), (5, 5, 5)), atol=1e-14)
    assert couplings.weights.shape == (40, 3 * 5 - 3 + 1)
    profiles = np.asarray(jax.jit(jax.vmap(coupling_bounds_multi))(marginals).profile)
    entropies = np.asarray(couplings.entropy)
    assert (entropies >= profiles).all()
    assert (entropies <= profiles + (1 + math.log2(math.e)) / 2).all()


def test_two_marginals_are_the_pair_kernel():
    rng = np.random.default_rng(1)
    marginals = rng.dirichlet(np.ones(6), size=2).astype(np.float32)
    multi, pair = greedy_coupling_multi(marginals), greedy_coupling(*marginals)
    np.testing.assert_array_equal(multi.indices, pair.indices)
    np.testing.assert_array_equal(multi.weights, pair.weights)


def test_counts_of_three_marginals_are_exact():
    rng = np.random.default_rng(2)
    counts = np.stack([rng.multinomial(1 << 20, rng.dirichlet(np.ones(4))) for _ in range(3)]).astype(np.int32)
    joint = np.asarray(greedy_coupling_multi(jnp.asarray(counts)).dense((4, 4, 4)))
    for axis, row in enumerate(counts):
        other = tuple(a for a in range(3) if a != axis)
        np.testing.assert_array_equal(joint.sum(other), row)


@pytest.mark.parametrize("sizes", [(120, 90), (600, 1100)])
def test_large_kernel_is_the_plain_kernel(sizes):
    """Property 9: rank rounds take the same steps in the same order: skewed, even, equal masses, absent symbols."""
    rng = np.random.default_rng(3)
    p, q = (
        np.concatenate(
            [rng.dirichlet(np.full(n, concentration), size=2) for concentration in (0.3, 3.0)]
            + [rng.multinomial(2 * n, np.full(n, 1 / n), size=1) / (2 * n)]
        )
        for n in sizes
    )
    p, q = p.astype(np.float32), q.astype(np.float32)
    plain, large = (
        jax.jit(jax.vmap(lambda p, q, k=kernel: greedy_coupling(p, q, kernel=k)))(p, q) for kernel in ("plain", "large")
    )
    np.testing.assert_array_equal(plain.weights, large.weights)
    np.testing.assert_array_equal(plain.indices[:4], large.indices[:4])  # among equal masses the choice is free
    counts = [integer_masses(x[0]) for x in (p, q)]
    integers = greedy_coupling(*counts, kernel="large").dense(sizes)
    np.testing.assert_array_equal(integers.sum(1), counts[0])
    np.testing.assert_array_equal(integers.sum(0), counts[1])


def test_large_kernel_survives_its_worst_case():
    """Equal masses against one: a round a step, ties throughout."""
    coupling = greedy_coupling(jnp.full((64,), 1 / 64), jnp.array([1.0]), kernel="large")
    assert float(coupling.entropy) == pytest.approx(6.0, abs=1e-5)


def test_integer_masses():
    """Largest remainders: exact total, nearest counts, nothing where there is no mass."""
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(50)).astype(np.float32)
    p[[3, 7]] = 0
    p /= p.sum()
    counts = np.asarray(integer_masses(jnp.asarray(p)))
    assert counts.dtype == np.int32
    assert counts.sum() == 1 << 30
    assert (counts[[3, 7]] == 0).all()
    assert np.abs(counts / 2**30 - p / p.astype(float).sum()).max() < 1e-7
    small = np.asarray(jax.jit(lambda p: integer_masses(p, total_bits=4))(jnp.array([0.34, 0.33, 0.33])))
    assert sorted(small) == [5, 5, 6]


def test_pivots_and_certificate(x64):
    """Mean excess over the optimum at most 0.002 bit on 1,000 random pairs of 2-4 states; the certificate holds."""
    rng = np.random.default_rng(5)
    p, q = np.zeros((1000, 4)), np.zeros((1000, 4))
    for row in range(1000):
        n, m = rng.integers(2, 5, size=2)
        p[row, :n], q[row, :m] = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))
    optimum = exact_entropies(p, q)
    certificate = jax.jit(jax.vmap(lambda p, q: certified_coupling(p, q, polish=True)))(p, q)
    excess = np.asarray(certificate.entropy) - optimum
    assert excess.min() > -1e-9
    assert excess.mean() <= 0.002
    greedy = np.asarray(jax.jit(jax.vmap(lambda p, q: greedy_coupling(p, q, rule="best").entropy))(p, q))
    assert (np.asarray(certificate.entropy) <= greedy + 1e-9).all()
    assert (np.asarray(certificate.entropy) < greedy - 1e-6).any()
    assert (np.asarray(certificate.bound) <= optimum + 1e-9).all()
    np.testing.assert_allclose(certificate.gap, np.asarray(certificate.entropy) - certificate.bound, atol=1e-9)
    joint = np.asarray(jax.vmap(lambda c: c.dense((4, 4)))(certificate.coupling))
    np.testing.assert_allclose(joint.sum(2), p, atol=1e-12)
    np.testing.assert_allclose(joint.sum(1), q, atol=1e-12)


def test_pivots_improve_the_zero_rule(x64):
    """From the couplings of the rule "zero", no local optima, pivots lower the entropy, and never raise it."""
    rng = np.random.default_rng(6)
    p, q = rng.dirichlet(np.ones(4), size=60), rng.dirichlet(np.ones(4), size=60)

    @jax.jit
    @jax.vmap
    def solve(p, q):
        start = greedy_coupling(p, q, rule="zero").entropy
        return start, polished_coupling(p, q, rule="zero", max_pivots=32).entropy

    start, polished = (np.asarray(x) for x in solve(p, q))
    assert (polished <= start + 1e-12).all()
    assert (polished < start - 1e-6).mean() > 0.05
