"""The decoder on one rank: the functions of ``lm`` with the hooks of a folding, and the objective they yield.

Everything here runs inside one manual ``shard_map`` over the fine mesh, or plainly on one device when all axes are
empty. Parameters arrive cast to vary over the whole mesh, so that every reduction of gradients is the transpose of that
one cast, outside of the loops over layers and micro-batches.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.lm import block, embed, flatten, head, unflatten
from jaxrl_suite.lm.decoder import SAVED_NAMES as DENSE_NAMES
from jaxrl_suite.lm.decoder import final_norm, head_table
from jaxrl_suite.lm.feed_forward import dense_feed_forward
from jaxrl_suite.lm.layers import wide
from jaxrl_suite.lm.scores import chunk_rows, weighted_log_prob
from jaxrl_suite.moe.balancing import balance_from_sums
from jaxrl_suite.moe.block_swiglu import LayerStack
from jaxrl_suite.moe.config import HParams, MoEConfig
from jaxrl_suite.moe.context import make_attend
from jaxrl_suite.moe.dispatch import ExpertAxes
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.hooks import tensor_parallel
from jaxrl_suite.moe.layer import SAVED_NAMES, LayerAxes, make_feed_forward, zigzag_order
from jaxrl_suite.moe.partition import is_multiplied, placements
from jaxrl_suite.moe.variance import axis_index, axis_size, sum_over, vary
from jaxrl_suite.types import Array, FeedForward, Params

Loss = Callable[[Array, "Batch"], Array]
Gather = tuple[tuple[str, ...], int]
# Of queries, keys and values "held" names those before they are cut up or filled up for a kernel.
_SAVED = (*SAVED_NAMES, *(name for name in DENSE_NAMES if name not in ("query", "key", "value")))
# What norms, sums and changes of shape consist of: to repeat it takes less time than to write and read its result.
_CHEAP = frozenset(
    "add sub mul div neg square integer_pow rsqrt reduce_sum broadcast_in_dim reshape squeeze expand_dims transpose "
    "convert_element_type copy pcast pvary".split()
)
_HEAD_ROWS = 512  # rows of logits at once on a CPU: more leave the cache, fewer add the table's gradient up more often


class Batch(NamedTuple):
    """Token sequences, each array [B, T]; ``targets[t]`` is the token after ``inputs[t]``.

    Attributes:
        inputs: int32 tokens.
        targets: int32 tokens.
        mask: bool, positions that count in the loss.
        positions: int32, position within the segment.
        segments: int32, packed sequences have different numbers; 0 is padding.
    """

    inputs: Array
    targets: Array
    mask: Array
    positions: Array
    segments: Array


class Layout(NamedTuple):
    """Roles of the mesh axes that the functions below communicate over; static.

    Attributes:
        layer: axes of attention and expert layers.
        dp: atoms of data parallelism.
        pp: ("pp",) or none.
        mesh: every axis of the mesh.
        gathers: path -> (atoms, dimension) of weights that are gathered where they are used (FSDP).
    """

    layer: LayerAxes = LayerAxes()
    dp: tuple[str, ...] = ()
    pp: tuple[str, ...] = ()
    mesh: tuple[str, ...] = ()
    gathers: tuple[tuple[str, Gather], ...] = ()

    @property
    def dense(self) -> tuple[str, ...]:
        """Ranks that hold different tokens of attention: dp and cp."""
        return self.dp + self.layer.cp

    @property
    def sequence(self) -> tuple[str, ...]:
        """Ranks that share the sequences of one data rank: cp and tp."""
        return self.layer.cp + self.layer.tp


class ObjectiveParts(NamedTuple):
    """What one micro-batch adds to the step, the same on every rank.

    Attributes:
        loss: its share of the mean loss.
        balance: balancing loss, unweighted, summed over layers.
        z: router z-loss, unweighted, summed over layers.
        counts: float32 [L of this stage, E], copies routed to each expert in all.
        sent: copies sent in all.
        dropped: copies dropped in all.
        overflow: copies lost to full buffers in all.
    """

    loss: Array
    balance: Array
    z: Array
    counts: Array
    sent: Array
    dropped: Array
    overflow: Array


def make_layout(config: MoEConfig, folding: Folding) -> Layout:
    """Roles of the fine mesh of a folding."""
    roles = folding.roles
    gathers = ()
    if config.sharding == "fsdp":
        places = placements(config, folding)
        gathers = tuple((path, (place.gather, place.dim)) for path, place in places.items() if place.gather)
    layer = LayerAxes(ExpertAxes(roles["ep"], roles["etp"]), roles["tp"], roles["cp"])
    return Layout(layer, roles["dp"], roles["pp"], ("pp", *folding.atoms.names), gathers)


def language_batch(tokens: Array, segments: Array | None = None) -> Batch:
    """Next-token batch from token sequences.

    Args:
        tokens: int32 [B, T + 1].
        segments: int32 [B, T + 1] or None for whole rows; 0 is padding.

    Returns:
        Arrays [B, T]; a target in another segment or in padding does not count.

    Raises:
        ValueError: tokens of another shape or type.
    """
    tokens, rule = jnp.asarray(tokens), "must be integers [B, T + 1]"
    fits = jnp.issubdtype(tokens.dtype, jnp.integer) and tokens.ndim == 2 and tokens.shape[1] > 1
    check(fits, argument="tokens", value=f"{tokens.dtype}{list(tokens.shape)}", rule=rule)
    if segments is None:
        segments = jnp.ones_like(tokens)
    inputs, own = tokens[:, :-1], segments[:, :-1]
    place = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32)[None], inputs.shape)
    starts = jnp.concatenate([jnp.ones_like(own[:, :1], bool), own[:, 1:] != own[:, :-1]], axis=1)
    positions = place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
    return Batch(inputs, tokens[:, 1:], (own == segments[:, 1:]) & (own > 0), positions, own)


def next_token_loss(log_probs: Array, batch: Batch) -> Array:
    """Summed negative log-likelihood of the targets in nats; the train step divides by the number of targets."""
    return -jnp.sum(jnp.where(batch.mask, log_probs, 0))


def order_for_context(batch: Batch, config: MoEConfig, ranks: int) -> Batch:
    """Sequences in the order in which contiguous context shards are zig-zag shares."""
    if ranks == 1 or not config.zigzag:
        return batch
    order = zigzag_order(batch.inputs.shape[1], ranks)
    return jax.tree.map(lambda leaf: leaf[:, order], batch)


def gather_weights(params: Params, gathers: dict[str, Gather], dtype: jnp.dtype | None = None) -> Params:
    """Whole compute weights from shards; the transpose is one reduce-scatter in the dtype of the shards.

    Args:
        params: shards.
        gathers: path -> (atoms, dimension).
        dtype: of products; matrices that only enter products travel in it where it is narrower. None: as they are.
    """
    if not gathers:
        return params
    leaves = flatten(params)
    for path, (axes, dim) in gathers.items():
        if path in leaves:
            leaf = leaves[path]
            narrow = dtype is not None and dtype.itemsize < leaf.dtype.itemsize and is_multiplied(path)
            leaves[path] = _narrow_gather(leaf, axes, dim, dtype) if narrow else _gather(leaf, axes, dim)
    return unflatten(leaves)


def _gather(shard: Array, axes: tuple[str, ...], dim: int) -> Array:
    return jax.lax.all_gather(shard, axes, axis=dim, tiled=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _narrow_gather(shard: Array, axes: tuple[str, ...], dim: int, dtype: jnp.dtype) -> Array:
    """Cast, then gathered. Tangents are gathered first, so that gradients are summed as wide as they are stored."""
    return _gather(shard.astype(dtype), axes, dim)


@_narrow_gather.defjvp
def _(
    axes: tuple[str, ...], dim: int, dtype: jnp.dtype, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (shard,), (tangent,) = primals, tangents
    return _narrow_gather(shard, axes, dim, dtype), _gather(tangent, axes, dim).astype(dtype)


def pick_key_heads(attention: Params, config: MoEConfig, axes: tuple[str, ...]) -> Params:
    """This rank's key and value heads where there are fewer of them than tensor ranks (they are then held whole)."""
    heads, ranks = config.model.num_kv_heads, axis_size(axes)
    if not axes or heads % ranks == 0:
        return attention
    first = axis_index(axes) * heads // ranks
    picked = dict(attention)
    for name in ("key", "value", "key_bias", "value_bias"):
        if name in attention:
            picked[name] = jax.lax.dynamic_slice_in_dim(attention[name], first, 1, axis=attention[name].ndim - 2)
    return picked


