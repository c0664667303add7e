import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.reward_free import moment_weights, regression, weighted_ridge
from jaxrl_suite.testing import Algorithm, check_gradients
from tests.reference import reward_free_regression as oracle


def data(key, samples=20, dimension=4):
    keys = jax.random.split(key, 5)
    return (
        jax.random.normal(keys[0], (samples, dimension)),
        jax.random.uniform(keys[1], (samples,)),
        jax.random.uniform(keys[2], (samples,), minval=0.1, maxval=3.0),
        jax.random.uniform(keys[3], (), minval=0.5, maxval=2.0),
        jax.random.normal(keys[4], (dimension,)),
    )


def test_ridge_by_hand():
    """One sample x = 1, y = 3, w = 2, ridge 1, centre 1: (1 + 2 * 3) / (1 + 2) = 7/3."""
    one = jnp.ones(1)
    np.testing.assert_allclose(weighted_ridge(one[:, None], 3 * one, 2 * one, 1.0, one), [7 / 3], rtol=1e-6)
    np.testing.assert_allclose(weighted_ridge(one[:, None], 3 * one, 2 * one, 1.0), [2.0], rtol=1e-6)


def test_stream_of_updates_equals_one_solve(x64, key):
    """Property 1: rank-1 updates, batch sums and the closed form agree to 1e-10, for changing weights and ridges."""
    for seed in jax.random.split(key, 3):
        features, targets, weights, ridge, center = data(seed)
        expected = oracle.weighted_ridge(*map(np.array, (features, targets, weights, ridge, center)))
        np.testing.assert_allclose(weighted_ridge(features, targets, weights, ridge, center), expected, rtol=1e-10)
        statistics = regression.init_statistics((), ridge, center)
        inverse = jnp.eye(4) / ridge
        for start in range(0, 20, 5):
            part = slice(start, start + 5)
            statistics = regression.add_samples(statistics, features[part], targets[part], weights[part])
            for x, w in zip(features[part], weights[part], strict=True):
                inverse = regression.sherman_morrison(inverse, x, w)
        fitted = regression.fit(statistics)
        np.testing.assert_allclose(fitted.theta, expected, rtol=1e-10)
        np.testing.assert_allclose(inverse, fitted.inverse, rtol=1e-10, atol=1e-14)


def test_derivative_equals_autodiff_of_a_plain_solve(x64, key):
    """Property 2: the own rule agrees with autodiff of ``solve`` to rounding, in both modes and under vmap."""
    arguments = data(key)

    def plain(features, targets, weights, ridge, center):
        gram = features.T @ (features * weights[:, None]) + ridge * jnp.eye(4)
        return jnp.linalg.solve(gram, features.T @ (weights * targets) + ridge * center)

    for transform in (jax.jacrev, jax.jacfwd):
        ours = jax.jit(transform(weighted_ridge, argnums=(0, 1, 2, 3, 4)))(*arguments)
        theirs = jax.jit(transform(plain, argnums=(0, 1, 2, 3, 4)))(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), ours, theirs)


def test_derivative_in_every_argument_equals_finite_differences(x64, key):
    """Property 2: grad, jvp and vmap(grad) within 1e-6 of central differences in all five arguments."""
    line = Algorithm("ridge", weighted_ridge, data, differentiable=(0, 1, 2, 3, 4), loss=lambda t: jnp.sum(jnp.sin(t)))
    check_gradients(line, key, bound=1e-6)


def test_second_derivative(x64, key):
    features, targets, weights, ridge, center = data(key)

    def value(r):
        return jnp.sum(weighted_ridge(features, targets, weights, r, center) ** 2)

    step = 1e-4
    numeric = (jax.grad(value)(ridge + step) - jax.grad(value)(ridge - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.hessian(value))(ridge), numeric, rtol=1e-6)


def test_backward_is_one_factorisation_and_one_solve(key):
    """The gradient holds one Cholesky factor; the backward pass adds the two triangles of a single solve."""
    gradient = jax.grad(lambda *a: jnp.sum(weighted_ridge(*a)), argnums=(0, 1, 2, 3, 4))
    names = list(primitive_names(jax.make_jaxpr(gradient)(*data(key)).jaxpr))
    assert names.count("cholesky") == 1
    assert names.count("triangular_solve") == 4


def primitive_names(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitive_names(inner)


def test_failure_is_reported():
    bad = regression.fit(regression.RidgeStatistics(jnp.array([[1.0, 2.0], [2.0, 1.0]]), jnp.ones(2)))
    assert not bool(bad.finite)
    with pytest.raises(ValueError, match="ridge"):
        weighted_ridge(jnp.ones((3, 2)), jnp.ones(3), jnp.ones(3), 0.0)
    with pytest.raises(ValueError, match="weights"):
        weighted_ridge(jnp.ones((3, 2)), jnp.ones(3), jnp.ones(4), 1.0)


def moments_data(key, levels=4, dimension=3):
    keys = jax.random.split(key, 4)
    spread = jax.random.normal(keys[2], (levels, dimension, dimension))
    frozen = 4 * jnp.eye(dimension) + spread @ jnp.swapaxes(spread, 1, 2)
    extra = jax.random.normal(keys[3], (levels, dimension, dimension))
    running = frozen + extra @ jnp.swapaxes(extra, 1, 2)
    features = jax.random.uniform(keys[0], (levels, dimension)) / 2
    return features, jax.random.uniform(keys[1], (levels, dimension)), frozen, running


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_moment_weights_equal_reference(x64, key, levels):
    features, theta, frozen, running = moments_data(key, levels)
    for radius, floor, cutoff in ((0.3, 0.2, 0.8), (0.0, 0.01, 0.0), (5.0, 0.5, 3.0)):
        found = moment_weights(
            features, theta, jnp.linalg.inv(frozen), jnp.linalg.inv(running), *map(jnp.array, (radius, floor, cutoff))
        )
        expected = oracle.moment_variances(*map(np.array, (features, theta, frozen, running)), radius, floor, cutoff)
        np.testing.assert_allclose(found.variances, expected, rtol=1e-12)
        np.testing.assert_allclose(found.weights * expected, 1.0, rtol=1e-12)
        # Property 5: never below the floor, nor below the epistemic term.
        norms = np.sqrt(np.einsum("md,mde,me->m", features, np.linalg.inv(running), features))
        assert np.all(np.array(found.variances) >= max(floor**2, 0) - 1e-15)
        assert np.all(np.array(found.variances) >= cutoff**2 * norms - 1e-12)


def test_one_level_without_cutoff_is_least_squares(key):
    """Property 4: M = 1, alpha = 1, gamma = 0 gives weight 1 exactly."""
    features, theta, frozen, running = moments_data(key, 1)
    found = moment_weights(features, theta, frozen, running, jnp.array(0.3), jnp.array(1.0), jnp.array(0.0))
    assert found.variances.tolist() == [1.0]


def test_deterministic_transition_with_exact_model_falls_to_the_floor(x64):
    """Property 5: no variance and a tight covariance leave max(alpha^2, error, epistemic)."""
    value, theta = 0.6, jnp.ones((3, 1))
    features = jnp.array([[value], [value**2], [value**4]])
    inverse = jnp.full((3, 1, 1), 1e-12)
    found = moment_weights(features, theta, inverse, inverse, jnp.array(0.3), jnp.array(0.25), jnp.array(1.0))
    np.testing.assert_allclose(found.estimated[:2], 0.0, atol=1e-15)
    np.testing.assert_allclose(found.variances, [0.0625, 0.0625, 1.0])
