"""Token dispatch: moves copies of tokens to the ranks that own their experts, runs the experts, and brings them back.

Every mode has the same signature and, without drops, the same result:

========== ============================================== ========= ==========================================
mode       buffer                                         backends  use
========== ============================================== ========= ==========================================
drop_pad   [E, C, D], exactly C slots a source and expert all       fixed cost; the paper's benchmark mode
padded     [EP, N, D], N = T · min(k, E / EP) or smaller   all       dropless by plain all-to-all, the default
allgather  all tokens of the group, partial sums back     all       small groups, large k; reference
ragged     real rows only on the wire                     TPU, GPU  large groups
emulated   the offsets of ``ragged`` over an all-gather   all       tests of the metadata of ``ragged``
========== ============================================== ========= ==========================================

Order of collectives: all-to-all over EP, then all-gather over ETP; experts; reduce-scatter over ETP, then all-to-all
back. In this order the exchange across EP carries T · k rows and not ETP · T · k.

The combine weight of a copy travels with its row, 4 bytes beside 2 or 4 a number of the row, and multiplies inside the
expert, between activation and last product. That product has no bias, so in exact arithmetic it is the weighted sum of
outputs. What comes back is summed as it is: no derivative needs it, nobody keeps it, and where layers are recomputed
neither the last product nor the way back is repeated.

References:
    Liu et al. (2025), arXiv:2504.14960, section 3.2 (token dispatcher); Megatron-Core weighs at the same place.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_suite.config import check
from jaxrl_suite.moe.exchange import emulated_ragged_all_to_all, ragged_all_to_all, ragged_offsets
from jaxrl_suite.moe.grouped import Blocks, align, exclusive_cumsum, sort_by_group
from jaxrl_suite.moe.permute import collect_rows, spread_rows
from jaxrl_suite.moe.variance import axis_index, axis_size, unify, varying_axes
from jaxrl_suite.types import Array

Mode = Literal["drop_pad", "padded", "allgather", "ragged", "emulated"]
MODES: tuple[str, ...] = ("drop_pad", "padded", "allgather", "ragged", "emulated")


class ExpertAxes(NamedTuple):
    """Atoms of the expert axes; both empty on one device.

    Attributes:
        ep: atoms over which whole experts are spread; rank e owns experts e·E/EP up to (e+1)·E/EP.
        etp: atoms over which the width of every expert is split.
    """

    ep: tuple[str, ...] = ()
    etp: tuple[str, ...] = ()


class DispatchStats(NamedTuple):
    """Counts on this rank, int32 scalars.

    Attributes:
        sent: copies that this rank sent to experts.
        received: rows that this rank's experts got (of all ETP members together, counted on each).
        dropped: copies that a capacity rule dropped.
        overflow: copies lost because a dropless buffer was given fewer rows than the safe bound.
    """

    sent: Array
    received: Array
    dropped: Array
    overflow: Array


class Experts(NamedTuple):
    """Two ways to run the local experts; ``w · silu(x·gate) · (x·up)`` then ``down`` unless a test replaces them.

    Attributes:
        uniform: rows [E / EP, M, D], as many for every expert, and their combine weights w [E / EP, M, 1]
            -> [E / EP, M, D], weighted.
        blocks: aligned rows [M, D], weights [M, 1], and the :class:`Blocks` -> [M, D], weighted.
        block: rows of an aligned block.
    """

    uniform: Callable[[Array, Array], Array]
    blocks: Callable[[Array, Array, Blocks], Array]
    block: int = 128


def identity_experts(block: int = 8) -> Experts:
    """Experts that return their rows; dispatch followed by combine is then a weighted copy."""

    def weigh(x: Array, weights: Array) -> Array:
        return x * weights.astype(x.dtype)

    return Experts(weigh, lambda x, weights, blocks: weigh(x, weights), block)


@jax.named_scope("dispatch")  # an audit can tell expert traffic from that of attention
def dispatch(
    mode: Mode,
    x: Array,
    experts: Array,
    weights: Array,
    keep: Array,
    run: Experts,
    *,
    num_experts: int,
    axes: ExpertAxes = ExpertAxes(),  # noqa: B008
    capacity: int | None = None,
    rows_per_peer: int | None = None,
    rank: Array | None = None,
) -> tuple[Array, DispatchStats]:
    """Sends kept copies to their experts and combines what returns.

    Args:
        mode: one of ``MODES``.
        x: [T, D], tokens of this rank.
        experts: int32 [T, k].
        weights: [T, k], combine weights.
        keep: bool [T, k], copies that survive the capacity rule.
        run: the local experts.
        num_experts: E, in all.
        axes: atoms of EP and ETP; inside a manual ``shard_map`` unless both are empty.
        capacity: C, slots of a source rank and expert ("drop_pad" only; at most C copies may be kept).
        rows_per_peer: "padded": rows to each peer; None for the bound that can never overflow.
        rank: int32 [T, k], place of each copy in its expert ("drop_pad" only), from ``rank_in_expert``.

    Returns:
        y [T, D], the weighted sums, zero for a token without kept copies; and counts.

    Raises:
        ValueError: unknown mode, or the mode lacks an argument.
    """
    check(mode in MODES, argument="mode", value=mode, rule=f"must be one of {', '.join(MODES)}")
    x, experts, weights, keep = unify(x, experts, weights, keep)
    dropped = jnp.sum(~keep & (experts < num_experts), dtype=jnp.int32)
    if not axes.ep and not axes.etp:  # nothing to exchange, so nothing to pad: empty slots would only cost time
        y, sent = _local(x, jnp.where(keep, experts, num_experts), weights, run, num_experts)
        return y, DispatchStats(sent, sent, dropped, jnp.zeros_like(dropped))
    if mode == "drop_pad":
        check(capacity is not None and rank is not None, argument="mode", value=mode, rule="needs capacity and rank")
        assert capacity is not None and rank is not None
        y, sent, received = _drop_pad(x, experts, weights, keep, run, num_experts, axes, capacity, rank)
        return y, DispatchStats(sent, received, dropped, jnp.zeros_like(dropped))
    groups = jnp.where(keep, experts, num_experts)
    if mode == "allgather":
        y, sent, received = _allgather(x, groups, weights, run, num_experts, axes)
        return y, DispatchStats(sent, received, dropped, jnp.zeros_like(dropped))
    y, sent, received, overflow = _exchange(mode, x, groups, weights, run, num_experts, axes, rows_per_peer)
    return y, DispatchStats(sent, received, dropped, overflow)


def _weighted_rows(x: Array, weights: Array, source: Array, slots: Array, copy: Array) -> tuple[Array, Array]:
    """Rows to send and their combine weights: [M, D] and [M, 1].

    Args:
        x: [T, D].
        weights: [T, k].
        source: int32 [M], token of each row, T for none.
        slots: int32 [T, k], row of each copy, M for none.
        copy: int32 [M], copy (t·k + j) of each row, T·k for none.
    """
    return spread_rows(x, source, slots), spread_rows(weights.reshape(-1, 1), copy, slots.reshape(-1, 1))


def _to_experts(tree: Any, axes: ExpertAxes) -> Any:
    """Equal parts to every EP rank, then what all ETP members got."""
    if axes.ep:
        tree = jax.tree.map(lambda leaf: jax.lax.all_to_all(leaf, axes.ep, 0, 0, tiled=True), tree)
    return _gathered(tree, axes.etp)


def _gathered(tree: Any, axes: tuple[str, ...]) -> Any:
    """What all members hold, one after the other, and the name by which policies of recomputation keep it."""
    if axes:
        tree = jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axes, tiled=True), tree)
    return checkpoint_name(tree, "dispatched")


def _from_experts(outputs: Array, axes: ExpertAxes) -> Array:
    """The way back of :func:`_to_experts`; partial outputs are summed."""
    if axes.etp:
        outputs = jax.lax.psum_scatter(outputs, axes.etp, tiled=True)
    return jax.lax.all_to_all(outputs, axes.ep, 0, 0, tiled=True) if axes.ep else outputs


def _token_of(copy: Array, top_k: int, num_tokens: int) -> Array:
    return jnp.minimum(copy // top_k, num_tokens)


def _drop_pad(
    x: Array,
    experts: Array,
    weights: Array,
    keep: Array,
    run: Experts,
    num_experts: int,
    axes: ExpertAxes,
    capacity: int,
    rank: Array,
) -> tuple[Array, Array, Array]:
    num_tokens, top_k = experts.shape
    num_rows = num_experts * capacity
    slots = jnp.where(keep & (rank < capacity), experts * capacity + rank, num_rows)
    copies = jnp.arange(num_tokens * top_k, dtype=jnp.int32)
    empty = jnp.full_like(slots, num_tokens * top_k, shape=(num_rows,))
    copy = empty.at[slots.reshape(-1)].set(copies, mode="drop", unique_indices=True)
    source = _token_of(copy, top_k, num_tokens)
    rows = _weighted_rows(x, weights, source, slots, copy)
    returned = _uniform_round_trip(rows, run, num_experts, capacity, axes)
    sent = jnp.sum(slots < num_rows, dtype=jnp.int32)
    received = _received(slots, num_experts, capacity, axes)
    return collect_rows(returned, source, slots), sent, received


def _uniform_round_trip(
    rows: tuple[Array, Array], run: Experts, num_experts: int, capacity: int, axes: ExpertAxes
) -> Array:
    local = num_experts // axis_size(axes.ep)
    rows = _to_experts(rows, axes)
    sources = rows[0].shape[0] // (local * capacity)

    def by_expert(leaf: Array) -> Array:
        width = leaf.shape[-1]
        return leaf.reshape(sources, local, capacity, width).swapaxes(0, 1).reshape(local, -1, width)

    outputs = run.uniform(*map(by_expert, rows))
    outputs = outputs.reshape(local, sources, capacity, -1).swapaxes(0, 1).reshape(rows[0].shape)
    return _from_experts(outputs, axes)


def _received(slots: Array, num_experts: int, capacity: int, axes: ExpertAxes) -> Array:
    used = jnp.zeros_like(slots, shape=(num_experts * capacity,)).at[slots.reshape(-1)].set(1, mode="drop")
    per_peer = used.reshape(axis_size(axes.ep), -1).sum(axis=1, dtype=jnp.int32)
    return _total_received(per_peer, axes)


def _total_received(per_peer: Array, axes: ExpertAxes) -> Array:
    """Rows that arrive here over EP, summed over the ETP members whose rows are gathered."""
    arrived = jnp.sum(jax.lax.psum_scatter(per_peer, axes.ep, tiled=True) if axes.ep else per_peer, dtype=jnp.int32)
    return jax.lax.psum(arrived, axes.etp) if axes.etp else arrived


def _local(x: Array, groups: Array, weights: Array, run: Experts, num_experts: int) -> tuple[Array, Array]:
    """One device holds all experts: straight from tokens to aligned blocks and back."""
    num_tokens, top_k = groups.shape
    blocks = align(groups.reshape(-1), num_experts, block=run.block)
    slots = blocks.slots.reshape(num_tokens, top_k)
    source = _token_of(blocks.source, top_k, num_tokens)
    outputs = run.blocks(*_weighted_rows(x, weights, source, slots, blocks.source), blocks)
    sent = jnp.sum(groups < num_experts, dtype=jnp.int32)
    return collect_rows(outputs, source, slots), sent


def _allgather(
    x: Array, groups: Array, weights: Array, run: Experts, num_experts: int, axes: ExpertAxes
) -> tuple[Array, Array, Array]:
    members = axes.ep + axes.etp
    local = num_experts // axis_size(axes.ep)
    sent = jnp.sum(groups < num_experts, dtype=jnp.int32)
    if members:
        x, groups, weights = _gathered((x, groups, weights), members)
    mine = groups - axis_index(axes.ep) * local
    mine = jnp.where((mine >= 0) & (mine < local), mine, local)
    partial, received = _local(x, mine, weights, run, local)
    return (jax.lax.psum_scatter(partial, members, tiled=True) if members else partial), sent, received


def _exchange(
    mode: str,
    x: Array,
    groups: Array,
    weights: Array,
    run: Experts,
    num_experts: int,
    axes: ExpertAxes,
    rows_per_peer: int | None,
) -> tuple[Array, Array, Array, Array]:
    """Dropless modes over EP and ETP: sort by expert, exchange, align by local expert, and all the way back."""
    num_tokens, top_k = groups.shape
    ep = axis_size(axes.ep)
    local = num_experts // ep
    bound = num_tokens * min(top_k, local)
    per_peer = min(bound, rows_per_peer or bound) if mode == "padded" else bound
    _, rank, counts = sort_by_group(groups.reshape(-1), num_experts)
    counts = counts.reshape(ep, local)
    sent_to = jnp.sum(counts, axis=1, dtype=jnp.int32)
    peer = jnp.minimum(groups.reshape(-1), num_experts - 1) // local
    within = rank - exclusive_cumsum(sent_to)[peer]
    valid = (groups.reshape(-1) < num_experts) & (within < per_peer)
    overflow = jnp.sum(jnp.maximum(sent_to - per_peer, 0), dtype=jnp.int32)
    if mode == "padded":
        counts = _clip_counts(counts, per_peer)
        num_rows = ep * per_peer
        slots = jnp.where(valid, peer * per_peer + within, num_rows)
    else:
        num_rows = num_tokens * top_k
        slots = jnp.where(valid, rank, num_rows)
    copies = jnp.arange(num_tokens * top_k, dtype=jnp.int32)
    empty = jnp.full_like(slots, num_tokens * top_k, shape=(num_rows,))
    copy = empty.at[slots].set(copies, mode="drop", unique_indices=True)
    source, slots = _token_of(copy, top_k, num_tokens), slots.reshape(num_tokens, top_k)
    rows = _weighted_rows(x, weights, source, slots, copy)
    if mode == "padded":
        returned, received = _padded_round_trip(rows, counts, run, local, axes, per_peer)
    else:
        returned, received = _ragged_round_trip(mode, rows, counts, run, local, axes, ep * bound)
    sent = jnp.sum(counts, dtype=jnp.int32)
    return collect_rows(returned, source, slots), sent, received, overflow


def _clip_counts(counts: Array, per_peer: int) -> Array:
    """Rows of each (peer, local expert) that fit into ``per_peer`` rows, first experts first."""
    before = exclusive_cumsum(counts, axis=1)
    return jnp.clip(per_peer - before, 0, counts).astype(counts.dtype)


def _padded_round_trip(
    rows: tuple[Array, Array], counts: Array, run: Experts, local: int, axes: ExpertAxes, per_peer: int
) -> tuple[Array, Array]:
    rows, counts = _to_experts((rows, counts), axes)
    ends = jnp.cumsum(counts, axis=1, dtype=jnp.int32)  # [source, local expert]
    place = jnp.arange(per_peer, dtype=jnp.int32)
    groups = jnp.sum(place[None, :, None] >= ends[:, None, :], axis=-1, dtype=jnp.int32).reshape(-1)
    outputs = _from_experts(_run_sorted(rows, groups, run, local), axes)
    return outputs, jnp.sum(counts, dtype=jnp.int32)


def _ragged_round_trip(
    mode: str, rows: tuple[Array, Array], counts: Array, run: Experts, local: int, axes: ExpertAxes, num_receive: int
) -> tuple[Array, Array]:
    exchange = ragged_all_to_all if mode == "ragged" else emulated_ragged_all_to_all
    num_send = rows[0].shape[0]
    offsets = None
    if axes.ep:
        offsets, counts = ragged_offsets(counts, axes.ep)
        values, weights = (exchange(leaf, num_receive, offsets, axes.ep) for leaf in rows)
        rows = values, weights
    # One run of (source, local expert) chunks for each ETP member.
    rows, chunk_counts = _gathered((rows, counts.reshape(1, -1)), axes.etp)
    members = chunk_counts.shape[0]
    ends = jnp.cumsum(chunk_counts, axis=1, dtype=jnp.int32)
    place = jnp.arange(rows[0].shape[0] // members, dtype=jnp.int32)
    chunk = jax.vmap(lambda e: jnp.searchsorted(e, place, side="right"))(ends).astype(jnp.int32)
    groups = jnp.where(place[None, :] < ends[:, -1:], chunk % local, local).reshape(-1)
    outputs = _run_sorted(rows, groups, run, local)
    if axes.etp:
        outputs = jax.lax.psum_scatter(outputs, axes.etp, tiled=True)
    if offsets is not None:
        outputs = exchange(outputs, num_send, offsets.reversed(axes.ep), axes.ep)
    return outputs, jnp.sum(chunk_counts, dtype=jnp.int32)


def _run_sorted(rows: tuple[Array, Array], groups: Array, run: Experts, local: int) -> Array:
    """Runs experts on rows in any order."""
    blocks = align(groups, local, block=run.block)
    rows, blocks = unify(rows, blocks)
    x, weights = (spread_rows(leaf, blocks.source, blocks.slots) for leaf in rows)
    outputs = run.blocks(x, weights, blocks)
    if varying_axes(outputs) != varying_axes(rows):
        outputs, blocks = unify(outputs, blocks)
    return collect_rows(outputs, blocks.source, blocks.slots)
