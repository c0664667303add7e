"""Coding over a learned world: with the true model the game is the library's, step by step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.together import learned_game
from experiments.together.coding_over_learned_world import CodingOverLearnedWorldConfig
from jaxrl_suite.coupling import games
from jaxrl_suite.envs.rate_grid import next_state
from jaxrl_suite.mdp import finite_policy_evaluation

MESSAGES, EPISODES, STEPS = 8, 12, 20


@functools.cache
def setting():
    world = learned_game.windy_walk()
    truth = learned_game.grid_of(world, world.kernel(), horizon=STEPS)
    plan = jax.jit(lambda model: learned_game.plan_in(world, model, 0.02))
    messages = jnp.arange(EPISODES, dtype=jnp.int32) % MESSAGES
    return world, truth, plan(world.kernel()), plan(world.kernel(world.nominal)), messages


@functools.partial(jax.jit, static_argnames="observed")
def played(sender, receiver=None, observed="actions"):
    _, truth, _, _, messages = setting()
    key = jax.random.key(3)
    return learned_game.play(key, truth, messages, sender, receiver, num_messages=MESSAGES, observed=observed)


def test_true_model_gives_the_librarys_play():
    """Learned = true: states, rewards and answers follow step by step from the library's code and Bayes' rule."""
    _, truth, exact, _, messages = setting()
    ours = played(exact)

    @jax.jit
    def step(time, beliefs, states, actions):
        given = jax.vmap(lambda belief, state: games.step_code(belief, exact.policy[state], None).given)(
            beliefs, states
        )
        after = jax.vmap(lambda belief, law, action: games.update_belief(belief, law[:, action]))(
            beliefs, given, actions
        )
        keys = jax.vmap(lambda e: jax.random.fold_in(jax.random.fold_in(jax.random.key(3), e), time))(episodes)
        moves = jax.vmap(lambda key: jax.random.split(key)[1])(keys)
        moved = jax.vmap(lambda key, state, action: next_state(key, truth, state, action))(moves, states, actions)
        return after, moved, given[episodes, messages, actions]

    episodes = jnp.arange(EPISODES, dtype=jnp.int32)
    beliefs, rewards = jnp.full((EPISODES, MESSAGES), 1 / MESSAGES), jnp.zeros(EPISODES)
    for time in range(STEPS):
        alive = time < ours.lengths
        after, moved, chance = step(jnp.int32(time), beliefs, ours.states[:, time], ours.actions[:, time])
        assert np.all(np.asarray(chance)[np.asarray(alive)] > 0)  # the sender does only what its message allows
        np.testing.assert_array_equal(np.where(alive, moved, ours.states[:, time]), ours.states[:, time + 1])
        beliefs = jnp.where(alive[:, None], after, beliefs)
        rewards = rewards + jnp.where(alive, truth.entry_reward[moved], 0)
    np.testing.assert_array_equal(ours.decoded, jnp.argmax(beliefs, axis=1))
    np.testing.assert_allclose(ours.rewards, rewards, atol=1e-6)


def test_a_receiver_with_the_same_model_answers_the_same():
    _, _, exact, nominal, _ = setting()
    alone, both, other = played(exact), played(exact, exact), played(exact, nominal)
    for one, two in zip(alone, both, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(alone.states, other.states)  # the receiver does not move the world
    assert np.any(alone.decoded != other.decoded)


def test_positions_tell_less_than_actions():
    """Where all moves are certain and differ, positions tell actions: then both receivers answer alike."""
    world, _, exact, _, messages = setting()
    certain = jnp.zeros_like(exact.model).at[..., 0].set(1.0)
    grid = learned_game.grid_of(world, certain, horizon=STEPS)
    # Keep only states whose four moves lead to four places, so that a place names its action.
    places = grid.mdp.successors[..., 0]
    inner = jnp.all(jnp.diff(jnp.sort(places, axis=1), axis=1) > 0, axis=1)
    policy = jnp.where(inner[:, None], exact.policy, jnp.eye(4, dtype=exact.policy.dtype)[0])
    plan = learned_game.Plan(policy, certain)
    answers = [
        learned_game.play(jax.random.key(5), grid, messages, plan, num_messages=MESSAGES, observed=observed).decoded
        for observed in ("actions", "states")
    ]
    np.testing.assert_array_equal(*answers)


def test_exact_reward_is_policy_evaluation():
    _, truth, exact, nominal, _ = setting()
    for plan in (exact, nominal):
        moves = jnp.broadcast_to(plan.policy, (STEPS, *plan.policy.shape))
        reward = jnp.broadcast_to(truth.mdp.reward, (STEPS, *truth.mdp.reward.shape))
        values = finite_policy_evaluation(truth.mdp.replace(reward=reward), moves)
        np.testing.assert_allclose(
            learned_game.exact_reward(truth, plan.policy), values[0, truth.start], rtol=1e-5, atol=1e-6
        )


def test_bad_input():
    world, truth, exact, _, messages = setting()
    with pytest.raises(ValueError, match=r"observed='thoughts'.*actions or states"):
        learned_game.play(jax.random.key(0), truth, messages, exact, num_messages=8, observed="thoughts")
    with pytest.raises(ValueError, match="model="):
        learned_game.grid_of(world, jnp.ones((2, 2, 2)))
    for field, value in (("episodes", (4, 4)), ("explorers", ("nobody",)), ("num_runs", 1), ("temperature", 0.0)):
        with pytest.raises(ValueError, match=f"{field}="):
            CodingOverLearnedWorldConfig(**{field: value})
