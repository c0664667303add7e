"""The derivative of a greedy coupling: linear along its path.

A greedy coupling runs through steps t = 1..L. Step t pairs row i and column j, gives the cell the smaller of the two
masses that are left, and takes it from both. As long as no comparison on the way changes its outcome, each step is
linear in the marginals: with remainders a (rows) and b (columns)

    w_t = a_i  if the row was used up,  b_j  if the column was;      a_i -= w_t,  b_j -= w_t.

So the *tape* of integers (i, j, side) is all that the derivative needs: O(N + M) memory, while differentiating
through the search would store every intermediate vector. The rule is a linear scan, which serves forward mode as it
stands; JAX transposes it for reverse mode, which gives the recursion  g_i <- gw_t - g_j  (row used up)  or
g_j <- gw_t - g_i  (column used up), run backwards.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.types import Array

ROW, COLUMN, IDLE = 0, 1, 2  # which side a step used up; IDLE steps pair nothing


class Tape(NamedTuple):
    """Path of a greedy coupling of two marginals.

    Attributes:
        rows: int32 [L], row of each step.
        columns: int32 [L], column of each step.
        sides: int32 [L], ``ROW`` or ``COLUMN``, whichever the step used up (``ROW`` if both), or ``IDLE``.
    """

    rows: Array
    columns: Array
    sides: Array


@jax.custom_jvp
def weights_of_tape(tape: Tape, weights: Array, p: Array, q: Array) -> Array:
    """The weights that a kernel found, as a differentiable function of the marginals.

    Args:
        tape: path of the kernel.
        weights: [L], what the kernel put into the cells; returned as it is.
        p: [N], row masses.
        q: [M], column masses.

    Returns:
        [L], ``weights``, with the derivative with respect to ``p`` and ``q`` along the tape.
    """
    del tape, p, q
    return weights


@weights_of_tape.defjvp
def _weights_of_tape_jvp(primals, tangents):
    tape, weights, p, q = primals
    _, _, dp, dq = tangents
    return weights_of_tape(tape, weights, p, q), tape_tangent(tape, dp, dq)


def tape_tangent(tape: Tape, dp: Array, dq: Array) -> Array:
    """Change of the weights when the marginals change by ``dp [N]`` and ``dq [M]``; linear in both, [L].

    One vector holds both remainders, so that a step is one gather and one scatter.
    """
    num_rows = dp.shape[0]

    def step(left: Array, entry: Array) -> tuple[Array, Array]:
        pair = entry[:2]
        both = left[pair]
        weight = jnp.where(entry[2] == ROW, both[0], jnp.where(entry[2] == COLUMN, both[1], jnp.zeros_like(both[0])))
        return left.at[pair].add(-weight, unique_indices=True), weight

    entries = jnp.stack([tape.rows, tape.columns + num_rows, tape.sides], axis=1)
    return jax.lax.scan(step, jnp.concatenate([dp, dq]), entries)[1]
