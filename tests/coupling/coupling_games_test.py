"""Markov coding games: laws of a step, play and replay, baselines, exact enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.coupling import games
from jaxrl_suite.coupling.exact_games import enumerate_game
from jaxrl_suite.coupling.games import CodingGame, play, step_code, update_belief
from jaxrl_suite.coupling.grouped_beliefs import (
    GroupedBelief,
    action_weights,
    grouped_code,
    grouped_update,
    new_groups,
    resized,
)
from jaxrl_suite.envs.rate_grid import RateGridConfig, environment, next_state, rate_grid, soft_policy
from jaxrl_suite.mdp import soft_value_iteration
from tests.reference import coupling_game as oracle
from tests.reference.coupling_greedy import argmax_greedy

_GRID = RateGridConfig(layout=("S...", ".#..", "...T", "...G"), horizon=40)


def world(temperature):
    grid = rate_grid(_GRID)
    return CodingGame(
        soft_policy(grid, temperature),
        lambda key, state, action: next_state(key, grid, state, action),
        grid.entry_reward,
        grid.terminal,
        grid.start,
    )


@pytest.fixture(scope="module")
def game():
    return world(0.1)


@pytest.mark.parametrize("encoder", ["greedy", "uniform_fixed", "uniform_adaptive"])
def test_actions_follow_the_policy_whatever_is_said(encoder, x64):
    """Property 19: averaged over messages the action law is the policy, to 1e-12."""
    rng = np.random.default_rng(0)
    beliefs, laws = rng.dirichlet(np.ones(24), size=30), rng.dirichlet(np.ones(4), size=30)
    codes = jax.jit(jax.vmap(lambda b, p: step_code(b, p, jnp.asarray(1.7), encoder)))(beliefs, laws)
    np.testing.assert_allclose(np.einsum("bn,bna->ba", beliefs, codes.given), laws, atol=1e-12)
    np.testing.assert_allclose(codes.given.sum(-1), 1.0, atol=1e-9)
    for belief, labels in zip(beliefs, np.asarray(codes.labels)):
        mass = np.bincount(labels, weights=belief)
        mass = mass[mass > 0]
        assert -(mass * np.log2(mass)).sum() <= 1.7 + 1e-9


def test_belief_update():
    belief = update_belief(jnp.array([0.5, 0.25, 0.25]), jnp.array([0.5, 1.0, 0.0]))
    np.testing.assert_allclose(belief, [0.5, 0.5, 0.0])
    np.testing.assert_allclose(update_belief(belief, jnp.zeros(3)), belief)


@pytest.fixture(scope="module")
def played(game):
    messages = jax.random.randint(jax.random.key(1), (600,), 0, 16)
    options = {"num_messages": 16, "horizon": 40, "num_lanes": 64}
    runs = {rate: play(jax.random.key(2), game, messages, rate, **options) for rate in (0.0, 1.0, 4.0)}
    return game, messages, options, runs


def test_accuracy_and_reward(played):
    """Properties 19 and 20: 1/|M| at rate 0, more with the rate, and the reward does not move."""
    _, messages, _, runs = played
    accuracy = {rate: float((e.decoded == messages).mean()) for rate, e in runs.items()}
    assert accuracy[0.0] == pytest.approx(1 / 16, abs=0.04)
    assert accuracy[4.0] >= accuracy[1.0] - 0.02 > 0.5
    rewards = np.array([np.asarray(e.rewards) for e in runs.values()])
    spread = 3 * np.sqrt(2) * rewards.std() / np.sqrt(600)
    assert np.ptp(rewards.mean(1)) <= spread
    truth = np.asarray(runs[4.0].truth).mean(0)
    assert truth[0] > 1 / 16
    assert (np.diff(truth) >= -0.02).all()  # a submartingale on average


def test_receiver_replays_the_trajectory(played):
    """Property 20: from states and actions alone the receiver's beliefs are the sender's, bit for bit."""
    game, messages, options, runs = played
    sent = runs[1.0]
    read = play(jax.random.key(9), game, messages, 1.0, replay=sent.trajectories, **options)
    np.testing.assert_array_equal(read.truth, sent.truth)
    np.testing.assert_array_equal(read.decoded, sent.decoded)
    np.testing.assert_array_equal(read.rewards, sent.rewards)


def test_episodes_are_whole(played):
    """Every step leads to a successor; an episode ends in a terminal cell or at the horizon; few steps are masked."""
    game, _, _, runs = played
    states, actions, lengths = (np.asarray(x) for x in runs[1.0].trajectories)
    successors, terminal = np.asarray(rate_grid(_GRID).mdp.successors), np.asarray(game.terminal)
    for row, length in enumerate(lengths):
        assert terminal[states[row, length]] or length == 40
        for t in range(length):
            assert states[row, t + 1] in successors[states[row, t], actions[row, t]]
            assert not terminal[states[row, t]]
    assert 0 <= float(runs[1.0].masked) < 0.4


def test_actions_pass_a_chi_square_test(played):
    """Property 19: frequencies at the start cell against the policy, the message unknown."""
    from scipy import stats

    game, _, _, runs = played
    first = np.concatenate([np.asarray(e.trajectories.actions[:, 0]) for e in runs.values()])
    expected = np.asarray(game.policy[int(game.start)], float)
    expected = expected / expected.sum() * len(first)
    assert stats.chisquare(np.bincount(first, minlength=4), expected).pvalue > 1e-3


def test_agrees_with_the_numpy_game(played):
    """Reference: accuracy, reward and length of a NumPy simulation within its own error."""
    game, messages, _, runs = played
    grid = rate_grid(_GRID)
    policy = np.asarray(game.policy, float)
    policy /= policy.sum(1, keepdims=True)
    arrays = (policy, np.asarray(grid.mdp.successors), np.asarray(grid.mdp.transition, float))
    rest = (np.asarray(game.reward), np.asarray(game.terminal), int(game.start))
    rng = np.random.default_rng(4)
    found = [
        (*oracle.play_episode(rng, *arrays, *rest, int(m), 16, 1.0, 40, argmax_greedy), int(m)) for m in messages[:200]
    ]
    decoded, rewards, lengths, worst, truth = (np.array(x) for x in zip(*found))
    assert worst.max() < 1e-9
    ours = runs[1.0]
    assert (decoded == truth).mean() == pytest.approx(float((ours.decoded == messages).mean()), abs=0.12)
    assert rewards.mean() == pytest.approx(float(ours.rewards.mean()), abs=4 * rewards.std() / np.sqrt(200) + 0.02)
    assert lengths.mean() == pytest.approx(float(ours.trajectories.lengths.mean()), rel=0.2)


def test_every_message_of_512_arrives_on_the_paper_grid():
    """Property 20 at the paper's size: at 9 bits a step, all that a walk with entropy to spare says is understood.

    Two more episodes have messages that do not exist: inside jit their belief in the truth is a flag.
    """
    grid = rate_grid(RateGridConfig())
    policy = soft_policy(grid, float(np.exp(-4.0)))
    world = CodingGame(
        policy,
        lambda key, state, action: next_state(key, grid, state, action),
        grid.entry_reward,
        grid.terminal,
        grid.start,
    )
    messages = jax.random.randint(jax.random.key(1), (100,), 0, 512)
    options = {"num_messages": 512, "horizon": 60, "num_lanes": 100}
    flagged = jnp.concatenate([messages, jnp.array([512, -1])])
    episodes = jax.jit(lambda m: play(jax.random.key(2), world, m, 9.0, **options))(flagged)
    np.testing.assert_array_equal(np.isnan(episodes.truth), np.arange(102)[:, None] >= 100 + np.zeros(60))
    episodes = jax.tree.map(lambda x: x[:100] if x.ndim else x, episodes)
    states, _, lengths = (np.asarray(x) for x in episodes.trajectories)
    bits = -np.sum(np.asarray(policy) * np.log2(np.maximum(np.asarray(policy), 1e-30)), axis=1)
    said = np.where(np.arange(60) < lengths[:, None], bits[states[:, :-1]], 0).sum(1)
    ample = said > 9 + 6
    assert ample.mean() > 0.5
    np.testing.assert_array_equal(np.asarray(episodes.decoded)[ample], np.asarray(messages)[ample])
    assert (np.asarray(episodes.truth)[ample, -1] > 0.99).all()


def grouped(masses, sizes, rng):
    """Beliefs of groups in descending order, their names in any order, and the same as one mass a message."""
    order = np.argsort(-masses, axis=1, kind="stable")
    firsts, beliefs = np.zeros_like(sizes), np.zeros((len(masses), sizes[0].sum()))
    for row, (mass, size) in enumerate(zip(masses, sizes)):
        begin = 0
        for group in rng.permutation(len(mass)):
            firsts[row, group] = begin
            beliefs[row, begin : begin + size[group]] = mass[group]
            begin += size[group]
    parts = (np.take_along_axis(x, order, axis=1) for x in (masses, np.where(masses > 0, sizes, 0), firsts))
    return GroupedBelief(*(jnp.asarray(x.T) for x in parts)), beliefs


def ungrouped(belief, num_messages):
    """One mass a message, [B, N]; no message is in two groups."""
    found = np.zeros((belief.sizes.shape[1], num_messages))
    for lane, columns in enumerate(zip(*(np.asarray(x).T for x in belief))):
        for mass, size, first in zip(*columns):
            assert (found[lane, first : first + size] == 0).all()
            found[lane, first : first + size] = mass
    return found


@jax.jit
def grouped_step(belief, laws, rate, actions, messages):
    code = grouped_code(belief, laws.T, rate)
    return action_weights(code, belief, messages).T, grouped_update(belief, code, actions, 64)


def grouped_given(belief, beliefs, laws, rate):
    """Law of the action given every message [B, N, A] and the posteriors of every action [A, B, N]."""
    lanes, size = beliefs.shape
    weights, after = [], []
    for message in range(size):
        action = jnp.full((lanes,), message % laws.shape[1])
        found, posterior = grouped_step(belief, laws, rate, action, jnp.full((lanes,), message))
        weights.append(np.asarray(found))
        if message < laws.shape[1]:
            assert (np.diff(posterior.masses, axis=0) <= 1e-9).all()
            before, now = (np.sum(np.asarray(x.sizes) > 0, axis=0) for x in (belief, posterior))
            assert (now - before <= new_groups(laws.shape[1])).all()
            after.append(ungrouped(posterior, size))
    weights = np.stack(weights, axis=1)
    total = weights.sum(2, keepdims=True)  # 0 for a message that is impossible
    return weights / np.where(total > 0, total, 1), np.stack(after)


def test_grouped_game_is_the_plain_one(x64):
    """Groups of one message: the law of actions, the rate, and the posterior of the plain step, off near-ties."""
    rng = np.random.default_rng(0)
    masses = rng.dirichlet(np.full(24, 0.5), size=40)
    masses[:10, 5:] = 0
    masses /= masses.sum(1, keepdims=True)
    laws = rng.dirichlet(np.ones(4), size=40)
    belief, beliefs = grouped(masses, np.ones((40, 24), np.int32), rng)
    for rate in (0.0, 1.7, 9.0):
        codes = jax.jit(jax.vmap(lambda b, p, r=rate: step_code(b, p, jnp.asarray(r))))(beliefs, laws)
        given, after = grouped_given(belief, beliefs, laws, rate)
        present = beliefs > 0
        np.testing.assert_allclose(given[present], np.asarray(codes.given)[present], atol=1e-9)
        posterior = beliefs * np.moveaxis(np.asarray(codes.given), 2, 0)
        np.testing.assert_allclose(after, posterior / posterior.sum(2, keepdims=True), atol=1e-9)


def test_groups_are_coupled_greedily(x64):
    """Groups of several messages: the policy, Bayes' rule, and the information of the plain greedy coupling."""
    rng = np.random.default_rng(1)
    sizes = np.stack([rng.permutation([1, 1, 2, 3, 9, 16]) for _ in range(40)]).astype(np.int32)
    masses = rng.gamma(0.7, size=sizes.shape)
    masses[:6, 1:] = 0  # one group, as at the start
    masses /= (masses * sizes).sum(1, keepdims=True)
    laws = rng.dirichlet(np.ones(4), size=40)
    laws[3], laws[20:24] = 0.25, [0.5, 0.5, 0.0, 0.0]
    belief, beliefs = grouped(masses, sizes, rng)
    belief = resized(belief, 32)  # as many as there are messages, so that nothing can be lost

    def information(given):
        joint = beliefs[:, :, None] * given
        return np.where(
            joint > 0, joint * np.log2(np.where(joint > 0, given / np.where(laws > 0, laws, 1)[:, None], 1)), 0
        ).sum((1, 2))

    for rate in (1.0, 2.3, 9.0):
        codes = jax.jit(jax.vmap(lambda b, p, r=rate: step_code(b, p, jnp.asarray(r))))(beliefs, laws)
        given, after = grouped_given(belief, beliefs, laws, rate)
        given = np.where(beliefs[:, :, None] > 0, given, 0)
        np.testing.assert_allclose(np.einsum("bn,bna->ba", beliefs, given), laws, atol=1e-12)
        np.testing.assert_allclose(information(given), information(np.asarray(codes.given)), atol=1e-9)
        posterior = beliefs * np.moveaxis(given, 2, 0)
        total = posterior.sum(2, keepdims=True)
        np.testing.assert_allclose(
            after, np.where(total > 0, posterior / np.where(total > 0, total, 1), beliefs), atol=1e-9
        )


