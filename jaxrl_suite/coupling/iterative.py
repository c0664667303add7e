"""Iterative couplings of large messages: FIMEC, a message of independent blocks against a sequence of symbols.

A message is W blocks of V values each, uniform to everyone but the sender. All keep a belief for each block. At each
symbol the block of largest entropy is coupled with the law of the symbol; the sender draws the symbol given the true
value of that block, and everyone conditions that block's belief on the symbol. Averaged over messages the symbols
follow their law: to anyone without the key the text is the model's own.

The loop of a symbol, with its merging of symbols that say the same, is in :mod:`jaxrl_suite.coupling.symbol_step`.
Masses are counts (:func:`integer_masses`), so that the two sides agree to the last bit if they see the same counts.

References:
    Sokota et al. 2024, arXiv 2405.19540 (FIMEC, merging); Schroeder de Witt et al. 2023, arXiv 2210.14889 (perfect
    security).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.coupling.integer import round_masses
from jaxrl_suite.coupling.sparse import as_rate, check_names, check_rate
from jaxrl_suite.coupling.symbol_step import Partition, SymbolStep, couple_symbol, joint_counts
from jaxrl_suite.distributions import entropy
from jaxrl_suite.types import Array, PRNGKey, SequenceLaw


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
) -> SymbolStep:
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
        The symbol, the updated beliefs, and the likelihood of the symbol given ``values``.
    """

    def select(beliefs: Array) -> tuple[Array, Partition]:
        entropies = entropy(beliefs)
        block = jnp.argmax(entropies)
        return beliefs, Partition(beliefs[block], values[block], jnp.max(entropies), block)

    def condition(beliefs: Array, partition: Partition, joint: Array) -> Array:
        column = jnp.maximum(joint, 0).astype(beliefs.dtype)
        posterior = column / jnp.maximum(jnp.sum(column), 1)
        return beliefs.at[partition.place].set(jnp.where(jnp.sum(column) > 0, posterior, partition.masses))

    rate = as_rate(rate, beliefs.dtype)
    return couple_symbol(key, beliefs, select, condition, counts, symbol, replay, rate=rate, merge=merge)


def symbol_law(beliefs: Array, counts: Array, *, rate: Array | float = jnp.inf) -> Array:
    """Law ``[M]`` of the next symbol for someone who holds the beliefs but not the message.

    It is ``counts / total``, up to the rounding of the belief to counts.
    """
    belief = beliefs[jnp.argmax(entropy(beliefs))]
    joint = joint_counts(belief, counts, jnp.asarray(rate, beliefs.dtype)).astype(belief.dtype)
    rows = jnp.sum(joint, axis=1, keepdims=True)
    given = jnp.where(rows > 0, joint / jnp.maximum(rows, 1), (counts / jnp.sum(counts)).astype(belief.dtype)[None])
    return belief @ given


class HiddenText(NamedTuple):
    """Symbols with a message in them.

    Attributes:
        tokens: int32 [B, T].
        values: int32 [B, W], the most probable message, as the receiver decodes it.
        certainty: [B], least probability of a decoded block; near 1 when the text was long enough.

    Inside jit, a row with a value out of range has tokens and values of -1 and a certainty of NaN.
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

    Returns:
        Text and decoded message.

    Raises:
        ValueError: tokens of another shape, a value out of range, or a rate that is negative.
    """
    shape = (prompts.shape[0], num_tokens)
    given = jnp.zeros(shape, jnp.int32) if tokens is None else tokens
    check(given.shape == shape, argument="tokens", value=given.shape, rule=f"must have shape {shape}")
    check_names("values", values, num_values)
    replay = jnp.asarray(tokens is not None)
    rate = as_rate(rate, jnp.float32)
    check_rate(rate)
    return _text(key, law, params, prompts, mask, values, given, replay, rate, num_values, merge)


@functools.partial(jax.jit, static_argnames=("law", "num_values", "merge"))
def _text(key, law, params, prompts, mask, values, given, replay, rate, num_values, merge) -> HiddenText:
    """Sender and receiver are this one compiled function, so that their beliefs agree to the last bit."""
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(prompts.shape[0]))
    beliefs = jnp.full((*values.shape, num_values), 1 / num_values, jnp.float32)
    state = law.init(params, prompts, mask)

    def one(key, beliefs, values, counts, symbol):
        return fimec_symbol(key, beliefs, values, counts, symbol, replay, rate=rate, merge=merge)[:2]

    def step(carry, entry):
        state, logits, beliefs = carry
        time, observed = entry
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        counts = jax.vmap(lambda row: round_masses(row, 1 << 30))(probs)
        drawn, beliefs = jax.vmap(one)(
            jax.vmap(jax.random.fold_in, (0, None))(keys, time), beliefs, values, counts, observed
        )
        state, logits = law.step(params, state, drawn)
        return (state, logits, beliefs), drawn

    start = (state, law.logits(state), beliefs)
    (_, _, beliefs), drawn = jax.lax.scan(step, start, (jnp.arange(given.shape[1]), given.T))
    valid = jnp.all((values >= 0) & (values < num_values), axis=1)
    decoded = jnp.argmax(beliefs, axis=-1).astype(jnp.int32)
    tokens, found = (jnp.where(valid[:, None], x, -1) for x in (drawn.T, decoded))
    certainty = jnp.min(jnp.max(beliefs, axis=-1), axis=-1)
    return HiddenText(tokens, found, jnp.where(valid, certainty, jnp.full_like(certainty, jnp.nan)))
