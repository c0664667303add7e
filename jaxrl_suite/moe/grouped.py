"""Grouped matrix products: rows sorted by expert, each group against its own matrix, work proportional to the rows.

A dense masked product (what ``jax.lax.ragged_dot`` becomes on a CPU and on stock GPU builds) costs E times too much.
Here rows lie in an *aligned* layout: the group of each expert is padded to whole blocks, so every block meets exactly
one matrix, and a loop over blocks does one plain 2-D product each, skipping blocks without rows.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.moe import grouped_gpu
from jaxrl_suite.moe.permute import collect_rows, spread_rows
from jaxrl_suite.moe.variance import unify, vary_like, zeros_like_varying
from jaxrl_suite.types import Array

Backend = Literal["blocks", "ragged_dot", "tokamax"]
OUTER_ROWS = 256  # gradients of weights: products over fewer rows spend their time on adding the results


class Blocks(NamedTuple):
    """Aligned layout of rows that belong to experts.

    Attributes:
        source: int32 [M], row that fills each aligned slot, or the number of rows R for none.
        slots: int32 [R, 1], aligned slot of each row, or M for a row of no expert.
        expert: int32 [M / block], expert of each block.
        live: bool [M / block], whether a block holds any row.
    """

    source: Array
    slots: Array
    expert: Array
    live: Array


def sort_by_group(groups: Array, num_groups: int) -> tuple[Array, Array, Array]:
    """Stable sort of items by group.

    Args:
        groups: int32 [N], group of each item; ``num_groups`` means none and sorts last.
        num_groups: number of groups.

    Returns:
        order int32 [N] (item at each sorted place), rank int32 [N] (place of each item), counts int32 [num_groups].

    >>> sort_by_group(jnp.array([1, 0, 1, 0]), 2)[0].tolist()
    [1, 3, 0, 2]
    """
    (num,) = groups.shape
    items = jnp.arange(num, dtype=jnp.int32)
    if (num_groups + 1) * num < 2**31:  # one integer key is several times cheaper than a key with a payload
        order = jnp.sort(groups.astype(jnp.int32) * num + items) % max(num, 1)
    else:
        order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    rank = jnp.zeros_like(order).at[order].set(items, unique_indices=True)
    edges = jnp.searchsorted(groups[order], jnp.arange(num_groups + 1, dtype=groups.dtype)).astype(jnp.int32)
    return order, rank, edges[1:] - edges[:-1]


def exclusive_cumsum(sizes: Array, axis: int = -1) -> Array:
    """Sums of the entries before each entry.

    >>> exclusive_cumsum(jnp.array([2, 3, 1])).tolist()
    [0, 2, 5]
    """
    return jnp.cumsum(sizes, axis=axis, dtype=sizes.dtype) - sizes


def align(groups: Array, num_groups: int, *, block: int = 128) -> Blocks:
    """Aligned layout of rows by expert.

    Args:
        groups: int32 [R], expert of each row; ``num_groups`` for a row that belongs to none.
        num_groups: number of experts.
        block: rows of a block.
    """
    (num,) = groups.shape
    num_blocks = -(-num // block) + num_groups
    order, rank, counts = sort_by_group(groups, num_groups)
    starts = exclusive_cumsum(counts)
    blocks_of = -(-counts // block)
    first_block = exclusive_cumsum(blocks_of)
    safe = jnp.minimum(groups, num_groups - 1)
    slots = first_block[safe] * block + rank - starts[safe]
    slots = jnp.where(groups < num_groups, slots, num_blocks * block)[:, None]
    index = jnp.arange(num_blocks, dtype=jnp.int32)
    ends = first_block + blocks_of
    expert = jnp.minimum(jnp.searchsorted(ends, index, side="right").astype(jnp.int32), num_groups - 1)
    live = index < ends[-1]
    within = (index - first_block[expert])[:, None] * block + jnp.arange(block, dtype=jnp.int32)
    filled = live[:, None] & (within < counts[expert][:, None])
    place = jnp.where(filled, starts[expert][:, None] + within, 0)
    source = jnp.where(filled, order[place], num).reshape(-1)
    return Blocks(source, slots, expert, live)


def blocks_of_experts(expert: Array, live: Array, num_experts: int) -> tuple[Array, Array]:
    """First block and number of blocks with rows of each expert, both int32 [E]; see :class:`Blocks`."""
    owned = jnp.sum((expert[:, None] == jnp.arange(num_experts)) & live[:, None], axis=0, dtype=jnp.int32)
    return exclusive_cumsum(owned), owned  # blocks with rows come first, in the order of their experts


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def block_matmul(rows: Array, weights: Array, expert: Array, live: Array, transposed: bool = False) -> Array:
    """Product of each block of aligned rows with the matrix of its expert; zero for blocks without rows.

    The derivative is a pair of such products, so it can be transposed and differentiated again in reverse.

    Args:
        rows: [M, D], aligned.
        weights: [E, D, F].
        expert: int32 [M / block].
        live: bool [M / block].
        transposed: multiply with the transposed matrices: rows [M, F] to [M, D], without a copy of the weights.

    Returns:
        [M, F].
    """
    return _block_matmul(rows, weights, expert, live, transposed)


@jax.custom_vjp
def block_outer(rows: Array, others: Array, expert: Array, live: Array, like: Array) -> Array:
    """Sum over the blocks of each expert of ``rowsᵀ · others``: the derivative of :func:`block_matmul` by its weights.

    Args:
        rows: [M, D], aligned.
        others: [M, F], aligned.
        expert: int32 [M / block].
        live: bool [M / block].
        like: [E, 0], carries the number of experts in its shape.

    Returns:
        [E, D, F], accumulated in float32 at least, in the dtype of ``rows``.
    """
    return _block_outer(rows, others, expert, live, like)


def _block_matmul(rows: Array, weights: Array, expert: Array, live: Array, transposed: bool) -> Array:
    rows, weights, expert, live = unify(rows, weights, expert, live)
    walk = functools.partial(_walk_matmul, transposed=transposed)
    if not grouped_gpu.fits(rows, weights.shape, weights.shape[1 if transposed else 2], expert.shape[0]):
        return walk(rows, weights, expert, live)
    tiles = functools.partial(grouped_gpu.gpu_block_matmul, transposed=transposed)
    return jax.lax.platform_dependent(rows, weights, expert, live, cuda=tiles, default=walk)


def _walk_matmul(rows: Array, weights: Array, expert: Array, live: Array, *, transposed: bool) -> Array:
    """Block after block."""
    num_blocks, width = expert.shape[0], weights.shape[1 if transposed else 2]
    block = rows.shape[0] // num_blocks

    def one(_: None, item: tuple[Array, Array, Array]) -> tuple[None, Array]:
        x, e, is_live = item

        def product(x: Array) -> Array:
            contracted = (((1,), (1 if transposed else 0,)), ((), ()))
            wide = _wide(x.dtype)
            return jax.lax.dot_general(x, weights[e], contracted, preferred_element_type=wide).astype(x.dtype)

        def nothing(x: Array) -> Array:
            return zeros_like_varying((block, width), x.dtype, x, weights, e)

        return None, jax.lax.cond(is_live, product, nothing, x)

    return jax.lax.scan(one, None, (rows.reshape(num_blocks, block, -1), expert, live))[1].reshape(-1, width)


def _block_outer(rows: Array, others: Array, expert: Array, live: Array, like: Array) -> Array:
    num_experts, block = like.shape[0], rows.shape[0] // expert.shape[0]
    rows, others, expert, live = unify(rows, others, expert, live)
    first, owned = blocks_of_experts(expert, live, num_experts)
    walk = functools.partial(_walk_outer, block=block)
    if not grouped_gpu.fits(rows, (num_experts, rows.shape[-1], others.shape[-1]), others.shape[-1], expert.shape[0]):
        return walk(rows, others, first, owned)
    tiles = functools.partial(grouped_gpu.gpu_block_outer, block=block)
    return jax.lax.platform_dependent(rows, others, first, owned, cuda=tiles, default=walk)


def _walk_outer(rows: Array, others: Array, first: Array, owned: Array, *, block: int) -> Array:
    """Expert by expert: each sum stays in the cache and is written once, in products of up to ``OUTER_ROWS`` rows."""
    width, other_width = rows.shape[-1], others.shape[-1]
    sizes = [1 << power for power in range(4) if power == 0 or block << power <= min(OUTER_ROWS, rows.shape[0])]
    wide = _wide(rows.dtype)

    def one(_: None, item: tuple[Array, Array]) -> tuple[None, Array]:
        start, number = item

        def add(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            done, total = carry
            which = jnp.sum(number - done >= jnp.array(sizes[1:], jnp.int32), dtype=jnp.int32)

            def product(size: int) -> Array:
                begin = (start + done) * block
                x, y = (jax.lax.dynamic_slice_in_dim(part, begin, size * block) for part in (rows, others))
                return jnp.dot(x.T, y, preferred_element_type=wide)

            branches = [functools.partial(product, size) for size in sizes]
            return done + jnp.left_shift(1, which), total + jax.lax.switch(which, branches)

        zeros = zeros_like_varying((width, other_width), wide, rows)
        return None, jax.lax.while_loop(lambda carry: carry[0] < number, add, (number * 0, zeros))[1]

    return jax.lax.scan(one, None, (first, owned))[1].astype(rows.dtype)


def _matmul_forward(rows: Array, weights: Array, expert: Array, live: Array, transposed: bool) -> tuple[Array, tuple]:
    # Not the bare loops or kernels: whoever differentiates again meets the rule a second time.
    return block_matmul(rows, weights, expert, live, transposed), (rows, weights, expert, live)


def _matmul_backward(transposed: bool, residuals: tuple, cotangent: Array) -> tuple:
    rows, weights, expert, live = residuals
    like = vary_like(jnp.zeros((weights.shape[0], 0), rows.dtype), rows)
    d_rows = block_matmul(cotangent, weights, expert, live, not transposed)
    pair = (cotangent, rows) if transposed else (rows, cotangent)
    d_weights = block_outer(*pair, expert, live, like).astype(weights.dtype)
    return d_rows.astype(rows.dtype), d_weights, None, None


def _outer_forward(rows: Array, others: Array, expert: Array, live: Array, like: Array) -> tuple[Array, tuple]:
    return block_outer(rows, others, expert, live, like), (rows, others, expert, live, like)


def _outer_backward(residuals: tuple, cotangent: Array) -> tuple:
    rows, others, expert, live, like = residuals
    d_rows = block_matmul(others, cotangent, expert, live, True)
    d_others = block_matmul(rows, cotangent, expert, live, False)
    return d_rows, d_others, None, None, jnp.zeros_like(like)


block_matmul.defvjp(_matmul_forward, _matmul_backward)
block_outer.defvjp(_outer_forward, _outer_backward)


def grouped_matmul(
    rows: Array, weights: Array, sizes: Array, *, block: int = 128, backend: Backend = "blocks"
) -> Array:
    """Product of contiguous groups of rows with one matrix a group.

    Args:
        rows: [R, D], sorted by group; rows beyond ``sum(sizes)`` yield zero.
        weights: [E, D, F].
        sizes: int32 [E], rows of each group.
        block: rows of a block ("blocks").
        backend: "blocks" (work proportional to the rows on every platform), "ragged_dot" (JAX's own; dense on a CPU)
            or "tokamax" (kernels for GPU and TPU, where that package is installed).

    Returns:
        [R, F].

    >>> rows, weights = jnp.ones((3, 2)), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)])
    >>> grouped_matmul(rows, weights, jnp.array([1, 2]), block=2)[:, 0].tolist()
    [1.0, 2.0, 2.0]
    """
    check(backend in _BACKENDS, argument="backend", value=backend, rule=f"must be one of {', '.join(_BACKENDS)}")
    return _BACKENDS[backend](rows, weights, sizes, block)


def _by_blocks(rows: Array, weights: Array, sizes: Array, block: int) -> Array:
    index = jnp.arange(rows.shape[0], dtype=jnp.int32)
    groups = jnp.searchsorted(jnp.cumsum(sizes), index, side="right").astype(jnp.int32)
    layout = align(groups, weights.shape[0], block=block)
    rows, weights, layout = unify(rows, weights, layout)
    aligned = spread_rows(rows, layout.source, layout.slots)
    return collect_rows(block_matmul(aligned, weights, layout.expert, layout.live), layout.source, layout.slots)


def _by_ragged_dot(rows: Array, weights: Array, sizes: Array, block: int) -> Array:
    del block
    product = jax.lax.ragged_dot(rows, weights, sizes.astype(jnp.int32), preferred_element_type=_wide(rows.dtype))
    inside = jnp.arange(rows.shape[0]) < jnp.sum(sizes)  # some kernels leave the tail unwritten
    return jnp.where(inside[:, None], product, 0).astype(rows.dtype)


def _by_tokamax(rows: Array, weights: Array, sizes: Array, block: int) -> Array:
    del block
    try:
        import tokamax
    except ImportError as error:
        raise ValueError("backend='tokamax': the package tokamax is not installed. Use backend='blocks'.") from error
    product = tokamax.ragged_dot(rows, weights, sizes.astype(jnp.int32), preferred_element_type=_wide(rows.dtype))
    inside = jnp.arange(rows.shape[0]) < jnp.sum(sizes)
    return jnp.where(inside[:, None], product, 0).astype(rows.dtype)


_BACKENDS: dict[str, Callable[[Array, Array, Array, int], Array]] = {
    "blocks": _by_blocks,
    "ragged_dot": _by_ragged_dot,
    "tokamax": _by_tokamax,
}


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