def test_long_lists_of_groups_play_the_same_game(monkeypatch):
    """A lane goes on bit for bit the same whether the lists are short or, as its neighbours need more, whole.

    Short lists of 12 rather than 32 send most steps through the whole ones.
    """
    game = world(0.02)
    messages = jax.random.randint(jax.random.key(1), (96,), 0, 300)
    options = {"num_messages": 300, "horizon": 40, "num_lanes": 96}
    kept = games._BELIEFS["greedy"]
    switches, played = [], {}

    def grown(belief, num_actions):
        number = kept.grown(belief, num_actions)
        jax.debug.callback(lambda n: switches.append(int(n)), number)
        return number

    for size in (32, 12):
        shorter = kept._replace(small=lambda num_messages, num_actions, size=size: size, grown=grown)
        monkeypatch.setitem(games._BELIEFS, "greedy", shorter)
        games._play.clear_cache()
        switches.clear()
        played[size] = jax.block_until_ready(play(jax.random.key(2), game, messages, 1.0, **options))
        jax.effects_barrier()
        assert (max(switches) > size) == (size == 12)
    games._play.clear_cache()
    jax.tree.map(np.testing.assert_array_equal, played[32]._replace(masked=0), played[12]._replace(masked=0))


def test_fixed_bins_saturate(played):
    """Property 21: two fixed bins of 16 messages tell at most 2/16; bins of the belief do better."""
    game, messages, options, _ = played
    fixed, adaptive = (
        jax.jit(lambda m, k=kind: play(jax.random.key(3), game, m, 1.0, encoder=f"uniform_{k}", **options))(messages)
        for kind in ("fixed", "adaptive")
    )
    assert float((fixed.decoded == messages).mean()) <= 2 / 16 + 0.05
    assert float((adaptive.decoded == messages).mean()) > 0.5


