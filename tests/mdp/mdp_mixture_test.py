import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import mdp as m


def small_mixture(**changes):
    generator = np.random.default_rng(0)
    kernels = generator.dirichlet(np.ones(3), size=(2, 4, 2))  # [D, S, A, N]
    successors = np.array(
        [[[0, 1, 2], [1, 2, 3]], [[3, 2, 0], [0, 1, 3]], [[0, 1, 2], [1, 2, 3]], [[3, 0, 1], [2, 3, 0]]]
    )
    arguments = {"features": np.moveaxis(kernels, 0, -1), "successors": successors, "theta": np.array([0.3, 0.7])}
    return m.linear_mixture(**(arguments | changes))


def test_integrated_features_give_the_mean_of_any_function(x64, key):
    """Property 3: phi_f . theta* = P f, rows of the kernel are distributions."""
    model = small_mixture()
    np.testing.assert_allclose(model.kernel().sum(-1), 1.0)
    values = jax.random.uniform(key, (4,))
    expected = m.expected_value(model.tabular(jnp.zeros((4, 2))), values)
    np.testing.assert_allclose(m.integrated_features(model, values) @ model.theta, expected, atol=1e-14)


def test_normalisation_is_exact_on_all_vertices(x64):
    """Property 3: the largest ||phi_f|| over all f into {0, 1} is 1; theta absorbs the factor."""
    model, raw = small_mixture(), small_mixture(normalise=False)
    norms = [
        np.linalg.norm(m.integrated_features(model, jnp.array(f, float)), axis=-1).max()
        for f in itertools.product((0, 1), repeat=4)
    ]
    np.testing.assert_allclose(max(norms), 1.0, atol=1e-12)
    np.testing.assert_allclose(model.kernel(), raw.kernel(), atol=1e-14)


def test_bound_by_parts_is_sufficient():
    features = np.random.default_rng(1).normal(size=(2, 2, 13, 3))
    subsets = np.random.default_rng(2).integers(0, 2, size=(200, 13))
    norms = np.linalg.norm(np.einsum("vj,sajd->vsad", subsets, features), axis=-1)
    assert m.feature_bound(features) >= norms.max()


def test_simulation_visits_successors_at_their_frequencies(x64, key):
    model = small_mixture()
    policy = jnp.zeros((1, 4), jnp.int32)
    states, actions = jax.jit(jax.vmap(lambda k: m.simulate(model, k, policy)))(jax.random.split(key, 20_000))
    frequency = np.bincount(np.array(states[:, 1]), minlength=4)[:3] / 20_000
    np.testing.assert_allclose(frequency, model.kernel()[0, 0], atol=0.015)  # four standard errors
    assert np.all(np.array(actions) == 0)


def test_errors_name_the_row():
    with pytest.raises(ValueError, match=r"theta: kernel\[0, 0\].*sums to 0\.8"):
        small_mixture(theta=np.array([0.3, 0.5]))
    with pytest.raises(ValueError, match="nominal: kernel"):
        small_mixture(nominal=np.array([1.0, 1.0]))
    with pytest.raises(ValueError, match="start=9"):
        small_mixture(start=9)
    with pytest.raises(ValueError, match="listed twice"):
        small_mixture(successors=np.zeros((4, 2, 3), int))
