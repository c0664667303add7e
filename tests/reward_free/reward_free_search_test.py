import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_suite import reward_free as rf
from jaxrl_suite.envs import mixtures
from jaxrl_suite.mdp import LinearMixtureMDP, integrated_features, simulate
from jaxrl_suite.reward_free import rewards as reward_module
from jaxrl_suite.reward_free import search
from jaxrl_suite.reward_free.certificate import optimistic_total
from tests.reference import mdp_planning

sweep = jax.jit(rf.uncertainty_value)


def small_world():
    """Four states, two actions, three dense kernels."""
    kernels = np.random.default_rng(3).dirichlet(np.full(4, 0.5), (3, 4, 2))
    return mixtures.from_kernels(kernels, np.array([0.2, 0.3, 0.5]))


def covariances(key, dimension, scale=20.0):
    spread = jax.random.normal(key, (2, dimension, dimension))
    return jnp.linalg.inv(scale * (jnp.eye(dimension) + spread @ jnp.swapaxes(spread, 1, 2)))


def every_path(mdp, horizon):
    """All (state, action) paths that the features allow, by recursion."""
    mask, successors = np.array(mdp.mask), np.array(mdp.successors)

    def grow(state, steps):
        if steps == 0:
            yield ()
            return
        for action in range(mdp.num_actions):
            for following in successors[state, action][mask[state, action]]:
                for rest in grow(int(following), steps - 1):
                    yield ((state, action), *rest)

    return list(grow(int(mdp.start), horizon))


def test_longest_path_equals_brute_force(x64, key):
    """Property 6: the dynamic program equals the maximum over all paths; after scaling no path exceeds 1."""
    mdp = mixtures.lock(4, 2, 2)
    rewards = jax.random.uniform(key, (4, 4, 2))
    paths = every_path(mdp, 4)

    def best(values):
        return max(sum(values[h, s, a] for h, (s, a) in enumerate(path)) for path in paths)

    found = rf.longest_path(mdp, rewards)
    np.testing.assert_allclose(found.total, best(np.array(rewards)), atol=1e-12)
    along = sum(rewards[h, s, a] for h, (s, a) in enumerate(zip(found.states, found.actions, strict=False)))
    np.testing.assert_allclose(along, found.total, atol=1e-12)
    np.testing.assert_allclose(best(np.array(rf.normalise_rewards(mdp, rewards))), 1.0, atol=1e-12)
    np.testing.assert_allclose(rf.normalise_rewards(mdp, rewards / 100), rewards / 100)


def test_rewards_outside_the_class_are_refused_by_name():
    mdp = mixtures.lock(3, 2, 2)
    rewards = jnp.zeros((2, 3, 3, 2)).at[1, :, 0, 0].set(0.4)
    rf.check_rewards(mdp, rewards[:1])
    with pytest.raises(ValueError, match=r"rewards\[1\]: the path .*\(0, 0\), \(0, 0\), \(0, 0\) collects 1\.2"):
        rf.check_rewards(mdp, rewards)
    with pytest.raises(ValueError, match=r"\(0, 1, 2, 1\)\]=-0\.5"):
        rf.check_rewards(mdp, jnp.zeros((1, 3, 3, 2)).at[0, 1, 2, 1].set(-0.5))
    with pytest.raises(ValueError, match="shape"):
        rf.check_rewards(mdp, jnp.zeros((3, 2)))


def test_rewards_outside_the_class_are_flagged_exactly(x64):
    """Inside jit: flagged if and only if some path from the start collects more than 1 or meets what is no reward."""
    mdp, generator = mixtures.lock(4, 2, 2), np.random.default_rng(0)
    paths = every_path(mdp, 4)
    rewards = generator.uniform(size=(60, 4, 4, 2)) ** 3
    rewards *= generator.uniform(0.9, 1.1, (60, 1, 1, 1)) / np.array(
        [max(sum(r[h, s, a] for h, (s, a) in enumerate(path)) for path in paths) for r in rewards]
    ).reshape(-1, 1, 1, 1)
    for index, bad in enumerate([-1e-3, np.nan, np.inf, -np.inf] * 10):  # one entry, reachable or not
        rewards[index].reshape(-1)[generator.integers(32)] = bad

    def is_outside(r):
        along = np.array([[r[h, s, a] for h, (s, a) in enumerate(path)] for path in paths])
        return bool(np.any(~(along >= 0)) or np.any(along.sum(1) > 1 + 1e-9))

    expected = [is_outside(r) for r in rewards]
    assert jax.jit(lambda r: rf.rewards_outside(mdp, r))(jnp.asarray(rewards)).tolist() == expected
    # Broken entries that no path meets are harmless, and both answers occur among sound and broken rewards.
    assert {True, False} == set(expected[:40]) == set(expected[40:])


