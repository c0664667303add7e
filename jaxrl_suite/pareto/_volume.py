"""Volume of a union of boxes anchored at the origin, and its derivatives: the kernel under ``hypervolume``.

Layout decides the speed on a CPU. Batches are cut into tiles of a few dozen fronts, ``[T, N, lanes]``, so that vector
lanes run along independent fronts and the arrays of a tile stay in the cache. Sorting is a bitonic network of
compare-exchanges, which needs no gather; its recorded exchanges, run backwards, restore the order.

* K = 2: by falling x with the highest y so far, ``V = sum_i (x_i - x_(i+1)) max_{j <= i} y_j``.
* K >= 3: one axis is walked by falling coordinate (the chain), one is the height, and the others cut space into cells
  ``(l_1, ..., l_(K-2))`` at the sorted coordinates of the points. The walk keeps in every cell the greatest height of
  the points that reach it, ``S[l] = sum_i (x_i - x_(i+1)) max {h_j: j <= i, j reaches l}``, and V is the sum of S times
  the widths of the cells: N^(K-1) steps of four vector operations.

The derivative along an axis is the area of an exposed facet. From K = 4 it is a difference of neighbouring S along a
cell axis, times the other widths; one walk yields the derivatives along all its cell axes, so that two walks yield all.

For K = 3 the facets are walked one by one, without cells. Seen along axis z, point i exposes ``[0, x_i] x [0, y_i]``
less what the points that precede it along z (larger z_j) cover of that. With the points by falling x, let
``t_ij = max {y_k: k <= j, k precedes i along z}`` be the height that they reach over the strip between x_(j+1) and x_j;
those with larger x reach over all strips below x_i, hence

``dV/dz_i = sum_{j >= i} (x_j - x_(j+1)) max(0, y_i - t_ij)``.

The sum has no negative terms, needs no sorted cells, and one chain serves two axes: by falling z, (height y, mark x)
yields dV/dx and (height x, mark y) dV/dy. So two sorts and three walks of N^2 steps yield the gradient, and the volume
is ``V = sum_i z_i dV/dz_i``, since V grows in proportion to the unit of z. Among equal coordinates the earlier in the
chain precedes: each piece of a facet that points share belongs to one of them, which makes it a subgradient.

References: Fleischer (2003), "The measure of Pareto optima"; Emmerich and Deutz (2014), "Time complexity and zeros of
the hypervolume indicator gradient field"; Batcher (1968), "Sorting networks and their applications".
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.types import Array

# How many points one step of the walk inserts: what it reads and writes of the cells is shared by that many.
_BLOCK = 32


def _stages(number: int) -> Iterator[tuple[str, int]]:
    """Stages of a bitonic network: "flip" compares row i of a group of ``size`` with row size - 1 - i, "half" with row
    i + size / 2; all comparisons fall in the same direction."""
    group = 2
    while group <= number:
        yield "flip", group
        size = group // 2
        while size > 1:
            yield "half", size
            size //= 2
        group *= 2


def _halves(values: Array, kind: str, size: int) -> tuple[Array, Array]:
    split = values.reshape(-1, 2, size // 2, values.shape[-1])
    first, second = split[:, 0], split[:, 1]
    return first, jnp.flip(second, axis=1) if kind == "flip" else second


def _join(first: Array, second: Array, kind: str, shape: tuple[int, ...]) -> Array:
    return jnp.stack([first, jnp.flip(second, axis=1) if kind == "flip" else second], axis=1).reshape(shape)


def _exchange(values: Array, swap: Array, kind: str, size: int) -> Array:
    first, second = _halves(values, kind, size)
    return _join(jnp.where(swap, second, first), jnp.where(swap, first, second), kind, values.shape)


def _sort(key: Array, *carried: Array) -> tuple[tuple[Array, ...], list[Array]]:
    """Sorts the rows of ``key`` [N, lanes] to fall, N a power of two, and carries others along.

    Returns:
        The sorted arrays, and the exchanges that :func:`_unsort` needs.
    """
    arrays, swaps = (key, *carried), []
    for kind, size in _stages(key.shape[0]):
        first, second = _halves(arrays[0], kind, size)
        swap = first < second
        swaps.append(swap)
        arrays = tuple(_exchange(values, swap, kind, size) for values in arrays)
    return arrays, swaps


def _unsort(values: Array, swaps: list[Array]) -> Array:
    """Takes rows in sorted order back to where they came from."""
    for (kind, size), swap in reversed(list(zip(_stages(values.shape[0]), swaps, strict=True))):
        values = _exchange(values, swap, kind, size)
    return values


def _tiles(points: Array, lanes: int) -> Array:
    """[K, N, B] -> [K, T, N', lanes] with zero rows up to a power of two and zero fronts up to a full tile."""
    num_axes, number, batch = points.shape
    rows, tiles = max(2, 1 << (number - 1).bit_length()), -(-batch // lanes)
    padded = jnp.pad(points, ((0, 0), (0, rows - number), (0, tiles * lanes - batch)))
    return padded.reshape(num_axes, rows, tiles, lanes).swapaxes(1, 2)


def _untile(values: Array, number: int, batch: int) -> Array:
    """[T, N', lanes] -> [N, B]."""
    return values.swapaxes(0, 1).reshape(values.shape[1], -1)[:number, :batch]


def _drop(falling: Array) -> Array:
    """Differences to the following row, which is zero after the last."""
    return falling - jnp.concatenate([falling[1:], jnp.zeros_like(falling[:1])], axis=0)


def _greater(a: Array, b: Array) -> Array:
    return jnp.where(a > b, a, b)  # faster than jnp.maximum on a CPU, which must pass NaN on


def _walk(insert: Callable[[Array, Array], Array], zeros: Array, num_live: Array) -> Array:
    """Inserts the points block after block; ``insert`` takes and gives pairs (height, sum), which start as zeros.

    The pairs are complex numbers: of two arrays XLA would make two loops on a CPU, and walk all heights again for the
    second.
    """
    block = min(_BLOCK, zeros.shape[-2])
    return jax.lax.fori_loop(0, (num_live + (block - 1)) // block, insert, jax.lax.complex(zeros, zeros))


def _area(x: Array, y: Array) -> Array:
    """Area [lanes] under the points [N, lanes] of one tile."""
    (x, y), _ = _sort(x, y)
    return jnp.sum(_drop(x) * jax.lax.cummax(y, axis=0), axis=0)


def _area_gradient(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Area [lanes] and its derivatives [N, lanes] along x and y."""
    (x, y), swaps = _sort(x, y)
    best = jax.lax.cummax(y, axis=0)
    along_x = jnp.concatenate([best[:1], best[1:] - best[:-1]], axis=0)
    corner = jnp.where(along_x > 0, x, 0)
    # The next corner is the widest of those that follow.
    following = jnp.concatenate([corner[1:], jnp.zeros_like(corner[:1])], axis=0)
    along_y = jnp.where(along_x > 0, x - jax.lax.cummax(following, axis=0, reverse=True), 0)
    return jnp.sum(_drop(x) * best, axis=0), _unsort(along_x, swaps), _unsort(along_y, swaps)


def _facets(chain: Array, height: Array, mark: Array, num_live: Array) -> Array:
    """Derivatives [N, lanes] along the axis of ``mark``; points [N, lanes] of one tile by falling ``chain``."""
    number = chain.shape[0]
    block = min(_BLOCK, number)
    steps, index = _drop(chain), jnp.arange(number)[:, None]
    above = jnp.nextafter(mark, jnp.full_like(mark, jnp.inf))

    def insert(step: Array, carry: Array) -> Array:
        top, total = jax.lax.real(carry), jax.lax.imag(carry)
        cut = lambda values: jax.lax.dynamic_slice_in_dim(values, step * block, block)  # noqa: E731
        widths, heights, marks = cut(steps), cut(height), cut(mark)
        for i in range(block):
            later = index > step * block + i
            precedes = marks[i] >= jnp.where(later, mark, above)  # of equals, the earlier; never the point itself
            top = _greater(jnp.where(precedes, heights[i], 0), top)
            total = total + jnp.where(later, 0, widths[i]) * _greater(height - top, jnp.zeros_like(top))
        return jax.lax.complex(top, total)

    return jax.lax.imag(_walk(insert, jnp.zeros_like(height), num_live))


def _space_gradient(points: Array, num_live: Array) -> tuple[Array, Array, Array, Array]:
    """Volume [lanes] and its derivatives [N, lanes] along the axes of one tile [3, N, lanes]."""
    x, y, z = points
    (chain, first, second), swaps = _sort(z, x, y)
    along_x = _unsort(_facets(chain, second, first, num_live), swaps)
    along_y = _unsort(_facets(chain, first, second, num_live), swaps)
    (chain, first, second), swaps = _sort(x, y, z)
    along_z = _unsort(_facets(chain, first, second, num_live), swaps)
    return jnp.sum(z * along_z, axis=0), along_x, along_y, along_z


class _CellAxis(NamedTuple):
    """How one axis is cut, [N, lanes] each: point i reaches level l if ``mark[i] >= level[l]``."""

    mark: Array
    level: Array
    width: Array


class _Tile(NamedTuple):
    """Points of a tile by falling chain coordinate."""

    steps: Array
    height: Array
    axes: tuple[_CellAxis, ...]


def _prepare(points: Array) -> _Tile:
    """Sorts a tile [K, N, lanes]; axis 0 is the chain, axis 1 the height, the others are cut into cells."""
    (chain, height, *others), _ = _sort(*points)
    levels = [_sort(other)[0][0] for other in others]
    return _Tile(_drop(chain), height, tuple(map(_CellAxis, others, levels, map(_drop, levels))))


def _prepare_exactly(points: Array) -> tuple[_Tile, list[Array], list[list[Array]]]:
    """As :func:`_prepare`, but points with equal coordinates get levels of their own, as facets need; and the swaps."""
    (chain, height, *others), swaps = _sort(*points)
    rows = jnp.broadcast_to(-jnp.arange(chain.shape[0], dtype=chain.dtype)[:, None], chain.shape)
    axes, level_swaps = [], []
    for other in others:
        (level,), back = _sort(other)
        axes.append(_CellAxis(_unsort(rows, back), rows, _drop(level)))
        level_swaps.append(back)
    return _Tile(_drop(chain), height, tuple(axes)), swaps, level_swaps


def _cells(tile: _Tile, num_live: Array) -> Array:
    """The walk: S [N, ..., N, lanes], one axis of cells for each of ``tile.axes``."""
    number, lanes = tile.height.shape
    block = min(_BLOCK, number)
    *others, last = tile.axes
    # Heights [cell, point, lanes] where the last cell axis is reached: made once, since the walk reads them once for
    # every other cell. Points of a step lie side by side: at strides of a power of two they would share cache sets.
    reached = jnp.where(last.mark[None] >= last.level[:, None], tile.height[None], 0) if others else tile.height[None]
    compared = others or [last]

    def spread(values: Array, axis: int) -> Array:
        """[N or 1, lanes] along one of the cell axes."""
        shape = [1] * len(tile.axes)
        shape[axis] = values.shape[0]
        return values.reshape(*shape, lanes)

    def insert(step: Array, carry: Array) -> Array:
        top, total = jax.lax.real(carry), jax.lax.imag(carry)
        cut = lambda values: jax.lax.dynamic_slice_in_dim(values, step * block, block, axis=-2)  # noqa: E731
        widths, heights, marks = cut(tile.steps), cut(reached), [cut(axis.mark) for axis in compared]
        for i in range(block):
            candidate = spread(heights[:, i], len(others))
            for axis, mark in enumerate(marks):
                inside = spread(mark[i : i + 1], axis) >= spread(compared[axis].level, axis)
                candidate = jnp.where(inside, candidate, 0)
            top = _greater(candidate, top)
            total = total + widths[i] * top
        return jax.lax.complex(top, total)

    zeros = jnp.zeros((*(number for _ in tile.axes), lanes), tile.height.dtype)
    return jax.lax.imag(_walk(insert, zeros, num_live))


def _integrate(cells: Array, tile: _Tile, keep: int | None = None) -> Array:
    """Sum of the cells times their widths, [lanes]; along axis ``keep`` the facet of each level instead, [N, lanes]."""
    for axis in reversed(range(len(tile.axes))):
        if axis == keep:
            continue
        shape = (*(-1 if a == axis else 1 for a in range(cells.ndim - 1)), cells.shape[-1])
        cells = jnp.sum(cells * tile.axes[axis].width.reshape(shape), axis=axis, keepdims=True)
    cells = cells.reshape(-1, cells.shape[-1])
    return cells[0] if keep is None else jnp.concatenate([cells[:1], cells[1:] - cells[:-1]], axis=0)


def _map_tiles(function: Callable[..., Any], many_cells: bool) -> Callable[..., Any]:
    """All tiles at once, or one after another where the cells of all would not fit the cache."""
    return (lambda *tiles: jax.lax.map(lambda one: function(*one), tiles)) if many_cells else jax.vmap(function)


def _num_live(chain: Array) -> Array:
    """The largest number of points of a front that are not zero; the others come last in every walk."""
    return jnp.max(jnp.sum(chain > 0, axis=1, dtype=jnp.int32))


def _lanes(batch: int) -> int:
    return min(batch, 32)


def volume(points: Array) -> Array:
    """Volume of the union of the boxes ``[0, p_i]``.

    Args:
        points: [K, N, B], not negative.

    Returns:
        [B].
    """
    num_axes, _, batch = points.shape
    if num_axes == 1:
        return jnp.max(points[0], axis=0)
    tiles = _tiles(points, _lanes(batch))
    if num_axes == 2:
        return jax.vmap(_area)(tiles[0], tiles[1]).reshape(-1)[:batch]
    num_live = _num_live(tiles[0])
    prepared = jax.vmap(_prepare, in_axes=1)(tiles)
    whole = _map_tiles(lambda tile: _integrate(_cells(tile, num_live), tile), num_axes > 3)
    return whole(prepared).reshape(-1)[:batch]


def volume_and_gradient(points: Array) -> tuple[Array, Array]:
    """Volume and the areas of the exposed facets.

    Args:
        points: [K, N, B], not negative.

    Returns:
        Volume [B] and its derivatives [K, N, B]; where coordinates tie, one subgradient.
    """
    num_axes, number, batch = points.shape
    if num_axes == 1:
        best = jnp.argmax(points[0], axis=0)
        highest = (jnp.arange(number)[:, None] == best[None, :]).astype(points.dtype)
        return jnp.max(points[0], axis=0), highest[None]
    tiles = _tiles(points, _lanes(batch))
    num_live = _num_live(tiles[0])
    if num_axes <= 3:
        if num_axes == 2:
            total, *partial = jax.vmap(_area_gradient)(*tiles)
        else:
            total, *partial = jax.vmap(_space_gradient, in_axes=(1, None))(tiles, num_live)
        return total.reshape(-1)[:batch], jnp.stack([_untile(part, number, batch) for part in partial])
    gradient: list[Array] = [points[0]] * num_axes
    total = points[0, 0]

    def facets(tile: _Tile) -> tuple[Array, ...]:
        cells = _cells(tile, num_live)
        return _integrate(cells, tile), *(_integrate(cells, tile, axis) for axis in range(len(tile.axes)))

    # Each walk yields the derivatives along its last K - 2 coordinates.
    for shift in (0, 2):
        order = [(axis + shift) % num_axes for axis in range(num_axes)]
        tile, swaps, level_swaps = jax.vmap(_prepare_exactly, in_axes=1)(jnp.stack([tiles[axis] for axis in order]))
        volumes, *parts = jax.lax.map(facets, tile)
        total = volumes.reshape(-1)[:batch]
        for axis, part, back in zip(order[2:], parts, level_swaps, strict=True):
            restored = jax.vmap(lambda p, b, s: _unsort(_unsort(p, b), s))(part, back, swaps)
            gradient[axis] = _untile(restored, number, batch)
    return total, jnp.stack(gradient)
