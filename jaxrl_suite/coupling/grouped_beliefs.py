"""Belief, greedy code and coupling of a coding game in one pass, with messages of equal belief kept as one group.

Messages start equally probable, and a step treats those of one mass alike: the giant block of the encoder is scaled
as a whole, and of messages that stand alone an action keeps some whole and a few in part. So a belief over 512
messages is a list of a few dozen groups (mass, size, first name), each an interval of names: a group is only ever cut
into intervals. Encoder, coupling and Bayes' rule then cost a few operations a group rather than a message.

*Encoder.* Along algorithm 1 the giant block grows a message at a time; within a group the entropy of the code is a
closed form of the number of messages taken, so the first code that fits the rate is found by bisection.

*Coupling.* As long as a message of mass u fits into the largest action, greedy gives it to that action whole. Of c
messages, column b_j so gets the number of keys b_j - i u (i = 0, 1, ...) among the c largest of all: those above the
level L with sum_j (b_j - L)^+ = c u, rounded down, and the few left over one by one. Messages that do not fit use up
a column each, so there are at most A of them. The coupling is the greedy one, up to which of equally probable messages
gets which action.

One sort of integers a step, the leading bits of a mass with the place in the low bits, puts the groups in order again.
Masses that differ by less than one part in 10,000 (float32) may stay exchanged. That is sound: merging the first
messages of *any* order is a map whose entropy is computed exactly, any order of pairing is a coupling with the
right marginals, and sender and receiver run this very code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.coupling.ebim import rate_slack
from jaxrl_suite.coupling.kernels import first_maximum, residue, settle
from jaxrl_suite.distributions import entropy_terms
from jaxrl_suite.types import Array

SHORT = 32  # groups that mostly suffice, a power of two


class GroupedBelief(NamedTuple):
    """Beliefs of many lanes, B lanes of G groups; a group that is absent has mass and size 0 and comes last.

    Attributes:
        masses: [G, B], probability of *one* message of the group, nearly descending.
        sizes: int32 [G, B], number of its messages.
        firsts: int32 [G, B], the smallest of its messages; the others follow it.
    """

    masses: Array
    sizes: Array
    firsts: Array


class _Code(NamedTuple):
    """How many messages of each group are in the first block, alone, or in the last block of two."""

    giant: Array  # int32 [G, B], the first ones
    alone: Array
    pair: Array  # the last ones
    giant_mass: Array  # [1, B]
    pair_mass: Array


class GroupedCode(NamedTuple):
    """Code and coupling of one step in each lane, T events of the coupling.

    Attributes:
        code: which messages share a code.
        cells: [A + 2, A, B], joint law of rows and actions for the rows that may be in several cells: the message
            that used up each action, then the first block and the block of two.
        broken_group: int32 [A, B], group of the message that used up each action.
        broken_offset: int32 [A, B], its number among those of the group that are alone.
        group: int32 [T, B], group of an event.
        offset: int32 [T, B], number of the first message that it gives away, among those of the group that are alone.
        counts: int32 [T, A, B], how many messages go to each action whole, in this order.
    """

    code: _Code
    cells: Array
    broken_group: Array
    broken_offset: Array
    group: Array
    offset: Array
    counts: Array


def uniform_groups(num_messages: int, num_lanes: int, capacity: int, dtype: jnp.dtype) -> GroupedBelief:
    """All messages equally probable: one group."""
    first = jax.lax.broadcasted_iota(jnp.int32, (capacity, num_lanes), 0) == 0
    sizes = jnp.where(first, num_messages, 0)
    masses = jnp.where(first, jnp.asarray(1 / num_messages, dtype), jnp.zeros((), dtype))
    return GroupedBelief(masses, sizes, jnp.zeros_like(sizes))


def new_groups(num_actions: int) -> int:
    """By how many groups a belief may grow in one step.

    The blocks of the code cut two groups; a message that uses up an action stands alone and cuts its group; rounding
    may give away the messages of a group in several parts (the loop over events has room for as many).
    """
    return 3 * num_actions + 4


def num_groups(belief: GroupedBelief) -> Array:
    """int32 [], the most groups that a lane has."""
    return jnp.max(jnp.sum(belief.sizes > 0, axis=0, dtype=jnp.int32))


def resized(belief: GroupedBelief, capacity: int) -> GroupedBelief:
    """The same groups in arrays of another size, those beyond it dropped."""
    size = belief.sizes.shape[0]
    return jax.tree.map(lambda x: jnp.pad(x, ((0, max(0, capacity - size)), (0, 0)))[:capacity], belief)


def read_belief(belief: GroupedBelief, messages: Array) -> tuple[Array, Array]:
    """Belief in each lane's message [B] and the most probable message int32 [B]."""
    inside = (messages >= belief.firsts) & (messages < belief.firsts + belief.sizes)
    truth = jnp.sum(jnp.where(inside, belief.masses, jnp.zeros_like(belief.masses)), axis=0)
    _, likeliest = first_maximum(belief.masses, _iota(belief.sizes))
    return truth, _pick(belief.firsts, likeliest)[0]


