import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import pareto
from jaxrl_suite.envs import tied_bits

WEIGHTS = np.array([0.2, 0.35, 0.5, 0.65, 0.8])


def ascend(rule, starts, num_steps, rate):
    """Exact gradient ascent of the weighted objectives with a weight rule, from several starts."""

    def one(theta):
        def step(carry, _):
            theta, state = carry
            values, pullback = jax.vjp(lambda t: tied_bits.objectives(t, 2), theta)
            influence = jax.jacobian(lambda t: tied_bits.objectives(t, 2))(theta)
            signals = pareto.Signals(objectives=values, influence=influence * jnp.sum(influence))
            state, weights = rule.step(state, signals)
            return (theta + rate * pullback(weights)[0], state), None

        (theta, _), _ = jax.lax.scan(step, (theta, rule.init()), length=num_steps)
        return jax.nn.sigmoid(theta)

    return jax.vmap(one)(starts)


def test_objectives_equal_enumeration(x64):
    """Exact expectations, gradients and the sum of all probabilities by listing every sequence."""
    for num_bits in (1, 2, 3):
        bits = jnp.asarray(tied_bits.sequences(num_bits))
        listed = lambda t, b=bits: jnp.exp(tied_bits.sequence_log_prob(t, b)) @ tied_bits.rewards(b)  # noqa: E731
        theta = jnp.array(0.3)
        np.testing.assert_allclose(listed(theta), tied_bits.objectives(theta, num_bits), rtol=1e-12)
        slope = jax.jacobian(lambda t, n=num_bits: tied_bits.objectives(t, n))(theta)
        np.testing.assert_allclose(jax.jacobian(listed)(theta), slope, rtol=1e-12)
        assert float(jnp.exp(tied_bits.sequence_log_prob(theta, bits)).sum()) == pytest.approx(1)


def test_hypervolume_of_the_front(x64):
    """Property 4: 1 / C(2T, T); the error of sampling shrinks like 1 / n."""
    for num_bits, value in ((2, 1 / 6), (3, 1 / 20), (4, 1 / 70)):
        assert tied_bits.front_hypervolume(num_bits) == pytest.approx(value)
        front = jnp.asarray(tied_bits.known_front(num_bits, 201))
        half = jnp.arange(201) % 2 == 0  # every second point, the ends among them: one shape for both
        errors = [value - float(pareto.hypervolume(front, jnp.zeros(2), mask=mask)) for mask in (half, half | True)]
        assert 0 < errors[1] < 0.55 * errors[0]


def test_fixed_weights_and_influence_end_at_the_extremes(x64):
    """Properties 31 and 33: every fixed weighting, and the paper's rule, collapse to p in {0, 1}."""
    starts = jnp.array([-1.0, -0.1, 0.1, 1.0])
    fixed = lambda w: ascend(pareto.fixed_weights(jnp.stack([w, 1 - w])), starts, 4000, 1.0)  # noqa: E731
    p = np.asarray(jax.jit(jax.vmap(fixed))(WEIGHTS))
    assert np.all(np.minimum(p, 1 - p) < 0.01)
    rule = pareto.influence_weights(jnp.array([0.5, 0.5]), 0.1)
    p = np.asarray(ascend(rule, starts, 4000, 1.0))
    np.testing.assert_allclose(p, [0, 0, 1, 1], atol=0.01)
    middle = np.asarray(ascend(rule, jnp.array([0.0]), 100, 1.0))
    np.testing.assert_allclose(middle, 0.5, atol=1e-12)  # the unstable equilibrium is exact


def test_smooth_tchebycheff_reaches_the_interior(x64):
    """Property 32: one point of the front for every preference, the stationary points at temperature 0.02."""

    def reach(weight):
        rule = pareto.tchebycheff_weights(jnp.stack([weight, 1 - weight]), jnp.ones(2), temperature=0.02)
        return ascend(rule, jnp.array([0.3]), 6000, 0.05)[0]

    p = np.asarray(jax.jit(jax.vmap(reach))(WEIGHTS))
    assert np.all((p > 0.05) & (p < 0.95)) and np.all(np.diff(p) > 0.1)
    np.testing.assert_allclose(p, [0.079, 0.259, 0.5, 0.741, 0.921], atol=1e-3)


def test_hypervolume_ascent_spreads_a_population(x64):
    """Property 32: eight policies ascend their joint hypervolume to 0.1366 of 0.1667, inside the front."""
    thetas = jnp.linspace(-1.0, 1.0, 8) + 0.05

    def joint(thetas):
        return pareto.hypervolume(jax.vmap(lambda t: tied_bits.objectives(t, 2))(thetas), jnp.zeros(2))

    step = lambda thetas, _: (thetas + 2.0 * jax.grad(joint)(thetas), None)  # noqa: E731
    thetas, _ = jax.jit(lambda t: jax.lax.scan(step, t, length=4000))(thetas)
    assert float(joint(thetas)) == pytest.approx(0.1366, abs=1e-3)
    p = np.sort(np.asarray(jax.nn.sigmoid(thetas)))
    np.testing.assert_allclose(p[[0, -1]], [0.19, 0.81], atol=0.01)


def test_looking_back_reaches_the_chord(x64):
    """Property 34: one logit a prefix reaches J_1 + J_2 = 1, beyond the front of the memoryless policy."""
    step = lambda x, _: (x + 2.0 * jax.grad(lambda y: tied_bits.autoregressive_objectives(y).sum())(x), None)  # noqa: E731
    logits, _ = jax.lax.scan(step, jnp.array([0.2, -0.1, 0.1]), length=3000)
    assert float(tied_bits.autoregressive_objectives(logits).sum()) > 0.99
    assert float(tied_bits.autoregressive_objectives(jnp.zeros(3)).sum()) == pytest.approx(0.5)


def test_draws_follow_the_law(key):
    bits = tied_bits.draw(key, jnp.array(0.5), (20000, 2))
    rewards = np.asarray(tied_bits.rewards(bits)).mean(0)
    np.testing.assert_allclose(rewards, tied_bits.objectives(jnp.array(0.5), 2), atol=0.01)
