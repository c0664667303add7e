"""ARIMEC: a message from one autoregressive law hidden in a sequence from another.

FIMEC wants messages of independent uniform blocks. Here the message itself has a law over sequences (a language model,
say), and the posterior lives on its prefix tree (:mod:`jaxrl_suite.coupling.prefix_tree`). At each symbol of the text
the partition of largest entropy, the children of one node and all that is outside of it, is coupled with the law of
the symbol. Likely messages cost few symbols, and no compression has to be agreed on beforehand.

Whatever node is chosen, the symbols follow their law to anyone who does not know the message.

References:
    Sokota et al. 2024, arXiv 2405.19540 (ARIMEC, merging).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.coupling.integer import round_masses
from jaxrl_suite.coupling.prefix_tree import (
    PrefixTree,
    best_node,
    condition_tree,
    partition_at,
    prefix_tree,
    read_message,
)
from jaxrl_suite.coupling.sparse import as_rate, check_names, check_rate
from jaxrl_suite.coupling.symbol_step import Partition, SymbolStep, couple_symbol
from jaxrl_suite.types import Array, PRNGKey, SequenceLaw


def arimec_symbol(
    key: PRNGKey,
    tree: PrefixTree,
    message: Array,
    counts: Array,
    symbol: Array,
    replay: Array | bool,
    *,
    law: SequenceLaw,
    params: Any,
    rate: Array | float = jnp.inf,
    merge: bool = True,
) -> SymbolStep:
    """One symbol of the text: drawn by the sender, or observed by the receiver. Both run this very function.

    Args:
        key: consumed; the sender's alone.
        tree: posterior over messages.
        message: int32 [D], the true one; the receiver passes anything.
        counts: int32 [M], law of the symbol as counts.
        symbol: int32 [], the observed symbol of a replay.
        replay: whether the symbol is given.
        law: of the message.
        params: what it reads.
        rate: bits of a code of the block, as in a rate-limited game; without limit by default.
        merge: whether groups of symbols that say the same are refined by further partitions; static.

    Returns:
        The symbol, the updated tree, and the likelihood of the symbol given ``message``.
    """

    def select(tree: PrefixTree) -> tuple[PrefixTree, Partition]:
        tree, node = best_node(tree, law, params)
        return tree, partition_at(tree, node, message)

    def condition(tree: PrefixTree, partition: Partition, joint: Array) -> PrefixTree:
        masses = partition.masses
        # Blocks without a count (-1) draw the symbol by its law, so their mass stays as it was.
        seen = (joint >= 0) & (masses > 0)
        share = jnp.maximum(joint, 0).astype(masses.dtype)
        total = jnp.sum(jnp.where(seen, masses, 0))
        given = total * share / jnp.maximum(jnp.sum(share), 1) / jnp.where(seen, masses, jnp.ones_like(masses))
        return condition_tree(tree, partition.place, jnp.where(seen, given, jnp.ones_like(given)))

    rate = as_rate(rate, tree.masses.dtype)
    return couple_symbol(key, tree, select, condition, counts, symbol, replay, rate=rate, merge=merge)


class ArimecText(NamedTuple):
    """Texts with messages in them.

    Attributes:
        tokens: int32 [B, T].
        messages: int32 [B, D], as the receiver decodes them.
        certainty: [B], posterior mass of the decoded message; near 1 when the text was long enough.
        overflow: bool [B], whether the pool of nodes was too small to find the best partition.

    Inside jit, a row whose message holds no symbol of the message's law has tokens and messages of -1 and a certainty
    of NaN.
    """

    tokens: Array
    messages: Array
    certainty: Array
    overflow: Array


def arimec_text(
    key: PRNGKey,
    law: SequenceLaw,
    params: Any,
    prompts: Array,
    mask: Array,
    messages: Array,
    *,
    message_law: SequenceLaw,
    message_params: Any,
    message_prompt: Array,
    num_tokens: int,
    capacity: int = 256,
    tokens: Array | None = None,
    rate: Array | float = jnp.inf,
    merge: bool = True,
) -> ArimecText:
    """Hides a message in each of B texts, or reads it back from ``tokens``.

    When the message is settled the rest of the text is drawn from the law as it is.

    Args:
        key: consumed; row b draws from ``fold_in(key, b)``.
        law: of the text, any sequence law.
        params: what it reads.
        prompts: int32 [B, P].
        mask: bool [B, P].
        messages: int32 [B, D], symbols of ``message_law``; a receiver passes zeros.
        message_law: of the messages, any sequence law; rows of one message at a time.
        message_params: what it reads.
        message_prompt: int32 [P'], what comes before every message; both sides know it.
        num_tokens: T.
        capacity: nodes held of the tree of messages; a few times D suffices when the law is sharp.
        tokens: int32 [B, T], text to read; None to write one.
        rate: bits of the code at each token.
        merge: see :func:`arimec_symbol`.

    Returns:
        Texts and decoded messages.

    Raises:
        ValueError: shapes that do not fit, a message out of range, or a rate that is negative.
    """
    check(messages.ndim == 2, argument="messages", value=messages.shape, rule="must have two axes, [B, D]")
    fits = messages.shape[0] == prompts.shape[0]
    check(fits, argument="messages", value=messages.shape, rule=f"must have one row a prompt, {prompts.shape[0]}")
    check(num_tokens > 0, argument="num_tokens", value=num_tokens, rule="must be positive")
    shape = (prompts.shape[0], num_tokens)
    given = jnp.zeros(shape, jnp.int32) if tokens is None else tokens
    check(given.shape == shape, argument="tokens", value=given.shape, rule=f"must have shape {shape}")
    rate = as_rate(rate, jnp.float32)
    check_rate(rate)
    source = (message_params, message_prompt)
    num_symbols = _first_logits.eval_shape(message_law, *source).shape[-1]
    check_names("messages", messages, num_symbols)
    replay = jnp.asarray(tokens is not None)
    return _text(key, law, params, prompts, mask, messages, message_law, source, given, replay, rate, capacity, merge)


@functools.partial(jax.jit, static_argnames="law")
def _first_logits(law: SequenceLaw, params: Any, prompt: Array) -> Array:
    """[1, V]. Asked for its shape alone, so nothing is computed, and jit remembers the answer."""
    return law.logits(law.init(params, prompt[None], jnp.ones((1, prompt.shape[0]), bool)))


@functools.partial(jax.jit, static_argnames=("law", "message_law", "capacity", "merge"))
def _text(
    key, law, params, prompts, mask, messages, message_law, source, given, replay, rate, capacity, merge
) -> ArimecText:
    """Sender and receiver are this one compiled function, so that their posteriors agree to the last bit."""
    rows, num_tokens = given.shape
    message_params, message_prompt = source
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
    root = prefix_tree(message_law, message_params, message_prompt, length=messages.shape[1], capacity=capacity)
    trees = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), root)

    def one(key, tree, message, counts, symbol):
        options = {"law": message_law, "params": message_params, "rate": rate, "merge": merge}
        return arimec_symbol(key, tree, message, counts, symbol, replay, **options)[:2]

    def step(carry, entry):
        state, logits, trees = carry
        time, observed = entry
        probs = jax.nn.softmax(logits.astype(jnp.float32))
        counts = jax.vmap(lambda row: round_masses(row, 1 << 30))(probs)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, time)
        drawn, trees = jax.vmap(one)(step_keys, trees, messages, counts, observed)
        state, logits = law.step(params, state, drawn)
        return (state, logits, trees), drawn

    state = law.init(params, prompts, mask)
    (_, _, trees), drawn = jax.lax.scan(step, (state, law.logits(state), trees), (jnp.arange(num_tokens), given.T))
    decoded = jax.vmap(lambda tree: read_message(tree, message_law, message_params))(trees)
    num_symbols = root.masses.shape[1]
    valid = jnp.all((messages >= 0) & (messages < num_symbols), axis=1)
    tokens, found = (jnp.where(valid[:, None], x, -1) for x in (drawn.T, decoded.message))
    certainty = jnp.where(valid, decoded.mass, jnp.full_like(decoded.mass, jnp.nan))
    return ArimecText(tokens, found, certainty, trees.overflow)
