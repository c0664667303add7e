import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.envs import mixtures
from jaxrl_suite.mdp import integrated_features
from jaxrl_suite.reward_free import moment_weights, regression, squared_powers, weighted_ridge
from jaxrl_suite.testing import Algorithm, check_gradients
from tests.reference import reward_free_regression as oracle


def data(key, samples=20, dimension=4):
    """Drawn by NumPy: the generators of JAX would be compiled for every shape."""
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    arrays = (
        generator.normal(size=(samples, dimension)),
        generator.uniform(size=samples),
        generator.uniform(0.1, 3.0, samples),
        np.asarray(generator.uniform(0.5, 2.0)),
        generator.normal(size=dimension),
    )
    return tuple(jnp.asarray(array, jnp.result_type(float)) for array in arrays)


def test_ridge_by_hand():
    """One sample x = 1, y = 3, w = 2, ridge 1, centre 1: (1 + 2 * 3) / (1 + 2) = 7/3."""
    one = jnp.ones(1)
    np.testing.assert_allclose(weighted_ridge(one[:, None], 3 * one, 2 * one, 1.0, one), [7 / 3], rtol=1e-6)
    np.testing.assert_allclose(weighted_ridge(one[:, None], 3 * one, 2 * one, 1.0), [2.0], rtol=1e-6)


def test_stream_of_updates_equals_one_solve(x64, key):
    """Property 1: rank-1 updates, batch sums and the closed form agree to 1e-10, for changing weights and ridges."""
    add, update = jax.jit(regression.add_samples), jax.jit(regression.sherman_morrison)
    for seed in jax.random.split(key, 3):
        features, targets, weights, ridge, center = data(seed)
        expected = oracle.weighted_ridge(*map(np.array, (features, targets, weights, ridge, center)))
        np.testing.assert_allclose(weighted_ridge(features, targets, weights, ridge, center), expected, rtol=1e-10)
        statistics = regression.init_statistics((), ridge, center)
        inverse = jnp.eye(4) / ridge
        for start in range(0, 20, 5):
            part = slice(start, start + 5)
            statistics = add(statistics, *(np.asarray(array)[part] for array in (features, targets, weights)))
            for x, w in zip(np.asarray(features)[part], np.asarray(weights)[part], strict=True):
                inverse = update(inverse, x, w)
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

    step, slope = 1e-4, jax.jit(jax.grad(value))
    numeric = (slope(ridge + step) - slope(ridge - step)) / (2 * step)
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


weigh = jax.jit(moment_weights)


def moments_data(key, levels=4, dimension=3):
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    spread, extra = generator.normal(size=(2, levels, dimension, dimension))
    frozen = 4 * np.eye(dimension) + spread @ spread.swapaxes(1, 2)
    running = frozen + extra @ extra.swapaxes(1, 2)
    features, theta = generator.uniform(size=(2, levels, dimension))
    return tuple(jnp.asarray(array, jnp.result_type(float)) for array in (features / 2, theta, frozen, running))


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_moment_weights_equal_reference(x64, key, levels):
    features, theta, frozen, running = moments_data(key, levels)
    for radius, floor, cutoff in ((0.3, 0.2, 0.8), (0.0, 0.01, 0.0), (5.0, 0.5, 3.0)):
        found = weigh(
            features, theta, np.linalg.inv(frozen), np.linalg.inv(running), *map(jnp.array, (radius, floor, cutoff))
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
    found = weigh(features, theta, frozen, running, jnp.array(0.3), jnp.array(1.0), jnp.array(0.0))
    assert found.variances.tolist() == [1.0]


def test_deterministic_transition_with_exact_model_falls_to_the_floor(x64):
    """Property 5: no variance and a tight covariance leave max(alpha^2, error, epistemic)."""
    value, theta = 0.6, jnp.ones((3, 1))
    features = jnp.array([[value], [value**2], [value**4]])
    inverse = jnp.full((3, 1, 1), 1e-12)
    found = moment_weights(features, theta, inverse, inverse, jnp.array(0.3), jnp.array(0.25), jnp.array(1.0))
    np.testing.assert_allclose(found.estimated[:2], 0.0, atol=1e-15)
    np.testing.assert_allclose(found.variances, [0.0625, 0.0625, 1.0])


def test_moment_weights_do_not_know_the_names_of_states(x64, key):
    """Property 4: relabelled states, with the function moved along, give every transition the weight it had."""
    kernels = np.random.default_rng(1).dirichlet(np.ones(4), (3, 4, 2))
    world = mixtures.from_kernels(kernels, np.array([0.2, 0.3, 0.5]))
    order = np.array([2, 0, 3, 1])  # state s is renamed order[s]
    back = np.argsort(order)
    renamed = world.replace(features=world.features[back], successors=jnp.asarray(order)[world.successors[back]])
    _, theta, frozen, running = moments_data(key)
    covariances = np.linalg.inv(frozen), np.linalg.inv(running)
    function = jnp.array([0.1, 0.9, 0.4, 0.7])

    @jax.jit
    def weights(world, function):
        powers = squared_powers(function, 4)
        features = jnp.stack([integrated_features(world, power) for power in powers], axis=2)  # [S, A, M, D]
        return moment_weights(features, theta, *covariances, jnp.array(0.3), jnp.array(0.1), jnp.array(0.5)).weights

    found, moved = weights(world, function), weights(renamed, function[back])
    np.testing.assert_allclose(moved[order], found, rtol=1e-12)
    assert np.ptp(np.array(found)) > 0.1


def test_variances_are_above_the_true_ones_on_the_good_event(x64):
    """Property 5: with each theta_m on the edge of its set, sigma_m^2 is at least Var f^(2^m) (the paper's lemma)."""
    generator, radius = np.random.default_rng(0), 0.3
    world = mixtures.from_kernels(generator.dirichlet(np.ones(5), (3, 5, 2)), np.array([0.2, 0.3, 0.5]))
    kernel, slack = np.zeros((5, 2, 5)), []
    for s, a, j in np.ndindex(world.successors.shape):
        kernel[s, a, world.successors[s, a, j]] += world.kernel()[s, a, j]
    scalars = tuple(map(jnp.array, (radius, 1e-3, 0.0)))
    for scale in (1.0, 30.0, 1e4):
        spread = generator.normal(size=(4, 3, 3))
        grams = scale * (np.eye(3) + spread @ spread.swapaxes(1, 2))
        noise = generator.normal(size=(4, 3))
        noise *= radius / np.sqrt(np.einsum("mi,mij,mj->m", noise, grams, noise))[:, None]
        powers = generator.uniform(size=5) ** (2 ** np.arange(4))[:, None]
        features = np.stack([integrated_features(world, jnp.asarray(power)) for power in powers], axis=2)
        inverses = np.linalg.inv(grams)
        found = np.array(weigh(features, world.theta + noise, inverses, inverses, *scalars).variances)
        mean, square = kernel @ powers.T, kernel @ (powers**2).T
        slack.append(found - (square - mean**2))
    assert min(gap.min() for gap in slack) >= -1e-12
    assert slack[-1][..., :-1].max() < 0.05  # with much data the estimate is close, so that the bound could fail
