import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm, moe
from jaxrl_suite.lm.attention import blockwise_attend
from jaxrl_suite.moe.audit import audit, parse_groups, summarize
from jaxrl_suite.moe.context import all_gather_attend, ring_attend
from jaxrl_suite.moe.fp8 import E4M3_EPSILON, dequantize, fp8_matmul, quantize, round_rows, round_tiles
from jaxrl_suite.moe.layer import zigzag_order
from jaxrl_suite.moe.model import Layout, make_layer, make_layout, order_for_context, summed_loss
from jaxrl_suite.moe.pipeline import circular_layers, num_ticks
from jaxrl_suite.moe.train import loss_and_gradients
from jaxrl_suite.moe.upcycling import copy_factor, upcycle, upcycled_config
from jaxrl_suite.moe.verify import quick_compile, sharded_layer
from tests.reference import moe_routing as reference

E, K = 4, 2


def random_router(seed, num_tokens=12):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(num_tokens, E))
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return logits.astype(np.float32), probs.astype(np.float32), np.argsort(-probs, axis=-1)[:, :K].astype(np.int32)


def test_balancing_losses_against_the_formula():
    """Property 21, on one device: Switch's form, its sequence average, and the z-loss."""
    logits, probs, experts = random_router(0)
    np.testing.assert_allclose(moe.load_balance_loss(probs, experts), reference.load_balance(probs, experts), rtol=1e-5)
    by_sequence = [reference.load_balance(probs[i : i + 4], experts[i : i + 4]) for i in (0, 4, 8)]
    ours = moe.sequence_balance_loss(probs.reshape(3, 4, E), experts.reshape(3, 4, K))
    np.testing.assert_allclose(ours, np.mean(by_sequence), rtol=1e-5)
    np.testing.assert_allclose(moe.z_loss(logits), reference.z_loss(logits), rtol=1e-5)


def test_perfect_balance_has_loss_one_and_masked_tokens_do_not_count():
    probs = np.full((4, E), 1 / E, np.float32)
    experts = np.array([[0, 1], [2, 3], [0, 1], [2, 3]], np.int32)
    assert float(moe.load_balance_loss(probs, experts)) == pytest.approx(1.0)
    _, p, e = random_router(1)
    mask = np.arange(12) < 7
    np.testing.assert_allclose(moe.load_balance_loss(p, e, mask=mask), reference.load_balance(p[:7], e[:7]), rtol=1e-5)


def test_bias_moves_against_the_load_and_never_enters_weights():
    """Property 22: rate times sign(mean - count); selection changes, weights and gradients do not see the bias."""
    np.testing.assert_array_equal(
        moe.update_balance_bias(jnp.zeros(4), jnp.array([4.0, 2.0, 1.0, 1.0]), 0.5), [-0.5, 0.0, 0.5, 0.5]
    )
    config = lm.LanguageModelConfig(num_experts=E, experts_per_token=E)
    logits, bias = jnp.array(random_router(2)[0]), jnp.array([3.0, -1.0, 0.0, 1.0])
    plain, biased = moe.route(logits, config), moe.route(logits, config, bias)
    order = jnp.argsort(plain.experts), jnp.argsort(biased.experts)
    sort = functools.partial(jnp.take_along_axis, axis=1)
    np.testing.assert_allclose(sort(plain.weights, order[0]), sort(biased.weights, order[1]), rtol=1e-6)
    gradient = jax.grad(lambda b: jnp.sum(jnp.sin(moe.route(logits, config, b).weights)))(bias)
    np.testing.assert_array_equal(gradient, 0)


