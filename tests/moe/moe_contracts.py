"""The algorithms of ``moe`` that run on one device, for the contract tests; collectives have parity tests instead."""

import jax
import jax.numpy as jnp

from jaxrl_suite import moe
from jaxrl_suite.moe.balancing import balance_from_sums
from jaxrl_suite.moe.block_swiglu import block_swiglu
from jaxrl_suite.moe.dispatch import identity_experts
from jaxrl_suite.moe.grouped import align, block_matmul
from jaxrl_suite.moe.permute import collect_rows, spread_rows
from jaxrl_suite.testing import Algorithm

T, E, K, D, F = 6, 4, 2, 3, 5
MODEL = moe.MoEConfig().model.replace(width=D, ffn_width=F, num_experts=E, experts_per_token=K)


def experts_of(key):
    scores = jax.random.uniform(key, (T, E))
    return jnp.argsort(scores, axis=-1)[:, :K].astype(jnp.int32)


def probs_and_experts(key):
    a, b = jax.random.split(key)
    return jax.nn.softmax(jax.random.normal(a, (T, E))), experts_of(b)


def counts_and_sums(key):
    a, b = jax.random.split(key)
    return jnp.round(jax.random.uniform(a, (E,)) * 9), jax.random.uniform(b, (E,)), jnp.asarray(5.0)


def rows_and_maps(key):
    groups = jax.random.randint(key, (T,), 0, E + 1).astype(jnp.int32)
    layout = align(groups, E, block=2)
    return jax.random.normal(key, (T, D)), layout.source, layout.slots


def aligned_product(key):
    rows, source, slots = rows_and_maps(key)
    layout = align(jax.random.randint(key, (T,), 0, E + 1).astype(jnp.int32), E, block=2)
    weights = jax.random.normal(jax.random.fold_in(key, 1), (E, D, F))
    return spread_rows(rows, source, slots), weights, layout.expert, layout.live


def aligned_experts(key):
    rows, _, *where = aligned_product(key)
    weights = jax.random.uniform(jax.random.fold_in(key, 3), (rows.shape[0], 1))
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    params = {name: jax.random.normal(jax.random.fold_in(key, i), s) for i, (name, s) in enumerate(shapes.items())}
    return rows, params, weights, *where


def tokens_and_routing(key):
    x, w, e = jax.random.split(key, 3)
    return jax.random.normal(x, (T, D)), experts_of(e), jax.random.uniform(w, (T, K))


def layer_arguments(key):
    keys = jax.random.split(key, 5)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    experts = {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items())}
    params = {"router": jax.random.normal(keys[3], (D, E)), "experts": experts}
    return params, jax.random.normal(keys[4], (1, T, D))


def through_experts(mode):
    def function(x, experts, weights):
        keep = moe.keep_by_capacity(experts, weights, E, 3)
        rank = moe.rank_in_expert(experts, weights, E)
        run = identity_experts(block=2)
        return moe.dispatch(mode, x, experts, weights, keep, run, num_experts=E, capacity=3, rank=rank)[0]

    return function


def layer(params, x):
    config = moe.MoEConfig(model=MODEL, dispatch="padded", block_rows=2)
    return moe.moe_layer(params, x, config=config)[0]


def sequence_balance_loss(probs, experts):
    return moe.sequence_balance_loss(probs[None], experts[None])


ALGORITHMS = [
    Algorithm("moe.load_balance_loss", moe.load_balance_loss, probs_and_experts, differentiable=(0,)),
    Algorithm("moe.sequence_balance_loss", sequence_balance_loss, probs_and_experts, differentiable=(0,)),
    Algorithm(
        "moe.balance_from_sums", lambda c, p, n: balance_from_sums(c, p, n, K), counts_and_sums, differentiable=(1,)
    ),
    Algorithm("moe.z_loss", moe.z_loss, lambda key: (jax.random.normal(key, (T, E)),), differentiable=(0,)),
    Algorithm(
        "moe.update_balance_bias",
        lambda bias, counts: moe.update_balance_bias(bias, counts, 0.1),
        lambda key: (jnp.zeros(E), counts_and_sums(key)[0]),
    ),
    Algorithm(
        "moe.load_imbalance",
        moe.load_imbalance,
        lambda key: (counts_and_sums(key)[0] + 1 + 0.1 * jnp.arange(E),),  # no ties: a maximum has no derivative there
        differentiable=(0,),
    ),
    Algorithm(
        "moe.rank_in_expert",
        lambda experts, weights: moe.rank_in_expert(experts, weights, E),
        lambda key: tokens_and_routing(key)[1:],
    ),
    Algorithm(
        "moe.keep_by_capacity",
        lambda experts, weights: moe.keep_by_capacity(experts, weights, E, 2),
        lambda key: tokens_and_routing(key)[1:],
    ),
    Algorithm("moe.permute.spread_rows", spread_rows, rows_and_maps, vmap=True),
    Algorithm(
        "moe.permute.collect_rows",
        lambda rows, source, slots: collect_rows(spread_rows(rows, source, slots), source, slots),
        rows_and_maps,
    ),
    Algorithm("moe.grouped.block_matmul", block_matmul, aligned_product),
    Algorithm("moe.block_swiglu", block_swiglu, aligned_experts),
    Algorithm("moe.dispatch[padded]", through_experts("padded"), tokens_and_routing, vmap=False),
    Algorithm("moe.dispatch[drop_pad]", through_experts("drop_pad"), tokens_and_routing, vmap=False),
    Algorithm("moe.moe_layer", layer, layer_arguments, vmap=False),
]
