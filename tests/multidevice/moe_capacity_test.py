"""Capacity, float8 and bfloat16 on foldings, against rules applied shard by shard in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm, moe
from jaxrl_suite.lm.feed_forward import router_logits
from jaxrl_suite.moe.layer import zigzag_order
from jaxrl_suite.moe.verify import quick_compile, sharded_layer
from tests.reference import moe_routing as reference

B, T, D, E, K = 4, 16, 8, 8, 2
MODEL = lm.LanguageModelConfig(width=D, ffn_width=8, num_experts=E, experts_per_token=K, num_layers=1)


@functools.cache
def inputs():
    generator = np.random.default_rng(0)
    shapes = {"gate": (E, D, 8), "up": (E, D, 8), "down": (E, 8, D)}
    experts = {name: generator.normal(size=shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}
    router = generator.normal(size=(D, E)).astype(np.float32) * 0.5
    return {"router": router, "experts": experts}, generator.normal(size=(B, T, D)).astype(np.float32)


def on_folding(text, **options):
    """The layer on a folding, sequences given and returned in their own order; also the copies dropped in all."""
    folding, config = moe.Folding.parse(text), moe.MoEConfig(model=MODEL, block_rows=8, **options)
    params, x = inputs()
    order = np.asarray(zigzag_order(T, folding.cp))

    def layer(params, x):
        y, sums = sharded_layer(params, x[:, order], config, folding)
        return y[:, np.argsort(order)], sums.stats.dropped.sum()

    return jax.jit(layer, compiler_options=quick_compile())(params, x)


def expected(keep_of):
    """NumPy's layer with the copies that ``keep_of(experts, weights)`` [B, T, k] keeps."""
    params, x = inputs()
    tokens = x.reshape(-1, D)
    routing = jax.jit(lambda p, v: moe.route(router_logits(p, v, MODEL), MODEL))(params, tokens)
    experts, weights = (np.asarray(leaf).reshape(B, T, K) for leaf in (routing.experts, routing.weights))
    keep = keep_of(experts, weights)
    flat = (leaf.reshape(-1, K) for leaf in (experts, weights, keep))
    weights_of_experts = {name: np.asarray(leaf) for name, leaf in params["experts"].items()}
    return reference.moe(np.asarray(tokens), *flat, **weights_of_experts).reshape(B, T, D), int((~keep).sum())


def keep_by_shard(shards, factor, policy):
    """The rule on each shard, a pair of index arrays (rows, columns) of the batch, with the shard's own capacity."""

    def keep_of(experts, weights):
        keep = np.zeros((B, T, K), bool)
        for rows, columns in shards:
            part = np.ix_(rows, columns)
            own = [leaf[part].reshape(-1, K) for leaf in (experts, weights)]
            slots = int(np.ceil(own[0].size * factor / E))
            kept = reference.keep_by_capacity(*own, E, slots, policy)
            keep[part] = kept.reshape(len(rows), len(columns), K)
        return keep

    return keep_of


