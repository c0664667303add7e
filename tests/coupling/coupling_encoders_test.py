"""Stochastic refinement, exact search, quantisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.coupling import ebim_exact, ebim_greedy, ebim_refine, partitions, quantize_lpt, quantize_uniform
from jaxrl_suite.distributions import mutual_information
from tests.reference import coupling_ebim as oracle
from tests.reference.coupling_greedy import entropy


def test_partitions():
    """Property 16: Bell numbers; the same strings as the recursive definition."""
    assert [len(partitions(n)) for n in range(1, 10)] == [1, 2, 5, 15, 52, 203, 877, 4140, 21147]
    assert {tuple(row) for row in partitions(5).tolist()} == set(oracle.partitions(5))
    with pytest.raises(ValueError, match="explodes"):
        partitions(10)


def test_exact_search(x64):
    """Property 16: the best of all partitions; at least the greedy map."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(6), size=8)
    rates = np.array([0.5, 1.2, 2.0])
    every = jax.vmap(jax.vmap(ebim_exact, in_axes=(None, 0)), in_axes=(0, None))
    exact = np.asarray(jax.jit(every)(p, rates).information)
    for row, law in enumerate(p):
        values = oracle.partition_entropies(law)
        np.testing.assert_allclose(exact[row], [values[values <= r + 1e-12].max() for r in rates], atol=1e-12)
        greedy = [float(ebim_greedy(law, r).information) for r in rates]
        assert (exact[row] >= np.array(greedy) - 1e-12).all()


def test_envelope_of_the_worked_example(x64):
    """Property 15: the seven values of brute force at [0.7, 0.2, 0.1], and I = R at the five partitions."""
    p, bases = jnp.array([0.7, 0.2, 0.1]), jnp.asarray(partitions(3))
    refine = jax.jit(jax.vmap(lambda rate: ebim_refine(p, rate, bases)))
    rates = jnp.array([0.2, 0.4, 0.6, 0.7, 0.8, 0.95, 1.05])
    expected = [0.11054, 0.32659, 0.51051, 0.63977, 0.75284, 0.89958, 0.95733]
    np.testing.assert_allclose(refine(rates).information, expected, atol=1e-5)
    touching = jnp.array([0.0, entropy([0.9, 0.1]), entropy([0.8, 0.2]), entropy([0.7, 0.3]), entropy([0.7, 0.2, 0.1])])
    # A map whose entropy is the rate counts only up to rounding, where the left curve is vertical: look just above.
    np.testing.assert_allclose(refine(touching + 1e-11).information, touching, atol=1e-9)


def test_curves_are_what_their_joints_say(x64):
    """Properties 14 and 15: values recomputed from the joint; rate kept; no worse than greedy; monotone."""
    rng = np.random.default_rng(1)
    p = np.concatenate([rng.dirichlet(np.ones(6), size=6), np.array([[0.5, 0, 0.3, 0, 0.2, 0]])])
    rates = np.linspace(0.0, 2.6, 27)
    refine = jax.vmap(jax.vmap(ebim_refine, in_axes=(None, 0)), in_axes=(0, None))
    refined = jax.jit(refine)(p, rates)
    joints = jax.vmap(lambda law, row: jax.vmap(lambda encoder: encoder.joint(law))(row))(p, refined)
    assert float(joints.min()) >= -1e-12
    np.testing.assert_allclose(joints.sum(-1), np.broadcast_to(p[:, None], joints.shape[:-1]), atol=1e-12)
    joints = jnp.maximum(joints, 0)
    np.testing.assert_allclose(mutual_information(joints), refined.information, atol=1e-9)
    codes = np.asarray(joints.sum(2))
    np.testing.assert_allclose([[entropy(c) for c in row] for row in codes], refined.entropy, atol=1e-9)
    information = np.asarray(refined.information)
    greedy = jax.jit(jax.vmap(jax.vmap(ebim_greedy, in_axes=(None, 0)), in_axes=(0, None)))(p, rates)
    assert (information >= np.asarray(greedy.information) - 1e-9).all()
    assert (information > np.asarray(greedy.information) + 1e-3).mean() > 0.5
    assert (information <= rates + 1e-9).all()
    assert (np.asarray(refined.entropy) <= rates + 1e-9).all()
    assert (np.diff(information, axis=1) >= -1e-9).all()


def test_envelope_over_all_partitions_is_continuous(x64):
    """Property 14: with every map as a base the information does not jump."""
    p, bases = jnp.array([0.4, 0.3, 0.2, 0.1]), jnp.asarray(partitions(4))
    refine = jax.jit(jax.vmap(lambda rate: ebim_refine(p, rate, bases).information))
    rates = np.linspace(0.0, 1.84, 300)
    steps = np.abs(np.asarray(refine(rates + 1e-7)) - np.asarray(refine(rates)))
    assert steps.max() < 2e-5  # left curves are vertical at their base, so the step is not O(1e-7)


def test_quantisers(x64):
    """Bins by hand; rates kept; bin packing within 4/3 of even."""
    p = np.array([0.05, 0.35, 0.1, 0.3, 0.2])
    assert quantize_uniform(p, 1.0).labels.tolist() == [0, 0, 0, 1, 1]
    assert quantize_uniform(p, 1.0, adaptive=True).labels.tolist() == [0, 0, 0, 1, 1]
    assert quantize_uniform(p, 1.6).labels.tolist() == [0, 0, 1, 1, 2]
    assert quantize_lpt(p, 1.0).labels.tolist() == [0, 0, 0, 1, 1]
    assert quantize_uniform(p, 2.999).labels.tolist() == quantize_uniform(p, 50.0).labels.tolist() == [0, 1, 2, 3, 4]
    law = np.random.default_rng(2).dirichlet(np.ones(40))
    for rate in (0.0, 1.0, 2.0, 3.3):
        for encoder in (
            quantize_uniform(law, rate),
            quantize_uniform(law, rate, adaptive=True),
            quantize_lpt(law, rate),
        ):
            assert float(encoder.entropy) <= rate + 1e-9
            assert float(jnp.sum(encoder.code)) == pytest.approx(1.0)
    assert float(quantize_lpt(law, 2.0).code.max()) <= 4 / 3 / 4
    belief = np.zeros(40)
    belief[10:14] = 0.25
    assert float(quantize_uniform(belief, 2.0).entropy) <= 1.0  # fixed bins of ten cannot tell them apart
    assert float(quantize_uniform(belief, 2.0, adaptive=True).entropy) == pytest.approx(2.0)
