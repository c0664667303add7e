import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import pareto
from jaxrl_suite.envs import test_functions


@pytest.mark.parametrize("name", ["zdt1", "zdt2", "dtlz2_2", "fonseca_fleming"])
def test_hypervolume_of_the_fronts(name, x64):
    """Property 4: closed forms; the error of sampling shrinks like 1 / n."""
    reference, value = test_functions.HYPERVOLUMES[name]
    front = jnp.asarray(-test_functions.known_front(name, 1001)[::4])
    half = jnp.arange(front.shape[0]) % 2 == 0  # every second point, the ends among them: one shape for both
    errors = [
        value - float(pareto.hypervolume(front, jnp.full(2, -reference), mask=mask)) for mask in (half, half | True)
    ]
    assert 0 < errors[1] < 0.55 * errors[0] < 0.003


def test_problems_lie_on_their_fronts(x64):
    """Optimal arguments give points of the known front; other arguments are dominated by it."""
    t = jnp.linspace(0.0, 1.0, 11)
    zero = jnp.zeros((11, 3))
    for function, name in ((test_functions.zdt1, "zdt1"), (test_functions.zdt2, "zdt2")):
        costs = jax.vmap(function)(jnp.concatenate([t[:, None], zero], axis=1))
        np.testing.assert_allclose(costs, test_functions.known_front(name, 11), atol=1e-12)
        worse = jax.vmap(function)(jnp.concatenate([t[:, None], zero + 0.3], axis=1))
        assert np.all(np.asarray(worse)[:, 1] > np.asarray(costs)[:, 1])
    sphere = jax.vmap(lambda x: test_functions.dtlz2(x, 3))(jnp.stack([t, t[::-1], 0 * t + 0.5, 0 * t + 0.5], axis=1))
    np.testing.assert_allclose(np.sum(np.asarray(sphere) ** 2, axis=1), 1, rtol=1e-12)
    circle = jax.vmap(lambda x: test_functions.dtlz2(x, 2))(jnp.stack([t, 0 * t + 0.5], axis=1))
    np.testing.assert_allclose(np.sort(circle, 0), np.sort(test_functions.known_front("dtlz2_2", 11), 0), atol=1e-12)
    line = (1 - 2 * t[:, None]) / np.sqrt(2) * jnp.ones((1, 2))
    np.testing.assert_allclose(
        np.asarray(jax.vmap(test_functions.fonseca_fleming)(line)),
        test_functions.known_front("fonseca_fleming", 11),
        atol=1e-12,
    )
    assert float(test_functions.known_front("fonseca_fleming", 3).max()) == pytest.approx(1 - np.exp(-4), abs=1e-6)


def test_weighted_sums_end_at_the_extremes_of_concave_fronts(x64):
    """Property 31: on ZDT2 and DTLZ2 every weighted sum is best at an end of the front; Tchebycheff is not."""
    for name in ("zdt2", "dtlz2_2"):
        front = test_functions.known_front(name, 201)
        for weight in np.linspace(0.05, 0.95, 19):
            best = int(np.argmin(front @ np.array([weight, 1 - weight])))
            assert best in (0, 200)
        inner = int(np.argmin(np.max(front * 0.5, axis=1)))
        assert 50 < inner < 150


def test_quadratics_by_hand(x64):
    curvature, centres = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(test_functions.quadratics(jnp.zeros(2), curvature, centres), [0.5, 1.0])


def test_unknown_fronts_are_refused():
    with pytest.raises(ValueError, match="name='zdt3': must be one of zdt1, zdt2, dtlz2_2"):
        test_functions.known_front("zdt3")
