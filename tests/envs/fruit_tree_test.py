import warnings

import jax
import jax.numpy as jnp
import mo_gymnasium
import numpy as np
import pytest

from jaxrl_suite.envs.fruit_tree import fruit_tree, published_fruits
from jaxrl_suite.pareto import non_dominated


def test_every_leaf_equals_mo_gymnasium():
    """Property 35: all 32 ways down the smallest tree, in lockstep, and the stored front."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        original = mo_gymnasium.make("fruit-tree-v0", depth=5).unwrapped
    fruits = published_fruits(5)
    env = fruit_tree(fruits)
    step, key = jax.jit(env.step), jax.random.key(0)
    for leaf in range(32):
        state, observation = env.reset(key, env.params)
        np.testing.assert_array_equal(observation, original.reset(seed=0)[0])
        for bit in range(4, -1, -1):
            action = leaf >> bit & 1
            result = step(key, state, jnp.asarray(action), env.params)
            expected, reward, terminated, _, _ = original.step(action)
            np.testing.assert_array_equal(result.observation, expected)
            np.testing.assert_allclose(result.reward, reward, rtol=1e-6)
            assert bool(result.terminated) == terminated
            state = result.state
        assert terminated
        np.testing.assert_allclose(result.reward, fruits[leaf], rtol=1e-6)
    np.testing.assert_allclose(np.array(original.pareto_front(gamma=1.0)), fruits)
    original.close()


def test_all_fruits_are_pareto_optimal(x64):
    assert bool(jnp.all(non_dominated(jnp.asarray(published_fruits(6)))))


def test_leaves_must_fill_the_tree():
    with pytest.raises(ValueError, match=r"fruits=\(3, 2\)"):
        fruit_tree(np.ones((3, 2)))
