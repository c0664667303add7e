"""Iterative couplings of large messages: FIMEC, a message of independent blocks against a sequence of symbols.

A message is W blocks of V values each, uniform to everyone but the sender. All keep a belief for each block. At each
symbol the block of largest entropy is coupled with the law of the symbol; the sender draws the symbol given the true
value of that block, and everyone conditions that block's belief on the symbol. Averaged over messages the symbols
follow their law: to anyone without the key the text is the model's own.

*Merging*: symbols whose columns in the coupling are proportional say the same about the block. Then only their group
is drawn, and the law within the group is coupled with the next block of largest entropy, until one symbol is left:
entropy of the symbol that the first block could not use carries another one.

Masses are counts (:func:`integer_masses`), so that the two sides agree to the last bit if they see the same counts.

References:
    Sokota et al. 2024, arXiv 2405.19540 (FIMEC, merging); Schroeder de Witt et al. 2023, arXiv 2210.14889 (perfect
    security).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.coupling.ebim import code_at_rate
from jaxrl_suite.coupling.greedy import greedy_coupling
from jaxrl_suite.coupling.integer import round_masses
from jaxrl_suite.coupling.partitions import code_of_labels
from jaxrl_suite.distributions import entropy
from jaxrl_suite.types import Array, PRNGKey, SequenceLaw

CERTAIN = 1e-6  # bits: a block of less entropy is settled and carries nothing more; it is wrong once in 10 million


class _Stage(NamedTuple):
    beliefs: Array  # [W, V]
    counts: Array  # int32 [M], law among the symbols that are still possible
    symbol: Array  # int32 [], one of them
    couplings: Array  # int32 [], number so far


def fimec_symbol(
    key: PRNGKey,
    beliefs: Array,
    values: Array,
    counts: Array,
    symbol: Array,
    replay: Array | bool,
    *,
    rate: Array | float = jnp.inf,
    merge: bool = True,
) -> tuple[Array, Array]:
    """One symbol: drawn by the sender, or observed by the receiver. Both run this very function.

    Args:
        key: consumed; the sender's alone.
        beliefs: [W, V], law of each block.
        values: int32 [W], true values; the receiver passes anything.
        counts: int32 [M], law of the symbol as counts.
        symbol: int32 [], the observed symbol of a replay.
        replay: whether the symbol is given.
        rate: bits of a code of the block, as in a rate-limited game; without limit by default.
        merge: whether groups of symbols that say the same are refined with further blocks; static.

    Returns:
        The symbol and the updated beliefs.
    """
    rate = jnp.asarray(rate, beliefs.dtype)
    index = jnp.arange(counts.shape[0], dtype=jnp.int32)

    def unfinished(stage: _Stage) -> Array:
        open_blocks = jnp.max(entropy(stage.beliefs)) > CERTAIN
        several = jnp.sum(stage.counts > 0) > 1
        return several & open_blocks & ((stage.couplings == 0) | merge) & (stage.couplings < counts.shape[0])

    def couple(stage: _Stage) -> _Stage:
        block = jnp.argmax(entropy(stage.beliefs))
        belief = stage.beliefs[block]
        joint = _joint(belief, stage.counts, rate)
        row = joint[values[block]]
        row = jnp.where(jnp.sum(row) > 0, row, stage.counts)
        chosen = jnp.where(replay, symbol, _draw(jax.random.fold_in(key, stage.couplings), row)).astype(jnp.int32)
        column = joint[:, chosen].astype(belief.dtype)
        posterior = column / jnp.maximum(jnp.sum(column), 1)
        posterior = jnp.where(jnp.sum(column) > 0, posterior, belief)
        return _Stage(
            stage.beliefs.at[block].set(posterior),
            jnp.where(_same_message(joint, chosen) | (index == chosen), stage.counts, 0),
            chosen,
            stage.couplings + 1,
        )

    start = _Stage(beliefs, counts, jnp.asarray(symbol, jnp.int32), jnp.zeros((), jnp.int32))
    stage = jax.lax.while_loop(unfinished, couple, start)
    last = _draw(jax.random.fold_in(key, counts.shape[0]), stage.counts)
    # Without merging the symbol that was drawn stays, with it whatever is left of its group is drawn by its law.
    keep = (stage.couplings > 0) & (not merge)
    drawn = jnp.where(keep, stage.symbol, last)
    return jnp.where(replay, symbol, drawn).astype(jnp.int32), stage.beliefs


def symbol_law(beliefs: Array, counts: Array, *, rate: Array | float = jnp.inf) -> Array:
    """Law ``[M]`` of the next symbol for someone who holds the beliefs but not the message.

    It is ``counts / total``, up to the rounding of the belief to counts.
    """
    belief = beliefs[jnp.argmax(entropy(beliefs))]
    joint = _joint(belief, counts, jnp.asarray(rate, beliefs.dtype)).astype(belief.dtype)
    rows = jnp.sum(joint, axis=1, keepdims=True)
    given = jnp.where(rows > 0, joint / jnp.maximum(rows, 1), (counts / jnp.sum(counts)).astype(belief.dtype)[None])
    return belief @ given


def _joint(belief: Array, counts: Array, rate: Array) -> Array:
    """Coupling of a block with the symbols, int32 [V, M]; with a rate, of its code, shared out among the values."""
    total = jnp.sum(counts)
    labels, _ = code_at_rate(belief, rate)
    masses = round_masses(belief, total)
    code = code_of_labels(masses, labels)
    joint = greedy_coupling(code, counts).dense((belief.shape[0], counts.shape[0]))
    # Values of one code share its row in proportion to their masses; alone in it, a value gets the row as it is.
    alone = masses == code[labels]
    share = masses.astype(belief.dtype) / jnp.maximum(code[labels], 1).astype(belief.dtype)
    shared = jnp.round(joint[labels].astype(belief.dtype) * share[:, None]).astype(jnp.int32)
    return jnp.where(alone[:, None], joint[labels], shared)


def _same_message(joint: Array, chosen: Array) -> Array:
    """bool [M], symbols whose column has a single entry, in the same row as the only entry of the chosen column."""
    filled = joint > 0
    single = jnp.sum(filled, axis=0) == 1
    row = jnp.argmax(filled, axis=0)
    return single & single[chosen] & (row == row[chosen])


def _draw(key: PRNGKey, counts: Array) -> Array:
    """Draws an index in proportion to counts, exactly."""
    target = jax.random.randint(key, (), 0, jnp.maximum(jnp.sum(counts), 1))
    return jnp.sum(jnp.cumsum(counts) <= target).astype(jnp.int32)


class HiddenText(NamedTuple):
    """Symbols with a message in them.

    Attributes:
        tokens: int32 [B, T].
        values: int32 [B, W], the most probable message, as the receiver decodes it.
        certainty: [B], least probability of a decoded block; near 1 when the text was long enough.
    """

    tokens: Array
    values: Array
    certainty: Array


def fimec_text(
    key: PRNGKey,
    law: SequenceLaw,
    params,
    prompts: Array,
    mask: Array,
    values: Array,
    *,
    num_values: int,
    num_tokens: int,
    tokens: Array | None = None,
    rate: Array | float = jnp.inf,
    merge: bool = True,
    bias: Array | float = 0.0,
) -> HiddenText:
    """Hides a message in each of B texts, or reads it back from ``tokens``.

    When the message is settled the rest of the text is drawn from the law as it is.

    Args:
        key: consumed; row b draws from ``fold_in(key, b)``.
        law: any sequence law.
        params: what the law reads.
        prompts: int32 [B, P].
        mask: bool [B, P].
        values: int32 [B, W], blocks of the messages; a receiver passes zeros.
        num_values: V, values of a block.
        num_tokens: T.
        tokens: int32 [B, T], text to read; None to write one.
        rate: bits of the code of a block at each token.
        merge: see :func:`fimec_symbol`.
        bias: added to the logit of token 0: an embedder that does not keep the law, for tests of the tests.

    Returns:
        Text and decoded message.
    """
    replay = tokens is not None
    given = jnp.zeros((prompts.shape[0], num_tokens), jnp.int32) if tokens is None else tokens
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(prompts.shape[0]))
    beliefs = jnp.full((*values.shape, num_values), 1 / num_values, jnp.float32)
    state = law.init(params, prompts, mask)

    def one(key, beliefs, values, counts, symbol):
        return fimec_symbol(key, beliefs, values, counts, symbol, replay, rate=rate, merge=merge)

    def step(carry, entry):
        state, logits, beliefs = carry
        time, observed = entry
        logits = logits.astype(jnp.float32).at[:, 0].add(bias)
        counts = jax.vmap(lambda row: round_masses(jax.nn.softmax(row), 1 << 30))(logits)
        drawn, beliefs = jax.vmap(one)(
            jax.vmap(jax.random.fold_in, (0, None))(keys, time), beliefs, values, counts, observed
        )
        state, logits = law.step(params, state, drawn)
        return (state, logits, beliefs), drawn

    start = (state, law.logits(state), beliefs)
    (_, _, beliefs), drawn = jax.lax.scan(step, start, (jnp.arange(num_tokens), given.T))
    return HiddenText(
        drawn.T, jnp.argmax(beliefs, axis=-1).astype(jnp.int32), jnp.min(jnp.max(beliefs, axis=-1), axis=-1)
    )