def grouped_code(belief: GroupedBelief, action_laws: Array, rate: Array) -> GroupedCode:
    """Code of at most ``rate`` bits and its coupling with the laws of the actions ``[A, B]``."""
    code = _encode(belief, rate)
    (num_groups, batch), num_actions = belief.sizes.shape, action_laws.shape[0]
    tolerance = residue(jnp.maximum(belief.masses[:1], code.giant_mass), action_laws)
    action, row = _iota(action_laws), _iota(jnp.zeros((num_actions + 2, batch)))
    zero, none = jnp.zeros_like(action_laws), jnp.zeros((num_actions, batch), jnp.int32)
    length = _events(num_groups, num_actions)
    alone_groups = code.alone > 0
    begin = jnp.min(jnp.where(alone_groups, _iota(code.alone), num_groups), axis=0, keepdims=True)

    def head_of(pointer: Array) -> tuple[Array, Array]:
        at = jnp.minimum(pointer, num_groups - 1)
        mass, count = (jnp.take_along_axis(x, at, axis=0) for x in (belief.masses, code.alone))
        return jnp.where((pointer < num_groups) & (count > 0), mass, jnp.zeros_like(mass)), count

    def unfinished(carry) -> Array:
        time, (pointer, _, slots, left, *_), _ = carry
        heads = jnp.maximum(head_of(pointer)[0], jnp.max(slots, axis=0, keepdims=True))
        return (time < length) & jnp.any((heads > 0) & jnp.any(left > 0, axis=0, keepdims=True))

    def event(carry):
        time, (pointer, offset, slots, left, cells, broken_group, broken_offset), outputs = carry
        head, count = head_of(pointer)
        kept, slot = first_maximum(slots, row)
        from_slot = kept > head
        most, column = first_maximum(left, action)
        whole = ~from_slot & (head > 0) & (head <= most)
        counts, filled = _give_whole(head, count - offset, left)
        filled = jnp.where((counts > 0) & (filled <= tolerance), zero, filled)
        counts = jnp.where(whole, counts, 0)
        # One row against one column: a remainder, or a message that does not fit.
        weight, left_row, left_column, _ = settle(jnp.where(from_slot, kept, head), most, tolerance)
        single = ~whole & (weight > 0)
        breaks = single & ~from_slot
        target = jnp.where(from_slot, slot, column)
        here, there = single & (row == target), action == column
        slots = jnp.where(here, left_row, slots)
        cells = jnp.where(here[:, None] & there[None], cells + weight[None], cells)
        broken_group = jnp.where(breaks & there, pointer, broken_group)
        broken_offset = jnp.where(breaks & there, offset, broken_offset)
        left = jnp.where(whole, filled, jnp.where(single & there, left_column, left))
        given = (pointer, offset, counts)
        outputs = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, time, axis=0), outputs, given
        )
        offset = offset + jnp.sum(counts, axis=0, keepdims=True, dtype=jnp.int32) + breaks
        ended = ~from_slot & (offset >= count)
        state = (jnp.where(ended, pointer + 1, pointer), jnp.where(ended, 0, offset), slots, left)
        return time + 1, (*state, cells, broken_group, broken_offset), outputs

    slots = jnp.concatenate([zero, code.giant_mass, code.pair_mass])
    cells = jnp.zeros((num_actions + 2, num_actions, batch), action_laws.dtype)
    start = (begin, jnp.zeros_like(begin), slots, action_laws, cells, none - 1, none)
    integers = jnp.zeros((length, 1, batch), jnp.int32)
    outputs = (integers, integers, jnp.zeros((length, num_actions, batch), jnp.int32))
    _, state, outputs = jax.lax.while_loop(unfinished, event, (jnp.zeros((), jnp.int32), start, outputs))
    return GroupedCode(code, *state[4:], outputs[0][:, 0], outputs[1][:, 0], outputs[2])