def test_bias_evens_out_a_skewed_load():
    """Property 22: a skewed router reaches max / mean at most 1.1 without any loss."""
    config = lm.LanguageModelConfig(num_experts=8, experts_per_token=2, router_score="sigmoid")
    logits = jax.random.normal(jax.random.key(0), (2048, 8)) + jnp.linspace(0, 3, 8)

    def step(bias, _):
        counts = moe.expert_counts(moe.route(logits, config, bias).experts, 8)
        return moe.update_balance_bias(bias, counts, 2e-3), moe.load_imbalance(counts)

    _, imbalance = jax.jit(lambda b: jax.lax.scan(step, b, length=400))(jnp.zeros(8))
    assert float(imbalance[0]) > 1.8 and float(imbalance[-1]) <= 1.1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_zigzag_is_a_balanced_permutation(ranks):
    """Property 27: causal work of the ranks differs by at most one block."""
    order = np.asarray(zigzag_order(32, ranks))
    assert sorted(order) == list(range(32))
    work = [(order[rank * 32 // ranks : (rank + 1) * 32 // ranks] + 1).sum() for rank in range(ranks)]
    assert max(work) - min(work) <= 32 // (2 * ranks)
    inverse = np.argsort(order)
    np.testing.assert_array_equal(np.arange(32)[order][inverse], np.arange(32))


@pytest.mark.parametrize("kernel", ["all_gather", "ring zigzag", "ring"])
def test_context_attention_equals_full_attention(kernel):
    """Property 27: with grouped queries, packed segments and a window, forward and backward."""
    folding = moe.Folding.parse("attention=cp4")
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, 16, 4, 4))
    k, v = (jax.random.normal(key, (2, 16, 2, 4)) for key in keys[1:3])
    segments = jnp.array([[1] * 16, [1] * 6 + [2] * 10], jnp.int32)
    positions = jnp.array([list(range(16)), list(range(6)) + list(range(10))], jnp.int32)
    cotangent = jax.random.normal(keys[3], q.shape)
    order = zigzag_order(16, 4) if kernel != "ring" else jnp.arange(16)
    spec, axes = folding.spec(None, "cp"), folding.roles["cp"]
    window = None if kernel == "ring" else 7

    def local(q, k, v, positions, segments):
        if kernel == "all_gather":
            return all_gather_attend(q, k, v, positions, segments, axes=axes, window=window)
        return ring_attend(q, k, v, positions, segments, axes=axes, zigzag="zigzag" in kernel, window=window)

    mapped = jax.shard_map(local, mesh=folding.mesh(), in_specs=(spec,) * 5, out_specs=spec)

    def ours(q, k, v):
        parts = [part[:, order] for part in (q, k, v, positions, segments)]
        return mapped(*parts)[:, jnp.argsort(order)]

    def whole(q, k, v):
        return blockwise_attend(q, k, v, positions, segments, window=window)

    def both(function):
        def run(q, k, v):
            y, pullback = jax.vjp(function, q, k, v)
            return y, pullback(cotangent)

        return jax.jit(run, compiler_options=quick_compile())(q, k, v)

    for a, b in zip(jax.tree.leaves(both(ours)), jax.tree.leaves(both(whole)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_packed_batches_do_not_look_ahead():
    batch = moe.language_batch(jnp.array([[5, 6, 7, 8, 9]]), jnp.array([[1, 1, 2, 2, 0]]))
    assert batch.inputs.tolist() == [[5, 6, 7, 8]] and batch.targets.tolist() == [[6, 7, 8, 9]]
    assert batch.mask.tolist() == [[True, False, True, False]]
    assert batch.positions.tolist() == [[0, 1, 0, 1]]
    config = moe.MoEConfig()
    assert order_for_context(batch, config, 2).inputs.tolist() == [[5, 8, 6, 7]]


def test_known_slope_of_the_loss_gives_the_gradients_of_any_other_loss(monkeypatch):
    """The gradient taken on the way, in chunks that do not divide the tokens, against log-probabilities first."""
    monkeypatch.setattr("jaxrl_suite.moe.model._HEAD_ROWS", 7)
    model = lm.LanguageModelConfig(
        vocab_size=40, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=4, expert_width=8
    )
    config, folding = moe.MoEConfig(model=model), moe.Folding(dp=2, edp=2)
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, 40)
    batch = moe.language_batch(tokens, segments=jnp.array([[1] * 9, [1] * 4 + [2] * 5, [1] * 6 + [0] * 3, [1] * 9]))
    params = lm.init_params(jax.random.key(0), model)

    @functools.partial(jax.jit, static_argnames="loss", compiler_options=quick_compile())
    def gradients(params, loss):
        return loss_and_gradients(params, batch, config, folding, loss=loss)

    known, parts = gradients(params, moe.next_token_loss)
    found, others = gradients(params, lambda log_probs, batch: moe.next_token_loss(log_probs, batch))
    np.testing.assert_allclose(parts.loss, others.loss, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(known), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(jnp.max(jnp.abs(theirs))))


@pytest.mark.parametrize("loss", [moe.next_token_loss, lambda log_probs, batch: moe.next_token_loss(log_probs, batch)])
def test_activations_of_nan_where_nothing_counts_leave_the_loss_alone(loss):
    model = lm.LanguageModelConfig(vocab_size=12, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)
    config = moe.MoEConfig(model=model.replace(num_experts=2, expert_width=8))
    layout = make_layout(config, moe.Folding())._replace(mesh=())
    batch = moe.language_batch(jnp.array([[5, 6, 7, 8, 9]]), jnp.array([[1, 1, 1, 0, 0]]))
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    params = lm.init_params(jax.random.key(1), model)

    def total(x):
        return summed_loss(params, x, batch, loss, config=config, layout=layout)

    np.testing.assert_array_equal(total(x.at[0, 3].set(jnp.nan)), total(x))


def test_norms_are_repeated_and_nothing_dear_is():
    """Of a layer on 2 x 8 tokens two arrays of their size stay, its input and the residual; gradients are the same."""
    model = lm.LanguageModelConfig(
        family="mixtral", width=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, ffn_width=24, num_experts=E
    )
    batch = moe.language_batch(jnp.zeros((2, 9), jnp.int32))
    params = jax.tree.map(lambda leaf: leaf[0], lm.init_params(jax.random.key(0), model)["layers"])
    x = jax.random.normal(jax.random.key(1), (2, 8, 16))
    gradients, texts, streams = {}, {}, {}
    for policy in ("none", "norms"):
        layer = make_layer(batch, config=moe.MoEConfig(model=model, remat=policy), layout=Layout())

        def total(params, x, layer=layer):
            return jnp.sum(jnp.sin(layer(x, params)[0]))

        gradient = jax.jit(jax.grad(total, argnums=(0, 1)), compiler_options=quick_compile())
        gradients[policy], texts[policy] = gradient(params, x), str(gradient.trace(params, x).jaxpr)
        kept = jax.tree.leaves(jax.eval_shape(lambda layer=layer: jax.vjp(layer, x, params)[1]))
        streams[policy] = sum(leaf.shape in ((2, 8, 16), (16, 16)) for leaf in kept)
    assert streams["norms"] == 2 < streams["none"], streams
    for dear in (" dot_general[", " exp ", " sort[", " gather["):
        assert texts["norms"].count(dear) == texts["none"].count(dear) > 0, dear
    jax.tree.map(
        lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-6),
        gradients["norms"], gradients["none"],
    )  # fmt: skip


def test_pipeline_ticks_and_circular_order():
    """Property 26: v·m + PP - 1 ticks; a stage's rounds of layers follow each other and nothing is lost."""
    assert [num_ticks(6, 3), num_ticks(6, 3, rounds=2), num_ticks(2, 5), num_ticks(4, 1)] == [8, 14, 6, 4]
    held = circular_layers(jnp.arange(8), 2, 2)
    assert held.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert circular_layers(held, 2, 2).tolist() == list(range(8))


def test_float8_rounding_error_and_product():
    """Blockwise scales keep the error of every number within half a unit of its block's largest; zero stays zero."""
    x = jax.random.normal(jax.random.key(0), (5, 300)) * jnp.exp(jnp.arange(300) / 50.0)
    q = quantize(x)
    assert q.values.dtype == jnp.float8_e4m3fn and q.scales.shape == (5, 3)
    largest = jnp.repeat(q.scales * 448, 128, axis=1)[:, :300]
    error = jnp.abs(dequantize(q) - x)
    assert bool(jnp.all(error <= jnp.maximum(E4M3_EPSILON * jnp.abs(x), largest * 2.0**-17)))
    assert float(jnp.abs(dequantize(quantize(jnp.zeros((2, 130)))).max())) == 0
    w = jax.random.normal(jax.random.key(1), (300, 140))
    np.testing.assert_allclose(fp8_matmul(x, w), round_rows(x) @ round_tiles(w), rtol=2e-4, atol=2e-2)
    np.testing.assert_array_equal(jax.grad(lambda v: jnp.sum(round_rows(v)))(x), 1)


DENSE = lm.LanguageModelConfig(
    vocab_size=16, width=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, ffn_width=8, init_std=0.4
)


@pytest.mark.parametrize(("experts", "k", "granularity"), [(4, 2, 1), (8, 2, 2), (8, 4, 2), (8, 4, 4)])
def test_upcycling_keeps_the_dense_logits(experts, k, granularity):
    """Property 28: exact at any granularity when whole copies are chosen, the factor on the down projection."""
    sparse = upcycled_config(DENSE, num_experts=experts, experts_per_token=k, granularity=granularity)
    params = lm.init_params(jax.random.key(0), DENSE)
    up = upcycle(jax.random.key(1), params, DENSE, sparse)
    assert {path: leaf.shape for path, leaf in lm.flatten(up).items()} == lm.parameter_shapes(sparse)
    tokens = jax.random.randint(jax.random.key(2), (2, 6), 0, 16)
    dense, logits = lm.apply(params, tokens, config=DENSE), lm.apply(up, tokens, config=sparse)
    np.testing.assert_allclose(logits, dense, atol=1e-5 * float(jnp.abs(dense).max()))


def test_spreading_the_factor_over_three_matrices_is_not_exact():
    """Differs: Megatron's a^(1/3) on each matrix changes the function, since SiLU is not homogeneous."""
    sparse = upcycled_config(DENSE, num_experts=8, experts_per_token=4, granularity=4)
    params, tokens = lm.init_params(jax.random.key(0), DENSE), jnp.arange(6)[None]
    up = upcycle(jax.random.key(1), params, DENSE, sparse, scaling="cube_root")
    dense, logits = lm.apply(params, tokens, config=DENSE), lm.apply(up, tokens, config=sparse)
    assert float(jnp.abs(logits - dense).max() / jnp.abs(dense).max()) > 1e-3
    assert copy_factor(sparse, 4) == 4.0 and copy_factor(sparse.replace(router_normalize=False), 4) == 8.0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ],
)
def test_replica_groups_in_every_written_form(text, groups):
    assert parse_groups(text) == groups