def run_layers(layers: Params, x: Array, batch: Batch, *, config: MoEConfig, layout: Layout) -> tuple[Array, Any]:
    """A stack of blocks by one scan, so that compile time does not grow with depth.

    Where experts are walked, the walk reads their matrices from the stack, and gradients belong to the layer's slice:
    a scan copies every layer out of what it walks, forward and backward, unless nobody reads the copy.

    Args:
        layers: stacked parameters of this stage.
        x: [B, T, D], this rank's part of the sequences.
        batch: arrays of the tokens of this context rank.
        config: model and options.
        layout: axes.

    Returns:
        x, and the :class:`RouterSums` of each layer (an empty tuple for a dense model).
    """
    layer = make_layer(batch, config=config, layout=layout)
    if not _as_stored(layers, x, config, layout):
        return jax.lax.scan(layer, x, layers)
    stack = jax.lax.stop_gradient(layers["feed_forward"]["experts"])

    def one(x: Array, item: tuple[Params, Array]) -> tuple[Array, Any]:
        params, index = item
        feed_forward = dict(params["feed_forward"])
        feed_forward["experts"] = {**feed_forward["experts"], "stack": LayerStack(stack, index)}
        return layer(x, {**params, "feed_forward": feed_forward})

    number = jax.tree.leaves(stack)[0].shape[0]
    return jax.lax.scan(one, x, (layers, jnp.arange(number, dtype=jnp.int32)))