def test_every_reward_of_the_bank_is_in_the_class(key):
    mdp = mixtures.region_chain(5, 2)
    bank = rf.reward_bank(mdp, key, 6)
    assert bank.shape == (60, 6, 5, 2)
    rf.check_rewards(mdp, bank)
    totals = jax.jit(jax.vmap(lambda r: reward_module.longest_totals(mdp, r)[0, mdp.start]))(bank)
    assert float(jnp.min(totals[10:])) > 0.999


def test_sweep_without_widths_is_policy_evaluation(x64, key):
    """Property 7: with zero widths and the true theta V is the exact value and the uncertainty is 0."""
    mdp = mixtures.lock(5, 2, 2)
    rewards = rf.normalise_rewards(mdp, jax.random.uniform(key, (6, 5, 2)))
    policy = jax.random.randint(key, (6, 5), 0, 2)
    zero = jnp.zeros((mdp.dimension, mdp.dimension))
    found = sweep(mdp, mdp.theta, rewards, zero, zero, jnp.array(1.0), policy)
    kernel = np.zeros((5, 2, 5))
    for s, a, j in itertools.product(range(5), range(2), range(2)):
        kernel[s, a, mdp.successors[s, a, j]] += mdp.kernel()[s, a, j]
    expected = mdp_planning.finite_values(kernel, np.array(rewards), np.array(policy))
    np.testing.assert_allclose(found.values, expected, atol=1e-12)
    assert float(jnp.max(jnp.abs(found.uncertainty))) < 1e-12


def counterexample():
    """Five states 0, A, B, T, U and one action: widths are not monotone in the function."""
    e = np.eye(4)
    features = np.zeros((5, 1, 2, 4))
    successors = np.array([[[1, 2]], [[3, 4]], [[3, 4]], [[3, 4]], [[4, 3]]])
    features[0, 0] = e[1], e[0] - e[1]
    features[1, 0] = e[3], e[0] - e[3]
    features[2, 0] = e[2], e[0] - e[2]
    features[3, 0, 0] = features[4, 0, 0] = e[0]
    theta = jnp.array([1.0, 0.5, 0.5, 0.5])
    scalars = (jnp.int32(0), jnp.array(1.0), jnp.array(1.0))
    return LinearMixtureMDP(jnp.array(features), jnp.array(successors, jnp.int32), theta, theta, *scalars)


def test_uncertainty_can_grow_with_data(x64):
    """Property 7: the counterexample to "the uncertainty value never increases", 0.413 -> 0.605."""
    mdp = counterexample()
    rewards = jnp.zeros((3, 5, 1)).at[2, 3].set(1.0)
    hat = jnp.diag(1 / jnp.array([1e4, 4, 1e4, 1e4]))
    values = [
        sweep(mdp, mdp.theta, rewards, jnp.diag(1 / jnp.array(tilde)), hat, jnp.array(1.0)).total
        for tilde in ([1e4, 1e4, 6.25, 6.25], [1e4, 1e4, 1e6, 6.25])
    ]
    np.testing.assert_allclose(values, [0.413, 0.605], atol=5e-4)


def test_hand_written_derivative_equals_autodiff(x64, key):
    """Where values are cut at 1 and where they are not, with both ways to add up what flows into a state."""
    mdp = small_world()
    keys = jax.random.split(key, 2)
    logits = jax.random.normal(keys[1], (5, 4, 2)) - 1.0
    spec = search.SearchSpec(4, 2, 0, leak=0.0)  # autodiff of a clip does not leak

    @jax.jit
    def autodiff(logits, tilde, hat):
        def score(logits):
            rewards = rf.normalise_rewards(mdp, jax.nn.sigmoid(logits))
            return rf.uncertainty_value(mdp, mdp.nominal, rewards, tilde, hat, jnp.array(0.5)).score

        return jax.value_and_grad(score)(logits)

    @functools.partial(jax.jit, static_argnums=3)
    def by_hand(logits, tilde, hat, dense):
        lanes = search.Lanes(
            jnp.transpose(mdp.features, (2, 3, 0, 1)).reshape(-1, 3, 8),
            jnp.transpose(mdp.successors, (2, 0, 1)).reshape(-1, 8),
            jnp.transpose(mdp.mask, (2, 0, 1)).reshape(-1, 8),
            mdp.start,
            mdp.nominal[:, None],
            0.25 * tilde[..., None],
            1.0 * hat[..., None],
        )
        scatter = search._scatter_matrix(spec, lanes) if dense else None
        return search.score_and_gradient(spec, lanes, logits.reshape(5, 8, 1), scatter)

    for scale in (20.0, 0.1):
        pair = covariances(keys[0], 3, scale)
        expected, slope = autodiff(logits, *pair)
        for dense in (False, True):
            value, gradient = by_hand(logits, *pair, dense)
            np.testing.assert_allclose(value[0], expected, rtol=1e-12)
            np.testing.assert_allclose(gradient[..., 0].reshape(5, 4, 2), slope, atol=1e-12)
        assert scale == 0.1 or float(jnp.max(jnp.abs(slope))) > 1e-4


