"""Log-probabilities of given tokens, without ever holding logits for all of them."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.decoder import IDENTITY, final_norm, forward, head_table, logits_of
from jaxrl_suite.lm.layers import wide
from jaxrl_suite.types import Array, Parallel, Params

_LOGITS_AT_ONCE = 1 << 26  # elements of the largest block of logits: 256 MiB in float32


def chunk_rows(num_rows: int, vocab_size: int, limit: int = _LOGITS_AT_ONCE) -> int:
    """Rows of a chunk: equal chunks of at most ``limit`` logits.

    >>> chunk_rows(2048, 49152)
    1024
    """
    chunks = max(1, -(-num_rows * vocab_size // limit))
    return -(-num_rows // chunks)


def log_probs(
    params: Params,
    tokens: Array,
    segments: Array | None = None,
    *,
    config: LanguageModelConfig,
    temperature: float | Array = 1.0,
    parallel: Parallel = IDENTITY,
    chunk: int | None = None,
    start: int = 0,
    **options: Any,
) -> Array:
    """``log p(token t | tokens before t)`` for every token from ``start`` on.

    Args:
        params: see the parameter table of the package.
        tokens: int32 [B, T].
        segments: int32 [B, T] for packed or padded rows, 0 is padding; None for one sequence a row.
        config: conventions of the model.
        temperature: logits are divided by it.
        parallel: hooks; ``token_log_prob`` reads each chunk of logits.
        chunk: rows of logits held at once; chosen from the vocabulary by default.
        start: first token wanted; the output table, the dearest matrix of a small model, is not applied before it.
        **options: as for :func:`jaxrl_suite.lm.decoder.forward`.

    Returns:
        [B, T - start] in nats, float32 at least; 0 at the first token of each segment and at padding.

    Raises:
        ValueError: ``start`` does not lie in ``0 .. T - 1``.
    """
    length = tokens.shape[1]
    check(0 <= start < length, argument="start", value=start, rule=f"must lie in 0 .. {length - 1}: rows have {length}")
    x, _ = forward(params, tokens, config=config, segments=segments, parallel=parallel, **options)
    h = parallel.before_column(final_norm(params, x, config=config))
    # Row t - 1 predicts token t; the row before the first does not matter, since it is masked.
    rows = jnp.roll(h, 1, axis=1)
    targets, real = shifted_targets(tokens, segments)
    rows, targets, real = (part[:, start:] for part in (rows, targets, real))
    return jnp.where(real, _picked(params, rows, targets, config, temperature, parallel, chunk), 0.0)


def shifted_targets(tokens: Array, segments: Array | None) -> tuple[Array, Array]:
    """What each place predicts, written at the place that is predicted.

    Returns:
        tokens int32 [B, T] and a bool mask [B, T], true where the token before belongs to the same segment.
    """
    first = jnp.zeros_like(tokens[:, :1], bool)
    if segments is None:
        return tokens, jnp.concatenate([first, jnp.ones_like(tokens[:, 1:], bool)], axis=1)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return tokens, jnp.concatenate([first, same], axis=1)


def _picked(
    params: Params,
    rows: Array,
    targets: Array,
    config: LanguageModelConfig,
    temperature: float | Array,
    parallel: Parallel,
    chunk: int | None,
) -> Array:
    table = head_table(params)
    batch, length, width = rows.shape
    rows = rows.reshape(-1, width)
    size = chunk_rows(rows.shape[0], table.shape[0]) if chunk is None else min(chunk, rows.shape[0])
    padding = -rows.shape[0] % size
    rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(-1, size, width)
    wanted = jnp.pad(targets.reshape(-1), (0, padding)).reshape(-1, size)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(rows: Array, wanted: Array) -> Array:
        logits = logits_of(table, rows, config=config)
        return parallel.token_log_prob(logits / jnp.asarray(temperature, logits.dtype), wanted)

    if rows.shape[0] == 1:
        return one(rows[0], wanted[0])[: batch * length].reshape(batch, length)
    _, picked = jax.lax.scan(lambda carry, item: (carry, one(*item)), (), (rows, wanted))
    return picked.reshape(-1)[: batch * length].reshape(batch, length)


def weighted_log_prob(h: Array, table: Array, tokens: Array, weights: Array, *, chunk: int | None = None) -> Array:
    """``sum_n weights_n log softmax(table h_n)[tokens_n]`` with its gradient computed on the way.

    The backward pass of a sum with known weights needs no second look at the logits: the gradient of every chunk is
    taken while its logits are at hand, which saves one of four products with the table.

    Args:
        h: [N, D].
        table: [V, D].
        tokens: int32 [N].
        weights: [N]; their gradient is that of the sum.
        chunk: rows of logits held at once.

    Returns:
        Scalar in float32 at least.
    """
    size = chunk_rows(h.shape[0], table.shape[0]) if chunk is None else min(chunk, h.shape[0])
    return _weighted(size, h, table, tokens, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(size: int, h: Array, table: Array, tokens: Array, weights: Array) -> Array:
    return _weighted_forward(size, h, table, tokens, weights, gradients=False)[0]


def _chunks(size: int, h: Array, tokens: Array, weights: Array) -> tuple[Array, Array, Array]:
    padding = -h.shape[0] % size
    return (
        jnp.pad(h, ((0, padding), (0, 0))).reshape(-1, size, h.shape[1]),
        jnp.pad(tokens, (0, padding)).reshape(-1, size),
        jnp.pad(weights, (0, padding)).reshape(-1, size),
    )


def _weighted_forward(size: int, h: Array, table: Array, tokens: Array, weights: Array, gradients: bool = True):
    dtype = wide(h.dtype)

    def step(carry: tuple[Array, Array], item: tuple[Array, Array, Array]):
        total, d_table = carry
        rows, wanted, weight = item
        logits = jax.lax.dot_general(
            rows, table.astype(rows.dtype), (((1,), (1,)), ((), ())), preferred_element_type=dtype
        )
        best = logits.max(axis=-1, keepdims=True)
        mass = jnp.exp(logits - best).sum(axis=-1, keepdims=True)
        picked = jnp.take_along_axis(logits, wanted[:, None], axis=-1)
        log_prob = (picked - best - jnp.log(mass))[:, 0]
        total = total + jnp.sum(weight.astype(dtype) * log_prob)
        if not gradients:
            return (total, d_table), None
        columns = jnp.arange(table.shape[0], dtype=wanted.dtype)[None]
        hit = (columns == wanted[:, None]).astype(dtype)
        d_logits = weight.astype(dtype)[:, None] * (hit - jnp.exp(logits - best) / mass)
        d_logits = d_logits.astype(rows.dtype)
        d_rows = jax.lax.dot_general(
            d_logits, table.astype(rows.dtype), (((1,), (0,)), ((), ())), preferred_element_type=dtype
        )
        d_table = d_table + jax.lax.dot_general(d_logits, rows, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        return (total, d_table), (d_rows.astype(rows.dtype), log_prob)

    start: Any = jnp.zeros((), dtype), jnp.zeros(table.shape if gradients else (), dtype)
    carry, parts = jax.lax.scan(step, start, _chunks(size, h, tokens, weights))
    (total, d_table), kept = carry, cast(Any, parts)
    if not gradients:
        return total, None
    d_rows, log_prob = (part.reshape(-1, *part.shape[2:])[: h.shape[0]] for part in kept)
    return total, (d_rows, d_table, log_prob, jnp.zeros((), table.dtype), jnp.zeros((), weights.dtype))


def _weighted_backward(size: int, saved: tuple[Array, ...], g: Array):
    del size
    d_rows, d_table, log_prob, table, weight = saved
    # Scaled before it is rounded: g is often one over a number of tokens, and the sum over them may be beyond float16.
    d_rows, d_table, d_weights = (
        (part.astype(g.dtype) * g).astype(like.dtype)
        for part, like in ((d_rows, d_rows), (d_table, table), (log_prob, weight))
    )
    return d_rows, d_table, None, d_weights


_weighted.defvjp(_weighted_forward, _weighted_backward)
