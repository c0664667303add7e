"""Scores of given tokens under an output table, and their gradients, with one chunk of logits at a time in memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.distributions import Mass
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


def cut(size: int, x: Array) -> Array:
    """Rows [N, ...] in whole chunks [n, size, ...], the last filled up with zeros."""
    x = jnp.pad(x, ((0, -x.shape[0] % size), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(-1, size, *x.shape[1:])


def _joined(x: Array, number: int) -> Array:
    """The inverse of :func:`cut`."""
    return x.reshape(-1, *x.shape[2:])[:number]


def _product(a: Array, b: Array, contracted: tuple[int, int], dtype: Any) -> Array:
    b = b.astype(a.dtype)
    if jax.default_backend() == "cpu":  # XLA has no narrow products there, widens them itself, and forgets to in places
        a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.dot_general(a, b, (((contracted[0],), (contracted[1],)), ((), ())), preferred_element_type=dtype)


def _mass(logits: Array) -> Mass:
    best = logits.max(axis=-1)
    # Written out before they are summed: fused into the sum, XLA takes them one after another on one core of a CPU.
    powers = jax.lax.optimization_barrier(jnp.exp(logits - best[:, None]))
    return Mass(powers, best, powers.sum(axis=-1))


def _log_prob(logits: Array, wanted: Array, mass: Mass) -> Array:
    return jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0] - mass.best - jnp.log(mass.total)


class _Rows(NamedTuple):
    """Rows of the output table's product: activations [n, D] and turned [D, n], the row of the table that was chosen
    [n, D], its number [n], and the weight [n]."""

    h: Array
    turned: Array
    chosen: Array
    wanted: Array
    weight: Array


def _row_gradients(rows: _Rows, table: Array, mass: Mass, dtype: Any) -> tuple[Array, Array]:
    """Gradients by the activations [n, D] and, but for the chosen rows, by the table [D, V].

    ``d h_n = weights_n (table[tokens_n] - sum_v p_nv table_v)`` and ``d table_v = sum_n weights_n (1[v = tokens_n] -
    p_nv) h_n``. With ``p = powers / total`` division, weights and sign act on the narrow factors of the products, so
    that no second array of the vocabulary's width is written.
    """
    # Weights of one over the number of tokens are below the range of float16.
    narrow = dtype if rows.h.dtype == jnp.float16 else rows.h.dtype
    powers = mass.powers.astype(narrow)
    mean = _product(powers, table, (1, 0), dtype) / mass.total[:, None]
    # The factor of the table's gradient stands ready as [D, n]: the product need not turn the larger one around.
    factor = (rows.turned.astype(dtype) * (-rows.weight / mass.total)).astype(narrow)
    return rows.weight[:, None] * (rows.chosen - mean), _product(factor, powers, (1, 0), dtype)


def _gradients(
    chunks: Chunks, h: Array, table: Array, tokens: Array, weights: Array, laws: Mass | None
) -> tuple[Array, Array, Array]:
    """Scores, and the gradients of ``sum_n weights_n log softmax(table h_n)[tokens_n]``.

    Args:
        chunks: how to walk.
        h: [N, D].
        table: [V, D].
        tokens: int32 [N].
        weights: [N].
        laws: [N, V] of the powers where they are known, see :func:`weighted_scores`.

    Returns:
        The log-probabilities [N], the gradient by rows [N, D] and by the table [V, D], in the dtype of sums.
    """
    dtype, number = chunks.dtype, h.shape[0]
    weights = weights.astype(dtype)
    chosen = table[tokens].astype(dtype)
    if laws is None:
        parts = tuple(cut(chunks.rows, x) for x in (h, chosen, tokens, weights))
        pieces = _Rows(parts[0], parts[0].swapaxes(1, 2), *parts[1:])

        def step(d_table: Array, rows: _Rows):
            logits = _product(rows.h, table, (1, 1), dtype)
            mass = _mass(logits)
            d_rows, more = _row_gradients(rows, table, mass, dtype)
            return d_table + more, (_log_prob(logits, rows.wanted, mass), d_rows)

        start = vary_like(jnp.zeros(table.shape[::-1], dtype), h, table, tokens, weights)
        d_table, found = jax.lax.scan(step, start, pieces)
        scores, d_rows = (_joined(x, number) for x in found)
    else:
        scores = _known_scores(h, chosen, laws)
        d_rows, d_table = _row_gradients(_Rows(h, h.T, chosen, tokens, weights), table, laws, dtype)
        d_table = jax.lax.optimization_barrier(d_table)  # or XLA makes [V, D] at once, and turns the powers around
    return scores, d_rows, d_table.T.at[tokens].add(weights[:, None] * h.astype(dtype))


def _known_scores(h: Array, chosen: Array, laws: Mass) -> Array:
    return jnp.sum(h.astype(chosen.dtype) * chosen, axis=-1) - laws.best - jnp.log(laws.total)


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
    return weighted_scores(chunks, h, table, tokens, weights, None)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_scores(
    chunks: Chunks, h: Array, table: Array, tokens: Array, weights: Array, laws: Mass | None
) -> tuple[Array, Array]:
    """The weighted sum, which has a derivative, and the log-probabilities [N], which have none.

    ``laws`` are those of ``table h_n`` at these very values, from whoever computed them before: they save the first of
    three products, and the exponentials. A row of weight 0 may have a law of no mass.
    """
    if laws is not None:
        scores = _known_scores(h, table[tokens].astype(chunks.dtype), laws)
        return jnp.sum(weights.astype(chunks.dtype) * scores), scores

    def step(carry: tuple[()], item: tuple[Array, Array]):
        logits = _product(item[0], table, (1, 1), chunks.dtype)
        return carry, _log_prob(logits, item[1], _mass(logits))

    _, scores = jax.lax.scan(step, (), (cut(chunks.rows, h), cut(chunks.rows, tokens)))
    scores = _joined(scores, h.shape[0])
    return jnp.sum(weights.astype(chunks.dtype) * scores), scores


def _weighted_forward(chunks: Chunks, h: Array, table: Array, tokens: Array, weights: Array, laws: Mass | None):
    scores, *gradients = _gradients(chunks, h, table, tokens, weights, laws)
    total = jnp.sum(weights.astype(chunks.dtype) * scores)
    like = tuple(jnp.zeros((), x.dtype) for x in (h, table, weights))
    return (total, scores), (*gradients, scores, like)


def _weighted_backward(chunks: Chunks, saved: tuple[Any, ...], cotangents: tuple[Array, Array]):
    del chunks
    g, _ = cotangents
    *parts, like = saved
    # Scaled before it is rounded: g is often one over a number of tokens, and the sum over them may be beyond float16.
    d_rows, d_table, d_weights = ((part * g).astype(one.dtype) for part, one in zip(parts, like, strict=True))
    return d_rows, d_table, None, d_weights, None


weighted_scores.defvjp(_weighted_forward, _weighted_backward)
