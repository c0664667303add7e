"""Belief, greedy code and coupling of a coding game in one pass, with the messages kept in order of belief.

A step of the game needs the belief sorted three times: for the path of the encoder, for the coupling of its code, and
to undo both. But the order changes little from step to step, and the code of algorithm 1 is simple in it: the first
``giant`` messages are one code, perhaps the last two are another, and the rest stand alone. So everybody keeps the
list of messages in (nearly) descending order of belief, and nothing is named by index until the end.

One sort of integers a step, the leading bits of a mass with the rank in the low bits, puts the list in order again.
Masses that differ by less than one part in 10,000 (float32, 512 messages) may stay exchanged. That is sound: merging
the first ``giant`` messages of *any* order is a map whose entropy is computed exactly, any order of pairing is a
coupling with the right marginals, and sender and receiver run this very code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.coupling.ebim import path_entropies, rate_slack
from jaxrl_suite.coupling.kernels import small_steps
from jaxrl_suite.types import Array


class RankedBelief(NamedTuple):
    """Beliefs of many lanes.

    Attributes:
        masses: [B, N], probabilities, nearly descending.
        names: int32 [B, N], the message at each rank.
    """

    masses: Array
    names: Array


class RankedCode(NamedTuple):
    """Code and coupling of one step in each lane.

    Attributes:
        giant: int32 [B], size of the first block.
        pair: bool [B, N], the two messages of the last block, if there is one.
        cells: [B, A, N + 1], joint law of action and code: the giant block stands at rank ``giant - 1``, the pair at N.
    """

    giant: Array
    pair: Array
    cells: Array


def uniform_belief(num_messages: int, num_lanes: int, dtype: jnp.dtype) -> RankedBelief:
    """All messages equally probable."""
    masses = jnp.full((num_lanes, num_messages), 1 / num_messages, dtype)
    return RankedBelief(masses, jax.lax.broadcasted_iota(jnp.int32, masses.shape, 1))


def ranked_code(belief: RankedBelief, action_laws: Array, rate: Array) -> RankedCode:
    """Code of at most ``rate`` bits and its coupling with the laws of the actions ``[B, A]``."""
    masses, size = belief.masses, belief.masses.shape[1]
    rank = jax.lax.iota(jnp.int32, size)[None]
    entropies = jax.vmap(path_entropies)(masses)
    position = jnp.argmax(entropies <= rate + rate_slack(masses.dtype), axis=1).astype(jnp.int32)
    step, is_split = (position + 1) // 2, position % 2 == 1
    count = jnp.sum(masses > 0, axis=1, dtype=jnp.int32)
    giant = jnp.where(is_split, step, step + 1)
    giant = jnp.where(is_split & (step >= count - 1), count, giant)  # S_{n-1}: everything is one block
    in_giant = rank < giant[:, None]
    pair = is_split[:, None] & (rank >= count[:, None] - 2) & (rank < count[:, None]) & ~in_giant
    zero = jnp.zeros_like(masses)
    giant_mass = jnp.sum(jnp.where(in_giant, masses, zero), axis=1, keepdims=True)
    pair_mass = jnp.sum(jnp.where(pair, masses, zero), axis=1, keepdims=True)
    first = giant[:, None] - 1
    rows = jnp.where(rank == first, giant_mass, jnp.where(in_giant | pair, zero, masses))
    steps = small_steps(rows.T, pair_mass.T, action_laws.T, first=first.T)
    # Every action has a row of its own, so that a step adds to one cell.
    lanes = jax.lax.broadcasted_iota(jnp.int32, steps.row.shape, 1)
    cells = jnp.zeros((masses.shape[0], action_laws.shape[1], size + 1), masses.dtype)
    return RankedCode(giant, pair, cells.at[lanes, steps.column, steps.row].add(steps.weight))


def action_weights(code: RankedCode, belief: RankedBelief, messages: Array) -> Array:
    """Law of the action given each lane's message ``[B, A]``, times the probability of the message's code."""
    size = belief.masses.shape[1]
    rank = jnp.argmax(belief.names == messages[:, None], axis=1).astype(jnp.int32)
    paired = jnp.take_along_axis(code.pair, rank[:, None], axis=1)[:, 0]
    place = jnp.where(rank < code.giant, code.giant - 1, jnp.where(paired, size, rank))
    return jnp.take_along_axis(code.cells, place[:, None, None], axis=2)[:, :, 0]


def ranked_update(belief: RankedBelief, code: RankedCode, actions: Array) -> RankedBelief:
    """Bayes' rule; an action that is impossible under every message leaves the belief as it was."""
    masses, size = belief.masses, belief.masses.shape[1]
    rank = jax.lax.iota(jnp.int32, size)[None]
    cells = jnp.take_along_axis(code.cells, actions[:, None, None], axis=1)[:, 0]
    in_giant, zero = rank < code.giant[:, None], jnp.zeros_like(masses)

    def shared(block: Array, cell: Array) -> Array:
        inside = jnp.where(block, masses, zero)
        total = jnp.sum(inside, axis=1, keepdims=True)
        return inside * (cell / jnp.where(total > 0, total, jnp.ones_like(total)))

    giant_cell = jnp.take_along_axis(cells, code.giant[:, None] - 1, axis=1)
    alone = jnp.where(in_giant | code.pair, zero, cells[:, :-1])
    posterior = alone + shared(in_giant, giant_cell) + shared(code.pair, cells[:, -1:])
    total = jnp.sum(posterior, axis=1, keepdims=True)
    posterior = jnp.where(total > 0, posterior / jnp.where(total > 0, total, jnp.ones_like(total)), masses)
    order = _nearly_descending(posterior)
    return RankedBelief(*(jnp.take_along_axis(x, order, axis=1) for x in (posterior, belief.names)))


def _nearly_descending(masses: Array) -> Array:
    """int32 [B, N], an order by the leading bits of the masses; ties by rank."""
    integer = {4: jnp.int32, 8: jnp.int64}[masses.dtype.itemsize]
    keys = jnp.iinfo(integer).max - jax.lax.bitcast_convert_type(masses, integer)
    low = (1 << max(1, (masses.shape[1] - 1).bit_length())) - 1
    rank = jax.lax.broadcasted_iota(integer, masses.shape, 1)
    return (jnp.sort((keys & ~low) | rank, axis=1) & low).astype(jnp.int32)
