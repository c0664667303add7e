import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxrl_suite import moe, pareto
from jaxrl_suite.pareto import Signals

step = jax.jit(pareto.influence_step)


def bowls(seed, size):
    """Quadratic objectives with random curvature and centres, and the exact step of weights and parameters."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(size, 2, 2))
    curvature = jnp.asarray(factors @ factors.transpose(0, 2, 1) + 0.5 * np.eye(2))
    centres = jnp.asarray(rng.normal(size=(size, 2)))

    def objectives(x):
        gap = x[None] - centres
        return -0.5 * jnp.einsum("ki,kij,kj->k", gap, curvature, gap)

    return objectives, curvature, centres


def optimum(weights, curvature, centres):
    weights = np.asarray(weights)
    total = np.einsum("k,kij->ij", weights, curvature)
    return np.linalg.solve(total, np.einsum("k,kij,kj->i", weights, curvature, centres))


def test_golden_step(x64):
    """Property 9: golden values of the official rule, and the maximiser of eta <w, I> - mu KL by a numeric solver."""
    start = np.array([0.334, 0.333, 0.333])
    influence = np.array([1.58, 0.70, 0.23])
    for rate, golden in (
        (0.1, [0.3591800399, 0.3279382288, 0.3128817313]),
        (0.01, [0.3364842075, 0.3325375259, 0.3309782666]),
    ):
        weights = np.exp(step(jnp.log(start), influence, rate))
        np.testing.assert_allclose(weights, golden, atol=1e-10)

        def negative(w, rate=rate):
            return -(rate * w @ influence - np.sum(w * np.log(w / start)))

        found = optimize.minimize(
            negative, start, bounds=[(1e-9, 1)] * 3, constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP", options={"ftol": 1e-15},
        ).x  # fmt: skip
        np.testing.assert_allclose(weights, found, atol=1e-6)


def test_influence_of_the_golden_gradients(x64):
    rows = jnp.array([[0.6, 0.8, 0.0], [0.0, 0.5, 0.5], [0.3, 0.0, -0.4]])
    np.testing.assert_allclose(pareto.influence(lambda x: rows @ x, jnp.zeros(3)), [1.58, 0.70, 0.23], atol=1e-14)


def test_step_stays_on_the_simplex():
    """Property 8: any influence, any number of steps; a common constant changes nothing."""
    rng = np.random.default_rng(0)
    log_weights = jnp.log(jnp.full(4, 0.25))
    for scale in (1.0, 1e2, 1e4, 1e4, 1.0):
        influence = jnp.asarray(scale * rng.normal(size=4), jnp.float32)
        moved = step(log_weights, influence, 1.0)
        np.testing.assert_allclose(moved, step(log_weights, influence + 64.0, 1.0), rtol=1e-3, atol=1e-3)
        log_weights = moved
        weights = np.exp(log_weights)
        assert np.all(weights >= 0) and abs(weights.sum() - 1) < 1e-6 and np.all(np.isfinite(log_weights))


def test_neutral_cases():
    """Property 10: rate 0 is fixed weights bit for bit; K = 1; equal objectives; permutations."""
    weights = jnp.array([0.2, 0.5, 0.3])
    rule = pareto.influence_weights(weights, 0.0)
    state, fixed = rule.init(), pareto.fixed_weights(weights)
    for scale in (1.0, -300.0):
        state, moved = rule.step(state, Signals(influence=scale * jnp.arange(3.0)))
        np.testing.assert_allclose(moved, fixed.step(fixed.init(), Signals())[1], rtol=3e-7)
    assert float(jnp.exp(step(jnp.zeros(1), jnp.array([7.0]), 2.0))[0]) == 1.0
    np.testing.assert_allclose(jnp.exp(step(jnp.log(weights), jnp.full(3, 5.0), 2.0)), weights, rtol=1e-6)
    influence, order = jnp.array([1.0, -2.0, 0.5]), jnp.array([2, 0, 1])
    moved = step(jnp.log(weights), influence, 0.7)
    np.testing.assert_allclose(moved[order], step(jnp.log(weights)[order], influence[order], 0.7), rtol=1e-6)


def test_interval_accumulates(x64):
    """Property 11: W steps equal one step with the mean influence, and nothing moves in between."""
    start = jnp.array([0.2, 0.5, 0.3])
    rule = pareto.influence_weights(start, 0.4, interval=3)
    influences = np.random.default_rng(0).normal(size=(3, 3))
    state = rule.init()
    for row in influences[:2]:
        state, weights = rule.step(state, Signals(influence=jnp.asarray(row)))
        np.testing.assert_allclose(weights, start, rtol=1e-14)
    state, weights = rule.step(state, Signals(influence=jnp.asarray(influences[2])))
    expected = np.exp(step(jnp.log(start), influences.mean(0), 0.4))
    np.testing.assert_allclose(weights, expected, rtol=1e-13)
    assert int(state.count) == 0 and not np.any(state.accumulated)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint])
def test_influence_equals_the_jacobian(wrap, x64):
    """Property 12: row sums of J J', sum of influences = |sum g|^2 >= 0, a subset equals the sliced Jacobian."""
    rng = np.random.default_rng(0)
    first, second = jnp.asarray(rng.normal(size=(8, 5))), jnp.asarray(rng.normal(size=(4, 8)))
    params = {"inner": {"w": first}, "outer": second}
    x = jnp.asarray(rng.normal(size=5))
    objectives = wrap(lambda p: p["outer"] @ jnp.tanh(p["inner"]["w"] @ x))
    jacobian = jax.jacobian(objectives)(params)
    rows = {k: np.asarray(v).reshape(4, -1) for k, v in (("in", jacobian["inner"]["w"]), ("out", jacobian["outer"]))}
    full = np.concatenate([rows["in"], rows["out"]], axis=1)
    result = pareto.linearise(objectives, params)
    np.testing.assert_allclose(result.influence, (full @ full.T).sum(1), rtol=1e-10)
    assert float(result.influence.sum()) == pytest.approx(np.sum(full.sum(0) ** 2), rel=1e-10)
    sliced = pareto.influence(objectives, params, subset=lambda path: path.startswith("inner/"))
    np.testing.assert_allclose(sliced, (rows["in"] @ rows["in"].T).sum(1), rtol=1e-10)
    matrix, squares = pareto.gram(objectives, params, subset=lambda path: path == "inner/w")
    np.testing.assert_allclose(matrix, rows["in"] @ rows["in"].T, rtol=1e-10)
    np.testing.assert_allclose(squares, np.sum(full**2, axis=1), rtol=1e-10)
    clipped = full / np.maximum(1, np.linalg.norm(full, axis=1, keepdims=True))
    inner = clipped[:, : rows["in"].shape[1]]
    official = pareto.gram_influence(matrix, squared_norms=squares, clip_norm=1.0)
    np.testing.assert_allclose(official, (inner @ inner.T).sum(1), rtol=1e-10)


