import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import distributions
from jaxrl_suite.testing import assert_close


def test_entropy_of_known_laws():
    assert float(distributions.entropy(jnp.array([0.5, 0.25, 0.25, 0.0]))) == 1.5
    assert float(distributions.entropy(jnp.full(8, 1 / 8))) == 3.0
    assert float(distributions.entropy(jnp.array([1.0, 0.0]))) == 0.0
    assert float(distributions.binary_entropy(jnp.array(0.5))) == 1.0


def test_entropy_has_a_finite_gradient_at_zero_mass():
    gradient = jax.grad(distributions.entropy)(jnp.array([0.5, 0.5, 0.0]))
    expected = -(np.log2(0.5) + 1 / np.log(2))
    assert_close(gradient, jnp.array([expected, expected, 0.0]), "reference")


def test_information_of_a_joint_law_matches_the_definition(key):
    joint = jax.random.dirichlet(key, jnp.ones(12)).reshape(3, 4)
    p, q = np.asarray(joint).sum(1), np.asarray(joint).sum(0)
    direct = float(np.sum(joint * np.log2(joint / (p[:, None] * q[None, :]))))
    assert float(distributions.mutual_information(joint)) == pytest.approx(direct, abs=2e-6)
    chain = distributions.entropy(jnp.asarray(p)) - distributions.mutual_information(joint)
    assert float(distributions.conditional_entropy(joint)) == pytest.approx(float(chain), abs=2e-6)


def test_information_is_zero_when_independent_and_entropy_when_equal():
    p = jnp.array([0.7, 0.2, 0.1])
    assert float(distributions.mutual_information(jnp.outer(p, p))) == pytest.approx(0, abs=1e-6)
    assert float(distributions.mutual_information(jnp.diag(p))) == pytest.approx(float(distributions.entropy(p)))


def test_kl_agrees_with_distrax_and_is_infinite_outside_the_support():
    p, q = jnp.array([0.6, 0.3, 0.1]), jnp.array([0.2, 0.5, 0.3])
    by_distrax = distributions.categorical(probs=p).kl_divergence(distributions.categorical(probs=q)) / jnp.log(2.0)
    assert_close(distributions.kl_divergence(p, q), by_distrax, "reference")
    assert jnp.isinf(distributions.kl_divergence(jnp.array([0.5, 0.5]), jnp.array([1.0, 0.0])))
    assert float(distributions.kl_divergence(jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5]))) == 1.0


def test_not_a_number_is_not_taken_for_zero():
    """The mark of what is no law must not come out as a law of no entropy."""
    law, bad = jnp.array([0.5, 0.5]), jnp.array([0.5, jnp.nan])
    assert jnp.isnan(distributions.entropy(bad)) and jnp.isnan(distributions.mutual_information(jnp.diag(bad)))
    assert jnp.isnan(distributions.kl_divergence(bad, law))
    assert float(distributions.entropy(jnp.array([1.0, -1e-9]))) == 0  # rounding below zero is no mass