def action_weights(code: GroupedCode, belief: GroupedBelief, messages: Array) -> Array:
    """Law of the action given each lane's message ``[A, B]``, times the probability of the message's code."""
    inside = (messages >= belief.firsts) & (messages < belief.firsts + belief.sizes)
    group = jnp.sum(jnp.where(inside, _iota(inside), 0), axis=0, keepdims=True, dtype=jnp.int32)
    mass, first, giant, alone = (
        _pick(x, group) for x in (belief.masses, belief.firsts, code.code.giant, code.code.alone)
    )
    number = messages - first - giant  # [1, B], among those that are alone
    is_giant, is_pair = number < 0, number >= alone
    single = ~is_giant & ~is_pair & jnp.any(inside, axis=0, keepdims=True)
    # Which action got it whole.
    place = (number - code.offset)[:, None]
    end = jnp.cumsum(code.counts, axis=1, dtype=jnp.int32)
    taken = single[:, None] & (code.group == group)[:, None] & (place >= end - code.counts) & (place < end)
    weights = jnp.where(jnp.any(taken, axis=0), mass, jnp.zeros_like(mass))
    broken = single & (code.broken_group == group) & (code.broken_offset == number)
    rows = jnp.concatenate([broken, is_giant, is_pair])
    return weights + jnp.sum(jnp.where(rows[:, None], code.cells, jnp.zeros_like(code.cells)), axis=0)


def grouped_update(belief: GroupedBelief, code: GroupedCode, actions: Array, num_messages: int) -> GroupedBelief:
    """Bayes' rule; an action that is impossible under every message leaves the belief as it was.

    The number of messages, the longest list that there may be, decides how many bits the order reads, so that it is the
    same in lists of every length.
    """
    groups, which = _iota(belief.sizes), _iota(code.broken_group) == actions
    parts = code.code
    cells = jnp.sum(jnp.where(which[None], code.cells, jnp.zeros_like(code.cells)), axis=1)  # [A + 2, B]
    masses = belief.masses

    def share(cell: Array, block: Array) -> Array:
        return cell / jnp.where(block > 0, block, jnp.ones_like(block))

    giant = GroupedBelief(masses * share(cells[-2:-1], parts.giant_mass), parts.giant, belief.firsts)
    # The block of two is in the last two groups.
    last = jnp.max(jnp.where(belief.sizes > 0, groups, 0), axis=0, keepdims=True)
    two = jnp.concatenate([jnp.maximum(last - 1, 0), last])
    scaled = masses * share(cells[-1:], parts.pair_mass)
    distinct = (two[:1] < two[1:]) | (jnp.arange(2)[:, None] == 1)
    pair = GroupedBelief(
        jnp.take_along_axis(scaled, two, axis=0),
        jnp.where(distinct, jnp.take_along_axis(parts.pair, two, axis=0), 0),
        jnp.take_along_axis(belief.firsts + belief.sizes - parts.pair, two, axis=0),
    )
    begin = belief.firsts + parts.giant
    counts = jnp.sum(jnp.where(which[None], code.counts, 0), axis=1, dtype=jnp.int32)  # [T, B]
    before = jnp.sum(jnp.where(_iota(which)[None] < actions, code.counts, 0), axis=1, dtype=jnp.int32)
    at = jnp.minimum(code.group, groups.shape[0] - 1)
    firsts = jnp.take_along_axis(begin, at, axis=0) + code.offset + before
    alone = GroupedBelief(jnp.take_along_axis(masses, at, axis=0), counts, firsts)
    at = jnp.maximum(code.broken_group, 0)
    firsts = jnp.take_along_axis(begin, at, axis=0) + code.broken_offset
    broken = GroupedBelief(cells[:-2], (code.broken_group >= 0).astype(jnp.int32), firsts)
    found = jax.tree.map(lambda *xs: jnp.concatenate(xs), giant, alone, broken, pair)
    found = found._replace(masses=jnp.where(found.sizes > 0, found.masses, jnp.zeros((), masses.dtype)))
    total = sum(_total(part.masses * part.sizes) for part in (giant, alone, broken, pair))
    possible = total > 0
    places = num_messages + _events(num_messages, cells.shape[0] - 2) + cells.shape[0]
    order = _nearly_descending(found.masses, places)[: groups.shape[0]]
    after = jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=0), found)
    posterior = after.masses / jnp.where(possible, total, jnp.ones_like(total))
    after = GroupedBelief(posterior, jnp.where(posterior > 0, after.sizes, 0), after.firsts)
    return jax.tree.map(lambda new, old: jnp.where(possible, new, old), after, belief)


