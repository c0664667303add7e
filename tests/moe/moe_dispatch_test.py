import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import moe
from jaxrl_suite.moe.block_swiglu import LayerStack, block_swiglu
from jaxrl_suite.moe.dispatch import identity_experts
from jaxrl_suite.moe.grouped import align, block_matmul, sort_by_group
from jaxrl_suite.moe.layer import make_experts
from jaxrl_suite.moe.permute import collect_rows, spread_rows
from jaxrl_suite.moe.verify import quick_compile
from tests.reference import moe_routing as reference

E, K, T, D, F = 8, 2, 24, 16, 8
MODES = ("drop_pad", "padded", "allgather", "emulated")
FOLDINGS = ("attention=tp8 experts=ep8", "attention=tp8 experts=etp2.ep2.edp2", "attention=tp8 experts=etp8")


def random_routing(seed, num_tokens=T):
    generator = np.random.default_rng(seed)
    experts = np.stack([generator.permutation(E)[:K] for _ in range(num_tokens)]).astype(np.int32)
    weights = generator.random((num_tokens, K)).astype(np.float32)
    return experts, weights


def random_experts(seed):
    generator = np.random.default_rng(seed)
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return {name: generator.normal(size=shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}


def config_for(mode, **options):
    factor = {"capacity_factor": E / K} if mode == "drop_pad" else {}
    model = moe.MoEConfig().model.replace(width=D, ffn_width=F, num_experts=E, experts_per_token=K)
    return moe.MoEConfig(model=model, dispatch=mode, block_rows=8, **{**factor, **options})


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("capacity", [1, 3, 24])
def test_capacity_rule_against_the_reference(policy, capacity):
    """Property 10: at most C copies an expert, the most probable (or earliest), ties by lowest index."""
    experts, weights = random_routing(0)
    weights = np.round(weights, 1)  # many ties
    keep = moe.keep_by_capacity(jnp.array(experts), jnp.array(weights), E, capacity, policy)
    expected = reference.keep_by_capacity(experts, weights, E, capacity, policy)
    np.testing.assert_array_equal(keep, expected)
    assert max(np.bincount(experts[np.asarray(keep)], minlength=E)) <= capacity


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "slots"),
    [(16, 8, 2, 1.0, 4), (16, 8, 2, 1.1, 5), (7, 8, 2, 1.0, 2), (4, 8, 2, 9, 4)],
)
def test_capacity_is_the_ceiling_of_copies(tokens, experts, k, factor, slots):
    assert moe.expert_capacity(tokens, experts, k, factor) == slots


def test_spread_and_collect_are_transposes():
    source = jnp.array([2, 4, 0, 2], jnp.int32)  # 4 is out of range: an empty slot
    slots = jnp.array([[2, 4], [4, 4], [0, 3], [4, 4]], jnp.int32)
    rows = jnp.arange(8.0).reshape(4, 2)
    out = spread_rows(rows, source, slots)
    np.testing.assert_array_equal(out, [[4, 5], [0, 0], [0, 1], [4, 5]])
    matrix = np.asarray(jax.jacobian(lambda r: spread_rows(r, source, slots))(rows)).reshape(8, 8)
    back = np.asarray(jax.jacobian(lambda r: collect_rows(r, source, slots))(out)).reshape(8, 8)
    np.testing.assert_array_equal(matrix.T, back)


@pytest.mark.parametrize("backend", ["blocks", "ragged_dot"])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 12, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
def test_grouped_product_against_a_loop(backend, sizes):
    generator = np.random.default_rng(1)
    rows, weights = generator.normal(size=(12, 6)), generator.normal(size=(4, 6, 5))
    rows, weights = rows.astype(np.float32), weights.astype(np.float32)
    expected, start = np.zeros((12, 5), np.float32), 0
    for group, size in enumerate(sizes):
        expected[start : start + size] = rows[start : start + size] @ weights[group]
        start += size
    out = moe.grouped_matmul(jnp.array(rows), jnp.array(weights), jnp.array(sizes, jnp.int32), block=4, backend=backend)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def assert_equal_twice(function, oracle, *arguments):
    """First and second derivatives of two functions agree."""

    def second(f):
        leaves = jax.tree.leaves
        return lambda *a: sum(jnp.sum(jnp.square(leaf)) for leaf in leaves(jax.grad(f, range(len(a)))(*a)))

    for order in (lambda f: f, second):
        first, other = (jax.jit(jax.grad(order(f), range(len(arguments))))(*arguments) for f in (function, oracle))
        chex.assert_trees_all_close(first, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [2, 16])  # kernels for a GPU fit blocks of 16: they stand in the program, unused
