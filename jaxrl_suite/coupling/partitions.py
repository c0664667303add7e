"""All partitions of a small alphabet, and the best of them as an encoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check_count
from jaxrl_suite.coupling.ebim import Encoder, rate_slack
from jaxrl_suite.coupling.greedy import normalise
from jaxrl_suite.coupling.sparse import as_laws, as_rate, check_law, check_rate, is_law
from jaxrl_suite.distributions import entropy
from jaxrl_suite.types import Array

LARGEST_ALPHABET = 9


@functools.cache
def partitions(size: int) -> np.ndarray:
    """Every partition of ``size`` symbols once, as restricted-growth strings: label 0 comes first, and so on.

    Args:
        size: N, from 1 to 9.

    Returns:
        int32 [Bell(N), N] on the host: 1, 2, 5, 15, 52, 203, 877, 4140, 21147 rows.

    Raises:
        ValueError: N is not in 1..9.

    >>> partitions(3).tolist()
    [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 1, 2]]
    """
    check_count(1, most=LARGEST_ALPHABET, size=size, why=": the number of partitions explodes")
    rows = np.zeros((1, 1), np.int32)
    for _ in range(size - 1):
        choices = rows.max(axis=1) + 2
        rows = np.repeat(rows, choices, axis=0)
        label = np.concatenate([np.arange(count) for count in choices])
        rows = np.concatenate([rows, label[:, None].astype(np.int32)], axis=1)
    rows.setflags(write=False)
    return rows


def code_of_labels(p: Array, labels: Array) -> Array:
    """Law of the label, ``[N]`` for ``p [N]`` and ``labels int32 [N]`` in 0..N-1."""
    member = labels[:, None] == jnp.arange(p.shape[0], dtype=labels.dtype)[None, :]
    return jnp.sum(jnp.where(member, p[:, None], jnp.zeros_like(p)[:, None]), axis=0)


def ebim_exact(p: Array, rate: Array | float) -> Encoder:
    """The most informative deterministic encoder: the best of all partitions with entropy at most the rate.

    Args:
        p: [N], probabilities, N at most 9.
        rate: [], bits.

    Returns:
        Encoder whose labels are 0, 1, ... in order of appearance.

    Raises:
        ValueError: N is above 9, ``p`` is no law, or the rate is negative.

    >>> round(float(ebim_exact(jnp.array([0.4, 0.3, 0.2, 0.1]), 1.0).information), 4)
    1.0
    """
    (p,) = as_laws(p=p)
    rate = as_rate(rate, p.dtype)
    check_law("p", p)
    check_rate(rate)
    return _exact(p, rate, jnp.asarray(partitions(p.shape[0])))


@jax.jit
def _exact(p: Array, rate: Array, candidates: Array) -> Encoder:
    valid = is_law(p) & (rate >= 0)
    p = normalise(p, valid)
    search = jax.lax.stop_gradient(p)
    entropies = entropy(jax.vmap(lambda labels: code_of_labels(search, labels))(candidates))
    fits = entropies <= rate + rate_slack(p.dtype)
    return encoder_of_labels(p, candidates[jnp.argmax(jnp.where(fits, entropies, -1))], valid)


def encoder_of_labels(p: Array, labels: Array, valid: Array) -> Encoder:
    """The encoder with given labels; NaN if ``valid`` is false."""
    code = code_of_labels(p, labels)
    information = jnp.maximum(entropy(code), 0)
    nan = jnp.full((), jnp.nan, p.dtype)
    information = jnp.where(valid, information, nan)
    return Encoder(labels, jnp.where(valid, code, nan), information, information)
