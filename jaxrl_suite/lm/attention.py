"""Blockwise causal attention with an online softmax: memory linear in the length, forward and backward.

The visible (query block, key block) pairs are listed when the function is traced, so that nothing above the diagonal
or outside a window is computed, and one scan walks the list. Its length is static, hence the derivative below is
itself a scan that is linear in the cotangent, and JAX can transpose it again (influences need that). A short sequence
is one block, and nothing is walked: all rows and heads go through one batched product.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxrl_suite.lm.layers import vary_like, wide
from jaxrl_suite.types import Array

Layout = Literal["auto", "looped", "batched"]
_Map = Callable[[Callable[..., Any], Any], Any]
_HIDDEN = -1e30  # finite, so that a block of which nothing is visible makes no NaN
# A CPU takes the products of all rows and heads at once up to here: scores of more tokens leave the cache.
_CPU_BLOCK = 128


class _Plan(NamedTuple):
    """Static facts of one call.

    Attributes:
        offset: column of the first query among those of the keys, where order on the time axis is order of positions;
            None where every block may see every other.
        window: see :func:`blockwise_attend`.
        scale: factor on the scores.
        group: query heads of a KV head.
        layout: see :func:`blockwise_attend`; on a CPU "auto" is "batched" for a single small block.
        q_block: queries of a block.
        k_block: keys of a block.
    """

    offset: int | None
    window: int | None
    scale: float
    group: int
    layout: Layout
    q_block: int
    k_block: int


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
            accelerators and for short sequences; "auto" decides when the program is lowered for its platform.

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
        ordered: queries are the last T of the S columns, and a later column is never visible: blocks above the diagonal
            are skipped.

    Returns:
        output [B, T, Hq, C] in the dtype of ``q`` and, in float32 at least, the natural logarithm of each row's
        normaliser [B, T, Hq] (about -1e30 where nothing was visible). Parts (o_i, n_i) over disjoint keys merge to
        ``sum_i o_i exp(n_i - n)`` with ``n = logsumexp_i n_i``. Both are differentiable.
    """
    batch, length, num_heads, width = q.shape
    num_keys, num_kv_heads = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    if block_size is None:  # a step of the walk costs a launch on an accelerator, and cache misses on a CPU
        block_size = _CPU_BLOCK if jax.default_backend() == "cpu" else 512
    if max(length, num_keys) <= block_size:  # filled up to whole vector registers only
        q_block, k_block = (16 * -(-rows // 16) for rows in (length, num_keys))
        layout = "batched" if layout == "auto" and max(q_block, k_block) <= _CPU_BLOCK else layout
    else:
        q_block = k_block = block_size
    n, m = -(-length // q_block), -(-num_keys // k_block)
    plan = _Plan(num_keys - length if ordered else None, window, width**-0.5, group, layout, q_block, k_block)
    q, k, v = (vary_like(x, q, k, v) for x in (q, k, v))
    q, k, v = _pad(q, n * q_block), _pad(k, m * k_block), _pad(v, m * k_block)
    far = jnp.iinfo(jnp.int32).max
    places = _Places(
        _pad(q_positions, n * q_block, far).reshape(batch, n, q_block),
        _pad(k_positions, m * k_block, far).reshape(batch, m, k_block),
        _pad(q_segments, n * q_block, -1).reshape(batch, n, q_block),
        _pad(k_segments, m * k_block, -1).reshape(batch, m, k_block),
    )
    output, normaliser = _attention(plan, q, k, v, places)
    return output[:, :length], normaliser[:, :length]


def _pad(x: Array, length: int, value: int = 0) -> Array:
    widths = [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: _Plan, q: Array, k: Array, v: Array, places: _Places) -> tuple[Array, Array]:
    def row(over_heads: _Map, arrays: tuple[Array, ...], places: _Places) -> tuple[Array, Array]:
        q, k, v = arrays
        blocks = (_query_blocks(plan, q), _key_blocks(plan, k), _key_blocks(plan, v))
        output, normaliser = over_heads(lambda one: _forward_one(plan, one, places), blocks)
        return _from_query_blocks(plan, output), _from_query_blocks(plan, normaliser)

    return _over_rows(row, plan, (q, k, v), places)


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

    def row(over_heads: _Map, arrays: tuple[Array, ...], places: _Places) -> tuple[Array, Array, Array]:
        q, k, v, *by_query = arrays
        blocks = (_query_blocks(plan, q), _key_blocks(plan, k), _key_blocks(plan, v))
        blocks += tuple(_query_blocks(plan, x) for x in by_query)
        dq, dk, dv = over_heads(lambda one: _backward_one(plan, one, places), blocks)
        return _from_query_blocks(plan, dq), _from_turned_blocks(dk), _from_turned_blocks(dv)

    return *_over_rows(row, plan, (q, k, v, g, offset, normaliser), places), None


_attention.defvjp(_attention_forward, _attention_backward)


# A row is laid out for the products where it is read and written, while it lies in the cache of a CPU: as passes over
# all rows that took 2 % of a train step.
def _query_blocks(plan: _Plan, x: Array) -> Array:
    """[T, Hq, ...] to [Hk, n, block * group, ...]: time major, heads of a group minor, one product for the group."""
    length, rest = x.shape[0], x.shape[2:]
    x = x.reshape(length, -1, plan.group, *rest).swapaxes(0, 1)
    return x.reshape(x.shape[0], length // plan.q_block, -1, *rest)


def _from_query_blocks(plan: _Plan, x: Array) -> Array:
    """The inverse of :func:`_query_blocks`."""
    rest = x.shape[3:]
    x = x.reshape(x.shape[0], -1, plan.group, *rest).swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *rest)


def _key_blocks(plan: _Plan, x: Array) -> Array:
    """[S, Hk, C] to [Hk, m, block, C]."""
    length, heads, width = x.shape
    return x.swapaxes(0, 1).reshape(heads, length // plan.k_block, plan.k_block, width)


def _from_turned_blocks(x: Array) -> Array:
    """[Hk, m, C, block] to [S, Hk, C]."""
    heads, _, width, _ = x.shape
    return x.transpose(1, 3, 0, 2).reshape(-1, heads, width)


def _over_rows(row: Callable[..., Any], plan: _Plan, arrays: tuple[Array, ...], places: _Places) -> Any:
    """Applies ``row(map over KV heads, arrays of one row, places of one row)`` over the leading axis."""

    def batched(arrays: tuple[Array, ...], places: _Places) -> Any:
        return jax.vmap(functools.partial(row, lambda one, blocks: jax.vmap(one)(blocks)))(arrays, places)

    def looped(arrays: tuple[Array, ...], places: _Places) -> Any:
        return jax.lax.map(lambda item: row(jax.lax.map, *item), (arrays, places))

    if plan.layout == "auto":
        return jax.lax.platform_dependent(arrays, places, cpu=looped, default=batched)
    return (looped if plan.layout == "looped" else batched)(arrays, places)


def _scores(plan: _Plan, q: Array, k: Array, places: _Places, i: Array | int, j: Array | int) -> Array:
    """Scaled scores of query block i against key block j, hidden entries at -1e30: [rows * group, keys]."""
    dtype = wide(q.dtype)
    scores = jax.lax.dot_general(q[i], k[j], (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    scores = scores * jnp.asarray(plan.scale, dtype)
    distance = places.query[i][:, None] - places.key[j][None, :]
    visible = (distance >= 0) & (places.query_segment[i][:, None] == places.key_segment[j][None, :])
    if plan.window is not None:
        visible &= distance < plan.window
    visible = jnp.broadcast_to(visible[:, None, :], (visible.shape[0], plan.group, visible.shape[1]))
    return jnp.where(visible.reshape(scores.shape), scores, jnp.asarray(_HIDDEN, dtype))


def _visible_pairs(plan: _Plan, q: Array, k: Array) -> tuple[np.ndarray, np.ndarray]:
    """(query block, key block) for every two blocks of which something may be visible, row by row."""
    i, j = np.indices((len(q), len(k)), np.int32).reshape(2, -1)
    if plan.offset is None:
        return i, j
    rows, keys = q.shape[1] // plan.group, k.shape[1]
    seen = j * keys < plan.offset + (i + 1) * rows
    if plan.window is not None:
        seen &= plan.offset + i * rows - ((j + 1) * keys - 1) < plan.window
    return i[seen], j[seen]


def _forward_one(plan: _Plan, arrays: tuple[Array, Array, Array], places: _Places) -> tuple[Array, Array]:
    q, k, v = arrays
    n, rows, width = q.shape
    dtype = wide(q.dtype)
    pairs = _visible_pairs(plan, q, k)

    def values(weights: Array, j: Array | int) -> Array:
        return jax.lax.dot_general(
            weights.astype(v.dtype), v[j], (((1,), (0,)), ((), ())), preferred_element_type=dtype
        )

    if len(pairs[0]) == 1:
        scores = _scores(plan, q, k, places, 0, 0)
        best = scores.max(axis=-1)
        weights = jnp.exp(scores - best[:, None])
        total = weights.sum(axis=-1)
        return (values(weights, 0) / total[:, None]).astype(q.dtype)[None], (best + jnp.log(total))[None]

    def step(carry: Any, pair: Any):
        best, total, output = carry
        i, j = pair
        scores = _scores(plan, q, k, places, i, j)
        new_best = jnp.maximum(best[i], scores.max(axis=-1))
        weights = jnp.exp(scores - new_best[:, None])
        shrink = jnp.exp(best[i] - new_best)
        return (
            best.at[i].set(new_best),
            total.at[i].set(total[i] * shrink + weights.sum(axis=-1)),
            output.at[i].set(output[i] * shrink[:, None] + values(weights, j)),
        ), None

    init = (
        jnp.full((n, rows), _HIDDEN, dtype),
        jnp.zeros((n, rows), dtype),
        jnp.zeros((n, rows, width), dtype),
    )
    init = tuple(vary_like(x, q, k, v, *places) for x in init)
    (best, total, output), _ = jax.lax.scan(step, init, pairs)
    return (output / total[..., None]).astype(q.dtype), best + jnp.log(total)


def _backward_one(plan: _Plan, arrays: tuple[Array, ...], places: _Places) -> tuple[Array, Array, Array]:
    q, k, v, g, offset, normaliser = arrays
    dtype = wide(q.dtype)
    # Turned before the walk: gradients by keys and values are then [C, keys], products that a CPU need not turn.
    turned_q, turned_g = q.swapaxes(1, 2), g.swapaxes(1, 2)

    def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
        return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=dtype)

    def gradients(i: Array | int, j: Array | int) -> tuple[Array, Array, Array]:
        weights = jnp.exp(_scores(plan, q, k, places, i, j) - normaliser[i][:, None])
        d_weights = product(g[i], v[j], (1, 1)) - offset[i][:, None]
        d_scores = (weights * d_weights * jnp.asarray(plan.scale, dtype)).astype(q.dtype)
        return (
            product(d_scores, k[j], (1, 0)),
            product(turned_q[i], d_scores, (1, 0)),
            product(turned_g[i], weights.astype(q.dtype), (1, 0)),
        )

    def step(carry: tuple[Array, Array, Array], pair: Any):
        dq, dk, dv = carry
        i, j = pair
        more_q, more_k, more_v = gradients(i, j)
        return (dq.at[i].add(more_q), dk.at[j].add(more_k), dv.at[j].add(more_v)), None

    pairs = _visible_pairs(plan, q, k)
    if len(pairs[0]) == 1:
        dq, dk, dv = (x[None] for x in gradients(0, 0))
    else:
        shapes = (q.shape, k.swapaxes(1, 2).shape, v.swapaxes(1, 2).shape)
        dq, dk, dv = (vary_like(jnp.zeros(shape, dtype), q, k, v, g, *places) for shape in shapes)
        (dq, dk, dv), _ = jax.lax.scan(step, (dq, dk, dv), pairs)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