def test_grouped_product_gradients_twice(block):
    """First and second derivatives of the blocked product equal those of a masked dense product."""
    groups = jnp.array([1, 0, 2, 3, 1, 1], jnp.int32)  # 3: a row of no expert
    key = jax.random.key(0)
    rows, weights = jax.random.normal(key, (6, 16)), jax.random.normal(jax.random.fold_in(key, 1), (3, 16, 16)) / 4
    layout = align(groups, 3, block=block)

    def blocked(rows, weights):
        aligned = spread_rows(rows, layout.source, layout.slots)
        return jnp.sum(jnp.sin(block_matmul(aligned, weights, layout.expert, layout.live)))

    def dense(rows, weights):
        product = jnp.einsum("rd,rdf->rf", rows, weights[jnp.minimum(groups, 2)])
        return jnp.sum(jnp.sin(jnp.where(groups[:, None] < 3, product, 0)))

    assert_equal_twice(blocked, dense, rows, weights)


@pytest.mark.parametrize(
    ("block", "num", "stacked"),
    [(16, 240, False), (128, 240, False), (16, 240, True), (16, 1100, False), (16, 2200, False)],
)
def test_block_swiglu_and_its_gradients_twice(block, num, stacked):
    """Uneven experts, one of them without rows; blocks of 16 are walked in 7 + 7 and 1, of many rows in 4 + 8 x 8.

    Of 2,200 rows the gradient of down is turned.
    """
    key = jax.random.key(0)
    groups = jnp.where(jnp.arange(num) < num - 20, 2, jnp.arange(num) % 2 * 3).astype(jnp.int32)
    groups = groups.at[7].set(4)  # a row of no expert
    sizes = {"gate": (4, 6, 5), "up": (4, 6, 5), "down": (4, 5, 6)}
    params = {name: jax.random.normal(jax.random.fold_in(key, i), s) / 4 for i, (name, s) in enumerate(sizes.items())}
    rows = jax.random.normal(jax.random.fold_in(key, 3), (num, 6)) / 4
    weights = jax.random.normal(jax.random.fold_in(key, 4), (num, 1))
    layout = align(groups, 4, block=block)

    def walked(rows, params, weights):
        aligned = (spread_rows(leaf, layout.source, layout.slots) for leaf in (rows, weights))
        stack = one_of_three_layers(params) if stacked else None
        y = block_swiglu(next(aligned), params, next(aligned), layout.expert, layout.live, stack)
        return jnp.sum(jnp.sin(collect_rows(y, layout.source, layout.slots)))

    def dense(rows, params, weights):
        gate, up, down = (params[name][jnp.minimum(groups, 3)] for name in ("gate", "up", "down"))
        hidden = jax.nn.silu(jnp.einsum("rd,rdf->rf", rows, gate)) * jnp.einsum("rd,rdf->rf", rows, up)
        y = weights * jnp.einsum("rf,rfd->rd", hidden, down)
        return jnp.sum(jnp.sin(jnp.where(groups[:, None] < 4, y, 0)))

    np.testing.assert_allclose(walked(rows, params, weights), dense(rows, params, weights), rtol=1e-5)
    assert_equal_twice(walked, dense, rows, params, weights)


def one_of_three_layers(params):
    """The second of three; the others would show in every number."""
    matrices = jax.tree.map(lambda leaf: jnp.stack([leaf * jnp.nan, leaf, leaf * jnp.nan]), params)
    return LayerStack(jax.lax.stop_gradient(matrices), jnp.int32(1))


def test_a_stack_is_read_and_the_slice_of_it_is_not():
    """On a CPU: XLA does not copy out of the stack in a loop over layers what nobody reads; gradients go there."""
    params = random_experts(0)
    layout = align(jnp.repeat(jnp.arange(E, dtype=jnp.int32), 8), E, block=8)
    rows, weights = jnp.ones((len(layout.source), D)), jnp.ones((len(layout.source), 1))

    def total(params, stack):
        return jnp.sum(jnp.sin(block_swiglu(rows, params, weights, layout.expert, layout.live, stack)))

    gradient = jax.jit(jax.value_and_grad(total))
    nothing = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    jax.tree.map(np.testing.assert_array_equal, gradient(nothing, one_of_three_layers(params)), gradient(params, None))


def test_a_row_of_nan_stays_in_the_gradient_of_its_expert():
    """Experts 0 and 2 have rows, 1 has none: what the walk summed for one expert never reaches another."""
    groups = jnp.array([0, 0, 2, 2], jnp.int32)
    layout = align(groups, 3, block=2)
    params = {"gate": jnp.ones((3, 3, 2)), "up": jnp.ones((3, 3, 2)), "down": jnp.ones((3, 2, 3))}
    rows = jnp.ones((4, 3)).at[0, 0].set(jnp.nan)

    def total(params):
        aligned = spread_rows(rows, layout.source, layout.slots)
        return jnp.sum(block_swiglu(aligned, params, jnp.ones((len(aligned), 1)), layout.expert, layout.live))

    for name, gradient in jax.grad(total)(params).items():
        assert np.isnan(gradient[0]).any(), name
        assert np.all(np.asarray(gradient[1]) == 0), name
        assert np.isfinite(gradient[2]).all() and np.any(np.asarray(gradient[2])), name


