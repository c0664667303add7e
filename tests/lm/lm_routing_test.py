import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from jaxrl_suite import lm
from jaxrl_suite.testing import assert_close
from tests.reference import lm_decoder

BASE = lm.LanguageModelConfig(num_experts=8, experts_per_token=2)


def test_golden_softmax_by_hand():
    """Probabilities 1/8, 2/8, 5/8: raw weights are two of them, normalised ones 5/7 and 2/7."""
    config = BASE.replace(num_experts=3)
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    routing = lm.route(logits, config)
    assert routing.experts.tolist() == [[2, 1]]
    np.testing.assert_allclose(routing.weights, [[5 / 7, 2 / 7]], rtol=1e-6)
    np.testing.assert_allclose(routing.probs, [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-6)
    raw = lm.route(logits, config.replace(router_normalize=False))
    np.testing.assert_allclose(raw.weights, [[5 / 8, 2 / 8]], rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router_normalize": False, "experts_per_token": 4},
        {"router_score": "sigmoid", "router_scale": 2.5},
        {"router_score": "sigmoid", "router_groups": 4, "router_top_groups": 2, "experts_per_token": 4},
        {"router_groups": 2, "router_top_groups": 1},
        {"num_experts": 16, "experts_per_token": 10},
    ],
)
def test_route_equals_numpy(changes, key):
    config = BASE.replace(**changes)
    logits = jax.random.normal(key, (13, config.num_experts))
    bias = 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (config.num_experts,))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        routing = jax.jit(lambda x, b: lm.route(x, config, b))(logits, bias)
    for t in range(13):
        experts, weights = lm_decoder.route(np.asarray(logits[t], np.float64), config, np.asarray(bias, np.float64))
        assert routing.experts[t].tolist() == experts.tolist()
        assert_close(np.asarray(routing.weights[t]), weights.astype(np.float32), "reference")


def test_bias_moves_the_choice_but_neither_weights_nor_gradients(key):
    """Property 22, first half: the bias enters the selection only."""
    logits = jax.random.normal(key, (5, 8))
    bias = jnp.zeros(8).at[3].set(10.0)
    routing = lm.route(logits, BASE.replace(router_score="sigmoid", router_normalize=False), bias)
    assert (routing.experts[:, 0] == 3).all()
    np.testing.assert_allclose(routing.weights[:, 0], jax.nn.sigmoid(logits[:, 3]), rtol=1e-6)
    assert (jax.grad(lambda b: lm.route(logits, BASE, b).weights.sum())(bias) == 0).all()


def test_ties_go_to_the_lowest_index():
    assert lm.top_k_indices(jnp.array([[1.0, 2.0, 2.0, 2.0]]), 3).tolist() == [[1, 2, 3]]


def test_nan_rows_give_valid_indices_and_nan_weights():
    routing = lm.route(jnp.full((1, 8), jnp.nan), BASE)
    assert ((routing.experts >= 0) & (routing.experts < 8)).all()
    assert jnp.isnan(routing.weights).all()


def test_straight_through_has_the_values_of_hard_and_the_slope_of_all_scores(key, x64):
    config = BASE.replace(router_dtype="float64", num_experts=5)
    logits, cotangent = jax.random.normal(key, (7, 5)), jnp.arange(1.0, 15.0).reshape(7, 2)
    hard, through = lm.route(logits, config), lm.route(logits, config.replace(router_top_k="straight_through"))
    np.testing.assert_array_equal(through.experts, hard.experts)
    np.testing.assert_allclose(through.weights, hard.weights, rtol=1e-12)
    slope = jax.grad(
        lambda x: (lm.route(x, config.replace(router_top_k="straight_through")).weights * cotangent).sum()
    )(logits)
    p = np.asarray(jax.nn.softmax(logits))
    dense = np.zeros((7, 5))
    np.put_along_axis(dense, np.asarray(hard.experts), np.asarray(cotangent), axis=1)
    np.testing.assert_allclose(slope, p * (dense - (p * dense).sum(1, keepdims=True)), rtol=1e-9)
    assert (np.abs(slope) > 1e-6).all()  # experts that were not chosen learn too


