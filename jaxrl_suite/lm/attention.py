"""Blockwise causal attention with an online softmax: memory linear in the length, forward and backward.

The visible (query block, key block) pairs are listed when the function is traced, so that nothing above the diagonal
or outside a window is computed, and one scan walks the list. Its length is static, hence the derivative below is
itself a scan that is linear in the cotangent, and JAX can transpose it again (influences need that).
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxrl_suite.lm.layers import vary_like, wide
from jaxrl_suite.types import Array

Layout = Literal["auto", "looped", "batched"]
_HIDDEN = -1e30  # finite, so that a block of which nothing is visible makes no NaN


class _Plan(NamedTuple):
    """Static facts of one call.

    Attributes:
        reach: blocks back that a query block sees, where order on the time axis is order of positions; None where
            every block may see every other.
        window: see :func:`blockwise_attend`.
        scale: factor on the scores.
        group: query heads of a KV head.
        layout: see :func:`blockwise_attend`.
    """

    reach: int | None
    window: int | None
    scale: float
    group: int
    layout: Layout


class _Places(NamedTuple):
    """Where rows stand: int32 [B, n, block] for queries and keys; position and segment."""

    query: Array
    key: Array
    query_segment: Array
    key_segment: Array


def blockwise_attend(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segments: Array | None,
    *,
    window: int | None = None,
    block_size: int | None = None,
    layout: Layout = "auto",
) -> Array:
    """Causal grouped-query attention of a sequence to itself; the default ``attend`` of a block.

    Token t sees token s if both have the same segment, s does not come later, and, with a window, their positions
    differ by less than it. Order on the time axis must be order of positions within each segment.

    Args:
        q: [B, T, Hq, C].
        k: [B, T, Hk, C]; query head h reads key head ``h // (Hq / Hk)``.
        v: [B, T, Hk, C].
        positions: int32 [B, T].
        segments: int32 [B, T], 0 is padding (whose output is finite and means nothing); None for one segment.
        window: tokens that are visible, itself included.
        block_size: rows of a block; 128 on a CPU and 512 elsewhere if None.
        layout: "looped" multiplies one (row, KV head) at a time, fast on CPU; "batched" all at once, for
            accelerators; "auto" decides when the program is lowered for its platform.

    Returns:
        [B, T, Hq, C] in the dtype of ``q``.

    References:
        Rabe and Staats (2021), arXiv 2112.05682; Dao et al. (2022), arXiv 2205.14135, algorithms 1 and 4.
    """
    places = segments if segments is not None else jnp.ones_like(positions)
    return attention_with_normaliser(
        q, k, v, positions, positions, places, places,
        window=window, block_size=block_size, layout=layout, ordered=True,
    )[0]  # fmt: skip


def attention_with_normaliser(
    q: Array,
    k: Array,
    v: Array,
    q_positions: Array,
    k_positions: Array,
    q_segments: Array,
    k_segments: Array,
    *,
    window: int | None = None,
    block_size: int | None = None,
    layout: Layout = "auto",
    ordered: bool = False,
) -> tuple[Array, Array]:
    """Attention of T queries to S keys that may come from elsewhere, with what is needed to merge partial results.

    Args:
        q: [B, T, Hq, C].
        k: [B, S, Hk, C].
        v: [B, S, Hk, C].
        q_positions: int32 [B, T].
        k_positions: int32 [B, S]; a query sees keys of its segment whose position is not larger.
        q_segments: int32 [B, T].
        k_segments: int32 [B, S].
        window: see :func:`blockwise_attend`.
        block_size: see :func:`blockwise_attend`.
        layout: see :func:`blockwise_attend`.
        ordered: T = S and later on the time axis never means visible: blocks above the diagonal are skipped.

    Returns:
        output [B, T, Hq, C] in the dtype of ``q`` and, in float32 at least, the natural logarithm of each row's
        normaliser [B, T, Hq] (about -1e30 where nothing was visible). Parts (o_i, n_i) over disjoint keys merge to
        ``sum_i o_i exp(n_i - n)`` with ``n = logsumexp_i n_i``. Both are differentiable.
    """
    batch, length, num_heads, width = q.shape
    num_keys, num_kv_heads = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    if block_size is None:  # a step of the walk costs a launch on an accelerator, and cache misses on a CPU
        block_size = 128 if jax.default_backend() == "cpu" else 512
    block = min(block_size, max(8, 1 << (max(length, num_keys) - 1).bit_length()))
    n, m = -(-length // block), -(-num_keys // block)
    reach = (n if window is None else -(-(window - 1) // block)) if ordered else None
    plan = _Plan(reach, window, width**-0.5, group, layout)
    q, k, v = (vary_like(x, q, k, v) for x in (q, k, v))
    # Rows of a query block: time major, the heads of a group minor, so that one product serves the whole group.
    q = _pad(q.reshape(batch, length, num_kv_heads, group, width), n * block).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, num_kv_heads, n, block * group, width)
    k, v = (_pad(x, m * block).transpose(0, 2, 1, 3).reshape(batch, num_kv_heads, m, block, width) for x in (k, v))
    far = jnp.iinfo(jnp.int32).max
    places = _Places(
        _pad(q_positions, n * block, far).reshape(batch, n, block),
        _pad(k_positions, m * block, far).reshape(batch, m, block),
        _pad(q_segments, n * block, -1).reshape(batch, n, block),
        _pad(k_segments, m * block, -1).reshape(batch, m, block),
    )
    output, normaliser = _attention(plan, q, k, v, places)
    output = output.reshape(batch, num_kv_heads, n * block, group, width).transpose(0, 2, 1, 3, 4)
    normaliser = normaliser.reshape(batch, num_kv_heads, n * block, group).transpose(0, 2, 1, 3)
    return (
        output.reshape(batch, n * block, num_heads, width)[:, :length],
        normaliser.reshape(batch, n * block, num_heads)[:, :length],
    )


def _pad(x: Array, length: int, value: int = 0) -> Array:
    widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, q: Array, k: Array, v: Array, places: _Places) -> tuple[Array, Array]:
    return _over_heads(functools.partial(_forward_one, plan), plan, (q, k, v), places)


def _attention_forward(plan: _Plan, q: Array, k: Array, v: Array, places: _Places):
    output, normaliser = _attention(plan, q, k, v, places)
    # Named, so that a policy can keep them: without, the backward pass would attend a second time.
    output, normaliser = checkpoint_name(output, "attention"), checkpoint_name(normaliser, "normaliser")
    q, k, v = checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")
    return (output, normaliser), (q, k, v, places, output, normaliser)


def _attention_backward(plan: _Plan, residuals, cotangents):
    q, k, v, places, output, normaliser = residuals
    g, g_normaliser = cotangents
    # d score = p (g . v - g . output + g_normaliser): both row terms are computed once.
    offset = jnp.sum(g.astype(normaliser.dtype) * output.astype(normaliser.dtype), axis=-1) - g_normaliser
    dq, dk, dv = _over_heads(functools.partial(_backward_one, plan), plan, (q, k, v, g, offset, normaliser), places)
    return dq, dk, dv, None


_attention.defvjp(_attention_forward, _attention_backward)


def _over_heads(function, plan: _Plan, arrays: tuple[Array, ...], places: _Places):
    """Applies ``function(arrays of one row and KV head, places of one row)`` over leading axes [B, Hk]."""

    def batched(arrays, places):
        return jax.vmap(lambda a, p: jax.vmap(lambda one: function(one, p))(a))(arrays, places)

    def looped(arrays, places):
        return jax.lax.map(lambda row: jax.lax.map(lambda one: function(one, row[1]), row[0]), (arrays, places))

    if plan.layout == "auto":
        return jax.lax.platform_dependent(arrays, places, cpu=looped, default=batched)
    return (looped if plan.layout == "looped" else batched)(arrays, places)


def _scores(plan: _Plan, q: Array, k: Array, places: _Places, i: Array, j: Array) -> Array:
    """Scaled scores of query block i against key block j, hidden entries at -1e30: [block * group, block]."""
    dtype = wide(q.dtype)
    scores = jax.lax.dot_general(q[i], k[j], (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    scores = scores * jnp.asarray(plan.scale, dtype)
    distance = places.query[i][:, None] - places.key[j][None, :]
    visible = (distance >= 0) & (places.query_segment[i][:, None] == places.key_segment[j][None, :])
    if plan.window is not None:
        visible &= distance < plan.window
    visible = jnp.broadcast_to(visible[:, None, :], (visible.shape[0], plan.group, visible.shape[1]))
    return jnp.where(visible.reshape(scores.shape), scores, jnp.asarray(_HIDDEN, dtype))


def _visible_pairs(plan: _Plan, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """(query block, key block) for every two blocks of which something may be visible, row by row."""
    i, j = np.indices((n, m), np.int32).reshape(2, -1)
    if plan.reach is None:
        return i, j
    seen = (j <= i) & (i - j <= plan.reach)
    return i[seen], j[seen]


def _forward_one(plan: _Plan, arrays: tuple[Array, Array, Array], places: _Places) -> tuple[Array, Array]:
    q, k, v = arrays
    n, rows, width = q.shape
    dtype = wide(q.dtype)

    def step(carry: Any, pair: Any):
        best, total, output = carry
        i, j = pair
        scores = _scores(plan, q, k, places, i, j)
        new_best = jnp.maximum(best[i], scores.max(axis=-1))
        weights = jnp.exp(scores - new_best[:, None])
        shrink = jnp.exp(best[i] - new_best)
        added = jax.lax.dot_general(
            weights.astype(v.dtype), v[j], (((1,), (0,)), ((), ())), preferred_element_type=dtype
        )
        return (
            best.at[i].set(new_best),
            total.at[i].set(total[i] * shrink + weights.sum(axis=-1)),
            output.at[i].set(output[i] * shrink[:, None] + added),
        ), None

    init = (
        jnp.full((n, rows), _HIDDEN, dtype),
        jnp.zeros((n, rows), dtype),
        jnp.zeros((n, rows, width), dtype),
    )
    init = tuple(vary_like(x, q, k, v, *places) for x in init)
    (best, total, output), _ = jax.lax.scan(step, init, _visible_pairs(plan, len(q), len(k)))
    return (output / total[..., None]).astype(q.dtype), best + jnp.log(total)


def _backward_one(plan: _Plan, arrays: tuple[Array, ...], places: _Places) -> tuple[Array, Array, Array]:
    q, k, v, g, offset, normaliser = arrays
    dtype = wide(q.dtype)

    def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
        return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=dtype)

    def step(carry: Any, pair: Any):
        dq, dk, dv = carry
        i, j = pair
        weights = jnp.exp(_scores(plan, q, k, places, i, j) - normaliser[i][:, None])
        d_weights = product(g[i], v[j], (1, 1)) - offset[i][:, None]
        d_scores = (weights * d_weights * jnp.asarray(plan.scale, dtype)).astype(q.dtype)
        return (
            dq.at[i].add(product(d_scores, k[j], (1, 0))),
            dk.at[j].add(product(d_scores, q[i], (0, 0))),
            dv.at[j].add(product(weights.astype(q.dtype), g[i], (0, 0))),
        ), None

    init = tuple(vary_like(jnp.zeros(x.shape, dtype), q, k, v, g, *places) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(step, init, _visible_pairs(plan, len(q), len(k)))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