def _as_stored(layers: Params, x: Array, config: MoEConfig, layout: Layout) -> bool:
    """Whether experts are walked as they are stored: nothing gathers, casts or rounds those of a layer."""
    experts = jax.tree.leaves(layers["feed_forward"].get("experts", {}))
    walked = jax.default_backend() == "cpu" and config.expert_precision != "float8" and not layout.gathers
    return bool(experts) and walked and all(leaf.dtype == x.dtype for leaf in experts)


def make_layer(batch: Batch, *, config: MoEConfig, layout: Layout) -> Callable[[Array, Params], tuple[Array, Any]]:
    """One block on the tokens of a batch, ``(x, its parameters) -> (x, RouterSums)``, recomputed as configured."""
    parallel = tensor_parallel(layout.layer.tp)
    attend = make_attend(config, layout.layer.cp)
    feed_forward = _feed_forward(config, layout, batch)
    prefix = "layers/"
    gathers = {path.removeprefix(prefix): (axes, dim - 1) for path, (axes, dim) in layout.gathers if prefix in path}

    def layer(x: Array, params: Params) -> tuple[Array, Any]:
        params = gather_weights(params, gathers, x.dtype)
        params = {**params, "attention": pick_key_heads(params["attention"], config, layout.layer.tp)}
        return block(
            params,
            x,
            batch.positions,
            batch.segments,
            config=config.model,
            feed_forward=feed_forward,
            attend=attend,
            parallel=parallel,
        )

    return rematerialised(layer, config.remat)


