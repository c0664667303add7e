"""Entropy and information in bits. The convention 0 log 0 = 0, with a finite gradient, lives here and nowhere else."""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from jaxrl_suite.types import Array

_LN2 = math.log(2.0)


def entropy_terms(p: Array) -> Array:
    """Elementwise ``-p log2 p`` with value and gradient 0 at ``p = 0``.

    Args:
        p: [...], masses, non-negative (they need not sum to one). A negative one counts as 0, NaN stays NaN.

    Returns:
        [...], bits.
    """
    safe = jnp.where(p > 0, p, 1.0)  # double where: the untaken branch must have a finite derivative
    return jnp.where(p > 0, -p * jnp.log(safe) / _LN2, 0.0 * p)  # a product, since a plain 0 would swallow a NaN


def entropy(p: Array, *, axis: int | Sequence[int] | None = -1) -> Array:
    """Shannon entropy ``-sum p log2 p``.

    Args:
        p: [..., N], probabilities; entries of mass zero are ignored.
        axis: axis or axes to sum over; None sums over all.

    Returns:
        [...], bits.

    >>> float(entropy(jnp.array([0.5, 0.25, 0.25])))
    1.5
    """
    return jnp.sum(entropy_terms(p), axis=axis)


def binary_entropy(p: Array) -> Array:
    """Entropy of a coin, ``h(p)``.

    Args:
        p: [...], probability of heads.

    Returns:
        [...], bits.
    """
    return entropy_terms(p) + entropy_terms(1.0 - p)


def joint_entropy(joint: Array) -> Array:
    """Entropy of a joint law ``[N, M]`` (any rank), bits."""
    return entropy(joint, axis=None)


def conditional_entropy(joint: Array) -> Array:
    """``H(X | Y)`` of a joint law ``[..., N, M]`` with X on the rows, bits."""
    return entropy(joint, axis=(-2, -1)) - entropy(jnp.sum(joint, axis=-2))


def mutual_information(joint: Array) -> Array:
    """``I(X; Y) = H(X) + H(Y) - H(X, Y)``.

    Args:
        joint: [..., N, M], joint probabilities.

    Returns:
        [...], bits.

    References:
        Cover and Thomas, Elements of Information Theory, 2006, equation (2.45).
    """
    return entropy(jnp.sum(joint, axis=-1)) + entropy(jnp.sum(joint, axis=-2)) - entropy(joint, axis=(-2, -1))


def kl_divergence(p: Array, q: Array, *, axis: int = -1) -> Array:
    """``sum p log2(p / q)``; infinite where p puts mass outside the support of q.

    Args:
        p: [..., N], probabilities.
        q: [..., N], probabilities.
        axis: axis to sum over.

    Returns:
        [...], bits.
    """
    covered = (p > 0) & (q > 0)
    ratio = jnp.log(jnp.where(covered, p, 1.0)) - jnp.log(jnp.where(covered, q, 1.0))
    terms = jnp.where(covered, p * ratio / _LN2, jnp.where(p > 0, jnp.inf, 0.0 * p))  # NaN stays NaN
    return jnp.sum(terms, axis=axis)
