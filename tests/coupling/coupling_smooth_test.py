"""Smooth couplings: marginals at every temperature, both ends, ties, derivatives, and training through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.coupling import greedy_coupling, sharpen_coupling, soft_coupling
from jaxrl_suite.distributions import entropy

soft = jax.jit(jax.vmap(soft_coupling, in_axes=(0, 0, None)))
rng = np.random.default_rng(0)
P, Q = rng.dirichlet(np.ones(5), size=40), rng.dirichlet(np.ones(4), size=40)


def bits(joints):
    return np.asarray(entropy(jnp.reshape(joints, (joints.shape[0], -1))))


def test_marginals_and_ends(x64):
    """Property 1 at every temperature; temperature 1 is independence, 0 the greedy coupling; entropy lies between."""
    for temperature in (1.0, 0.5, 0.1, 1e-3):
        joints = np.asarray(soft(P, Q, temperature))
        assert (joints >= 0).all()
        np.testing.assert_allclose(joints.sum(2), P, atol=1e-12)
        np.testing.assert_allclose(joints.sum(1), Q, atol=1e-12)
        if temperature == 1.0:
            np.testing.assert_allclose(joints, P[:, :, None] * Q[:, None, :], atol=1e-12)
    hard = jax.vmap(lambda p, q: greedy_coupling(p, q).dense((5, 4)))(P, Q)
    close = np.abs(joints - np.asarray(hard)).max((1, 2)) < 1e-6
    assert close.mean() > 0.9  # the others come close to a tie on their way
    means = [bits(soft(P, Q, t)).mean() for t in (1.0, 0.5, 0.1)] + [bits(hard).mean()]
    assert (np.diff(means) < 0).all()


def test_no_jump_at_a_tie(x64):
    """Exchanging which of two nearly equal masses is larger moves the greedy coupling by 0.2, not the soft one."""
    q = jnp.array([0.5, 0.3, 0.2])
    left, right = jnp.array([0.4 + 1e-9, 0.4 - 1e-9, 0.2]), jnp.array([0.4 - 1e-9, 0.4 + 1e-9, 0.2])
    couple = jax.jit(lambda p: greedy_coupling(p, q).dense((3, 3)))
    assert np.abs(couple(left) - couple(right)).max() > 0.2
    both = soft(jnp.stack([left, right]), jnp.stack([q, q]), 0.2)
    assert np.abs(both[0] - both[1]).max() < 1e-7


def test_derivative(x64):
    """Central differences along mass-preserving directions."""
    direction = np.array([0.3, -0.1, -0.2, 0.1, -0.1])

    def function(p, temperature):
        return jnp.sum(soft_coupling(p, Q[0], temperature) ** 2)

    value, gradient = jax.jit(function), jax.jit(jax.grad(function))
    for temperature in (0.7, 0.2):
        slope = float(gradient(P[0], temperature) @ direction)
        step = 1e-6
        expected = float(value(P[0] + step * direction, temperature) - value(P[0] - step * direction, temperature))
        assert slope == pytest.approx(expected / (2 * step), rel=1e-5)
    with_zero = gradient(jnp.array([0.5, 0.5, 0.0, 0.0, 0.0]), 0.3)
    assert np.isfinite(with_zero).all()


def test_sharpening_lowers_entropy(x64):
    """Same marginals, lower entropy, and still at least the optimum's lower bound; the product stays as it is."""
    start = soft(P, Q, 0.5)
    sharp = np.asarray(jax.vmap(sharpen_coupling)(start))
    np.testing.assert_allclose(sharp.sum(2), P, atol=1e-9)
    np.testing.assert_allclose(sharp.sum(1), Q, atol=1e-3)
    assert (bits(sharp) <= bits(start) + 1e-9).all()
    assert bits(sharp).mean() < bits(start).mean() - 0.3
    product = P[0][:, None] * Q[0][None, :]
    np.testing.assert_allclose(sharpen_coupling(product), product, atol=1e-9)


def test_training_through_it():
    """Gradient steps on the logits of p: what its soft coupling says of q more than doubles."""
    q = jnp.asarray(Q[1], jnp.float32)

    def information(logits):
        p = jax.nn.softmax(logits)
        return entropy(p) + entropy(q) - entropy(soft_coupling(p, q, 0.3).reshape(-1))

    @jax.jit
    def train(logits):
        def step(logits, _):
            value, slope = jax.value_and_grad(information)(logits)
            return logits + 0.05 * slope, value

        return jax.lax.scan(step, logits, length=400)[1]

    values = np.asarray(train(jnp.array([0.3, 0.1, -0.1, -0.3])))  # equal masses are a saddle
    assert np.isfinite(values).all()
    assert values[-1] > 2 * values[0]