def test_code_grid_by_enumeration():
    """Exact accuracy of a small CodeGrid: success as of the base policy, accuracy by rate, information below 2 bits."""
    grid = rate_grid(RateGridConfig(layout=("S..", "...", "..G"), noise=0.0, horizon=4))
    successors = grid.mdp.successors[:, :, 0]
    policies = soft_policy(grid, 0.2, horizon=4)
    arguments = (policies, successors, grid.entry_reward, grid.terminal, grid.start)
    silent, full = (enumerate_game(*arguments, 4, rate) for rate in (0.0, 3.0))
    assert float(silent.accuracy) == pytest.approx(1 / 4, abs=1e-5)
    assert float(silent.information) == pytest.approx(0, abs=1e-4)
    assert float(full.success) == pytest.approx(float(silent.success), abs=1e-4)
    assert float(full.mean_reward) == pytest.approx(float(silent.mean_reward), abs=1e-4)
    assert 0.8 < float(full.accuracy) <= 1 + 1e-5
    assert 1.5 < float(full.information) <= 2 + 1e-5


def test_soft_policy(x64):
    """Property 22: greedy when cold, uniform when hot, residual below 1e-8, and reward falls with the temperature."""
    grid = rate_grid(_GRID)
    assert float(soft_policy(grid, 1e-3).max(1)[~np.asarray(grid.terminal)].min()) > 0.45
    temperatures = jnp.array([0.01, 0.05, 0.2, 0.8])
    policies = jax.jit(jax.vmap(lambda beta: soft_policy(grid, beta, horizon=8)))(
        temperatures
    )  # exact, for eight steps
    np.testing.assert_allclose(policies.sum(-1), 1, atol=1e-9)
    step = jnp.einsum("thsa,sak,sakz->thsz", policies, grid.mdp.transition, jax.nn.one_hot(grid.mdp.successors, 16))
    law, rewards = jnp.zeros((4, 16)).at[:, grid.start].set(1.0), []
    for time in range(8):
        moved = jnp.einsum("ts,tsz->tz", jnp.where(grid.terminal, 0, law), step[:, time])
        rewards.append(moved @ grid.entry_reward)
        law = moved + jnp.where(grid.terminal, law, 0)
    assert (np.diff(np.sum(rewards, axis=0)) < 0).all()
    plan = soft_value_iteration(grid.mdp, 0.1)
    assert bool(plan.converged) and float(plan.residual) < 1e-8
    # With an end of value zero a hot policy would rather stay; without one it is uniform.
    endless = grid.replace(terminal=jnp.zeros_like(grid.terminal))
    np.testing.assert_allclose(soft_policy(endless, 1e3), 0.25, atol=1e-2)
    np.testing.assert_allclose(soft_policy(grid, 0.3)[np.asarray(grid.terminal)], 0.25, atol=1e-6)


def test_grid_environment():
    """The grid behind the suite's interface: six values a step, moves, walls, goal, trap, and the horizon."""
    config = RateGridConfig(layout=("S.", "TG"), noise=0.0, horizon=3)
    world = environment(config)
    reset, step = jax.jit(world.reset), jax.jit(world.step)
    up, right, down = 0, 1, 2

    def walk(*actions):
        state, observation = reset(jax.random.key(0), world.params)
        assert int(observation) == 0
        for number, action in enumerate(actions):
            out = step(jax.random.key(number), state, action, world.params)
            state = out[0]
        return out

    for actions, cell, reward, terminated, truncated in (
        ((up,), 0, 0.0, False, False),
        ((right, down), 3, 1.0, True, False),
        ((down,), 2, -1.0, True, False),
        ((up, up, up), 0, 0.0, False, True),
        ((up, right, down), 3, 1.0, True, False),
    ):
        _, observation, gain, ended, cut, info = walk(*actions)
        assert (int(observation), gain.tolist(), bool(ended), bool(cut)) == (cell, [reward], terminated, truncated)
        assert int(info["final_observation"]) == cell


def test_layouts_need_a_start():
    with pytest.raises(ValueError, match="one start"):
        RateGridConfig(layout=("SS", ".G"))
