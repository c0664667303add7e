"""Volume of a union of boxes anchored at the origin, and its derivatives: the kernel under ``hypervolume``.

Everything here works on ``[K, N, B]``: coordinates first, the batch as the minor axis, because XLA's CPU code is
several times faster when the vector lanes run along independent problems. Two ways:

* K = 2: every point owns the part of its top edge that no higher point covers,
  ``V = sum_i y_i max(0, x_i - max {x_j: j above i})``.
* K >= 3: walk through the points by falling x and keep, for every level of y, the highest z seen so far. Further
  coordinates are integrated slice by slice from above.

Each derivative of the volume is the area of an exposed facet, which is the difference of two neighbouring slices. One
walk yields the derivatives along its level and slice coordinates, so that two or three walks yield all of them.

References: Fleischer (2003), "The measure of Pareto optima"; Emmerich and Deutz (2014), "Time complexity and zeros of
the hypervolume indicator gradient field".
"""

import jax
import jax.numpy as jnp

from jaxrl_suite.types import Array

# How many points one step of the walk inserts: their maxima stay in registers, and the loop costs less.
_BLOCK = 8


def _exposed_length(x: Array, y: Array) -> Array:
    """Length [N, B] of the part of each top edge [0, x_i] at height y_i that no point above covers.

    Of two equally high points the one with the lower index lies above.
    """
    block = min(_BLOCK, x.shape[0])
    padding = -x.shape[0] % block
    xs, ys = (jnp.pad(values, ((0, padding), (0, 0))) for values in (x, y))
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]

    def cover(step: Array, covered: Array) -> Array:
        widths, heights = (jax.lax.dynamic_slice_in_dim(v, step * block, block) for v in (xs, ys))
        for k in range(block):
            height = heights[k][None, :]
            above = (height > y) | ((height == y) & (step * block + k < row))
            candidate = jnp.where(above, widths[k][None, :], 0)
            covered = jnp.where(candidate > covered, candidate, covered)
        return covered

    return jnp.maximum(x - jax.lax.fori_loop(0, (x.shape[0] + padding) // block, cover, jnp.zeros_like(x)), 0)


def _take(values: Array, order: Array) -> Array:
    return jnp.take_along_axis(values, order, axis=0)


def _order(values: Array) -> Array:
    """Positions [N, B] by falling value, stable."""
    return jnp.argsort(-values, axis=0, stable=True).astype(jnp.int32)


def _next(sorted_values: Array) -> Array:
    """The following entry along the first axis, zero at the end."""
    return jnp.concatenate([sorted_values[1:], jnp.zeros_like(sorted_values[:1])], axis=0)


def _drop(sorted_values: Array) -> Array:
    return sorted_values - _next(sorted_values)


def _levels(x: Array, height: Array, level: Array, rank: Array) -> Array:
    """Integral over x, for every level of y, of the greatest height among the points at or above that level.

    Args:
        x: [N, B], falling along the first axis.
        height: [N, B], zero where a point is switched off.
        level: int32 [N, 1], the ranks of the levels.
        rank: int32 [N, B], rank of each point's y, 0 the highest.

    Returns:
        [N, B], one integral a level.
    """
    num_points = x.shape[0]
    block = min(_BLOCK, num_points)
    padding = -num_points % block
    rows = (_drop(x), height, rank)
    widths, heights, ranks = (jnp.pad(values, ((0, padding), (0, 0))) for values in rows)
    num_live = jnp.sum(jnp.any(x > 0, axis=1), dtype=jnp.int32)

    def insert(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        top, total = carry
        slices = [jax.lax.dynamic_slice_in_dim(v, step * block, block) for v in (widths, heights, ranks)]
        for width, tall, where in zip(*slices):
            candidate = jnp.where(where[None, :] <= level, tall[None, :], 0)
            top = jnp.where(candidate > top, candidate, top)
            total = total + width[None, :] * top
        return top, total

    zeros = jnp.zeros_like(height)
    return jax.lax.fori_loop(0, (num_live + (block - 1)) // block, insert, (zeros, zeros))[1]


def _walk(points: Array, axes: tuple[int, ...]) -> tuple[Array, list[Array]]:
    """Volume and its derivatives along all coordinates but the first two of ``axes``.

    Args:
        points: [K, N, B], not negative; K at least 3.
        axes: the roles of the coordinates: x, height, level, then the slices.

    Returns:
        Volume [B] and the derivatives [N, B] along ``axes[2:]``.
    """
    x = points[axes[0]]
    order = _order(x)
    x, height, level, *slices = [_take(points[axis], order) for axis in axes]
    level_order = _order(level)
    level_rank, level_width = _order_inverse(level_order), _drop(_take(level, level_order))
    row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]

    def integrate(alive: Array, slices: list[Array]) -> tuple[Array, list[Array]]:
        if not slices:
            integral = _levels(x, jnp.where(alive, height, 0), row, level_rank)
            volume = jnp.sum(level_width * integral, axis=0)
            facet = jnp.diff(integral, axis=0, prepend=jnp.zeros_like(integral[:1]))
            return volume, [_take(facet, level_rank)]
        values, rest = slices[-1], slices[:-1]
        by_value = _order(values)
        rank, width = _order_inverse(by_value), _drop(_take(values, by_value))
        num_live = jnp.sum(jnp.any(_take(values, by_value) > 0, axis=1), dtype=jnp.int32)

        def add(i: Array, carry: tuple[Array, list[Array], Array]) -> tuple[Array, list[Array], Array]:
            volume, facets, sections = carry
            section, inner = integrate(alive & (rank <= i), rest)
            facets = [f + width[i][None, :] * g for f, g in zip(facets, inner)]
            return volume + width[i] * section, facets, sections.at[i].set(section)

        start = (jnp.zeros_like(x[0]), [jnp.zeros_like(x) for _ in range(len(rest) + 1)], jnp.zeros_like(x))
        volume, facets, sections = jax.lax.fori_loop(0, num_live, add, start)
        live = row < num_live
        facet = jnp.where(live, jnp.diff(sections, axis=0, prepend=jnp.zeros_like(sections[:1])), 0)
        return volume, facets + [_take(facet, rank)]

    volume, facets = integrate(jnp.ones_like(x, dtype=bool), slices)
    back = _order_inverse(order)
    return volume, [_take(facet, back) for facet in facets]


def _order_inverse(order: Array) -> Array:
    """Inverse of a permutation [N, B] along the first axis."""
    column = jnp.arange(order.shape[1], dtype=jnp.int32)[None, :]
    row = jnp.broadcast_to(jnp.arange(order.shape[0], dtype=jnp.int32)[:, None], order.shape)
    return jnp.zeros_like(order).at[order, column].set(row, unique_indices=True)


def volume(points: Array) -> Array:
    """Volume of the union of the boxes ``[0, p_i]``.

    Args:
        points: [K, N, B], not negative.

    Returns:
        [B].
    """
    num_axes = points.shape[0]
    if num_axes == 1:
        return jnp.max(points[0], axis=0)
    if num_axes == 2:
        return jnp.sum(points[1] * _exposed_length(points[0], points[1]), axis=0)
    return _walk(points, tuple(range(num_axes)))[0]


def volume_and_gradient(points: Array) -> tuple[Array, Array]:
    """Volume and the areas of the exposed facets.

    Args:
        points: [K, N, B], not negative.

    Returns:
        Volume [B] and its derivatives [K, N, B]; at ties the lower index is taken to lie above, which is one
        subgradient.
    """
    num_axes = points.shape[0]
    if num_axes == 1:
        best = jnp.argmax(points[0], axis=0)
        highest = (jnp.arange(points.shape[1])[:, None] == best[None, :]).astype(points.dtype)
        return jnp.max(points[0], axis=0), highest[None]
    if num_axes == 2:
        top = _exposed_length(points[0], points[1])
        return jnp.sum(points[1] * top, axis=0), jnp.stack([_exposed_length(points[1], points[0]), top])
    gradient: list[Array] = [points[0]] * num_axes
    total = points[0, 0]
    # Each walk yields the derivatives along its last K - 2 coordinates.
    rotations = range(3) if num_axes == 3 else (0, 2)
    for shift in rotations:
        axes = tuple((axis + shift) % num_axes for axis in range(num_axes))
        total, facets = _walk(points, axes)
        for axis, facet in zip(axes[2:], facets):
            gradient[axis] = facet
    return total, jnp.stack(gradient)
