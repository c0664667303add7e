import warnings

import jax
import jax.numpy as jnp
import mo_gymnasium
import numpy as np
import pytest

from jaxrl_suite.envs.deep_sea_treasure import deep_sea_treasure, known_front, sea_map

NAMES = {
    "convex": "deep-sea-treasure-v0",
    "concave": "deep-sea-treasure-concave-v0",
    "mirrored": "deep-sea-treasure-mirrored-v0",
}


@pytest.fixture(params=NAMES)
def pair(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mo-gymnasium warns about the precision of its own reward space
        original = mo_gymnasium.make(NAMES[request.param])
        yield request.param, original
        original.close()


def test_steps_and_front_equal_mo_gymnasium(pair):
    """Property 35: transitions, rewards, ends and the stored front, along random walks in lockstep."""
    layout, original = pair
    env = deep_sea_treasure(layout, max_steps=60)
    step = jax.jit(env.step)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    np.testing.assert_array_equal(sea_map(layout), original.unwrapped.sea_map)
    ends = 0
    for _ in range(8):
        state, observation = env.reset(key, env.params)
        np.testing.assert_array_equal(observation, original.reset(seed=0)[0])
        for _ in range(60):
            action = rng.choice(4, p=[0.1, 0.35, 0.15, 0.4])
            result = step(key, state, jnp.asarray(action), env.params)
            expected, reward, terminated, _, _ = original.unwrapped.step(action)
            np.testing.assert_array_equal(result.observation, expected)
            np.testing.assert_allclose(result.reward, reward, rtol=1e-7)
            assert bool(result.terminated) == terminated
            state = result.state
            if terminated:
                ends += 1
                break
    assert ends > 0
    assert bool(result.truncated) == (int(state.time) >= 60)
    for discount in (1.0, 0.99):
        stored = np.array(original.unwrapped.pareto_front(gamma=discount))
        np.testing.assert_allclose(known_front(layout, discount=discount), stored, rtol=1e-12)


def test_time_limit_and_batch():
    """A walk into the wall runs into the time limit; a batch of maps of one size is a vmap over parameters."""
    env = deep_sea_treasure("concave", max_steps=3)
    key = jax.random.key(0)

    def walk(params):
        state, _ = env.reset(key, params)

        def move(state, _):
            result = env.step(key, state, jnp.asarray(0), params)
            return result.state, (result.truncated, result.observation)

        return jax.lax.scan(move, state, length=4)[1]

    other = deep_sea_treasure("convex", max_steps=2).params
    truncated, observation = jax.vmap(walk)(jax.tree.map(lambda *x: jnp.stack(x), env.params, other))
    assert truncated.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert not np.any(observation)


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout='deep': unknown map"):
        deep_sea_treasure("deep")
