"""Greedy minimum entropy coupling of K marginals."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.coupling.greedy import normalise, poison
from jaxrl_suite.coupling.kernels import residue
from jaxrl_suite.coupling.sparse import SparseCoupling, as_laws, check_law, is_concrete, is_law
from jaxrl_suite.coupling.tape import Tape, weights_of_tape
from jaxrl_suite.types import Array


def greedy_coupling_multi(marginals: Array) -> SparseCoupling:
    """A joint law of K variables of low entropy: the rule "max" of :func:`greedy_coupling` for K marginals.

    Each step takes the largest symbol of every marginal and gives their cell the least of the K masses. At most
    ``(1 + log2 e)/2 = 1.22`` bit above the optimum, whatever K. Derivative, integer mode and padding as for two.

    Args:
        marginals: [K, N], one law a row, short ones padded by zeros; or counts of equal totals.

    Returns:
        Coupling with L = K N - K + 1 entries; NaN weights inside jit if a row is no law.

    Raises:
        ValueError: wrong rank, or a row is empty, negative, NaN or not normalised.

    References:
        Kocaoglu, Dimakis, Vishwanath, Hassibi 2017, arXiv 1611.04035, algorithm 1; Compton, Katz, Qi, Greenewald,
        Kocaoglu 2023, the bound.

    >>> coupling = greedy_coupling_multi(jnp.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]))
    >>> coupling.indices[:3].tolist(), coupling.weights.tolist()
    ([[0, 0, 0], [1, 0, 0], [1, 1, 0]], [0.5, 0.25, 0.25, 0.0])
    """
    (marginals,) = as_laws(counts=True, marginals=marginals)
    fits = marginals.ndim == 2 and marginals.shape[0] > 0
    check(fits, argument="marginals", value=marginals.shape, rule="must be [K, N] with at least one law")
    for k in range(marginals.shape[0]):
        check_law(f"marginals[{k}]", marginals[k])
    if jnp.issubdtype(marginals.dtype, jnp.integer) and is_concrete(marginals):
        totals = np.asarray(marginals).sum(axis=1).tolist()
        check(len(set(totals)) == 1, argument="sums of marginals", value=totals, rule="counts must have equal totals")
    return _greedy(marginals)


@jax.jit
def _greedy(marginals: Array) -> SparseCoupling:
    valid = jnp.all(is_law(marginals))
    if jnp.issubdtype(marginals.dtype, jnp.integer):
        totals = jnp.asarray(marginals).sum(axis=1)
        valid = valid & jnp.all(totals == totals[0])
    rows = jnp.stack([normalise(row, valid) for row in marginals])
    tape, weights = _search(jax.lax.stop_gradient(rows))
    if not jnp.issubdtype(rows.dtype, jnp.integer):
        weights = weights_of_tape(tape, weights, tuple(rows))
    return SparseCoupling(tape.indices, poison(weights, valid))


def _search(rows: Array) -> tuple[Tape, Array]:
    num_marginals, size = rows.shape
    tolerance = jnp.max(residue(rows.T))
    index = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)

    def step(left: Array, _) -> tuple[Array, tuple[Array, Array, Array]]:
        top = jnp.max(left, axis=1, keepdims=True)
        cell = jnp.min(jnp.where(left == top, index, size - 1), axis=1, keepdims=True)
        weight = jnp.min(top)
        used_up = top - weight <= tolerance
        rest = jnp.where(used_up, jnp.zeros_like(top), top - weight)
        alive = weight > 0
        side = jnp.where(alive, jnp.argmin(top[:, 0]).astype(jnp.int32), num_marginals)
        left = jnp.where(alive & (index == cell), rest, left)
        return left, (jnp.where(alive, cell[:, 0], 0), side, jnp.where(alive, weight, jnp.zeros_like(weight)))

    indices, sides, weights = jax.lax.scan(step, rows, length=num_marginals * size - num_marginals + 1)[1]
    return Tape(indices, sides), weights
