import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_suite import pareto
from tests.reference import pareto_aggregation as reference

RULES = {name: jax.jit(lambda gram, name=name: pareto.aggregate(gram, name)) for name in pareto.AGGREGATORS}


def gradients(seed, size=4, conflict=0.0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(size, 6)) * rng.uniform(0.3, 3.0, (size, 1))
    return rows - conflict * rows.mean(0)


@pytest.mark.parametrize("name", ["mgda", "pcgrad", "cagrad", "upgrad", "aligned_mtl", "imtl_g"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_rule_on_explicit_gradients(name, seed, x64):
    """Property 37: from the Gram matrix alone, the direction of the papers' formulas on the gradients themselves."""
    rows = gradients(seed, conflict=0.4 * seed)
    arguments = (0.5,) if name == "cagrad" else ()
    expected = getattr(reference, name)(rows, *arguments)
    direction = np.asarray(RULES[name](rows @ rows.T)) @ rows
    loose = name in ("mgda", "cagrad")  # the oracle is a general-purpose optimiser
    np.testing.assert_allclose(direction, expected, atol=2e-5 if loose else 1e-8)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_mgda_is_the_shortest_vector(seed, x64):
    """Property 37: optimality, <g_i, d> >= |d|^2 for all i with equality on the support."""
    rows = gradients(seed)
    gram = rows @ rows.T
    weights = np.asarray(RULES["mgda"](gram))
    products, square = gram @ weights, weights @ gram @ weights
    assert np.all(weights >= 0) and weights.sum() == pytest.approx(1)
    assert np.all(products >= square * (1 - 1e-9))
    np.testing.assert_allclose(products[weights > 1e-9], square, rtol=1e-9)


def test_mgda_of_two_has_a_closed_form(x64):
    """Property 37: w_1 = clip(<g_2 - g_1, g_2> / |g_1 - g_2|^2, 0, 1)."""
    for seed in range(8):
        g = np.random.default_rng(seed).normal(size=(2, 2)) + np.array([[1.0, 0.0], [0.5, 0.5]])
        expected = np.clip((g[1] - g[0]) @ g[1] / np.sum((g[0] - g[1]) ** 2), 0, 1)
        assert float(RULES["mgda"](g @ g.T)[0]) == pytest.approx(expected, abs=1e-9)


def test_cagrad_bounds(x64):
    """Property 37: the direction stays in its ball, and no member of the ball has a better worst improvement."""
    rows = gradients(3, conflict=0.9)
    gram, mean = rows @ rows.T, rows.mean(0)
    direction = np.asarray(pareto.cagrad(gram, radius=0.4)) @ rows
    assert np.linalg.norm(direction - mean) <= 0.4 * np.linalg.norm(mean) * (1 + 1e-6)
    rng = np.random.default_rng(0)
    for _ in range(500):
        other = rng.normal(size=6)
        other = mean + 0.4 * np.linalg.norm(mean) * other / np.linalg.norm(other)
        assert (rows @ other).min() <= (rows @ direction).min() + 1e-6
    np.testing.assert_allclose(np.asarray(pareto.cagrad(gram, radius=0.0)), 0.25, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nash_condition(seed, x64):
    """Property 37: a G a = 1 for every objective."""
    rows = gradients(seed, conflict=0.9)
    gram = rows @ rows.T
    a = np.asarray(RULES["nash_mtl"](gram))
    np.testing.assert_allclose(a * (gram @ a), 1.0, rtol=1e-9)
    assert np.all(a > 0)


def test_upgrad_harms_nobody(x64):
    rows = gradients(5, conflict=0.95)
    assert np.all(rows @ (np.asarray(RULES["upgrad"](rows @ rows.T)) @ rows) >= -1e-9)


def test_imtl_projects_equally(x64):
    rows = gradients(6)
    direction = np.asarray(RULES["imtl_g"](rows @ rows.T)) @ rows
    projections = rows @ direction / np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-9)


@pytest.mark.parametrize("name", pareto.AGGREGATORS)
def test_degenerate_gram_matrices_stay_finite(name):
    """Zero, repeated and opposite gradients give finite coefficients in float32."""
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], np.float32)
    for rows in (np.zeros((4, 2), np.float32), np.ones((4, 2), np.float32), opposite):
        assert np.all(np.isfinite(RULES[name](jnp.asarray(rows @ rows.T))))