@pytest.mark.parametrize("changes", [{}, {"router_score": "sigmoid"}, {"router_normalize": False}])
def test_continuous_top_k_has_no_jump_where_the_choice_changes(changes, key, x64):
    """Along a line of logits that swaps experts, the dense weights move as little as the logits; "hard" jumps."""
    base = BASE.replace(router_dtype="float64", num_experts=5, **changes)
    start, end = jax.random.normal(key, (2, 5))
    line = start + jnp.linspace(0.0, 1.0, 4001)[:, None] * (end - start)

    def steps(kind):
        routing = lm.route(line, base.replace(router_top_k=kind))
        dense = np.zeros((4001, 5))
        np.put_along_axis(dense, np.asarray(routing.experts), np.asarray(routing.weights), axis=1)
        swaps = (np.diff(np.sort(np.asarray(routing.experts)), axis=0) != 0).any()
        return np.abs(np.diff(dense, axis=0)).max(), swaps

    (largest, swaps), (jump, _) = steps("continuous"), steps("hard")
    assert swaps and largest < 0.02 < 0.1 < jump
    config = base.replace(router_top_k="continuous")
    weights = lambda x: lm.route(x[None], config).weights[0]  # noqa: E731
    jax.test_util.check_grads(weights, (start,), order=1, modes=("fwd", "rev"), atol=1e-7, rtol=1e-6)


def test_continuous_top_k_refuses_what_it_cannot_be():
    for changes in ({"router_bias": True}, {"router_groups": 2, "router_top_groups": 1}, {"experts_per_token": 1}):
        with pytest.raises(ValueError, match=r"LanguageModelConfig\.router_top_k='continuous': needs"):
            BASE.replace(router_top_k="continuous", **changes)
    raw = BASE.replace(router_top_k="continuous", num_experts=2, router_normalize=False)
    np.testing.assert_allclose(lm.route(jnp.zeros((1, 2)), raw).weights, [[0.5, 0.5]])  # nobody is left out


@pytest.mark.parametrize("experts", ["all_to_one", "spread"])
def test_dropless_layer_equals_a_loop_over_tokens(experts, key):
    """Degenerate routing too: one expert takes every token, another none."""
    config = lm.LanguageModelConfig(width=6, num_experts=5, experts_per_token=2, expert_width=4, init_std=0.5)
    params = jax.tree.map(lambda leaf: leaf[0], lm_decoder.parameters(config)["layers"]["feed_forward"])
    x = jax.random.normal(key, (2, 17, 6))
    if experts == "all_to_one":
        x = jnp.abs(x)
        params["router"] = jnp.zeros_like(params["router"]).at[:, 4].set(1.0).at[:, 0].set(0.5)
    y, aux = jax.jit(lm.sparse_feed_forward(config))(params, x)
    oracle = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = np.stack(
        [lm_decoder.feed_forward(oracle, row, config) for row in np.asarray(x, np.float64).reshape(-1, 6)]
    )
    assert_close(np.asarray(y).reshape(-1, 6), expected.astype(np.float32), "reference")
    assert aux.routing.experts.shape == (34, 2)


def test_expert_work_is_proportional_to_the_tokens():
    """From 8 to 64 experts at the same number of chosen ones, the compiled products grow by padding alone."""

    def flops(num_experts):
        config = lm.LanguageModelConfig(width=32, num_experts=num_experts, experts_per_token=2, expert_width=64)
        params = jax.eval_shape(lambda k: lm.init_params(k, config), jax.random.key(0))["layers"]["feed_forward"]
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
        jaxpr = jax.make_jaxpr(lm.sparse_feed_forward(config))(params, jnp.zeros((1, 4096, 32)))
        scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
        block = scans[-1].invars[-1].aval.shape
        return block[0] * block[1]  # rows that the expert matrices meet

    assert flops(8) <= 1.25 * 8192
    assert flops(64) <= 2 * 8192