def rematerialised(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """``jax.checkpoint`` with what each policy keeps; only "full_with_dispatch" repeats an exchange of tokens.

    "norms" repeats norms, sums and changes of shape alone, which a CPU does faster than it keeps them; "full" keeps
    block inputs and the rows that experts got; "elementwise" keeps what products yielded too, so that norms,
    rotations, activations and local permutations alone are repeated, and the gathers before column splits; "experts"
    recomputes the activations of experts only; "attention" recomputes the output of attention only.
    """
    policies = jax.checkpoint_policies
    keep: dict[str, Any] = {
        "norms": lambda primitive, *_, **__: primitive.name not in _CHEAP,
        "full": policies.save_only_these_names("dispatched"),
        "full_with_dispatch": policies.nothing_saveable,
        "elementwise": policies.save_only_these_names(*_SAVED),
        "attention": policies.save_anything_except_these_names("attention"),
    }
    if policy in ("none", "experts"):  # "experts" stands around the experts themselves, see make_experts
        return function
    check(policy in keep, argument="remat", value=policy, rule=f"must be none, experts, {', '.join(keep)}")
    return jax.checkpoint(function, policy=keep[policy], prevent_cse=False)


def token_log_probs(params: Params, x: Array, targets: Array, *, config: MoEConfig, layout: Layout) -> Array:
    """Log-probability of each target from the last activations, nats [B, T]; the same on every tensor rank."""
    parallel = tensor_parallel(layout.layer.tp)
    logits = head(params, x, config=config.model, parallel=parallel)
    return parallel.token_log_prob(logits, vary(targets, layout.mesh))


def summed_loss(params: Params, x: Array, batch: Batch, loss: Loss, *, config: MoEConfig, layout: Layout) -> Array:
    """Loss of this rank's tokens from the last activations, the same on every tensor rank.

    The slope of :func:`next_token_loss` is known before the log-probabilities are, so its gradient is taken chunk by
    chunk on the way, where a rank holds the whole output table: no array of all logits is kept.
    """
    accumulate = wide(x.dtype, config.model.accumulate_dtype)
    if loss is not next_token_loss or layout.layer.tp or accumulate != wide(x.dtype):
        return loss(token_log_probs(params, x, batch.targets, config=config, layout=layout), batch)
    h = final_norm(params, x, config=config.model).reshape(-1, x.shape[-1])
    weights = -batch.mask.reshape(-1).astype(accumulate)
    h = jnp.where(weights[:, None] == 0, 0, h)  # a NaN at a token that does not count is skipped, as elsewhere
    h, table, targets, weights = vary((h, head_table(params), batch.targets.reshape(-1), weights), layout.mesh)
    chunk = chunk_rows(h.shape[0], 1, _HEAD_ROWS) if jax.default_backend() == "cpu" else None
    return weighted_log_prob(h, table, targets, weights, chunk=chunk)


def objective_parts(
    total: Array, sums: Any, count: Array, *, config: MoEConfig, layout: Layout, num_parts: int
) -> ObjectiveParts:
    """Sums of one micro-batch over the ranks.

    Args:
        total: summed loss of this rank's tokens, the same on every tensor rank.
        sums: :class:`RouterSums` with a leading axis of layers, or ().
        count: tokens that count in the whole step.
        config: model and options.
        layout: axes.
        num_parts: micro-batches over which the balancing losses are averaged.
    """
    everywhere = (*layout.dense, "pp") if layout.mesh else ()
    loss = sum_over(total, everywhere) / count
    if not sums:
        none = jnp.zeros_like(loss)
        return ObjectiveParts(loss, none, none, none[None, None], none, none, none)
    scope = {"batch": layout.sequence, "sequence": layout.sequence}.get(config.balance, layout.dp + layout.sequence)
    per_sequence = (sums.counts, sums.probs, sums.tokens)
    if config.balance != "sequence":
        per_sequence = (sums.counts.sum(axis=1), sums.probs.sum(axis=1), sums.tokens.sum(axis=1))
    counts, probs, tokens = sum_over(per_sequence, scope)
    balance = balance_from_sums(counts, probs, tokens, config.model.experts_per_token)
    balance = jnp.sum(balance.mean(axis=1) if config.balance == "sequence" else balance)
    ranks = axis_size(layout.dp) if scope == layout.sequence else 1
    balance = sum_over(balance, (*(layout.dp if ranks > 1 else ()), "pp") if layout.mesh else ()) / ranks
    tokens_in_all = layout.dp + layout.sequence
    z, number = sum_over((sums.z, sums.tokens.sum(axis=1)), tokens_in_all)
    z = sum_over(jnp.sum(z / jnp.maximum(number, 1)), ("pp",) if layout.mesh else ())
    stats = jax.tree.map(lambda leaf: jnp.sum(leaf).astype(jnp.float32), sums.stats)
    sent, dropped, overflow = sum_over(
        (stats.sent, stats.dropped, stats.overflow), (*tokens_in_all, "pp") if layout.mesh else ()
    )
    load = sum_over(sums.counts.sum(axis=1), tokens_in_all)
    return ObjectiveParts(loss, balance / num_parts, z / num_parts, load, sent, dropped, overflow)


def total_objective(parts: ObjectiveParts, config: MoEConfig, hparams: HParams) -> Array:
    """Loss plus weighted balancing terms."""
    total = parts.loss + jnp.asarray(hparams.z_coef, parts.z.dtype) * parts.z
    if config.balance != "none":
        total = total + jnp.asarray(hparams.balance_coef, parts.balance.dtype) * parts.balance
    return total


def gather_outside_layers(params: Params, layout: Layout, dtype: jnp.dtype | None = None) -> Params:
    """Whole tables and last norm (FSDP); ``dtype`` as in :func:`gather_weights`."""
    return gather_weights(params, {path: g for path, g in layout.gathers if not path.startswith("layers/")}, dtype)


def whole_objective(
    params: Params, batch: Batch, count: Array, hparams: HParams, loss: Loss, config: MoEConfig, layout: Layout
) -> tuple[Array, ObjectiveParts]:
    """Objective of one micro-batch when every rank holds all layers (no pipeline)."""
    dtype = config.model.activation_dtype(params["embed"]["table"].dtype)
    params = gather_outside_layers(params, layout, dtype)
    x = embed(params, batch.inputs, config=config.model, parallel=tensor_parallel(layout.layer.tp))
    x, sums = run_layers(params["layers"], x, batch, config=config, layout=layout)
    total = summed_loss(params, x, batch, loss, config=config, layout=layout)
    parts = objective_parts(total, sums, count, config=config, layout=layout, num_parts=config.num_microbatches)
    return total_objective(parts, config, hparams), parts


def _feed_forward(config: MoEConfig, layout: Layout, batch: Batch) -> FeedForward:
    if not config.model.num_experts:
        return dense_feed_forward(config.model, tensor_parallel(layout.layer.tp))
    real = batch.segments > 0
    ranks = axis_size(layout.layer.tp)
    if ranks > 1:
        share = real.shape[1] // ranks
        real = jax.lax.dynamic_slice_in_dim(real, axis_index(layout.layer.tp) * share, share, axis=1)
    return make_feed_forward(config, layout.layer, real)


def split_microbatches(batch: Batch, number: int) -> Batch:
    """[B, T] to [M, B / M, T] on every data rank."""
    return jax.tree.map(lambda leaf: leaf.reshape(number, -1, *leaf.shape[1:]), batch)


def num_scalars(params: Params) -> int:
    """Number of scalars in a parameter dict."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
