"""Baselines for the bounded encoder: uniform bins and bin packing. They use ``floor(2 ** rate)`` codes at most."""

import jax
import jax.numpy as jnp

from jaxrl_suite.coupling.ebim import Encoder
from jaxrl_suite.coupling.greedy import normalise
from jaxrl_suite.coupling.partitions import encoder_of_labels
from jaxrl_suite.coupling.sparse import as_laws, as_rate, check_law, check_rate, is_law
from jaxrl_suite.types import Array


def num_codes(rate: Array, size: int) -> Array:
    """int32 [], ``floor(2 ** rate)``, at least 1 and at most ``size``; a hair of rounding below an integer counts."""
    return jnp.clip(jnp.floor(jnp.exp2(jnp.minimum(rate, 30)) * (1 + 1e-6)), 1, size).astype(jnp.int32)


def quantize_uniform(p: Array, rate: Array | float, *, adaptive: bool = False) -> Encoder:
    """Splits the symbols, in their order, into ``floor(2 ** rate)`` bins.

    The paper's baseline, in both of its readings: fixed bins of equally many symbols, whatever their
    probabilities; or, ``adaptive``, bins of equal probability under ``p``, so that a belief that has narrowed down is
    split again. In a coding game fixed bins can never tell apart the messages of one bin.

    Args:
        p: [N], probabilities.
        rate: [], bits; the entropy of the code is at most ``log2 floor(2 ** rate)``.
        adaptive: which reading.

    Returns:
        Encoder; labels are bin numbers.

    Raises:
        ValueError: ``p`` is empty, negative, NaN or not normalised, or the rate is negative.

    References:
        Ebrahimi, Chen, Khisti 2024, arXiv 2410.21666, algorithm 5.

    >>> quantize_uniform(jnp.array([0.7, 0.1, 0.1, 0.1]), 1.0).labels.tolist()
    [0, 0, 1, 1]
    >>> quantize_uniform(jnp.array([0.7, 0.1, 0.1, 0.1]), 1.0, adaptive=True).labels.tolist()
    [0, 1, 1, 1]
    """
    p, rate = _checked(p, rate)
    valid = is_law(p) & (rate >= 0)
    p = normalise(p, valid)
    return encoder_of_labels(p, uniform_labels(jax.lax.stop_gradient(p), rate, adaptive=adaptive), valid)


def uniform_labels(p: Array, rate: Array, *, adaptive: bool) -> Array:
    """Bin of each symbol, int32 [N]."""
    size = p.shape[0]
    bins = num_codes(rate, size)
    if adaptive:
        middle = jnp.cumsum(p) - p / 2  # where the middle of a symbol falls in [0, 1]
        return jnp.clip(jnp.floor(middle * bins.astype(p.dtype)).astype(jnp.int32), 0, bins - 1)
    return jnp.arange(size, dtype=jnp.int32) * bins // size


def quantize_lpt(p: Array, rate: Array | float) -> Encoder:
    """Bin packing: symbols in descending order, each to the code of least mass so far.

    Args:
        p: [N], probabilities.
        rate: [], bits; ``floor(2 ** rate)`` codes.

    Returns:
        Encoder; labels are code numbers.

    Raises:
        ValueError: ``p`` is empty, negative, NaN or not normalised, or the rate is negative.

    References:
        Shkel and Verdú 2017, single-shot approach; Ebrahimi, Chen, Khisti 2024, appendix D.1.

    >>> quantize_lpt(jnp.array([0.4, 0.3, 0.2, 0.1]), 1.0).labels.tolist()
    [0, 1, 1, 0]
    """
    p, rate = _checked(p, rate)
    valid = is_law(p) & (rate >= 0)
    p = normalise(p, valid)
    return encoder_of_labels(p, lpt_labels(jax.lax.stop_gradient(p), num_codes(rate, p.shape[0])), valid)


def lpt_labels(p: Array, codes: Array) -> Array:
    """Code of each symbol, int32 [N], by the longest-processing-time rule into ``codes`` codes."""
    size = p.shape[0]
    order = jnp.argsort(-p, stable=True)
    closed = jnp.where(jnp.arange(size) < codes, 0.0, jnp.inf).astype(p.dtype)

    def put(filled: Array, mass: Array) -> tuple[Array, Array]:
        code = jnp.argmin(filled).astype(jnp.int32)
        return filled.at[code].add(mass), code

    _, codes_in_order = jax.lax.scan(put, closed, p[order])
    return jnp.zeros((size,), jnp.int32).at[order].set(codes_in_order)


def _checked(p: Array, rate: Array | float) -> tuple[Array, Array]:
    (p,) = as_laws(p=p)
    rate = as_rate(rate, p.dtype)
    check_law("p", p)
    check_rate(rate)
    return p, rate