@pytest.mark.parametrize("precision", ["compute", "float8"])
def test_twice_the_weight_is_exactly_twice_the_output(precision):
    """Both forms of the experts; before the rounding to float8 a weight goes into the scale of its row."""
    run = make_experts(random_experts(0), config_for("padded", expert_precision=precision))
    x = jnp.array(np.random.default_rng(1).normal(size=(E * 8, D)), jnp.float32)
    layout = align(jnp.repeat(jnp.arange(E, dtype=jnp.int32), 8), E, block=8)

    def outputs(weight):
        rows = spread_rows(x, layout.source, layout.slots)
        aligned = run.blocks(rows, jnp.full((len(rows), 1), weight), layout)
        uniform = run.uniform(x.reshape(E, 8, D), jnp.full((E, 8, 1), weight))
        return collect_rows(aligned, layout.source, layout.slots), uniform.reshape(-1, D)

    once, twice = outputs(0.375), outputs(0.75)
    np.testing.assert_array_equal(jnp.stack(twice), 2 * jnp.stack(once))
    np.testing.assert_allclose(*once, atol=1e-6)


def test_sort_by_group_is_stable_and_counts():
    groups = jnp.array([2, 0, 3, 2, 0], jnp.int32)
    order, rank, counts = sort_by_group(groups, 3)
    assert order.tolist() == [1, 4, 0, 3, 2]
    assert rank.tolist() == [2, 0, 4, 3, 1]
    assert counts.tolist() == [2, 0, 2]


@functools.cache
def sharded(mode, text, kind):
    """Dispatch over eight devices, compiled once for all tests of a kind."""
    folding = moe.Folding.parse(text)
    axes = moe.ExpertAxes(folding.roles["ep"], folding.roles["etp"])
    tokens, expert = folding.spec("tokens"), folding.spec("ep", None, "etp")
    down = folding.spec("ep", "etp", None)
    config = config_for(mode)

    def local(params, x, experts, weights, keep):
        rank = moe.rank_in_expert(experts, weights, E)
        run = identity_experts() if kind == "identity" else make_experts(params, config)
        y, stats = moe.dispatch(
            mode, x, experts, weights, keep, run, num_experts=E, axes=axes, capacity=x.shape[0], rank=rank
        )
        return y, jax.tree.map(lambda leaf: leaf[None], stats)

    spec = {"gate": expert, "up": expert, "down": down}
    mapped = jax.shard_map(
        local, mesh=folding.mesh(), in_specs=(spec, tokens, tokens, tokens, tokens), out_specs=(tokens, tokens)
    )

    def both(params, x, experts, weights, keep, cotangent):
        y, pullback, stats = jax.vjp(lambda p, x, w: mapped(p, x, experts, w, keep), params, x, weights, has_aux=True)
        return y, pullback(cotangent), stats

    return folding, jax.jit(both, compiler_options=quick_compile())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", FOLDINGS)
def test_dispatch_then_combine_is_the_identity(mode, text):
    """Property 8: with weights 1/k, output = input and pulled-back = cotangent (times ETP, whose replicas are summed).

    Property 9: copies sent = copies received (once for each ETP member) = T · k.
    """
    folding, function = sharded(mode, text, "identity")
    experts, _ = random_routing(2)
    x, cotangent = np.random.default_rng(3).normal(size=(2, T, D)).astype(np.float32)
    weights = np.full((T, K), 1 / K, np.float32)
    y, (_, d_x, _), stats = function(random_experts(0), x, experts, weights, np.ones((T, K), bool), cotangent)
    np.testing.assert_allclose(y / folding.etp, x, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(d_x / folding.etp, cotangent, rtol=1e-6, atol=1e-6)
    assert int(stats.sent.sum()) == T * K
    assert int(stats.received.sum()) == T * K * folding.etp
    assert int(stats.dropped.sum()) == int(stats.overflow.sum()) == 0


ROUTINGS = {
    "random": lambda: random_routing(4),
    "one expert": lambda: (np.tile(np.array([[3, 5]], np.int32), (T, 1)), np.full((T, K), 0.5, np.float32)),
    "a rank without rows": lambda: (random_routing(5)[0] % 4, random_routing(5)[1]),
}


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", FOLDINGS[:2])
def test_modes_equal_the_reference(mode, text, routing):
    """Properties 14 and 15: all modes agree with a token-by-token loop, also for degenerate routing."""
    _, function = sharded(mode, text, "experts")
    experts, weights = ROUTINGS[routing]()
    if routing == "a rank without rows":
        experts[:, 1] = (experts[:, 0] + 1) % 4
    params = random_experts(1)
    x, cotangent = np.random.default_rng(6).normal(size=(2, T, D)).astype(np.float32)
    keep = np.ones((T, K), bool)
    y, (d_params, d_x, d_weights), _ = function(params, x, experts, weights, keep, cotangent)
    expected = reference.moe(x, experts, weights, keep, **params)
    np.testing.assert_allclose(y, expected, atol=2e-5 * np.abs(expected).max())
    one = jax.vjp(lambda p, x, w: dense(p, x, experts, w), params, jnp.array(x), jnp.array(weights))[1](cotangent)
    for ours, theirs in zip(jax.tree.leaves((d_params, d_x, d_weights)), jax.tree.leaves(one), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def dense(params, x, experts, weights):
    """Every expert on every token, masked."""
    hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, params["gate"])) * jnp.einsum("td,edf->tef", x, params["up"])
    outputs = jnp.einsum("tef,efd->ted", hidden, params["down"])
    combine = jnp.einsum("tke,tk->te", jax.nn.one_hot(experts, E), weights)
    return jnp.einsum("ted,te->td", outputs, combine)


