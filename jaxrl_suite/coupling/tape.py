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

ROW, COLUMN, IDLE = 0, 1, 2  # which side a step of a pair used up; IDLE steps pair nothing


class Tape(NamedTuple):
    """Path of a greedy coupling of K marginals.

    Attributes:
        indices: int32 [L, K], the cell of each step.
        sides: int32 [L], the marginal whose symbol the step used up (the first in a tie), or K if it paired nothing.
    """

    indices: Array
    sides: Array


@jax.custom_jvp
def weights_of_tape(tape: Tape, weights: Array, marginals: tuple[Array, ...]) -> Array:
    """The weights that a kernel found, as a differentiable function of the marginals.

    Args:
        tape: path of the kernel.
        weights: [L], what the kernel put into the cells; returned as it is.
        marginals: K arrays of masses.

    Returns:
        [L], ``weights``, with the derivative with respect to the marginals along the tape.
    """
    del tape, marginals
    return weights


@weights_of_tape.defjvp
def _weights_of_tape_jvp(primals, tangents):
    tape, weights, marginals = primals
    return weights_of_tape(tape, weights, marginals), tape_tangent(tape, tangents[2])


def tape_tangent(tape: Tape, tangents: tuple[Array, ...]) -> Array:
    """Change of the weights [L] when the K marginals change by ``tangents``; linear in them.

    One vector holds the remainders of all marginals, so that a step is one gather and one scatter.
    """
    num_marginals = len(tangents)
    starts, start = [], 0
    for tangent in tangents:
        starts.append(start)
        start += tangent.shape[0]

    def step(left: Array, entry: tuple[Array, Array]) -> tuple[Array, Array]:
        cell, side = entry
        here = left[cell]
        used_up = jax.lax.iota(jnp.int32, num_marginals) == side  # nothing in an idle step
        weight = jnp.sum(jnp.where(used_up, here, jnp.zeros_like(here)))
        return left.at[cell].add(-weight, unique_indices=True), weight

    cells = tape.indices + jnp.array(starts, jnp.int32)[None, :]
    return jax.lax.scan(step, jnp.concatenate(tangents), (cells, tape.sides))[1]
