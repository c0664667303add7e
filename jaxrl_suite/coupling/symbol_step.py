"""One symbol of an iterative coupling: the loop that FIMEC and ARIMEC share.

Everyone holds a posterior over messages. A *partition* cuts the messages into V blocks; the law of the block is
coupled with the law of the symbol, the sender draws from the row of the block that holds the message, and everyone
conditions on the outcome. With g the block of a message and C the coupling,

    p(symbol | message) = C[g, symbol] / sum_s C[g, s],      posterior' proportional to posterior p(symbol | message).

*Merging*: symbols whose columns in the coupling are proportional say the same about the block. (The cells of a greedy
coupling form a forest, so these are columns whose only entry is in one and the same row.) Then only their group is
drawn, and the law within the group is coupled with the partition of largest entropy at the new posterior, until one
symbol is left: entropy of the symbol that the first block could not use carries another one.

Masses are counts (:func:`jaxrl_suite.coupling.integer_masses`), so that the two sides agree to the last bit if they
see the same counts.

References:
    Sokota et al. 2024, arXiv 2405.19540 (iterative minimum entropy coupling and merging).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.coupling.ebim import code_at_rate
from jaxrl_suite.coupling.greedy import greedy_coupling
from jaxrl_suite.coupling.integer import round_masses
from jaxrl_suite.coupling.partitions import code_of_labels
from jaxrl_suite.types import Array, PRNGKey

CERTAIN = 1e-6  # bits: a partition of less entropy is settled and carries nothing; it is wrong once in 10 million


class Partition(NamedTuple):
    """Messages cut into V blocks.

    Attributes:
        masses: [V], law of the block.
        truth: int32 [], the block of the sender's message; the receiver's value is never read.
        entropy: [], of ``masses``, bits.
        place: which partition it is, for the conditioning.
    """

    masses: Array
    truth: Array
    entropy: Array
    place: Array


class SymbolStep(NamedTuple):
    """A symbol and what everybody knows after it.

    Attributes:
        symbol: int32 [].
        posterior: as the caller keeps it.
        likelihood: [], p(symbol | message, what was known before), for the message that was passed.
    """

    symbol: Array
    posterior: Any
    likelihood: Array


class _Stage(NamedTuple):
    posterior: Any
    partition: Partition
    counts: Array  # int32 [M], law among the symbols that are still possible
    symbol: Array  # int32 [], one of them
    couplings: Array  # int32 [], number so far
    likelihood: Array


def couple_symbol(
    key: PRNGKey,
    posterior: Any,
    select: Callable[[Any], tuple[Any, Partition]],
    condition: Callable[[Any, Partition, Array], Any],
    counts: Array,
    symbol: Array,
    replay: Array | bool,
    *,
    rate: Array,
    merge: bool,
) -> SymbolStep:
    """Draws a symbol (sender) or takes the observed one (receiver). Both run this very function.

    Args:
        key: consumed; the sender's alone.
        posterior: any pytree.
        select: ``select(posterior) -> (posterior, partition)``, the partition to couple; it may refine the posterior's
            representation.
        condition: ``condition(posterior, partition, joint [V]) -> posterior``; the counts of each block together with
            the symbol, of total ``sum``. A block that was rounded to no mass has -1: it draws by the law, so that its
            likelihood is that of nobody's choice.
        counts: int32 [M], law of the symbol as counts.
        symbol: int32 [], the observed symbol of a replay.
        replay: whether the symbol is given.
        rate: bits of the code of the block.
        merge: whether groups of symbols that say the same are refined; static.

    Returns:
        Symbol, posterior, and likelihood.
    """
    index = jnp.arange(counts.shape[0], dtype=jnp.int32)

    def unfinished(stage: _Stage) -> Array:
        several = jnp.sum(stage.counts > 0) > 1
        open_messages = stage.partition.entropy > CERTAIN
        return several & open_messages & ((stage.couplings == 0) | merge) & (stage.couplings < counts.shape[0])

    def couple(stage: _Stage) -> _Stage:
        joint = joint_counts(stage.partition.masses, stage.counts, rate)
        row = joint[stage.partition.truth]
        row = jnp.where(jnp.sum(row) > 0, row, stage.counts)
        chosen = jnp.where(replay, symbol, draw(jax.random.fold_in(key, stage.couplings), row)).astype(jnp.int32)
        same = _same_message(joint, chosen) | (index == chosen)
        drawn = same if merge else index == chosen
        share = jnp.sum(jnp.where(drawn, row, 0)) / jnp.sum(row)
        # Read at the first symbol of the group: the sender draws one of it here, the receiver sees another, and the
        # quotients of their columns are equal only up to rounding.
        column = jnp.where(jnp.sum(joint, axis=1) > 0, joint[:, jnp.argmax(drawn)], -1)
        posterior, partition = select(condition(stage.posterior, stage.partition, column))
        return _Stage(
            posterior,
            partition,
            jnp.where(same, stage.counts, 0),
            chosen,
            stage.couplings + 1,
            stage.likelihood * share.astype(stage.likelihood.dtype),
        )

    posterior, partition = select(posterior)
    zero = jnp.zeros((), jnp.int32)
    start = _Stage(
        posterior, partition, counts, jnp.asarray(symbol, jnp.int32), zero, jnp.ones((), partition.masses.dtype)
    )
    stage = jax.lax.while_loop(unfinished, couple, start)
    last = draw(jax.random.fold_in(key, counts.shape[0]), stage.counts)
    # Without merging the symbol that was drawn stays; with it, whatever is left of its group is drawn by its law.
    keep = (stage.couplings > 0) & (not merge)
    symbol = jnp.where(replay, symbol, jnp.where(keep, stage.symbol, last)).astype(jnp.int32)
    within = (stage.counts[symbol] / jnp.sum(stage.counts)).astype(stage.likelihood.dtype)
    return SymbolStep(symbol, stage.posterior, stage.likelihood * jnp.where(keep, jnp.ones_like(within), within))


def joint_counts(masses: Array, counts: Array, rate: Array) -> Array:
    """Coupling of a block with the symbols, int32 [V, M]; with a rate, of its code, shared out among the values."""
    total = jnp.sum(counts)
    labels, _ = code_at_rate(masses, rate)
    rounded = round_masses(masses, total)
    code = code_of_labels(rounded, labels)
    joint = greedy_coupling(code, counts).dense((masses.shape[0], counts.shape[0]))
    # Values of one code share its row in proportion to their masses; alone in it, a value gets the row as it is.
    alone = rounded == code[labels]
    share = rounded.astype(masses.dtype) / jnp.maximum(code[labels], 1).astype(masses.dtype)
    shared = jnp.round(joint[labels].astype(masses.dtype) * share[:, None]).astype(jnp.int32)
    return jnp.where(alone[:, None], joint[labels], shared)


def _same_message(joint: Array, chosen: Array) -> Array:
    """bool [M], symbols whose column has a single entry, in the same row as the only entry of the chosen column."""
    filled = joint > 0
    single = jnp.sum(filled, axis=0) == 1
    row = jnp.argmax(filled, axis=0)
    return single & single[chosen] & (row == row[chosen])


def draw(key: PRNGKey, counts: Array) -> Array:
    """Draws an index in proportion to counts, exactly. The key is consumed."""
    target = jax.random.randint(key, (), 0, jnp.maximum(jnp.sum(counts), 1))
    return jnp.sum(jnp.cumsum(counts) <= target).astype(jnp.int32)
