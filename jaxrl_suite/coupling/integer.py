"""Integer mass mode: laws as counts of a fixed total, so that couplings are exact and equal on every device."""

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check_count
from jaxrl_suite.coupling.sorting import sort_descending
from jaxrl_suite.coupling.sparse import as_laws, check_law, is_law
from jaxrl_suite.types import Array


def integer_masses(p: Array, *, total_bits: int = 30) -> Array:
    """Counts of total ``2 ** total_bits`` in proportion to ``p``, by largest remainders.

    A symbol keeps a count of at least ``floor(p 2**total_bits)``; what is left goes to the largest
    fractional parts. Feed two such laws to :func:`greedy_coupling`: comparisons and differences of integers have no
    rounding, so the marginals are met exactly and every machine that sees the same counts finds the same coupling.

    Args:
        p: [N], probabilities; symbols of mass zero stay at zero.
        total_bits: logarithm of the total, at most 30 so that sums fit into int32.

    Returns:
        int32 [N]; all -1 inside jit if ``p`` is no law, which :func:`greedy_coupling` takes for invalid counts.

    Raises:
        ValueError: ``p`` is empty, negative, NaN or not normalised, or ``total_bits`` is not in 1..30.

    >>> integer_masses(jnp.array([0.5, 0.3, 0.2]), total_bits=3).tolist()
    [4, 2, 2]
    """
    check_count(1, most=30, total_bits=total_bits)
    (p,) = as_laws(counts=True, p=p)
    check_law("p", p)
    counts = round_masses(p, 1 << total_bits)
    return jnp.where(is_law(p), counts, jnp.full_like(counts, -1))


def round_masses(p: Array, total: Array | int) -> Array:
    """Counts int32 [N] of the given total in proportion to ``p [N]``; the total may be traced, at most ``2 ** 30``."""
    p = jax.lax.stop_gradient(p)
    total = jnp.asarray(total, jnp.int32)
    scaled = p / jnp.sum(p) * total.astype(p.dtype)
    counts = jnp.floor(scaled).astype(jnp.int32)
    fraction = jnp.where(p > 0, scaled - jnp.floor(scaled), jnp.zeros_like(p))
    _, order = sort_descending(fraction)
    missing = total - jnp.sum(counts, dtype=jnp.int32)
    rank = jnp.zeros_like(counts).at[order].set(jnp.arange(p.shape[0], dtype=jnp.int32), unique_indices=True)
    counts = counts + ((rank < missing) & (p > 0)).astype(jnp.int32)
    # Rounding of float32 sums may leave more than one unit a symbol, or take some back: the largest symbol has room.
    rest = total - jnp.sum(counts, dtype=jnp.int32)
    return counts.at[jnp.argmax(p)].add(rest)