def _encode(belief: GroupedBelief, rate: Array) -> _Code:
    """The first code of algorithm 1 that fits: the likeliest messages as one, perhaps the last two as another."""
    masses, sizes, _ = belief
    group = _iota(sizes)
    ends, terms = jnp.cumsum(sizes, axis=0, dtype=jnp.int32), entropy_terms(masses)
    starts, of_group = ends - sizes, masses * sizes
    blocks = _running(of_group) - of_group
    tails = terms * sizes
    tails = _running(tails, reverse=True) - tails
    count = ends[-1:]
    last = jnp.max(jnp.where(sizes > 0, group, 0), axis=0, keepdims=True)
    low = _pick(masses, last)
    second = jnp.where(_pick(sizes, last) > 1, low, _pick(masses, jnp.maximum(last - 1, 0)))
    loss = entropy_terms(low) + entropy_terms(second) - entropy_terms(low + second)
    limit = rate + rate_slack(masses.dtype)

    def fits(entropy: Array, number: Array) -> Array:
        return (entropy - loss <= limit) | (number >= count)

    # The group where the block stops growing, then the number of its messages.
    at_end = entropy_terms(jnp.minimum(blocks + of_group, 1)) + tails
    stop = jnp.min(jnp.where(fits(at_end, ends), group, last), axis=0, keepdims=True)
    start, size, mass, term, block, tail = (_pick(x, stop) for x in (starts, sizes, masses, terms, blocks, tails))

    def entropy_at(number: Array) -> Array:
        return entropy_terms(jnp.minimum(block + number * mass, 1)) + (size - number) * term + tail

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # the first does not fit, the second does
        middle = (low + high) // 2
        good = fits(entropy_at(middle), start + middle)
        inner = middle > low
        return jnp.where(inner & ~good, middle, low), jnp.where(inner & good, middle, high)

    def apart(bounds: tuple[Array, Array]) -> Array:
        return jnp.any(bounds[1] - bounds[0] > 1)

    _, number = jax.lax.while_loop(apart, halve, (jnp.zeros_like(size), size))
    total = start + number
    is_split = (entropy_at(number) > limit) & (total < count)
    everything = is_split & (total >= count - 1)
    total, is_split = jnp.where(everything, count, total), is_split & ~everything
    giant = jnp.clip(total - starts, 0, sizes)
    pair = jnp.where(is_split, jnp.clip(ends - jnp.maximum(starts, count - 2), 0, sizes), 0)
    return _Code(giant, sizes - giant - pair, pair, _total(masses * giant), _total(masses * pair))


