"""Scores of given tokens under an output table, and their gradients, with one chunk of logits at a time in memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.lm.layers import vary_like, wide
from jaxrl_suite.types import Array

_LOGITS_AT_ONCE = 1 << 26  # elements of the largest block of logits: 256 MiB in float32


def chunk_rows(num_rows: int, vocab_size: int, limit: int = _LOGITS_AT_ONCE) -> int:
    """Rows of a chunk: equal chunks of at most ``limit`` logits.

    >>> chunk_rows(2048, 49152)
    1024
    """
    chunks = max(1, -(-num_rows * vocab_size // limit))
    return -(-num_rows // chunks)


def chunk_size(rows: Array, table: Array, chunk: int | None) -> int:
    """Rows of a chunk: ``chunk``, or by :func:`chunk_rows` where it is None."""
    return chunk_rows(rows.shape[0], table.shape[0]) if chunk is None else min(chunk, rows.shape[0])


class Chunks(NamedTuple):
    """Static facts of a walk over rows: how many at once, and the dtype of sums."""

    rows: int
    dtype: Any


class _Mass(NamedTuple):
    """Largest logit of every row and the sum of ``exp(logit - largest)``: [rows] each."""

    best: Array
    total: Array


def cut(size: int, x: Array) -> Array:
    """Rows [N, ...] in whole chunks [n, size, ...], the last filled up with zeros."""
    x = jnp.pad(x, ((0, -x.shape[0] % size), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(-1, size, *x.shape[1:])


def _joined(x: Array, number: int) -> Array:
    """The inverse of :func:`cut`."""
    return x.reshape(-1, *x.shape[2:])[:number]


def _product(a: Array, b: Array, contracted: tuple[int, int], dtype: Any) -> Array:
    return jax.lax.dot_general(
        a, b.astype(a.dtype), (((contracted[0],), (contracted[1],)), ((), ())), preferred_element_type=dtype
    )


def _mass(logits: Array) -> tuple[_Mass, Array]:
    """What normalises each row, and the exponentials ``exp(logit - largest)`` that it is the sum of."""
    best = logits.max(axis=-1)
    # Written out before they are summed: fused into the sum, XLA takes them one after another on one core of a CPU.
    powers = jax.lax.optimization_barrier(jnp.exp(logits - best[:, None]))
    return _Mass(best, powers.sum(axis=-1)), powers


def _log_prob(logits: Array, wanted: Array, mass: _Mass) -> Array:
    return jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0] - mass.best - jnp.log(mass.total)


def _gradients(chunks: Chunks, rows: Array, table: Array, tokens: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Scores, and the gradients of ``sum_n weights_n log softmax(table h_n)[tokens_n]``.

    ``d h_n = weights_n (table[tokens_n] - sum_v p_nv table_v)`` and ``d table_v = sum_n weights_n (1[v = tokens_n] -
    p_nv) h_n``. With ``p = powers / total`` the division and the weights act on the narrow factors of the products and
    the ones on single rows, so that ``powers`` is the only array of the vocabulary's width that is written.

    Args:
        chunks: how to walk.
        rows: [N, D].
        table: [V, D].
        tokens: int32 [N].
        weights: [N].

    Returns:
        The log-probabilities [N], the gradient by rows [N, D] and by the table [V, D], in the dtype of sums.
    """
    dtype = chunks.dtype
    # Weights of one over the number of tokens are below the range of float16.
    narrow = dtype if rows.dtype == jnp.float16 else rows.dtype
    chosen = table[tokens].astype(dtype)
    parts = tuple(cut(chunks.rows, x) for x in (rows, chosen, tokens, weights.astype(dtype)))
    # The factor of the table's gradient stands ready as [D, rows]: the product need not turn the larger one around.
    turned = parts[0].swapaxes(1, 2)

    def step(d_table: Array, item: tuple[tuple[Array, ...], Array]):
        (h, own, wanted, weight), h_turned = item
        logits = _product(h, table, (1, 1), dtype)
        mass, powers = _mass(logits)
        powers = powers.astype(narrow)
        mean = _product(powers, table, (1, 0), dtype) / mass.total[:, None]
        factor = (h_turned.astype(dtype) * (weight / mass.total)).astype(narrow)
        d_table = d_table - _product(factor, powers, (1, 0), dtype)
        return d_table, (_log_prob(logits, wanted, mass), weight[:, None] * (own - mean))

    start = vary_like(jnp.zeros(table.shape[::-1], dtype), rows, table, tokens, weights)
    d_table, (scores, d_rows) = jax.lax.scan(step, start, (parts, turned))
    number = rows.shape[0]
    d_table = d_table.T.at[tokens].add(weights.astype(dtype)[:, None] * rows.astype(dtype))
    return _joined(scores, number), _joined(d_rows, number), d_table


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
    chunks = Chunks(chunk_size(h, table, chunk), wide(h.dtype))
    return weighted_scores(chunks, h, table, tokens, weights)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_scores(chunks: Chunks, h: Array, table: Array, tokens: Array, weights: Array) -> tuple[Array, Array]:
    """The weighted sum, which has a derivative, and the log-probabilities [N], which have none."""

    def step(carry: tuple[()], item: tuple[Array, Array]):
        logits = _product(item[0], table, (1, 1), chunks.dtype)
        return carry, _log_prob(logits, item[1], _mass(logits)[0])

    _, scores = jax.lax.scan(step, (), (cut(chunks.rows, h), cut(chunks.rows, tokens)))
    scores = _joined(scores, h.shape[0])
    return jnp.sum(weights.astype(chunks.dtype) * scores), scores


def _weighted_forward(chunks: Chunks, h: Array, table: Array, tokens: Array, weights: Array):
    scores, *gradients = _gradients(chunks, h, table, tokens, weights)
    total = jnp.sum(weights.astype(chunks.dtype) * scores)
    like = tuple(jnp.zeros((), x.dtype) for x in (h, table, weights))
    return (total, scores), (*gradients, scores, like)


def _weighted_backward(chunks: Chunks, saved: tuple[Any, ...], cotangents: tuple[Array, Array]):
    del chunks
    g, _ = cotangents
    *parts, like = saved
    # Scaled before it is rounded: g is often one over a number of tokens, and the sum over them may be beyond float16.
    d_rows, d_table, d_weights = ((part * g).astype(one.dtype) for part, one in zip(parts, like, strict=True))
    return d_rows, d_table, None, d_weights


weighted_scores.defvjp(_weighted_forward, _weighted_backward)