def test_subsequence_dropping_is_decided_on_each_rank():
    """Property 13: the rule on every (dp, cp, tp) shard by itself, context shards in zig-zag order."""
    text, factor = "attention=tp2.cp2.dp2 experts=ep8", 1.0
    y, dropped = on_folding(text, dispatch="padded", capacity_factor=factor, drop_policy="probs")
    order = np.asarray(zigzag_order(T, 2)).reshape(2, 2, T // 4)
    shards = [(np.arange(2) + 2 * d, order[c, t]) for d in range(2) for c in range(2) for t in range(2)]
    reference_y, reference_dropped = expected(keep_by_shard(shards, factor, "probs"))
    assert int(dropped) == reference_dropped > 0
    np.testing.assert_allclose(y, reference_y, atol=1e-5 * np.abs(reference_y).max())


@pytest.mark.parametrize(
    ("dispatch", "policy", "texts"),
    [("drop_pad", "position", ("attention=tp2.cp2.dp2 experts=etp2.ep4", "attention=dp2 experts=ep2"))],
)
def test_full_sequence_dropping_does_not_depend_on_the_folding(dispatch, policy, texts):
    """Property 13: the rule over the sequences of a data rank; every split of them over cp and tp gives the same."""
    options = {"dispatch": dispatch, "drop_policy": policy, "drop_scope": "sequence", "capacity_factor": 0.75}
    shards = [(np.arange(2) + 2 * d, np.arange(T)) for d in range(2)]
    reference_y, reference_dropped = expected(keep_by_shard(shards, 0.75, policy))
    for text in texts:
        y, dropped = on_folding(text, **options)
        assert int(dropped) == reference_dropped > 0
        np.testing.assert_allclose(y, reference_y, atol=1e-5 * np.abs(reference_y).max())


def test_float8_experts_on_a_folding():
    """The same float8 numbers on a folding as on one device; their error is there, and small."""
    params, x = inputs()

    def loss(params, config):
        y, _ = moe.moe_layer(params, x, config=config)
        return jnp.sum(jnp.sin(y)), y

    gradient = jax.jit(
        jax.value_and_grad(loss, has_aux=True), static_argnames="config", compiler_options=quick_compile()
    )
    config = moe.MoEConfig(model=MODEL, block_rows=8)
    (_, exact), theirs = gradient(params, config=config)
    (_, rounded), ours = gradient(params, config=config.replace(expert_precision="float8"))
    assert 0.005 < float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)) < 0.06
    for a, b in zip(jax.tree.leaves(ours["experts"]), jax.tree.leaves(theirs["experts"]), strict=True):
        assert 0 < float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 0.15
    folded, _ = on_folding("attention=tp2.dp4 experts=ep8", dispatch="padded", expert_precision="float8")
    np.testing.assert_allclose(folded, rounded, atol=1e-5)


def test_router_decides_alike_on_every_mapping_in_bfloat16():
    """Property 23: bfloat16 activations, float32 router: the experts of each token do not depend on the mapping."""
    params, x = inputs()
    x = jnp.asarray(x, jnp.bfloat16)
    model = MODEL.replace(compute_dtype="bfloat16")

    def chosen(x):
        logits = router_logits(params, x.reshape(-1, D), model)
        assert logits.dtype == jnp.float32
        return moe.route(logits, model).experts.reshape(*x.shape[:2], K)

    whole = jax.jit(chosen)(x)
    for text in ("attention=tp2.cp2.dp2 experts=ep8", "attention=tp8 experts=etp8", "attention=dp4 experts=ep4"):
        folding = moe.Folding.parse(text)
        spec = folding.spec("dp", ("cp", "tp"))
        mapped = jax.jit(jax.shard_map(chosen, mesh=folding.mesh(), in_specs=spec, out_specs=spec))
        np.testing.assert_array_equal(mapped(x), whole)


def test_bfloat16_products_are_summed_in_float32():
    """Every product of the layer takes bfloat16 operands and asks for float32 sums, forward and backward."""
    params, x = inputs()
    model = MODEL.replace(compute_dtype="bfloat16")
    config = moe.MoEConfig(model=model, block_rows=8)

    def loss(params, x):
        return jnp.sum(moe.moe_layer(params, x.astype(jnp.bfloat16), config=config)[0].astype(jnp.float32))

    x = jnp.asarray(x)

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x))
    products = [line for line in text.splitlines() if "preferred_element_type=" in line]
    assert len(products) >= 9 and all("preferred_element_type=float32" in line for line in products)
    layer = jax.jit(lambda p, v, c: moe.moe_layer(p, v, config=c)[0], static_argnums=2)
    y, exact = layer(params, jnp.asarray(x, jnp.bfloat16), config), layer(params, x, config.replace(model=MODEL))
    assert y.dtype == jnp.bfloat16
    error = float(jnp.linalg.norm(y.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < error < 0.02
