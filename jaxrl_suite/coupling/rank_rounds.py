"""Greedy coupling of large balanced alphabets in rounds: many steps at once, and still the greedy coupling.

Sort both sides in descending order and pair rank k with rank k. That is what greedy does up to the first rank where a
remainder of an earlier pair is larger than the head of its side: then greedy would take the remainder next. So all
pairs before that rank are taken at once, the remainders are sorted in, and a new round starts. About twenty rounds
replace 8,191 steps at 4096 against 4096 symbols. Very skewed marginals need many more rounds (a thousand
times 1 against a mass of 1,000 needs a round a step), each of which costs a sort.

The sorts are what a round costs. A mass of 32 bits and its name make one integer of 64, and a sort of such integers
takes no longer than one of 32 bits, so nothing is gathered afterwards. What is sorted already, as all but the
remainders are, sorts twice as fast.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.coupling.kernels import Steps, batch_minor, residue
from jaxrl_suite.coupling.sorting import sort_descending
from jaxrl_suite.coupling.tape import COLUMN, IDLE, ROW
from jaxrl_suite.types import Array

_BLOCK = 64


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
    length, width = p.shape[0] + q.shape[0] - 1, min(p.shape[0], q.shape[0])
    tolerance = residue(p, q)[0]
    integers = jnp.zeros((length + width,), jnp.int32)
    steps = Steps(integers, integers, jnp.full_like(integers, IDLE), jnp.zeros((length + width,), p.dtype))
    names = [jnp.arange(x.shape[0], dtype=jnp.int32) for x in (p, q)]
    start = _Round(_sorted(_Side(p, names[0])), _sorted(_Side(q, names[1])), jnp.zeros((), jnp.int32), steps)

    state = start
    while True:
        # Symbols that are used up sink to the end; when few are left, the rest of the rounds sort shorter arrays.
        short = width // 2 if width >= 256 else 0

        def unfinished(state: _Round, short: int = short) -> Array:
            alive = (state.rows.masses[0] > 0) & (state.columns.masses[0] > 0)
            return alive & ((state.rows.masses[short] > 0) | (state.columns.masses[short] > 0))

        state = jax.lax.while_loop(unfinished, lambda state, w=width: _round(state, w, tolerance), state)
        if short == 0:
            return jax.tree.map(lambda x: x[:length], state.steps)
        rows, columns = (_Side(*(x[:short] for x in side)) for side in (state.rows, state.columns))
        state, width = state._replace(rows=rows, columns=columns), short


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

    def settle(side: _Side, left: Array) -> _Side:
        head = jnp.where(taken, left, side.masses[:width])
        return _sorted(side._replace(masses=jnp.concatenate([head, side.masses[width:]])))

    return _Round(settle(state.rows, left_a), settle(state.columns, left_b), state.count + number, steps)


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
    """Mass and name in one integer, so that ties go to the smaller name."""
    masses, dtype = side.masses, side.masses.dtype
    bits = masses if jnp.issubdtype(dtype, jnp.integer) else jax.lax.bitcast_convert_type(masses, jnp.int32)
    low = jnp.iinfo(jnp.int32).max - bits  # descending
    with jax.enable_x64(True):  # 64-bit integers for this sort alone
        keys = jax.lax.sort((low.astype(jnp.int64) << 32) | side.names.astype(jnp.int64))
        low, names = (keys >> 32).astype(jnp.int32), keys.astype(jnp.int32)
    bits = jnp.iinfo(jnp.int32).max - low
    return _Side(bits if jnp.issubdtype(dtype, jnp.integer) else jax.lax.bitcast_convert_type(bits, dtype), names)
