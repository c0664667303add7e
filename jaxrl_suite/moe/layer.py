"""The sparse feed-forward layer: route, decide capacity, dispatch, run experts, combine.

What each option depends on (D = "changes with"):

- dropless routing: nothing but the tokens; the same for every folding;
- capacity with ``drop_scope="rank"``: the tokens of one rank, D TP · CP, DP, micro-batches and the order of a sequence;
- capacity with ``drop_scope="sequence"``: the sequences of one data rank, independent of TP and CP;
- ``buffer_factor``: as rank-wise dropping, but the copies lost are counted as overflow.
"""

import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_suite.lm import route
from jaxrl_suite.lm.feed_forward import router_logits, shared_expert
from jaxrl_suite.lm.layers import project
from jaxrl_suite.moe.block_swiglu import LayerStack, block_swiglu, weighted_hidden
from jaxrl_suite.moe.capacity import expert_capacity, keep_by_capacity, rank_in_expert
from jaxrl_suite.moe.config import MoEConfig
from jaxrl_suite.moe.dispatch import DispatchStats, ExpertAxes, Experts, dispatch
from jaxrl_suite.moe.fp8 import round_rows, round_tiles
from jaxrl_suite.moe.grouped import Blocks, block_matmul
from jaxrl_suite.moe.hooks import tensor_parallel
from jaxrl_suite.moe.variance import axis_index, axis_size, unify, vary_like
from jaxrl_suite.types import Array, FeedForward, Parallel, Params

# What the backward pass of a folded sparse layer cannot compute again without a product, an exchange or a sort, beside
# the names that it shares with the decoder of one device.
SAVED_NAMES = ("held", "router", "routing", "dispatched", "shared")
_WALKED_BLOCK = 16  # rows: smaller blocks pad less, but more products have few rows


class LayerAxes(NamedTuple):
    """Atoms that a layer communicates over; all empty on one device.

    Attributes:
        experts: of EP and ETP.
        tp: of attention's tensor (and sequence) parallelism.
        cp: of context parallelism.
    """

    experts: ExpertAxes = ExpertAxes()
    tp: tuple[str, ...] = ()
    cp: tuple[str, ...] = ()


class RouterSums(NamedTuple):
    """Sums over this rank's tokens of one layer, from which every balancing rule follows; and counts.

    Attributes:
        counts: float32 [B, E], copies routed to each expert before drops, by sequence.
        probs: float32 [B, E], summed router probabilities.
        tokens: float32 [B], tokens that count.
        z: float32 [], sum of squared log-partitions.
        stats: counts of the dispatcher, int32.
    """

    counts: Array
    probs: Array
    tokens: Array
    z: Array
    stats: DispatchStats


def moe_layer(
    params: Params,
    x: Array,
    *,
    config: MoEConfig,
    axes: LayerAxes = LayerAxes(),  # noqa: B008
    mask: Array | None = None,
) -> tuple[Array, RouterSums]:
    """The sparse feed-forward of this rank's tokens.

    Args:
        params: one layer's ``feed_forward`` dict: router [D, E] whole, experts [E / EP, D, F / ETP] as this rank holds
            them, the shared expert split over tp.
        x: [B, T, D], normalised activations of this rank's part of the sequences.
        config: model and dispatch options.
        axes: what to communicate over, inside a manual ``shard_map``.
        mask: bool [B, T], tokens that count in the balancing sums; all by default. Masked tokens are routed all the
            same, since what they yield is never read.

    Returns:
        y [B, T, D] and the sums.

    References:
        Liu et al. (2025), arXiv:2504.14960, section 3; Jiang et al. (2024), arXiv:2401.04088, section 2.1.
    """
    model = config.model
    (batch, length, width), num_experts = x.shape, model.num_experts
    tokens = x.reshape(-1, width)
    logits = checkpoint_name(router_logits(params, tokens, model), "router")
    routing = route(logits, model, params.get("router_bias"))
    keep, rank, capacity = _capacity(routing.experts, routing.weights, batch, config, axes)
    experts, keep, rank = checkpoint_name((routing.experts, keep, rank), "routing")
    y, stats = dispatch(
        config.dispatch,
        tokens,
        experts,
        routing.weights,
        keep,
        make_experts(params["experts"], config, routing.experts.size * axis_size(axes.experts.etp)),
        num_experts=num_experts,
        axes=axes.experts,
        capacity=capacity,
        rows_per_peer=_rows_per_peer(tokens.shape[0], config, axes),
        rank=rank,
    )
    if "shared" in params:
        shared = shared_expert(params, x, model, _naming(tensor_parallel(axes.tp)))
        y = y + shared.reshape(-1, width)
    sums = _router_sums(routing.experts, routing.probs, logits, mask, batch, stats)
    return y.reshape(batch, length, width), sums