def test_replica_groups_in_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="three known forms"):
        parse_groups("sometimes")


@pytest.mark.parametrize("text", ["attention=tp2.dp4 experts=ep4.etp2", "attention=dp8 experts=edp8"])
def test_exchanged_bytes_equal_the_formula(text):
    """Properties 16, 18: rows go over EP groups and come back, E · C · h · 4 bytes each, and E · C · 4 of weights go.

    At degree 1 nothing is sent.
    """
    folding = moe.Folding.parse(text)
    model = lm.LanguageModelConfig(width=16, num_experts=8, expert_width=8, num_layers=1)
    config = moe.MoEConfig(model=model, dispatch="drop_pad", capacity_factor=1.25)
    params = jax.tree.map(lambda leaf: leaf[0], lm.init_params(jax.random.key(0), model)["layers"]["feed_forward"])
    x = jnp.ones((4, 16, 16)) if folding.dp == 4 else jnp.ones((8, 16, 16))
    found = audit(
        jax.jit(lambda p, v: sharded_layer(p, v, config, folding)[0], compiler_options=quick_compile())
        .lower(params, x)
        .compile()
    )
    exchanges = [item for item in found if item.kind == "all-to-all"]
    gathers = [item for item in found if item.kind in ("all-gather", "reduce-scatter")]
    if folding.ep == 1:
        assert found == []
        return
    tokens = x.shape[0] * x.shape[1] // 8
    rows = 8 * moe.expert_capacity(tokens, 8, 2, 1.25)
    groups = tuple(sorted(tuple(sorted(g)) for g in folding.groups("ep")))
    assert {(item.groups, item.runs) for item in exchanges} == {(groups, 1)}
    assert sorted(item.num_bytes for item in exchanges) == [rows * 4, rows * 16 * 4, rows * 16 * 4]
    assert all(item.wire_bytes() == (folding.ep - 1) / folding.ep * item.num_bytes for item in exchanges)
    inner = tuple(sorted(tuple(sorted(g)) for g in folding.groups("etp")))
    assert {item.groups for item in gathers} == {inner} and len(gathers) == 3
    assert summarize(found)[0]["bytes"] > 0
