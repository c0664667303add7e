"""Exact hypervolume in any number of dimensions, with its own derivative, under jit, vmap, grad and jvp."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_suite.config import as_array, check
from jaxrl_suite.pareto import _volume
from jaxrl_suite.types import Array


@jax.custom_batching.custom_vmap
def _batch_volume(points: Array) -> Array:
    """[B, N, K] -> [B]; a vmap makes the batch longer instead of adding an axis."""
    return _volume.volume(jnp.moveaxis(points, 0, -1).swapaxes(0, 1))


@_batch_volume.def_vmap
def _(axis_size: int, in_batched: list[bool], points: Array) -> tuple[Array, bool]:
    del in_batched
    return _batch_volume(points.reshape((-1, *points.shape[2:]))).reshape((axis_size, -1)), True


@jax.custom_batching.custom_vmap
def _batch_gradient(points: Array) -> tuple[Array, Array]:
    """[B, N, K] -> volume [B] and its derivatives [B, N, K]."""
    total, gradient = _volume.volume_and_gradient(jnp.moveaxis(points, 0, -1).swapaxes(0, 1))
    return total, jnp.moveaxis(gradient.swapaxes(0, 1), -1, 0)


@_batch_gradient.def_vmap
def _(axis_size: int, in_batched: list[bool], points: Array) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
    del in_batched
    total, gradient = _batch_gradient(points.reshape((-1, *points.shape[2:])))
    return (total.reshape((axis_size, -1)), gradient.reshape(points.shape)), (True, True)


def _of_one(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """For a single front, in float32 at least, results in the dtype of the points.

    Compiled also where the caller does not: a sorting network is hundreds of small operations.
    """

    def wide(points: Array) -> Any:
        batch = points[None].astype(jnp.promote_types(points.dtype, jnp.float32))
        return jax.tree.map(lambda part: part[0].astype(points.dtype), function(batch))

    return jax.jit(wide)


_one_volume, _one_gradient = _of_one(_batch_volume), _of_one(_batch_gradient)


@jax.custom_jvp
def _origin_volume(points: Array) -> Array:
    """Volume of the union of the boxes [0, p_i], points [N, K] not negative."""
    return _one_volume(points)


@_origin_volume.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # A custom_jvp whose tangent is linear: JAX transposes it, so both modes cost one gradient.
    total, gradient = _one_gradient(primals[0])
    return total, jnp.sum(gradient * tangents[0])


def _above_reference(points: Array, reference: Array, mask: Array | None) -> Array:
    """Distances above the reference [N, K]; rows that are masked or not above it in every coordinate become zero."""
    if mask is not None:  # first of all, so that NaN in a masked row reaches neither value nor derivative
        points = jnp.where(mask[:, None], points, reference[None, :])
    inside = jnp.all(points > reference[None, :], axis=1, keepdims=True)
    return jnp.where(inside, points - reference[None, :], jnp.zeros_like(points))


def as_numbers(argument: str, value: Any, shape: tuple[int, ...] | None = None, dtype: Any = None) -> Array:
    """The value as floats, see :func:`jaxrl_suite.config.as_array`; what has another shape is refused.

    Args:
        argument: what the caller calls the value.
        value: array, number or list.
        shape: expected shape; any by default.
        dtype: of the result; by default the value's own if it is floating.

    Raises:
        ValueError: no numbers, or another shape.
    """
    array = as_array(argument, value)
    check(shape in (None, array.shape), argument=argument, value=array.shape, rule=f"must have shape {shape}")
    if dtype is None:
        dtype = array.dtype if jnp.issubdtype(array.dtype, jnp.floating) else jnp.result_type(float)
    return array.astype(dtype)


def check_known(argument: str, values: Array, mask: Array | None = None) -> Array:
    """A factor for results that rest on ``values``: 1, or NaN if they hold NaN, which must not look like nothing.

    Args:
        argument: what the caller calls the values.
        values: [N, K] or [K], floats.
        mask: bool [N], rows that count; the others may hold anything.

    Returns:
        Scalar in the dtype of the values.

    Raises:
        ValueError: NaN, where values are known: not inside jit.
    """
    unknown = jnp.any(jnp.isnan(values), axis=-1)
    if mask is not None:
        unknown = unknown & mask
    found = jnp.any(unknown)
    if not isinstance(found, jax.core.Tracer) and bool(found):
        remedy = ""
        values = jax.lax.stop_gradient(values)  # inside grad the values are known, and their tracer is not
        if values.ndim == 2:
            row = int(jnp.argmax(unknown))
            argument, values = f"{argument}[{row}]", values[row]
            remedy = "Leave the row out; points take mask="
        check(False, argument=argument, value=values.tolist(), rule="must not be NaN", remedy=remedy)
    return jnp.where(found, jnp.nan, 1).astype(values.dtype)


def check_set(points: Array, reference: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Points and reference in one floating dtype, and the factor of :func:`check_known`."""
    points, reference = as_numbers("points", points), as_numbers("reference", reference)
    dtype = jnp.result_type(points, reference)
    points, reference = points.astype(dtype), reference.astype(dtype)
    check(points.ndim == 2, argument="points", value=points.shape, rule="must have shape [N, K]", remedy="vmap a batch")
    check(
        reference.shape == points.shape[1:],
        argument="reference",
        value=reference.shape,
        rule=f"must have shape [K] = {points.shape[1:]}, one number an objective",
    )
    if mask is not None:
        expected = points.shape[:1]
        check(mask.shape == expected, argument="mask", value=mask.shape, rule=f"must have shape [N] = {expected}")
    return points, reference, check_known("points", points, mask) * check_known("reference", reference)