def _give_whole(mass: Array, number: Array, left: Array) -> tuple[Array, Array]:
    """How many of ``number`` messages of one mass each column gets ``[A, B]``, and what is left of the columns."""
    safe = jnp.where(mass > 0, mass, jnp.ones_like(mass))
    number = number.astype(left.dtype)
    room = jnp.minimum(jnp.floor(left / safe), number)
    above = left[None] >= left[:, None]  # [A, A, B], the columns above each
    highest = jnp.sum(jnp.where(above, left[None], jnp.zeros_like(left)[None]), axis=1)
    level = jnp.max((highest - number * mass) / jnp.sum(above, axis=1), axis=0, keepdims=True)
    counts = jnp.clip(jnp.floor((left - level) / safe), 0, room)
    # Rounding must not give away more than there are.
    counts = jnp.clip(counts, 0, jnp.maximum(number - (jnp.cumsum(counts, axis=0) - counts), 0))
    remaining = number - jnp.sum(counts, axis=0, keepdims=True)
    column = _iota(left)
    for _ in range(left.shape[0]):
        rest = jnp.where(counts < room, left - counts * mass, jnp.full_like(left, -1))
        most, best = first_maximum(rest, column)
        one = (remaining > 0) & (most >= 0)
        counts = jnp.where(one & (column == best), counts + 1, counts)
        remaining = jnp.where(one, remaining - 1, remaining)
    return counts.astype(jnp.int32), jnp.maximum(left - counts * mass, 0)


def _running(x: Array, *, reverse: bool = False) -> Array:
    """Sums along the first axis, whose rounding does not depend on how many zeros follow.

    A lane must go on in the same way whatever lists its neighbours need. So entries are added in blocks of one length,
    in an order that is written down (that of a reduction depends on its shape), and then the totals of the blocks.
    """
    inside = _blocks(x)
    for power in range((SHORT - 1).bit_length()):
        step = 1 << power
        shift = ((0, 0), (0, step), (0, 0)) if reverse else ((0, 0), (step, 0), (0, 0))
        inside = inside + jnp.pad(inside[:, step:] if reverse else inside[:, :-step], shift)
        inside = jax.lax.optimization_barrier(inside)  # fused, the sums before would be taken twice each time
    totals = inside[:, 0] if reverse else inside[:, -1]
    others = jax.lax.cumsum(totals, axis=0, reverse=reverse) - totals
    return (inside + others[:, None]).reshape(-1, x.shape[1])[: x.shape[0]]


def _total(x: Array) -> Array:
    """[1, B], the sums of the columns, rounded in the same way."""
    blocks = _blocks(x)
    while blocks.shape[1] > 1:
        half = blocks.shape[1] // 2
        blocks = blocks[:, :half] + blocks[:, half:]
    return jnp.sum(blocks[:, 0], axis=0, keepdims=True)


def _blocks(x: Array) -> Array:
    x = jax.lax.optimization_barrier(x)  # a product fused into a sum would be rounded once less
    return jnp.pad(x, ((0, -x.shape[0] % SHORT), (0, 0))).reshape(-1, SHORT, x.shape[1])


def _events(num_groups: int, num_actions: int) -> int:
    """How many events a coupling may have: groups, cuts of remainders, and rounding."""
    return num_groups + 3 * num_actions + 4


def _iota(x: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)


def _pick(x: Array, at: Array) -> Array:
    """[1, B], the entry of each column at ``at [1, B]``."""
    return jnp.take_along_axis(x, at, axis=0)


def _nearly_descending(masses: Array, places: int) -> Array:
    """int32 [G, B], an order by the bits of the masses that ``places`` leave; ties by place."""
    integer = {4: jnp.int32, 8: jnp.int64}[masses.dtype.itemsize]
    keys = jnp.iinfo(integer).max - jax.lax.bitcast_convert_type(masses, integer)
    low = (1 << (places - 1).bit_length()) - 1
    place = jax.lax.broadcasted_iota(integer, masses.shape, 0)
    return (jnp.sort(((keys & ~low) | place).T, axis=1) & low).astype(jnp.int32).T