def test_lanes_of_a_batch_equal_single_searches(x64, key):
    """Seeds and radii share lanes under vmap, nested too; worlds of their own do not; all give what single searches
    give."""
    worlds = [mixtures.lock(4, 2, 2, stall=stall) for stall in ((0.1, 0.4), (0.3, 0.6))]
    pairs = jax.vmap(lambda k: covariances(k, 3))(jax.random.split(key, 2))
    starts = jax.random.normal(key, (2, 2, 5, 4, 2))
    radii = jnp.array([0.3, 0.9])

    def one(world, pair, start, radius):
        return rf.search_rewards(world, world.nominal, *pair, radius, start, jnp.array(0.5), num_steps=3)

    single = jax.jit(one)
    inner = jax.vmap(one, in_axes=(None, 0, 0, None))
    both = jax.jit(jax.vmap(inner, in_axes=(None, None, None, 0)))(worlds[0], pairs, starts, radii)
    for i, j in itertools.product(range(2), range(2)):
        expected = single(worlds[0], pairs[j], starts[j], radii[i])
        np.testing.assert_allclose(both[0][i, j], expected[0], atol=1e-9)
        np.testing.assert_allclose(both[1][i, j], expected[1], atol=1e-9)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *worlds)
    apart = jax.jit(jax.vmap(one, in_axes=(0, None, None, None)))(stacked, pairs[0], starts[0], radii[0])[1]
    np.testing.assert_allclose(apart, [single(world, pairs[0], starts[0], radii[0])[1] for world in worlds], atol=1e-9)


@pytest.mark.parametrize("states", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_search_comes_close_to_brute_force(x64, key, states):
    """Property 8: at least 0.97 of the maximum over all 64 (512) policies x reward ascent, on 10 random worlds."""
    horizon, actions = 3, 2
    policies = jnp.array(list(itertools.product(range(actions), repeat=horizon * states))).reshape(-1, horizon, states)

    def fixed_policy_best(mdp, tilde, hat, policy, logits):
        def score(logits):
            rewards = rf.normalise_rewards(mdp, jax.nn.sigmoid(logits))
            return rf.uncertainty_value(mdp, mdp.nominal, rewards, tilde, hat, jnp.array(0.5), policy).score

        optimiser = optax.adam(0.3)

        def step(carry, _):
            logits, state = carry
            value, gradient = jax.value_and_grad(score)(logits)
            updates, state = optimiser.update(-gradient, state)
            return (optax.apply_updates(logits, updates), state), value

        _, values = jax.lax.scan(step, (logits, optimiser.init(logits)), None, length=150)
        return jnp.max(values)

    def ratio(key):
        keys = jax.random.split(key, 5)
        kernels = jax.random.dirichlet(keys[0], jnp.full(states, 0.5), (3, states, actions))
        features = jnp.moveaxis(kernels, 0, -1)
        successors = jnp.broadcast_to(jnp.arange(states, dtype=jnp.int32), features.shape[:3])
        theta = jnp.full(3, 1 / 3)
        mdp = LinearMixtureMDP(features, successors, theta, theta, jnp.int32(0), jnp.array(1.0), jnp.array(1.0))
        tilde, hat = covariances(keys[1], 3, 2.0)
        starts = jax.random.normal(keys[2], (4, horizon, states, actions))
        found = rf.search_rewards(mdp, theta, tilde, hat, jnp.array(0.5), starts, jnp.array(0.5), num_steps=200)[1]
        cold = jax.random.normal(keys[3], (horizon, states, actions))
        best = jax.vmap(lambda p: fixed_policy_best(mdp, tilde, hat, p, cold))(policies)
        return found / jnp.max(best)

    ratios = np.array(jax.jit(lambda ks: jax.lax.map(ratio, ks))(jax.random.split(key, 10)))
    assert ratios.min() >= 0.97, ratios


@functools.cache
def good_events():
    """Fifty draws of parameters on the edge of their sets, with what properties 7, 8 and 18 compare; compiled once."""
    mdp, horizon, radius = mixtures.lock(5, 2, 2), 8, 0.15

    def total_width(tilde, policy, values):  # U_h = min(1, u_h + P U_{h+1}) under the true kernel
        def back(total, step):
            row, ahead = step
            u = jnp.minimum(1.0, radius * rf.width(tilde, integrated_features(mdp, ahead)))
            step = u + jnp.sum(mdp.kernel() * total[mdp.successors], axis=-1)
            return jnp.minimum(1.0, jnp.take_along_axis(step, row[:, None], axis=1)[:, 0]), None

        return jax.lax.scan(back, jnp.zeros(5), (policy, values[1:]), reverse=True)[0][mdp.start]

    def surplus(swept, rewards, tilde, hat):  # what the two inequalities of property 18 leave, [H, S] each
        def at(step):
            row, value, width, ahead_value, ahead_width, reward = step
            x, y = integrated_features(mdp, ahead_value), integrated_features(mdp, ahead_width)

            def pick(array):
                return jnp.take_along_axis(array, row[:, None], axis=1)[:, 0]

            u = jnp.minimum(1.0, radius * rf.width(tilde, x))
            by_width = width - pick(u) - pick(y @ mdp.theta)
            by_value = value - pick(reward) - pick(x @ mdp.theta)
            return (
                4 * jnp.minimum(1.0, radius * pick(rf.width(hat, y))) - by_width,
                2 * jnp.minimum(1.0, radius * pick(rf.width(tilde, x))) - by_value,
            )

        families = swept.values, swept.uncertainty
        now, ahead = [f[:-1] for f in families], [f[1:] for f in families]
        return jax.vmap(at)((swept.policy, *now, *ahead, rewards))

    def one(key):
        keys = jax.random.split(key, 4)
        tilde, hat = covariances(keys[0], 3, 30.0)
        noise, metric = jax.random.normal(keys[1], (3,)), jnp.linalg.inv(tilde) + jnp.linalg.inv(hat)
        theta = mdp.theta + radius * noise / jnp.sqrt(noise @ metric @ noise)
        rewards = rf.normalise_rewards(mdp, jax.random.uniform(keys[2], (horizon, 5, 2)) ** 4)
        policy = jax.random.randint(keys[3], (horizon, 5), 0, 2)
        greedy, drawn = (
            rf.uncertainty_value(mdp, theta, rewards, tilde, hat, jnp.array(radius), p) for p in (None, policy)
        )
        widest = radius * rf.width_bound(mdp, tilde, centred=False)
        return {
            "uncertainty": greedy.uncertainty,
            "total": greedy.total,
            "expected": total_width(tilde, greedy.policy, greedy.values),
            "drawn_expected": total_width(tilde, policy, drawn.values),
            "decoupled": optimistic_total(mdp, horizon, theta, widest, 2.0 * radius, hat)[0, mdp.start],
            "surplus": surplus(greedy, rewards, tilde, hat),
        }

    return jax.tree.map(np.array, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 50)))


