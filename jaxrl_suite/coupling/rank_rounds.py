"""Greedy coupling of large balanced alphabets in rounds: many steps at once, and still the greedy coupling.

Sort both sides in descending order and pair rank k with rank k. That is what greedy does up to the first rank where a
remainder of an earlier pair is larger than the head of its side: then greedy would take the remainder next. So all
pairs before that rank are taken at once, the remainders are sorted in, and a new round starts. About ten rounds
replace 8,191 steps at 4096 against 4096 symbols. Very skewed marginals need many more rounds (a thousand
times 1 against a mass of 1,000 needs a round a step), each of which costs a merge.

Order is what a round costs. A mass of 32 bits and its name make one integer of 64, the key, so that nothing is gathered
afterwards. Only the remainders are sorted; they are merged into the rest, which is in order, by a bitonic network
(Batcher 1968): minima and maxima of whole halves, which vectorise, where a sort mispredicts its branches. Masses of 64
bits have no room for a name and are sorted anew every round.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.coupling.kernels import Steps, batch_minor, residue
from jaxrl_suite.coupling.sorting import sort_descending
from jaxrl_suite.coupling.tape import COLUMN, IDLE, ROW
from jaxrl_suite.types import Array

_BLOCK = 64
_ABSENT = np.iinfo(np.int32).max << 32  # the least key of a symbol without mass
_NOTHING = _ABSENT + np.iinfo(np.int32).max  # the largest one, of no symbol


class _Side(NamedTuple):
    masses: Array  # [N], descending
    names: Array  # int32 [N]


class _Round(NamedTuple):
    rows: _Side
    columns: _Side
    count: Array
    steps: Steps


@batch_minor
def large_kernel(p: Array, q: Array) -> Steps:
    """As ``plain_kernel`` off ties, one pair after another. ``p [N, B]``, ``q [M, B]`` to L = N + M - 1 steps."""
    steps = jax.lax.map(lambda pair: _pair(*pair), (p.T, q.T))
    return jax.tree.map(jnp.transpose, steps)


def _pair(p: Array, q: Array) -> Steps:
    length, tolerance = p.shape[0] + q.shape[0] - 1, residue(p, q)[0]
    rows, columns = _start(p), _start(q)
    width = min(rows.masses.shape[0], columns.masses.shape[0])
    integers = jnp.zeros((length + width,), jnp.int32)
    steps = Steps(integers, integers, jnp.full_like(integers, IDLE), jnp.zeros((length + width,), p.dtype))

    state = _Round(rows, columns, jnp.zeros((), jnp.int32), steps)
    while True:
        # Symbols that are used up sink to the end; when few are left, the rest of the rounds work on shorter arrays.
        short = width // 2 if width >= 1024 else 0

        def unfinished(state: _Round, short: int = short) -> Array:
            alive = (state.rows.masses[0] > 0) & (state.columns.masses[0] > 0)
            return alive & ((state.rows.masses[short] > 0) | (state.columns.masses[short] > 0))

        state = jax.lax.while_loop(unfinished, lambda state, w=width: _round(state, w, tolerance), state)
        if short == 0:
            return jax.tree.map(lambda x: x[:length], state.steps)
        rows, columns = (_Side(*(x[:short] for x in side)) for side in (state.rows, state.columns))
        state, width = state._replace(rows=rows, columns=columns), short


def _start(masses: Array) -> _Side:
    """In order, with a power of two of symbols, as merging needs it."""
    size = masses.shape[0]
    masses = jnp.pad(masses, (0, (1 << (size - 1).bit_length()) - size))
    return _sorted(_Side(masses, jax.lax.iota(jnp.int32, masses.shape[0])))


def _round(state: _Round, width: int, tolerance: Array) -> _Round:
    a, b = state.rows.masses[:width], state.columns.masses[:width]
    equal = jnp.abs(a - b) <= tolerance
    zero = jnp.zeros_like(a)
    left_a = jnp.where(equal | (a <= b), zero, a - b)
    left_b = jnp.where(equal | (b <= a), zero, b - a)
    weight = jnp.minimum(a, b)
    number = _first_conflict(a, b, left_a, left_b)
    taken = jax.lax.iota(jnp.int32, width) < number
    side = jnp.where(taken, jnp.where(equal | (a <= b), ROW, COLUMN), IDLE)
    found = Steps(
        jnp.where(taken, state.rows.names[:width], 0),
        jnp.where(taken, state.columns.names[:width], 0),
        side.astype(jnp.int32),
        jnp.where(taken, weight, zero),
    )
    # What is written beyond the pairs taken is idle, and the next round overwrites it.
    steps = jax.tree.map(lambda x, new: jax.lax.dynamic_update_slice(x, new, (state.count,)), state.steps, found)

    settle = _merge_remainders if a.dtype.itemsize == 4 else _sort_remainders
    left_a, left_b = jnp.where(taken, left_a, zero), jnp.where(taken, left_b, zero)
    return _Round(*settle(state.rows, state.columns, left_a, left_b, number), state.count + number, steps)


def _sort_remainders(rows: _Side, columns: _Side, left_a: Array, left_b: Array, number: Array) -> tuple[_Side, _Side]:
    """Both sides after a round that took ``number`` pairs and left these masses of them: everything sorted anew."""

    def settle(side: _Side, left: Array) -> _Side:
        width = left.shape[0]
        head = jnp.where(jax.lax.iota(jnp.int32, width) < number, left, side.masses[:width])
        return _sorted(side._replace(masses=jnp.concatenate([head, side.masses[width:]])))

    return settle(rows, left_a), settle(columns, left_b)


def _merge_remainders(rows: _Side, columns: _Side, left_a: Array, left_b: Array, number: Array) -> tuple[_Side, _Side]:
    """As ``_sort_remainders``, but only the remainders are sorted, and merged into what is in order already.

    A pair leaves a remainder on one side at most. So one sort serves both: rows by their keys, which are not
    negative, columns by the complement of theirs, which is.
    """
    width = left_a.shape[0]
    counts = [jnp.sum(left > 0, dtype=jnp.int32) for left in (left_a, left_b)]
    with jax.enable_x64(True):  # 64-bit integers for the keys alone
        row_keys, column_keys = _keys(left_a, rows.names[:width]), _keys(left_b, columns.names[:width])
        left = jnp.where(left_a > 0, row_keys, jnp.where(left_b > 0, ~column_keys, _NOTHING))
        left = _sort_first(left, number)  # columns from the last to the first, rows from the first to the last
        falling = jnp.pad(left[::-1], (0, width))
        falling = jax.lax.dynamic_slice(falling, (width - counts[0] - counts[1],), (width,))
        return _merge(rows, falling, counts[0], number), _merge(columns, ~left, counts[1], number)


def _sort_first(keys: Array, number: Array) -> Array:
    """Sorts ``keys`` of which all but the first ``number`` are ``_NOTHING``."""
    width = keys.shape[0]
    if width < _BLOCK:
        return jax.lax.sort(keys)
    sizes = [width * eighths // 8 for eighths in range(1, 9)]

    def branch(size: int) -> Callable[[Array], Array]:
        return lambda keys: jnp.concatenate([jax.lax.sort(keys[:size]), keys[size:]])

    smallest = (jnp.maximum(number, 1) - 1) * 8 // width
    return jax.lax.switch(smallest, [branch(size) for size in sizes], keys)


def _merge(side: _Side, falling: Array, count: Array, number: Array) -> _Side:
    """The side in order, its first ``number`` symbols replaced by the first ``count`` of the ``falling`` keys."""
    size, width = side.masses.shape[0], falling.shape[0]
    rest = jnp.pad(_keys(*side), (0, width), constant_values=_NOTHING)
    rest = jax.lax.dynamic_slice(rest, (number - count,), (size,))  # starts at ``count``
    replaced = jax.lax.iota(jnp.int32, size) < count
    keys, half = jnp.where(replaced, jnp.pad(falling, (0, size - width)), rest), size // 2

    def ordered_half(keys: Array) -> Array:
        return jnp.concatenate([_ordered(keys[:half]), keys[half:]])

    # Nothing was put in; the second half holds no mass; or all is to be ordered.
    needed = jnp.where(count == 0, 0, jnp.where(keys[half] < _ABSENT, 2, 1))
    keys = jax.lax.switch(needed, [lambda keys: keys, ordered_half, _ordered], keys)
    return _side(keys, side.masses.dtype)


def _ordered(keys: Array) -> Array:
    """Bitonic keys, first falling and then rising, a power of two of them, in order.

    Short strides do not vectorise, so the second half of them runs along the first axis as well, on the transpose.
    """
    keys = _order_columns(keys.reshape(1 << (keys.shape[0].bit_length() // 2), -1))
    return _order_columns(keys.T).T.reshape(-1)


def _order_columns(keys: Array) -> Array:
    """Exchanges along the first axis of ``keys [N, M]``, at N/2, ..., 2, 1 rows' distance.

    Afterwards no entry of a row is above one of the next row, if the keys, row after row, were bitonic.
    """
    shape, stride = keys.shape, keys.shape[0] // 2
    while stride:
        keys = keys.reshape(-1, 2, stride, shape[1])
        first, second = keys[:, 0], keys[:, 1]
        keys = jnp.stack([jnp.minimum(first, second), jnp.maximum(first, second)], axis=1)
        stride //= 2
    return keys.reshape(shape)


def _first_conflict(a: Array, b: Array, left_a: Array, left_b: Array) -> Array:
    """int32 [], a rank up to which no earlier remainder is larger than the head of its side, and no head is zero.

    Blocks of ranks first, then the ranks of one block: a cumulative maximum over all ranks costs as much as a sort.
    A block that only might hold a conflict ends the round as well, so the answer may stop short of the first one.
    """
    size = _BLOCK if a.shape[0] % _BLOCK == 0 else a.shape[0]
    blocks, ranks = (jax.lax.iota(jnp.int32, number) for number in (a.shape[0] // size, size))

    def largest(values: Array, index: Array, shift: int) -> Array:
        """Of the entries up to each position, itself left out if ``shift`` is 1; 0 if there is none."""
        return jnp.max(jnp.where(index[None, :] + shift <= index[:, None], values[None, :], 0), axis=1)

    through = [largest(jnp.max(left.reshape(-1, size), axis=1), blocks, 0) for left in (left_a, left_b)]
    doubtful = [(most > x[size - 1 :: size]) | (x[size - 1 :: size] <= 0) for most, x in zip(through, (a, b))]
    block = jnp.min(jnp.where(doubtful[0] | doubtful[1], blocks, blocks.shape[0] - 1))

    def wrong(masses: Array, left: Array, most: Array) -> Array:
        masses, left = (jax.lax.dynamic_slice_in_dim(x, block * size, size) for x in (masses, left))
        before = jnp.max(jnp.where(blocks < block, most, 0))
        return (jnp.maximum(largest(left, ranks, 1), before) > masses) | (masses <= 0)

    conflict = wrong(a, left_a, through[0]) | wrong(b, left_b, through[1])
    return block * size + jnp.min(jnp.where(conflict, ranks, size))


def _sorted(side: _Side) -> _Side:
    if side.masses.dtype.itemsize == 4:
        return _sorted_whole(side)
    # Pairs run one after another (`batch_minor` keeps vmap out), so the sort may take the branch that it needs.
    masses, order = sort_descending(side.masses, exchanges=True)
    return _Side(masses, side.names[order])


def _sorted_whole(side: _Side) -> _Side:
    with jax.enable_x64(True):  # 64-bit integers for this sort alone
        return _side(jax.lax.sort(_keys(*side)), side.masses.dtype)


def _keys(masses: Array, names: Array) -> Array:
    """int64, not negative: masses of 32 bits from the largest to the least, and ties by name."""
    integral = jnp.issubdtype(masses.dtype, jnp.integer)
    bits = masses if integral else jax.lax.bitcast_convert_type(masses, jnp.int32)
    return ((jnp.iinfo(jnp.int32).max - bits).astype(jnp.int64) << 32) | names.astype(jnp.int64)


def _side(keys: Array, dtype: jnp.dtype) -> _Side:
    bits = jnp.iinfo(jnp.int32).max - (keys >> 32).astype(jnp.int32)
    masses = bits if jnp.issubdtype(dtype, jnp.integer) else jax.lax.bitcast_convert_type(bits, dtype)
    return _Side(masses, keys.astype(jnp.int32))