def test_pcgrad_orders(key):
    gram = jnp.array([[1.0, -0.5, -0.5], [-0.5, 2.0, -1.0], [-0.5, -1.0, 3.0]])
    drawn = {tuple(np.round(np.asarray(pareto.pcgrad(gram, key=k)), 5)) for k in jax.random.split(key, 12)}
    assert len(drawn) > 1
    assert pareto.pcgrad(jnp.eye(3)).tolist() == [1.0, 1.0, 1.0]


def test_unknown_rule_and_shape():
    with pytest.raises(ValueError, match=r"rule='nope': unknown rule\. Rules: sum, mgda"):
        pareto.aggregate(jnp.eye(2), "nope")
    with pytest.raises(ValueError, match="gram"):
        pareto.aggregate(jnp.ones((2, 3)))


def test_projection_on_the_simplex(x64):
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = rng.normal(size=5)
        p = np.asarray(pareto.project_simplex(jnp.asarray(x)))
        assert p.min() >= 0 and p.sum() == pytest.approx(1)
        for q in rng.dirichlet(np.ones(5), 20):  # variational inequality of a projection
            assert (x - p) @ (q - p) <= 1e-12


def test_transformation_in_a_chain(x64):
    """The update is the weighted sum of the gradients, weights moved before use; chains with an optimiser."""
    rule = pareto.influence_weights(jnp.array([0.334, 0.333, 0.333]), 0.1)
    tx = optax.chain(pareto.multi_objective(3, rule), optax.sgd(1.0))
    rows = np.array([[0.6, 0.8, 0.0], [0.0, 0.5, 0.5], [0.3, 0.0, -0.4]])
    params = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    stacked = {"a": jnp.asarray(rows[:, :2]), "b": jnp.asarray(rows[:, 2])}
    updates, state = jax.jit(tx.update)(stacked, tx.init(params), params)
    golden = np.array([0.3591800399, 0.3279382288, 0.3128817313])
    np.testing.assert_allclose(state[0].weights, golden, atol=1e-10)
    np.testing.assert_allclose(updates["a"], -golden @ rows[:, :2], atol=1e-9)
    np.testing.assert_allclose(updates["b"], -golden @ rows[:, 2], atol=1e-9)
    np.testing.assert_allclose(state[0].gram, rows @ rows.T, atol=1e-12)
    clipped = pareto.multi_objective(3, rule, clip_norm=0.1)
    _, state = clipped.update(stacked, clipped.init(params), params)
    units = 0.1 * rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.log(state.weights) - np.log([0.334, 0.333, 0.333])
    influences = units @ units.sum(0)
    np.testing.assert_allclose(np.diff(expected), 0.1 * np.diff(influences), atol=1e-9)


def test_famo_evens_out_the_log_losses():
    """l_1 = exp(-x_1), l_2 = exp(-5 x_2): equal shares make the second fall 25 times faster, FAMO makes them even."""
    speeds = jnp.array([1.0, 5.0])
    rule = pareto.famo_weights(jnp.array([0.5, 0.5]), jnp.zeros(2), rate=20.0, decay=0.0)

    def step(carry, _):
        x, state = carry
        losses = jnp.exp(-speeds * x)
        state, weights = rule.step(state, pareto.Signals(objectives=-losses))
        shares = weights * losses / jnp.sum(weights * losses)
        return (x + 0.01 * shares * speeds, state), (shares, 0.01 * shares * speeds**2)

    shares, falls = jax.jit(lambda carry: jax.lax.scan(step, carry, length=600)[1])((jnp.zeros(2), rule.init()))
    np.testing.assert_allclose(shares[0], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(shares[-1], [25 / 26, 1 / 26], rtol=0.02)
    np.testing.assert_allclose(falls[-1, 0], falls[-1, 1], rtol=0.05)