def _naming(parallel: Parallel) -> Parallel:
    """Hooks that name what a row split yields: a gate that multiplies it needs it again."""
    return parallel._replace(after_row=lambda x: checkpoint_name(parallel.after_row(x), "shared"))


def make_feed_forward(config: MoEConfig, axes: LayerAxes, mask: Array | None = None) -> FeedForward:
    """:func:`moe_layer` as the feed-forward slot of a decoder block."""

    def feed_forward(params: Params, x: Array) -> tuple[Array, RouterSums]:
        return moe_layer(params, x, config=config, axes=axes, mask=mask)

    return feed_forward


def make_experts(params: Params, config: MoEConfig, num_rows: int = 0) -> Experts:
    """The local SwiGLU experts, for rows in uniform groups and for rows in aligned blocks.

    Args:
        params: gate and up [E, D, F], down [E, F, D] of this rank; with ETP the outputs are partial sums. A walk reads
            their values from ``stack``, a :class:`LayerStack`, where there is one.
        config: read for dtypes and block size. With ``expert_precision="float8"`` every product takes float8 operands
            (rows in blocks of 1 x 128, weights in tiles of 128 x 128 of what this rank holds) and sums in float32; the
            backward pass sees the rounded operands, cotangents are not rounded. Combine weights multiply before the
            rounding, so that the scale of a row takes them up; their gradient sees the hidden row as it was.
        num_rows: rows that these experts get in all if the load is even, for the size of a block where it matters.
    """
    accumulate, num_local = config.model.accumulate_dtype, params["gate"].shape[0]
    stack = cast(LayerStack | None, params.get("stack"))
    params = {name: leaf for name, leaf in params.items() if name != "stack"}
    float8 = config.expert_precision == "float8"
    if float8:
        params = jax.tree.map(round_tiles, params)

    def rounded(rows: Array) -> Array:
        return round_rows(rows) if float8 else rows

    def uniform(x: Array, weights: Array) -> Array:
        arguments = unify(params, x, weights)

        def one(matrices: Params, rows: Array, weights: Array) -> Array:
            rows = rounded(rows)
            gate, up = (
                checkpoint_name(project(rows, matrices[name], accumulate=accumulate), name) for name in ("gate", "up")
            )
            return project(rounded(weighted_hidden(gate, up, weights)), matrices["down"], accumulate=accumulate)

        # A batched product takes more than twice as long as 2-D products on a CPU, and a fraction of it elsewhere.
        if jax.default_backend() != "cpu":
            return jax.vmap(one)(*arguments)
        return jax.lax.scan(lambda _, item: (None, one(*item)), None, arguments)[1]

    def blocks(x: Array, weights: Array, layout: Blocks) -> Array:
        x, weights, layout, matrices, whole = unify(rounded(x), weights, layout, params, stack)
        matrices = jax.tree.map(lambda leaf: leaf.astype(x.dtype), matrices)
        if not float8:
            return block_swiglu(x, matrices, weights, layout.expert, layout.live, whole)

        def product(rows: Array, name: str) -> Array:
            return block_matmul(rows, matrices[name], layout.expert, layout.live)

        gate, up = (checkpoint_name(product(x, name), name) for name in ("gate", "up"))
        return product(rounded(weighted_hidden(gate, up, weights)), "down")

    if config.remat == "experts":  # no exchange happens in here, so none can be repeated
        uniform, blocks = (jax.checkpoint(function, prevent_cse=False) for function in (uniform, blocks))
    walked = jax.default_backend() == "cpu" and not float8  # chunks of many blocks, whatever the size of a block
    block = config.block_rows or (_WALKED_BLOCK if walked else even_block(num_rows, num_local))
    return Experts(uniform, blocks, block)


