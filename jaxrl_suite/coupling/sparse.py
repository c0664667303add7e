"""What a coupling is: cells and their masses. And what a marginal must be."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import as_array, as_number, check
from jaxrl_suite.distributions import entropy
from jaxrl_suite.types import Array


class SparseCoupling(NamedTuple):
    """A joint law of K variables, as the list of its cells.

    Attributes:
        indices: int32 [L, K], the cell of each entry. Unused entries have mass zero (and cell 0, ..., 0).
        weights: [L], mass of each cell; integers in integer mass mode. A greedy coupling of K marginals of
            N symbols each has L = K N - K + 1. All NaN (all -1 as integers) if the marginals were not laws of
            equal mass, which :attr:`valid` reports.

    >>> coupling = SparseCoupling(jnp.array([[0, 1], [1, 0]]), jnp.array([0.5, 0.5]))
    >>> coupling.dense((2, 2)).tolist(), float(coupling.entropy)
    ([[0.0, 0.5], [0.5, 0.0]], 1.0)
    """

    indices: Array
    weights: Array

    def dense(self, shape: tuple[int, ...]) -> Array:
        """The joint as an array of ``shape``, one axis a marginal."""
        return jnp.zeros(shape, self.weights.dtype).at[tuple(self.indices.T)].add(self.weights)

    @property
    def entropy(self) -> Array:
        """Joint entropy in bits; no cell is listed twice, so the list suffices. NaN if not valid."""
        weights = self.weights
        if jnp.issubdtype(weights.dtype, jnp.integer):
            weights = weights.astype(jnp.result_type(float))
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        value = entropy(weights)
        return jnp.where(self.valid, value, jnp.full_like(value, jnp.nan))

    @property
    def valid(self) -> Array:
        """bool [], whether the marginals were laws of equal mass."""
        return jnp.all(self.weights >= 0, axis=-1)


def is_concrete(*arrays: Array) -> bool:
    """Whether all values are known now, that is outside jit, vmap and grad."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def sum_tolerance(dtype: jnp.dtype) -> float:
    """Largest deviation of a sum of probabilities from one that is taken for rounding."""
    return 1e-6 if jnp.finfo(dtype).bits == 64 else 1e-4


def is_law(p: Array) -> Array:
    """bool [...], whether ``p [..., N]`` is finite, non-negative and sums to one (integers: has positive mass)."""
    total = jnp.sum(p, axis=-1)
    if jnp.issubdtype(p.dtype, jnp.integer):
        return jnp.all(p >= 0, axis=-1) & (total > 0)
    return jnp.all(p >= 0, axis=-1) & (jnp.abs(total - 1) <= sum_tolerance(p.dtype))


def check_law(name: str, p: Array) -> None:
    """Raises unless ``p`` is a law over at least one symbol. Values are looked at only where they are known.

    Raises:
        ValueError: wrong rank, empty, negative, NaN or not normalised.
    """
    check(p.ndim == 1, argument=name, value=p.shape, rule="must have one axis", remedy="Use vmap for batches")
    check(p.shape[0] > 0, argument=name, value=p.shape, rule="must have at least one symbol")
    if not is_concrete(p):
        return
    values = np.asarray(p)
    for wrong, rule in ((np.isnan(values), "must not hold NaN"), (values < 0, "must not be negative")):
        place = int(np.argmax(wrong))
        check(not wrong.any(), argument=f"{name}[{place}]", value=values[place].item(), rule=rule)
    total = values.sum().item()
    if np.issubdtype(values.dtype, np.integer):
        largest = int(np.iinfo(values.dtype).max)
        check(total > 0, argument=f"sum of {name}", value=total, rule="must be positive")
        check(total <= largest, argument=f"sum of {name}", value=total, rule=f"counts must sum to at most {largest}")
    else:
        fits = abs(total - 1) <= sum_tolerance(values.dtype)
        # A law in float16 may be off by more than this even after the division.
        remedy = f"Divide {name} by its sum, in float32 at least"
        check(fits, argument=f"sum of {name}", value=total, rule="must be one", remedy=remedy)


def as_rate(rate: Array | float, dtype: Any) -> Array:
    """The rate as an array without axes.

    Raises:
        ValueError: no number, or several.
    """
    return as_number("rate", rate, dtype, rule="must be a non-negative number of bits")


def check_rate(rate: Array) -> None:
    """Raises unless the rate is a non-negative number; looked at only where it is known.

    Raises:
        ValueError: negative or NaN.
    """
    if is_concrete(rate):
        rule = "must be a non-negative number of bits"
        check(bool(np.all(np.asarray(rate) >= 0)), argument="rate", value=np.asarray(rate).tolist(), rule=rule)


def check_names(argument: str, values: Array, number: int) -> None:
    """Raises unless all values are in 0..number-1; looked at only where they are known.

    Raises:
        ValueError: a value out of range.
    """
    if is_concrete(values):
        wrong = np.asarray(values)
        wrong = wrong[(wrong < 0) | (wrong >= number)]
        check(wrong.size == 0, argument=argument, value=wrong[:5].tolist(), rule=f"must be in 0..{number - 1}")


def as_laws(*, counts: bool = False, **laws: Array) -> tuple[Array, ...]:
    """The arguments as arrays of one dtype: float32 at least, or integers where all are integers.

    Args:
        counts: whether integers may stand for probabilities.
        laws: each by the name that the caller knows it by.

    Raises:
        ValueError: one holds no numbers, or all are integers where only probabilities make sense.
    """
    arrays = [as_array(name, p) for name, p in laws.items()]
    dtype = jnp.result_type(*arrays)
    if jnp.issubdtype(dtype, jnp.integer):
        first, rule = next(iter(laws)), "must be probabilities, not counts"
        check(counts, argument=first, value=dtype.name, rule=rule, remedy="Divide counts by their sum")
    dtype = jnp.promote_types(dtype, jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32)
    return tuple(array.astype(dtype) for array in arrays)