@pytest.mark.parametrize("mode", MODES)
def test_dropped_copies_yield_zero_and_no_gradient(mode):
    """Property 11: dropped tokens yield exactly 0, pass nothing back; kept ones keep their weight."""
    _, function = sharded(mode, FOLDINGS[0], "experts")
    experts, weights = random_routing(7)
    keep = np.random.default_rng(8).random((T, K)) < 0.5
    keep[:3] = False
    params = random_experts(2)
    x, cotangent = np.random.default_rng(9).normal(size=(2, T, D)).astype(np.float32)
    y, (_, d_x, d_weights), stats = function(params, x, experts, weights, keep, cotangent)
    assert np.all(np.asarray(y[:3]) == 0) and np.all(np.asarray(d_x[:3]) == 0)
    assert np.all(np.asarray(d_weights)[~keep] == 0)
    np.testing.assert_allclose(y, reference.moe(x, experts, weights, keep, **params), atol=1e-5)
    assert int(stats.dropped.sum()) == int((~keep).sum())
    assert int(stats.sent.sum()) == int(keep.sum())


def test_overflow_is_counted_and_the_rest_is_exact():
    """A dropless buffer below the safe bound loses copies, counts them, and leaves the others as they are."""
    folding = moe.Folding.parse(FOLDINGS[0])
    tokens = folding.spec("tokens")

    def local(x, experts, weights):
        y, stats = moe.dispatch(
            "padded", x, experts, weights, jnp.ones_like(experts, bool), identity_experts(), num_experts=E,
            axes=moe.ExpertAxes(folding.roles["ep"]), rows_per_peer=1,
        )  # fmt: skip
        return y, stats.overflow[None]

    mapped = jax.jit(jax.shard_map(local, mesh=folding.mesh(), in_specs=(tokens,) * 3, out_specs=(tokens, tokens)))
    experts = np.zeros((T, K), np.int32)
    experts[:, 1] = 1
    x = np.random.default_rng(10).normal(size=(T, D)).astype(np.float32)
    y, overflow = mapped(x, experts, np.ones((T, K), np.float32))
    assert int(overflow.sum()) == T * K - 8 * 2  # each rank has one row for each of two experts' ranks
    first = np.arange(0, T, T // 8)
    np.testing.assert_allclose(y[first], 2 * x[first], rtol=1e-6)
    assert np.all(np.delete(np.asarray(y), first, axis=0) == 0)


def test_a_token_of_nan_stays_alone():
    """Bad input: NaN logits of one token leave every other token as it was, capacity or not."""
    x = np.random.default_rng(11).normal(size=(1, T, D)).astype(np.float32)
    broken = x.copy()
    broken[0, 5] = np.nan
    router = np.random.default_rng(12).normal(size=(D, E)).astype(np.float32)
    params = {"router": router, "experts": random_experts(3)}
    config = config_for("padded")
    layer = jax.jit(lambda p, v: moe.moe_layer(p, v, config=config), compiler_options=quick_compile())
    (whole, _), (y, sums) = layer(params, x), layer(params, broken)
    others = np.arange(T) != 5
    assert np.isnan(y[0, 5]).all() and float(sums.counts.sum()) == T * K
    np.testing.assert_allclose(y[0, others], whole[0, others], rtol=1e-6, atol=1e-6)


def test_unknown_mode_is_refused():
    experts, weights = random_routing(0)
    with pytest.raises(ValueError, match="drop_pad, padded"):
        moe.dispatch("deepep", jnp.ones((T, D)), experts, weights, experts > -1, identity_experts(), num_experts=E)