def even_block(num_rows: int, num_experts: int) -> int:
    """Rows of a block: the power of two below a quarter of an even share, 32 to 128.

    Padding an expert to whole blocks then costs an eighth of its rows at an even load; smaller blocks keep the
    processor waiting, larger ones gain nothing.

    >>> even_block(8192, 8), even_block(8192, 64), even_block(0, 1)
    (128, 32, 32)
    """
    return min(128, max(32, 1 << max(0, (num_rows // (4 * num_experts)).bit_length() - 1)))


def _capacity(
    experts: Array, weights: Array, batch: int, config: MoEConfig, axes: LayerAxes
) -> tuple[Array, Array | None, int | None]:
    """Which copies survive, their place among the survivors of this rank, and the slots of a source and expert."""
    num_experts, top_k, factor = config.model.num_experts, config.model.experts_per_token, config.capacity_factor
    num_tokens = experts.shape[0]
    if factor is None:
        return jnp.ones_like(experts, bool), None, None
    weights = jax.lax.stop_gradient(weights)
    if config.drop_scope == "rank" or not (axes.cp + axes.tp):
        capacity = expert_capacity(num_tokens, num_experts, top_k, factor)
        if config.dispatch == "drop_pad":
            rank = rank_in_expert(experts, weights, num_experts, config.drop_policy)
            return rank < capacity, rank, capacity
        return keep_by_capacity(experts, weights, num_experts, capacity, config.drop_policy), None, None
    keep, total = _sequence_keep(experts, weights, batch, config, axes)
    rank = None
    if config.dispatch == "drop_pad":
        rank = rank_in_expert(jnp.where(keep, experts, num_experts), weights, num_experts, config.drop_policy)
    return keep, rank, min(num_tokens, total)


def _sequence_keep(experts: Array, weights: Array, batch: int, config: MoEConfig, axes: LayerAxes) -> tuple[Array, int]:
    """Capacity decided over whole sequences: gathered in the order of the sequence, so that ties fall the same way."""
    model, members = config.model, axes.cp + axes.tp
    local, ranks = experts.shape[0] // batch, axis_size(members)
    both = (experts.reshape(batch, local, -1), weights.reshape(batch, local, -1))
    both = tuple(jax.lax.all_gather(part, members, axis=1, tiled=True) for part in both)
    order = zigzag_order(local * ranks, axis_size(axes.cp)) if config.zigzag else jnp.arange(local * ranks)
    ordered = tuple(jnp.zeros_like(part).at[:, order].set(part).reshape(-1, part.shape[-1]) for part in both)
    total = expert_capacity(
        ordered[0].shape[0], model.num_experts, model.experts_per_token, config.capacity_factor or 1
    )
    keep = keep_by_capacity(ordered[0], ordered[1], model.num_experts, total, config.drop_policy)
    keep = keep.reshape(batch, local * ranks, -1)[:, order]
    mine = jax.lax.dynamic_slice_in_dim(keep, axis_index(members) * local, local, axis=1)
    return mine.reshape(experts.shape), total


def zigzag_order(length: int, ranks: int) -> Array:
    """Global position of each place when sequences lie in zig-zag order over context ranks, int32 [T].

    Rank r owns chunks r and 2·ranks-1-r of 2·ranks equal chunks, so causal work is the same on every rank.

    >>> zigzag_order(8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
    """
    if ranks == 1:
        return jnp.arange(length, dtype=jnp.int32)
    chunks = jnp.arange(length, dtype=jnp.int32).reshape(2 * ranks, -1)
    pairs = [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]
    return jnp.concatenate([chunks[chunk] for pair in pairs for chunk in pair])


def _rows_per_peer(num_tokens: int, config: MoEConfig, axes: LayerAxes) -> int | None:
    if config.buffer_factor is None:
        return None
    even = num_tokens * config.model.experts_per_token / axis_size(axes.experts.ep)
    return max(1, math.ceil(round(even * config.buffer_factor, 9)))


def _router_sums(
    experts: Array, probs: Array, logits: Array, mask: Array | None, batch: int, stats: DispatchStats
) -> RouterSums:
    num_experts = probs.shape[-1]
    kept = jnp.ones(experts.shape[:1], probs.dtype) if mask is None else mask.reshape(-1).astype(probs.dtype)
    hits = (experts[:, :, None] == jnp.arange(num_experts, dtype=experts.dtype)).sum(axis=1).astype(probs.dtype)
    by_sequence = (batch, -1, num_experts)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1)).astype(probs.dtype)
    sums = RouterSums(
        counts=jax.lax.stop_gradient((hits * kept[:, None]).reshape(by_sequence).sum(axis=1)),
        probs=(probs * kept[:, None]).reshape(by_sequence).sum(axis=1),
        tokens=kept.reshape(batch, -1).sum(axis=1),
        z=jnp.sum(squares * kept),
        stats=stats,
    )
    return vary_like(sums, logits)
