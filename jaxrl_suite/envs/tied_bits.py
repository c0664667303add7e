"""TiedBits: a language-like problem with a provably non-convex front, exact in every respect.

A memoryless policy emits T bits with one shared logit, ``p = sigmoid(theta)``; the rewards are "all ones" and
"all zeros". ``J = (p^T, (1 - p)^T)``, front ``J_1^(1/T) + J_2^(1/T) = 1``, hypervolume ``1 / C(2T, T)`` above 0.
Every weighted sum is convex in p, so it is largest at an end. A policy that may look back reaches the chord
``J_1 + J_2 = 1`` instead.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check_count
from jaxrl_suite.types import Array, PRNGKey


def sequences(num_bits: int) -> np.ndarray:
    """All bit sequences, int32 [2^T, T].

    >>> sequences(2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    check_count(1, most=16, num_bits=num_bits, why=", since all are listed")
    return np.array(list(itertools.product((0, 1), repeat=num_bits)), np.int32)


def rewards(bits: Array) -> Array:
    """Rewards of bit sequences.

    Args:
        bits: int [..., T].

    Returns:
        [..., 2], "all ones" and "all zeros".
    """
    return jnp.stack([jnp.all(bits == 1, axis=-1), jnp.all(bits == 0, axis=-1)], axis=-1).astype(jnp.result_type(float))


def sequence_log_prob(theta: Array, bits: Array) -> Array:
    """Log-probability of sequences under the memoryless policy.

    Args:
        theta: [], shared logit of a one.
        bits: int [..., T].

    Returns:
        [...], nats.
    """
    signs = (2 * bits - 1).astype(theta.dtype)
    return jnp.sum(jax.nn.log_sigmoid(theta * signs), axis=-1)


def objectives(theta: Array, num_bits: int) -> Array:
    """Exact expected rewards ``(p^T, (1 - p)^T)``.

    Args:
        theta: [], shared logit.
        num_bits: T.

    Returns:
        [2].
    """
    return jnp.stack([jnp.exp(num_bits * jax.nn.log_sigmoid(theta)), jnp.exp(num_bits * jax.nn.log_sigmoid(-theta))])


def autoregressive_objectives(logits: Array) -> Array:
    """Expected rewards of a policy that sees its prefix: one logit for every prefix.

    Args:
        logits: [2^T - 1], logit of a one after each prefix, shorter prefixes first, then in counting order.

    Returns:
        [2].
    """
    num_bits = int(math.log2(logits.shape[0] + 1))
    starts = [2**t - 1 for t in range(num_bits)]
    ones = jnp.stack([logits[2 * start] for start in starts])
    zeros = jnp.stack([logits[start] for start in starts])
    return jnp.exp(jnp.stack([jnp.sum(jax.nn.log_sigmoid(ones)), jnp.sum(jax.nn.log_sigmoid(-zeros))]))


def draw(key: PRNGKey, theta: Array, shape: tuple[int, ...]) -> Array:
    """Samples sequences of the memoryless policy.

    Args:
        key: consumed.
        theta: [], shared logit.
        shape: [..., T].

    Returns:
        int32 of that shape.
    """
    return jax.random.bernoulli(key, jax.nn.sigmoid(theta), shape).astype(jnp.int32)


def known_front(num_bits: int, num_points: int = 101) -> np.ndarray:
    """Points of the front, equally spaced in p, float64 [num_points, 2].

    >>> known_front(2, 3).tolist()
    [[0.0, 1.0], [0.25, 0.25], [1.0, 0.0]]
    """
    p = np.linspace(0, 1, num_points)
    return np.stack([p**num_bits, (1 - p) ** num_bits], axis=1)


def front_hypervolume(num_bits: int) -> float:
    """Hypervolume of the whole front above the origin, ``1 / C(2T, T)``.

    >>> front_hypervolume(2)
    0.16666666666666666
    """
    return 1 / math.comb(2 * num_bits, num_bits)
