"""A folded model as a token policy: likelihoods in the training layout, decoding with a cache in a layout of its own.

Decoding reads every weight for a few tokens, so layers are not spread over a pipeline and tokens are not split: heads
lie over tp, experts over (ep, etp), tokens on every rank. Attention is partitioned by XLA from the layout of its
weights; experts run in a ``shard_map``, each rank on its own, and are summed once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_suite import lm
from jaxrl_suite.lm.cache import decoder_law
from jaxrl_suite.lm.decoder import sequence_positions
from jaxrl_suite.lm.feed_forward import router_logits, shared_expert
from jaxrl_suite.lm.generation import generate_from_law
from jaxrl_suite.moe.config import MoEConfig, check_folding, dropless
from jaxrl_suite.moe.dispatch import ExpertAxes, dispatch
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.hooks import tensor_parallel
from jaxrl_suite.moe.layer import make_experts, zigzag_order
from jaxrl_suite.moe.model import Batch, make_layout, order_for_context, run_layers, token_log_probs
from jaxrl_suite.moe.partition import logical_axes
from jaxrl_suite.moe.variance import axis_index, axis_size, unify, vary
from jaxrl_suite.types import Array, FeedForward, Generation, Params, Policy, PRNGKey


def policy(config: MoEConfig, folding: Folding) -> Policy:
    """The two functions that a trainer of policies needs, over a folding.

    Args:
        config: model and options; likelihoods are dropless whatever its capacity.
        folding: degrees. Both functions take the parameters in any layout; keep them in that of the train step for
            ``log_probs`` and pass ``to_decode(params, config, folding)`` to ``generate`` to move them only once.

    Returns:
        ``Policy(log_probs, generate)`` as in ``lm.policy``; rows and lengths of any number (they are padded).

    Raises:
        ValueError: the model does not fit the folding.
    """
    check_folding(config, folding)
    config = dropless(config)

    def log_probs(params: Params, tokens: Array, segments: Array | None = None, *, start: int = 0) -> Array:
        # Sequences are split over devices, so that leaving out the first tokens would leave some ranks idle.
        return _log_probs(params, tokens, segments, config=config, folding=folding)[:, start:]

    def generate(
        key: PRNGKey, params: Params, prompts: Array, mask: Array, row_ids: Array, sampling: Any, **options: Any
    ) -> Generation:
        return _generate(
            key, params, prompts, mask, row_ids, sampling=sampling, config=config, folding=folding, **options
        )

    return Policy(log_probs, generate)


def compute_specs(config: MoEConfig, folding: Folding, *, whole_layers: bool = True) -> dict[str, Any]:
    """Partition specs of the parameters without the data split; ``whole_layers`` puts all layers on every stage."""
    specs = {}
    for path in lm.parameter_shapes(config.model):
        logical = logical_axes(path, config.model, folding.tp)
        if whole_layers:
            logical = tuple(None if axis == "pp" else axis for axis in logical)
        specs[path] = folding.spec(*logical)
    return lm.unflatten(specs)


def to_decode(params: Params, config: MoEConfig, folding: Folding) -> Params:
    """Moves parameters from the layout of training to that of decoding."""
    mesh = folding.mesh()
    return jax.device_put(params, jax.tree.map(lambda s: NamedSharding(mesh, s), compute_specs(config, folding)))


def decode_feed_forward(config: MoEConfig, folding: Folding) -> FeedForward:
    """The sparse slot for decoding: every rank sees all tokens and runs its own experts; one sum over (ep, etp)."""
    axes = ExpertAxes(folding.roles["ep"], folding.roles["etp"])
    specs = compute_specs(config, folding)["layers"]["feed_forward"]["experts"]
    specs = jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    num_experts = config.model.num_experts

    def local(experts: Params, tokens: Array, chosen: Array, weights: Array) -> Array:
        own = num_experts // axis_size(axes.ep)
        mine = chosen - axis_index(axes.ep) * own
        mine = jnp.where((mine >= 0) & (mine < own), mine, own)
        experts, tokens, mine, weights = unify(experts, tokens, mine, weights)
        y, _ = dispatch("padded", tokens, mine, weights, mine < own, make_experts(experts, config), num_experts=own)
        members = axes.ep + axes.etp
        return jax.lax.psum(vary(y, members), members) if members else y

    whole = PartitionSpec()
    summed = jax.shard_map(local, mesh=folding.mesh(), in_specs=(specs, whole, whole, whole), out_specs=whole)

    def feed_forward(params: Params, x: Array) -> tuple[Array, tuple[()]]:
        tokens = x.reshape(-1, x.shape[-1])
        routing = lm.route(router_logits(params, tokens, config.model), config.model, params.get("router_bias"))
        y = summed(params["experts"], tokens, routing.experts, routing.weights)
        if "shared" in params:
            y = y + shared_expert(params, tokens, config.model)
        return y.reshape(x.shape), ()

    return feed_forward


@functools.partial(jax.jit, static_argnames=("config", "folding", "sampling", "loop"))
def _generate(
    key: PRNGKey,
    params: Params,
    prompts: Array,
    mask: Array,
    row_ids: Array,
    *,
    sampling: Any,
    config: MoEConfig,
    folding: Folding,
    loop: Any = "while",
) -> Generation:
    mesh = folding.mesh()
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), compute_specs(config, folding))
    params = jax.lax.with_sharding_constraint(params, shardings)
    slot = decode_feed_forward(config, folding) if config.model.num_experts else None
    law = decoder_law(config.model, max_tokens=sampling.max_tokens, feed_forward=slot)
    return generate_from_law(key, law, params, prompts, mask, row_ids=row_ids, sampling=sampling, loop=loop)


@functools.partial(jax.jit, static_argnames=("config", "folding"))
def _log_probs(params: Params, tokens: Array, segments: Array | None, *, config: MoEConfig, folding: Folding) -> Array:
    rows, length = tokens.shape
    segments = jnp.ones_like(tokens) if segments is None else segments
    twice = 2 if config.zigzag and folding.cp > 1 else 1
    right, below = -length % (twice * folding.tp * folding.cp), -rows % folding.dp
    inputs, segments = (jnp.pad(part, ((0, below), (0, right))) for part in (tokens, segments))
    batch = _batch_of(inputs, segments)
    layout = make_layout(config.replace(sharding="none"), folding)._replace(pp=())
    spec: Any = folding.spec("dp", "cp")

    def local(params: Params, batch: Batch) -> Array:
        params = vary(params, layout.mesh[1:])
        batch = vary(batch, layout.dense)
        x = lm.embed(params, batch.inputs, config=config.model, parallel=tensor_parallel(layout.layer.tp))
        x, _ = run_layers(params["layers"], x, batch, config=config, layout=layout)
        return token_log_probs(params, x, batch.targets, config=config, layout=layout._replace(mesh=layout.mesh[1:]))

    order = order_for_context(batch, config, folding.cp)
    mapped = jax.shard_map(
        local,
        mesh=folding.mesh(),
        in_specs=(compute_specs(config, folding), Batch(*(spec for _ in Batch._fields))),
        out_specs=spec,
    )
    values = mapped(params, order)
    if folding.cp > 1 and config.zigzag:
        values = values[:, jnp.argsort(zigzag_order(values.shape[1], folding.cp))]
    values = jnp.where(batch.mask, values, 0)
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))[:rows, :length]


def _batch_of(tokens: Array, segments: Array) -> Batch:
    """Next-token batch of whole rows: the last column has no target and does not count."""
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    next_segments = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    mask = (segments == next_segments) & (segments > 0)
    return Batch(tokens, following, mask, sequence_positions(segments), segments)
