"""How good an approximation of a front is, beside its hypervolume: IGD+ and R2. Smaller is better for both."""

import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.pareto.hypervolume import as_numbers, check_known
from jaxrl_suite.types import Array


def igd_plus(points: Array, front: Array, *, mask: Array | None = None) -> Array:
    """Mean distance from a known front to the region that a set dominates (inverted generational distance plus).

    ``IGD+ = mean over z in front of min over p in points of |max(z - p, 0)|``; weakly Pareto-compliant.

    Args:
        points: [N, K], larger is better.
        front: [M, K], the known front.
        mask: bool [N], rows of ``points`` that count; the others may hold NaN.

    Returns:
        Scalar, not negative; infinite for an empty set; NaN if the front or a row that counts holds NaN.

    Raises:
        ValueError: shapes do not fit, the front is empty, or NaN as above (where values are known: not inside jit).

    References:
        Ishibuchi et al. (2015), "Modified distance calculation in generational distance and inverted generational
        distance".

    >>> import jax.numpy as jnp
    >>> float(igd_plus(jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 2.0], [0.5, 0.5]])))
    0.5
    """
    points, front = _rows("points", points), _rows("front", front)
    _check_columns(points, front=front)
    known = check_known("points", points, mask) * check_known("front", front)
    points = points if mask is None else jnp.where(mask[:, None], points, 0)
    lack = jnp.maximum(front[:, None, :] - points[None, :, :], 0)
    square = jnp.sum(lack * lack, axis=-1)
    distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    if mask is not None:
        distance = jnp.where(mask[None, :], distance, jnp.inf)
    return known * jnp.mean(_least(distance))


def r2(points: Array, weights: Array, ideal: Array, *, mask: Array | None = None) -> Array:
    """Mean over weightings of the best Tchebycheff value that the set offers.

    ``R2 = mean over w of min over p of max_i w_i (z_i - p_i)``.

    Args:
        points: [N, K], larger is better.
        weights: [M, K], a spread of weightings.
        ideal: [K], z.
        mask: bool [N], rows of ``points`` that count; the others may hold NaN.

    Returns:
        Scalar; infinite for an empty set; NaN if the weights, the ideal or a row that counts holds NaN.

    Raises:
        ValueError: shapes do not fit, no weighting, or NaN as above (where values are known: not inside jit).

    References:
        Hansen and Jaszkiewicz (1998); Brockhoff, Wagner and Trautmann (2012), "On the properties of the R2 indicator".

    >>> import jax.numpy as jnp
    >>> float(r2(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[0.5, 0.5]]), jnp.ones(2)))
    0.5
    """
    points, weights = _rows("points", points), _rows("weights", weights)
    _check_columns(points, weights=weights)
    ideal = as_numbers("ideal", ideal, points.shape[1:])
    known = check_known("points", points, mask) * check_known("weights", weights) * check_known("ideal", ideal)
    points = points if mask is None else jnp.where(mask[:, None], points, 0)
    values = jnp.max(weights[:, None, :] * (ideal - points)[None, :, :], axis=-1)
    if mask is not None:
        values = jnp.where(mask[None, :], values, jnp.inf)
    return known * jnp.mean(_least(values))


def _rows(argument: str, values: Array) -> Array:
    values = as_numbers(argument, values)
    check(values.ndim == 2, argument=argument, value=values.shape, rule="must have two axes", remedy="vmap a batch")
    return values


def _check_columns(points: Array, **others: Array) -> None:
    for argument, rows in others.items():
        rule = f"must have rows, at least one, as long as those of points: {points.shape[1]}"
        check(rows.shape[0] > 0 and rows.shape[1] == points.shape[1], argument=argument, value=rows.shape, rule=rule)


def _least(values: Array) -> Array:
    """Least entry of each row, infinite if there is none.

    Its derivative goes to one such entry, where `jnp.min` divides by a count of ties.
    """
    if values.shape[1] == 0:
        return jnp.full(values.shape[0], jnp.inf, values.dtype)
    return jnp.take_along_axis(values, jnp.argmin(values, axis=1)[:, None], axis=1)[:, 0]
