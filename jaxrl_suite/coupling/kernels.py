"""The greedy pairing of two marginals, compiled four ways. All return the same steps.

``plain``   every step looks at both marginals, O(N + M) a step: the reference, and the fastest for balanced alphabets
            of up to a few hundred symbols.
``small``   for M much smaller than N: sort the long side once; what is left of its symbols fits into M slots, since
            each cut of a long symbol uses up a short one. O(M) a step.
``large``   for balanced alphabets of a thousand symbols and more, in :mod:`jaxrl_suite.coupling.rank_rounds`.
``zero``    the rule that pairs the two *closest* masses rather than the two largest; both sides in one sorted list,
            where the closest pair of opposite sides is adjacent.

Kernels carry the batch as the minor axis, ``p [N, B]`` and ``q [M, B]``: a step is then a few vector operations over
the batch, several times faster on a CPU than ``vmap`` with its leading batch axis. :func:`batch_minor` makes ``vmap``
do the move by itself, so that callers never see it. The maximum is taken first and then the smallest index
where it is reached, which vectorises where argmax does not.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.coupling.sorting import sort_descending
from jaxrl_suite.coupling.tape import COLUMN, IDLE, ROW
from jaxrl_suite.types import Array

Kernel = Callable[[Array, Array], "Steps"]


def batch_minor(kernel: Kernel) -> Kernel:
    """Turns ``kernel(p [N, B], q [M, B]) -> outputs [L, B]`` into one whose ``vmap`` widens the trailing axis B."""

    @jax.custom_batching.custom_vmap
    def call(p: Array, q: Array):
        return kernel(p, q)

    @call.def_vmap
    def rule(axis_size, in_batched, p, q):
        def merge(x: Array, batched: bool) -> Array:
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)

        outputs = call(merge(p, in_batched[0]), merge(q, in_batched[1]))
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], axis_size, -1), 1, 0), outputs)
        return split, jax.tree.map(lambda _: True, split)

    return call


def residue(*marginals: Array) -> Array:
    """[1, ...], difference of remainders that is rounding of equal masses rather than mass; 0 for integers.

    Reduces the first axis. Without it, 0.3 - 0.1 - 0.1 against 0.1 leaves a cell of 3e-17.
    """
    largest = functools.reduce(jnp.add, [jnp.max(p, axis=0, keepdims=True) for p in marginals])
    if jnp.issubdtype(largest.dtype, jnp.integer):
        return jnp.zeros_like(largest)
    return largest * (8 * float(jnp.finfo(largest.dtype).eps))


def settle(a: Array, b: Array, tolerance: Array) -> tuple[Array, Array, Array, Array]:
    """Pairs two masses: weight, what is left of each (exactly 0 on the side used up), and that side."""
    equal = jnp.abs(a - b) <= tolerance
    weight = jnp.minimum(a, b)
    zero = jnp.zeros_like(a)
    side = jnp.where(weight > 0, jnp.where(equal | (a <= b), ROW, COLUMN), IDLE)
    return weight, jnp.where(equal | (a <= b), zero, a - b), jnp.where(equal | (b <= a), zero, b - a), side


def first_maximum(x: Array, index: Array) -> tuple[Array, Array]:
    """Maximum over the first axis and the smallest index where it is reached, each ``[1, B]``."""
    top = jnp.max(x, axis=0, keepdims=True)
    return top, jnp.min(jnp.where(x == top, index, x.shape[0] - 1), axis=0, keepdims=True)


def _iota(x: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)


class Steps(NamedTuple):
    """What a kernel did, step by step, the batch as the minor axis.

    Attributes:
        row: int32 [L, B].
        column: int32 [L, B].
        side: int32 [L, B], ``ROW``, ``COLUMN`` or ``IDLE``.
        weight: [L, B].
    """

    row: Array
    column: Array
    side: Array
    weight: Array


def _outputs(steps: Steps) -> Steps:
    steps = Steps(*(x[:, 0, :] for x in steps))
    idle = steps.side == IDLE
    return steps._replace(row=jnp.where(idle, 0, steps.row), column=jnp.where(idle, 0, steps.column))


def run_steps(step: Callable, start, outputs, masses: tuple[Array, Array]):
    """``lax.scan`` of ``step(carry, None)`` that stops when every pair of the batch is done.

    A pair takes at most as many steps as it has positive masses, less one. Steps that are not run keep ``outputs``,
    which have the step as their leading axis.
    """
    alive = [jnp.max(jnp.sum(x > 0, axis=0, dtype=jnp.int32)) for x in masses]
    length = jnp.minimum(alive[0] + alive[1], jax.tree.leaves(outputs)[0].shape[0])

    def advance(time, state):
        carry, outputs = state
        carry, new = step(carry, None)

        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), time, axis=0)

        return carry, jax.tree.map(put, outputs, new)

    return jax.lax.fori_loop(0, length, advance, (start, outputs))[1]


@batch_minor
def plain_kernel(p: Array, q: Array) -> Steps:
    """Largest against largest, ties to the smallest index. ``p [N, B]``, ``q [M, B]`` to L = N + M - 1 steps."""
    size, batch = max(p.shape[0], q.shape[0]), p.shape[1]
    # Both sides in one array: half as many operations in the loop, which are short.
    both = jnp.stack([jnp.pad(x, ((0, size - x.shape[0]), (0, 0))) for x in (p, q)], axis=1)  # [size, 2, B]
    # A step is bound by the bytes that it touches. So indices are as narrow as they can be, and one a row: without
    # the barrier in the loop XLA would make them an array of the size of `both` and read it twice a step.
    narrow = jnp.uint8 if size <= 256 else jnp.uint16 if size <= 65536 else jnp.int32
    rows, tolerance = jax.lax.broadcasted_iota(narrow, (size, 1, 1), 0), residue(p, q)

    def step(carry: tuple[Array, Array], _):
        left, index = carry
        top = jnp.max(left, axis=0)  # [2, B]
        where = jnp.min(jnp.where(left == top[None], index, jnp.asarray(size - 1, narrow)), axis=0)
        other = top[::-1]
        used_up = (top <= other) | (jnp.abs(top - other) <= tolerance)
        rest = jnp.where(used_up, jnp.zeros_like(top), top - other)
        left = jnp.where(index == where[None], rest[None], left)
        return (left, jax.lax.optimization_barrier(index)), (top, where)

    length = p.shape[0] + q.shape[0] - 1
    idle = (jnp.zeros((length, 2, batch), p.dtype), jnp.zeros((length, 2, batch), narrow))
    tops, cells = run_steps(step, (both, rows), idle, (p, q))
    cells = cells.astype(jnp.int32)
    weight, _, _, side = settle(tops[:, :1], tops[:, 1:], tolerance[None])
    return _outputs(Steps(cells[:, :1], cells[:, 1:], side, weight))


@batch_minor
def small_kernel(p: Array, q: Array) -> Steps:
    """As :func:`plain_kernel`, and bit for bit the same off ties, for M much smaller than N."""
    sorted_p, order = (x.T for x in sort_descending(p.T, exchanges=True))
    steps = _small_steps(sorted_p, q)
    rows = jnp.take_along_axis(order, jnp.minimum(steps.row, p.shape[0] - 1), axis=0)
    return steps._replace(row=jnp.where(steps.side == IDLE, 0, rows))


def _small_steps(sorted_p: Array, q: Array) -> Steps:
    """Steps of the small-alphabet kernel for rows that are sorted already.

    Args:
        sorted_p: [N, B], masses in descending order.
        q: [M, B].

    Returns:
        N + M - 1 steps, rows by rank.
    """
    (num_rows, batch), num_columns = sorted_p.shape, q.shape[0]
    tolerance = residue(sorted_p, q)
    sorted_p = jnp.concatenate([sorted_p, jnp.zeros((1, batch), q.dtype)])
    # Slot j keeps what was left of the row that used up column j; columns are used up once.
    slot_index = column_index = _iota(q)

    def step(carry, _):
        pointer, slots, owners, q = carry
        head = jnp.take_along_axis(sorted_p, pointer, axis=0)
        kept, slot = first_maximum(slots, slot_index)
        from_slot = kept > head  # only when strictly larger: the order of ties of the plain kernel off ties of slots
        owner = jnp.max(jnp.where(slot_index == slot, owners, 0), axis=0, keepdims=True)
        rank = jnp.where(from_slot, owner, pointer)
        b, column = first_maximum(q, column_index)
        weight, left_a, left_b, side = settle(jnp.where(from_slot, kept, head), b, tolerance)
        q = jnp.where(column_index == column, left_b, q)
        target = jnp.where(from_slot, slot, column)
        slots = jnp.where(slot_index == target, left_a, slots)
        owners = jnp.where(slot_index == target, rank, owners)
        pointer = jnp.where(from_slot | (side == IDLE), pointer, pointer + 1)
        return (pointer, slots, owners, q), Steps(rank, column, side, weight)

    start = (jnp.zeros((1, batch), jnp.int32), jnp.zeros_like(q), jnp.zeros(q.shape, jnp.int32), q)
    integers = jnp.zeros((num_rows + num_columns - 1, 1, batch), jnp.int32)
    idle = Steps(integers, integers, jnp.full_like(integers, IDLE), jnp.zeros(integers.shape, q.dtype))
    return _outputs(run_steps(step, start, idle, (sorted_p, q)))


@batch_minor
def zero_kernel(p: Array, q: Array) -> Steps:
    """Closest against closest: pairs the two masses of least difference, O(N + M) a step."""
    num_rows, tolerance = p.shape[0], residue(p, q)
    values, owners = (x.T for x in sort_descending(jnp.concatenate([p, q]).T))
    index = _iota(values)

    def shift(x: Array, by: int) -> Array:
        return jnp.concatenate([x[by:], jnp.zeros_like(x[:by])])

    def pick(x: Array, at: Array) -> Array:
        return jnp.sum(jnp.where(index == at, x, 0), axis=0, keepdims=True).astype(x.dtype)

    def step(carry, _):
        values, owners = carry
        below, owner_below = shift(values, 1), shift(owners, 1)
        opposite = ((owners < num_rows) != (owner_below < num_rows)) & (below > 0)
        far = jnp.asarray(jnp.inf if jnp.issubdtype(values.dtype, jnp.floating) else jnp.iinfo(values.dtype).max)
        gap = jnp.where(opposite, values - below, far.astype(values.dtype))
        at = jnp.min(
            jnp.where(gap == jnp.min(gap, axis=0, keepdims=True), index, index.shape[0] - 1), axis=0, keepdims=True
        )
        alive = jnp.any(opposite, axis=0, keepdims=True)
        large, small, owner, partner = pick(values, at), pick(below, at), pick(owners, at), pick(owner_below, at)
        small = jnp.where(alive, small, jnp.zeros_like(small))
        weight, left, _, side = settle(large, small, tolerance)
        is_row = owner < num_rows
        # `settle` saw the larger mass as the row; it is used up only in a tie, else its partner is.
        side = jnp.where(side == IDLE, IDLE, jnp.where(is_row == (side == ROW), ROW, COLUMN))
        rest = (index != at) & (index != at + 1)
        place = jnp.sum(rest & (values >= left), axis=0, keepdims=True, dtype=jnp.int32)

        def insert(x: Array, new: Array) -> Array:
            after = jnp.where(index < place, shift(x, 2), jnp.where(index == place, new, shift(x, 1)))
            return jnp.where(alive & (index >= at), after, x)

        row, column = jnp.where(is_row, owner, partner), jnp.where(is_row, partner, owner) - num_rows
        return (insert(values, left), insert(owners, owner)), Steps(row, column, side, weight)

    return _outputs(jax.lax.scan(step, (values, owners), length=values.shape[0] - 1)[1])