def hypervolume(points: Array, reference: Array, *, mask: Array | None = None) -> Array:
    """Volume of the space that a set of points dominates, above a reference point; larger is better everywhere.

    ``HV(P, r) = volume of the union over p in P of [r, p]``. A point that is not above the reference in every
    coordinate adds nothing. Exact up to rounding in any number of dimensions. The derivative is that of the exposed
    facets, zero for dominated points; where coordinates tie it is one subgradient. Takes N^2 operations for K = 2 and
    3, N^(K-1) from K = 4; rows that are masked or below the reference are skipped. A vmap is
    turned into one batch with the batch as the minor axis.

    Differs: the official code can return negative numbers for points below the reference, see BUILD_NOTES.

    Args:
        points: [N, K], objective values, larger is better.
        reference: [K], in the units of the objectives.
        mask: bool [N], rows that count; all by default. Rows that do not count may hold NaN.

    Returns:
        Scalar, in the product of the units, not negative; NaN, as the derivative by rows above the reference, if a row
        that counts holds NaN.

    Raises:
        ValueError: shapes do not fit, or a row that counts holds NaN (where values are known: not inside jit).

    References:
        Zitzler and Thiele (1999), "Multiobjective evolutionary algorithms: a comparative case study"; Emmerich and
        Deutz (2014) for the derivative; Lu et al. (2025), arXiv 2509.11452, section on hypervolume guidance.

    >>> import jax.numpy as jnp
    >>> float(hypervolume(jnp.array([[3.0, 1.0], [1.0, 2.0]]), jnp.zeros(2)))
    4.0
    """
    points, reference, known = check_set(points, reference, mask)
    if points.shape[0] == 0:
        return known * 0
    return known * _origin_volume(_above_reference(points, reference, mask))


def hypervolume_improvement(point: Array, points: Array, reference: Array, *, mask: Array | None = None) -> Array:
    """Volume that a point would add to a set: ``HV(P + p) - HV(P)``, without the difference of two large numbers.

    It is the box below ``p`` less the volume of the set clipped to that box. Zero for a point that the set dominates or
    already holds (the code's form of the paper's gain).

    Args:
        point: [K].
        points: [N, K].
        reference: [K].
        mask: bool [N], rows that count; the others may hold NaN.

    Returns:
        Scalar, not negative; NaN if the point or a row that counts holds NaN.

    Raises:
        ValueError: shapes do not fit, or NaN as above (where values are known: not inside jit).

    References:
        Lu et al. (2025), arXiv 2509.11452; While et al. (2012), "A fast way of calculating exact hypervolumes".

    >>> import jax.numpy as jnp
    >>> float(hypervolume_improvement(jnp.array([2.0, 2.0]), jnp.array([[3.0, 1.0]]), jnp.zeros(2)))
    2.0
    """
    points, reference, known = check_set(points, reference, mask)
    point = as_numbers("point", point, reference.shape, points.dtype)
    known = known * check_known("point", point)
    box = _above_reference(point[None, :], reference, None)[0]
    if points.shape[0] == 0:
        return known * jnp.prod(box)
    rows = _above_reference(points, reference, mask)
    clipped = jnp.where(rows < box[None, :], rows, box[None, :])
    # Equal in exact arithmetic when covered; rounding must not leave a tiny gain or loss.
    covered = jnp.any(jnp.all(rows >= box[None, :], axis=1))
    gain = jnp.prod(box) - _origin_volume(clipped)
    return known * jnp.where(covered, jnp.zeros_like(gain), jnp.maximum(gain, 0))


def hypervolume_contributions(points: Array, reference: Array, *, mask: Array | None = None) -> Array:
    """What each point alone adds to the hypervolume: ``HV(P) - HV(P without p_i)``.

    Duplicates contribute nothing, since each is covered by the other.

    Args:
        points: [N, K].
        reference: [K].
        mask: bool [N], rows that count; the others contribute nothing and may hold NaN.

    Returns:
        [N], not negative; NaN in every row that counts if one of them holds NaN.

    Raises:
        ValueError: shapes do not fit, or NaN as above (where values are known: not inside jit).

    References:
        Emmerich and Fonseca (2011), "Computing hypervolume contributions in low dimensions".

    >>> import jax.numpy as jnp
    >>> hypervolume_contributions(jnp.array([[3.0, 1.0], [1.0, 2.0]]), jnp.zeros(2)).tolist()
    [2.0, 1.0]
    """
    points, reference, _ = check_set(points, reference, mask)
    num_points = points.shape[0]
    keep = jnp.ones(num_points, bool) if mask is None else jnp.asarray(mask, bool)
    clean = jnp.where(keep[:, None], points, reference[None, :])
    others = keep[None, :] & ~jnp.eye(num_points, dtype=bool)

    def alone(point: Array, rows: Array) -> Array:
        return hypervolume_improvement(point, clean, reference, mask=rows)

    return jnp.where(keep, jax.vmap(alone)(clean, others), 0)
