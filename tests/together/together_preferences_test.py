"""One exploration, every preference: the front's laws, and learning that is what it says it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.together import preferences
from experiments.together.every_preference import EveryPreferenceConfig
from jaxrl_suite import pareto
from jaxrl_suite.reward_free import ExplorerConfig, HParams, certificate, explore
from jaxrl_suite.reward_free.planning import plan_model

HORIZON = 4


@functools.cache
def world():
    return preferences.windy_rooms(HORIZON)


def test_corners_are_the_points_that_nothing_beats():
    points = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [2.0, 0.5]])
    np.testing.assert_array_equal(preferences.corners(points), [[1.0, 2.0], [2.0, 1.0]])
    many = np.random.default_rng(0).uniform(size=(200, 2))
    kept = many[np.asarray(pareto.non_dominated(jnp.asarray(many)))]
    np.testing.assert_allclose(preferences.corners(many), kept[np.argsort(kept[:, 0])].round(9))
    assert preferences.padded(many).shape == (512, 2)


def test_objectives_are_rewards_of_the_class():
    preferences.check_world(world())
    with pytest.raises(ValueError, match="objectives"):
        preferences.check_world(world()._replace(objectives=2 * world().objectives))


def test_front_of_the_true_world_is_best_for_every_weighting(x64):
    """In the true model the plans claim what they reach, and no other policy has a larger weighted value."""
    here, weights = preferences.windy_rooms(HORIZON), preferences.weightings(7)
    kernel = here.mdp.kernel()
    front = jax.jit(lambda model: preferences.plan_all(here, model, weights))(kernel)
    np.testing.assert_allclose(front.true, front.claimed, atol=1e-12)
    rewards = preferences.mixed_reward(here, jnp.asarray(weights))
    best = plan_model(kernel, here.mdp.successors, here.mdp.start, rewards).values
    np.testing.assert_allclose(jnp.sum(weights * front.true, axis=1), best, atol=1e-12)
    nominal = jax.jit(lambda model: preferences.plan_all(here, model, weights))(here.mdp.kernel(here.mdp.nominal))
    assert np.all(np.asarray(weights @ front.true.T).max(1) >= np.asarray(weights @ nominal.true.T).max(1) - 1e-12)


def test_certified_band_holds_the_values(x64):
    """Values in the model of a long exploration are within half the pooled bound of those in truth."""
    here = preferences.windy_rooms(HORIZON)
    config = ExplorerConfig(
        algorithm="ucrl_rfe", horizon=HORIZON, num_episodes=1500, radius="subgaussian", output="final"
    )
    hparams = HParams(delta=0.05, ridge_scale=0.01)

    @jax.jit
    def prove(key):
        found = explore(key, here.mdp, config, hparams)
        return certificate(here.mdp, config, hparams, found), preferences.plan_all(
            here, found.model, preferences.weightings(5)
        )

    sealed, front = prove(jax.random.key(0))
    half = float(sealed.pooled) / 2
    assert np.abs(front.claimed - front.true).max() <= half


def test_constant_weights_are_an_agent_told_its_reward(x64):
    """A rule that never moves plays, episode by episode, what the library's explorer for that reward plays."""
    here = preferences.windy_rooms(HORIZON)
    config = ExplorerConfig(algorithm="hf_ucrl_vtr_plus", horizon=HORIZON, num_episodes=3, output="final")
    weight, key = jnp.array([0.25, 0.75]), jax.random.key(1)
    rule = pareto.fixed_weights(weight)
    learn = jax.jit(lambda k: preferences.learn_dynamic(k, here, config, rule, weight, 3))
    values, model, weights = learn(key)
    found = jax.jit(lambda k: explore(k, here.mdp, config, reward=preferences.mixed_reward(here, weight)))(key)
    np.testing.assert_allclose(model, found.model, atol=1e-12)
    last = preferences.values_of(here, found.policy[None])
    np.testing.assert_allclose(values[-1], last[0], atol=1e-12)
    np.testing.assert_array_equal(weights, np.tile(weight, (3, 1)))


def test_agents_of_several_lengths_share_a_program(x64):
    """One that stops early is the start of one that goes on, and its model is that of an agent of this length."""
    here = preferences.windy_rooms(HORIZON)
    config = ExplorerConfig(algorithm="hf_ucrl_vtr_plus", horizon=HORIZON, num_episodes=3, output="final")
    first, key = jnp.array([0.0, 1.0]), jax.random.key(2)

    @functools.partial(jax.jit, static_argnums=1)
    def learn(num_played, num_episodes, last):
        rule = preferences.sweep_rule(num_played, first, last)
        return preferences.learn_dynamic(key, here, config, rule, first, num_episodes, num_played=num_played)

    values, model, weights = learn(2, 3, first[::-1])
    alone, own_model, _ = learn(2, 2, first[::-1])
    np.testing.assert_allclose(values[:2], alone, atol=1e-12)
    np.testing.assert_allclose(model, own_model, atol=1e-12)
    np.testing.assert_allclose(weights[:2], [[0, 1], [1, 0]], atol=1e-12)
    np.testing.assert_array_equal(learn(3, 3, first)[2], np.tile(first, (3, 1)))  # begins where it ends: fixed weights


def test_bad_input():
    for field, value, words in (
        ("episodes", (8, 4), "must increase"),
        ("episodes", (6, 12), "num_fixed"),
        ("explorers", ("nobody",), "ucrl_rfe"),
        ("rules", (), "schedule"),
        ("delta", 1.0, "0, 1"),
    ):
        with pytest.raises(ValueError, match=f"{field}=.*{words}"):
            EveryPreferenceConfig(**{field: value})
    with pytest.raises(ValueError, match="num_weightings"):
        preferences.weightings(1)
    with pytest.raises(ValueError, match="bend"):
        preferences.windy_rooms(4, bend=2.0)