def test_uncertainty_covers_the_expected_widths_on_the_good_event(x64):
    """Property 7: for theta within radius of the truth, W_1 >= U_1 with U_h = min(1, u_h + P U_{h+1}); W in [0, 1]."""
    found = good_events()
    assert np.all(found["total"] >= found["expected"] - 1e-12)
    assert found["uncertainty"].min() >= 0.0 and found["uncertainty"].max() <= 1.0
    assert found["expected"].max() > 0.03 and found["total"].min() < 1.0  # neither side is trivial


def test_decoupled_bound_covers_every_policy_and_reward(x64):
    """Property 8, decoupled half: on the good event Vbar_1 >= U_1 for random (policy, reward), U as in property 7."""
    found = good_events()
    assert np.all(found["decoupled"] >= found["drawn_expected"] - 1e-12)
    assert found["drawn_expected"].max() > 0.03 and found["decoupled"].min() < 1.0


def test_surplus_inequality(x64):
    """Property 18: on the good event W_h - u_h - P W_{h+1} <= 4 min(1, beta |phi|), with V, the reward and 2 too."""
    for left in good_events()["surplus"]:
        assert left.min() >= -1e-12


def test_uncertainty_predicts_what_play_meets(x64, key):
    """The pseudo value of the true model is the mean return of simulated play (four standard errors)."""
    mdp = mixtures.lock(5, 2, 2)  # shapes of the test of policy evaluation above
    rewards = rf.normalise_rewards(mdp, jax.random.uniform(key, (6, 5, 2)))
    zero = jnp.zeros((3, 3))
    found = sweep(mdp, mdp.theta, rewards, zero, zero, jnp.array(0.0), jnp.ones((6, 5), jnp.int32))
    states, actions = jax.jit(jax.vmap(lambda k: simulate(mdp, k, found.policy)))(jax.random.split(key, 4000))
    returns = np.array(rewards)[np.arange(6), np.array(states)[:, :-1], np.array(actions)].sum(1)
    assert abs(returns.mean() - float(found.values[0, 0])) < 4 * returns.std() / 4000**0.5