def test_influence_of_functions_with_their_own_backward():
    """No forward mode: objectives that hold a custom_vjp, which jvp refuses, have an influence too."""

    @jax.custom_vjp
    def double(x):
        return 2.0 * x

    double.defvjp(lambda x: (2.0 * x, None), lambda _, g: (2.0 * g,))
    np.testing.assert_allclose(pareto.influence(lambda x: double(x) * jnp.array([1.0, 3.0]), jnp.zeros(2)), [4.0, 36.0])


def test_influence_where_a_backward_pass_has_a_backward_of_its_own(x64):
    """Products of blocks with the matrix of their expert: their derivative is another function with its own rule."""
    rng = np.random.default_rng(0)
    rows, weights = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(2, 3, 4)))
    mixing, sizes = jnp.asarray(rng.normal(size=(5, 6))), jnp.array([4, 2], jnp.int32)

    def objectives(product, params):
        return mixing @ jnp.tanh(product(*params)).sum(axis=1)

    def grouped(rows, weights):
        return moe.grouped_matmul(rows, weights, sizes, block=2)

    def dense(rows, weights):
        return jnp.einsum("rd,rdf->rf", rows, weights[jnp.array([0, 0, 0, 0, 1, 1])])

    jacobian = jax.jacobian(functools.partial(objectives, dense))((rows, weights))
    flat = np.concatenate([np.asarray(part).reshape(5, -1) for part in jacobian], axis=1)
    influence = jax.jit(lambda params: pareto.influence(functools.partial(objectives, grouped), params))
    np.testing.assert_allclose(influence((rows, weights)), (flat @ flat.T).sum(1), rtol=1e-10)


