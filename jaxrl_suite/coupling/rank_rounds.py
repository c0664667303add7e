"""Greedy coupling of large balanced alphabets in rounds: many steps at once, and still the greedy coupling.

Sort both sides in descending order and pair rank k with rank k. That is what greedy does up to the first rank where a
remainder of an earlier pair is larger than the head of its side: then greedy would take the remainder next. So all
pairs before that rank are taken at once, the remainders are sorted in, and a new round starts. About twenty rounds
replace 8,191 steps at 4096 against 4096 symbols. Very skewed marginals need many more rounds (a thousand
times 1 against a mass of 1,000 needs a round a step), each of which costs a sort.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.coupling.kernels import Steps, batch_minor, residue
from jaxrl_suite.coupling.sorting import sort_descending
from jaxrl_suite.coupling.tape import COLUMN, IDLE, ROW
from jaxrl_suite.types import Array


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
    wrong = (_before(left_a) > a) | (_before(left_b) > b) | (weight <= 0)
    taken = jnp.cumsum(wrong, dtype=jnp.int32) == 0
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

    count = state.count + jnp.sum(taken, dtype=jnp.int32)
    return _Round(settle(state.rows, left_a), settle(state.columns, left_b), count, steps)


def _before(left: Array) -> Array:
    """Largest entry before each position, 0 at the first."""
    return jnp.concatenate([jnp.zeros_like(left[:1]), jax.lax.cummax(left)[:-1]])


def _sorted(side: _Side) -> _Side:
    # Pairs run one after another (`batch_minor` keeps vmap out), so the sort may take the branch that it needs.
    masses, order = sort_descending(side.masses, exchanges=True)
    return _Side(masses, side.names[order])