def test_two_objectives_compare_norms(x64):
    """Property 13: I_1 - I_2 = |g_1|^2 - |g_2|^2; with both clipped to norm 1 the weights stay."""
    objectives, _, _ = bowls(1, 2)
    x = jnp.array([3.0, -2.0])
    jacobian = np.asarray(jax.jacobian(objectives)(x))
    influence = np.asarray(pareto.influence(objectives, x))
    squares = np.sum(jacobian**2, axis=1)
    assert influence[0] - influence[1] == pytest.approx(squares[0] - squares[1], rel=1e-10)
    assert np.all(squares > 1)
    clipped = pareto.gram_influence(jnp.asarray(jacobian @ jacobian.T), clip_norm=1.0)
    np.testing.assert_allclose(np.exp(step(jnp.log(jnp.array([0.3, 0.7])), clipped, 5.0)), [0.3, 0.7], rtol=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_fixed_point_is_the_uniform_sum(size, x64):
    """Properties 14 and 15: the long run reaches the uniform-sum optimum from any weights; ratios stay bounded."""
    objectives, curvature, centres = bowls(size, size)
    rule = pareto.influence_weights(jnp.asarray(np.random.default_rng(9).dirichlet(np.ones(size))), 0.05)

    def advance(carry, _):
        x, state = carry
        values = pareto.linearise(objectives, x)
        norms = jnp.sqrt(jnp.max(jnp.sum(jax.jacobian(objectives)(x) ** 2, axis=1)))
        state, weights = rule.step(state, Signals(influence=values.influence))
        return (x + 0.05 * values.pullback(weights), state), (weights, norms)

    (x, _), (weights, norms) = jax.jit(lambda c: jax.lax.scan(advance, c, length=6000))((jnp.ones(2), rule.init()))
    np.testing.assert_allclose(x, optimum(np.ones(size), curvature, centres), atol=1e-8)
    logs = np.log(np.asarray(weights))
    spread = (logs[:, :, None] - logs[:, None, :]) - (logs[0][:, None] - logs[0][None, :])
    bound = 2 * size * float(norms.max()) ** 2 * 0.05 * np.arange(len(logs))
    assert np.all(np.abs(spread).max((1, 2)) <= bound + 1e-9)


def test_one_step_of_weights_and_parameters_by_hand(x64):
    """Property 14: one dimension, J_1 = -x^2 / 2, J_2 = -(x - 1)^2 at x = 3."""

    def objectives(x):
        return jnp.stack([-0.5 * x[0] ** 2, -((x[0] - 1) ** 2)])

    x = jnp.array([3.0])  # g = (-3, -4), I = (21, 28)
    result = pareto.linearise(objectives, x)
    weights = np.exp(step(jnp.log(jnp.array([0.5, 0.5])), result.influence, 0.1))
    expected = 1 / (1 + np.exp(0.1 * 7))
    np.testing.assert_allclose(weights, [expected, 1 - expected], rtol=1e-13)
    moved = x + 0.1 * result.pullback(jnp.asarray(weights))
    assert float(moved[0]) == pytest.approx(3 + 0.1 * (-3 * expected - 4 * (1 - expected)), rel=1e-13)


def test_summable_schedule_freezes_the_weights(x64):
    """Property 14: with a summable rate the limit is the optimum of the frozen weights, not of the uniform sum."""
    objectives, curvature, centres = bowls(5, 3)

    def advance(carry, t):
        x, log_weights = carry
        result = pareto.linearise(objectives, x)
        log_weights = pareto.influence_step(log_weights, result.influence, 0.02 * 0.9 ** t.astype(x.dtype))
        return (x + 0.05 * result.pullback(jnp.exp(log_weights)), log_weights), None

    start = (jnp.ones(2), jnp.log(jnp.array([0.7, 0.2, 0.1])))
    (x, log_weights), _ = jax.lax.scan(advance, start, jnp.arange(6000))
    np.testing.assert_allclose(x, optimum(np.exp(log_weights), curvature, centres), atol=1e-8)
    assert np.abs(np.asarray(x) - optimum(np.ones(3), curvature, centres)).max() > 1e-3


def test_hypervolume_gain_map(x64):
    """Property 16: the map's golden values, 0.5 at no gain, below 2, strictly increasing."""
    gains = jax.jit(pareto.hypervolume_gain)(jnp.array([0.0, 0.1, 0.5, 1.0, 2.0]))
    np.testing.assert_allclose(gains, [0.5, 0.649502, 1.193176, 1.642391, 1.946041], atol=5e-7)
    assert np.all(np.diff(gains) > 0) and float(gains[-1]) < 2


def test_hypervolume_gain_rule_follows_the_official_run(x64):
    """Property 16 and the goldens of 1.13: first point is the reference and gain 1; raw units saturate (D3)."""
    origin, first, second, third = (
        (0.33, -1930.0, 0.36),
        (0.50, -1500.0, 0.50),
        (0.60, -1400.0, 0.55),
        (0.45, -1600, 0.45),
    )
    paths = jnp.array(
        [[origin, first, second, third, (0.3, -1400.0, 0.6)], [origin, (0.34, -1900.0, 0.40), *[third] * 3]]
    )
    weights = jnp.full(3, 1 / 3)

    def play(scale, points):
        rule = pareto.hypervolume_gain_weights(weights, capacity=4, scale=scale)

        def advance(state, point):
            state, used = rule.step(state, Signals(objectives=point))
            return state, (pareto.weight_gain(state), used)

        return jax.lax.scan(advance, rule.init(), points)

    scales = jnp.array([[1.0, 1.0, 1.0], [1.0, 2048.0, 1.0]])
    state, (gains, used) = jax.jit(jax.vmap(jax.vmap(play, (None, 0)), (0, None)))(scales, paths)
    raw, scaled = gains
    np.testing.assert_array_equal(used, np.broadcast_to(weights, used.shape))
    np.testing.assert_array_equal(gains[:, :, 0], 1.0)
    assert float(raw[0, 2]) == pytest.approx(2.0, abs=1e-12) and raw[0, 3:].tolist() == [0.5, 0.5]
    assert float(raw[1, 1]) == pytest.approx(0.51799914, abs=1e-8)
    assert 0.5 < float(scaled[0, 1]) < 0.6
    assert state.archive.mask[0, 0].tolist() == [True, False, False, False]


def test_statistics_rules_by_hand():
    """Two rewards, one twice as spread: SAW follows the coefficient of variation, MO-GRPO and GDPO undo the spread."""
    base = jnp.array([0.5, 0.5])
    rewards = jnp.array([[[0.0, 2.0], [0.0, 2.0]], [[1.0, 5.0], [1.0, 5.0]]])  # means 1, 3; spreads 1, 2

    def weigh(rule, **extra):
        return np.asarray(rule.step(rule.init(), Signals(rewards=rewards, **extra))[1])

    np.testing.assert_allclose(weigh(pareto.saw_weights(base)), [0.6, 0.4], rtol=1e-5)
    np.testing.assert_allclose(weigh(pareto.mo_grpo_weights(base)), [2 / 3, 1 / 3], rtol=1e-5)
    np.testing.assert_allclose(weigh(pareto.gdpo_weights(base)), [2 / 3, 1 / 3], rtol=1e-5)
    advantages = jnp.array([[-1.0, 1.0], [-1.0, 1.0]])  # covariances 1 and 2
    moved = weigh(pareto.ctwa_weights(base, 0.5, targets=jnp.zeros(2)), advantages=advantages)
    np.testing.assert_allclose(moved, jax.nn.softmax(jnp.array([-0.5, -1.0])), rtol=1e-5)
    constant = Signals(rewards=jnp.ones((2, 2, 2)))
    for make in (pareto.saw_weights, pareto.mo_grpo_weights, pareto.gdpo_weights):
        rule = make(base)
        np.testing.assert_allclose(rule.step(rule.init(), constant)[1], base)


def test_lagrangian_raises_the_weight_of_a_violated_constraint():
    rule = pareto.lagrangian_weights(jnp.array([1.0, 0.0]), jnp.array([-jnp.inf, 0.8]), 1.0)
    state, weights = rule.step(rule.init(), Signals(objectives=jnp.array([0.2, 0.3])))
    np.testing.assert_allclose(weights, np.array([1.0, 0.5]) / 1.5, rtol=1e-6)
    for _ in range(3):
        state, weights = rule.step(state, Signals(objectives=jnp.array([0.2, 1.0])))
    np.testing.assert_allclose(weights, [1.0, 0.0], atol=1e-6)


def test_schedule_and_floor():
    rule = pareto.scheduled_weights(lambda t: jnp.stack([1.0 + t, jnp.ones_like(1.0 * t)]))
    state, first = rule.step(rule.init(), Signals())
    _, second = rule.step(state, Signals())
    np.testing.assert_allclose([first, second], [[0.5, 0.5], [2 / 3, 1 / 3]], rtol=1e-6)
    floored = pareto.influence_weights(jnp.array([0.5, 0.5]), 1.0, floor=0.1)
    _, weights = floored.step(floored.init(), Signals(influence=jnp.array([100.0, 0.0])))
    np.testing.assert_allclose(weights, [0.9, 0.1], atol=1e-6)


def test_hypervolume_gradient_falls_back_when_covered():
    weights, origin = jnp.array([0.25, 0.75]), jnp.zeros(2)
    rule = pareto.hypervolume_gradient_weights(weights, origin, capacity=2)
    rule = rule._replace(step=jax.jit(rule.step))
    state, first = rule.step(rule.init(), Signals(objectives=jnp.array([2.0, 1.0])))
    np.testing.assert_allclose(first, [1 / 3, 2 / 3], rtol=1e-6)  # facets 1 and 2
    _, covered = rule.step(state, Signals(objectives=jnp.array([1.0, 0.5])))
    np.testing.assert_allclose(covered, weights)


def test_objectives_that_are_nan_show_in_gain_and_weights_and_not_in_the_archive():
    """Rules raise nothing: the trainer keeps the old weights where objectives are not known."""
    weights, nan = jnp.array([0.25, 0.75]), Signals(objectives=jnp.array([jnp.nan, 1.0]))
    here, there = Signals(objectives=jnp.array([1.0, 1.0])), Signals(objectives=jnp.array([2.0, 2.0]))
    gain = pareto.hypervolume_gain_weights(weights, capacity=2)
    state, _ = gain.step(gain.init(), nan)
    assert not bool(state.started)
    state, _ = gain.step(state, here)  # the reference
    state, _ = gain.step(state, nan)
    assert np.isnan(pareto.weight_gain(state)) and np.isnan(state.delta)
    state, _ = gain.step(state, there)
    assert float(state.delta) == 1.0 and state.archive.mask.tolist() == [True, False]
    slope = pareto.hypervolume_gradient_weights(weights, jnp.zeros(2), capacity=2)
    kept, _ = slope.step(slope.init(), here)
    state, used = slope.step(kept, nan)
    assert np.isnan(used).all()
    np.testing.assert_array_equal(state.points, kept.points)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([0.5, 0.6], "sum to one"), ([1.5, -0.5], "non-negative"), ([jnp.nan, 1.0], "non-negative"), ([[1.0]], "shape")],
)
def test_weights_off_the_simplex(weights, message):
    with pytest.raises(ValueError, match=message):
        pareto.fixed_weights(jnp.array(weights))


def test_missing_signal_is_named():
    rule = pareto.influence_weights(jnp.array([0.5, 0.5]), 0.1)
    with pytest.raises(ValueError, match=r"signals\.influence"):
        rule.step(rule.init(), Signals())
