import warnings

import jax
import jax.numpy as jnp
import mo_gymnasium
import numpy as np
import pytest

from jaxrl_suite.envs.resource_gathering import known_front, resource_gathering
from jaxrl_suite.pareto import hypervolume


class Dice:
    """Stands in for the original's random generator: always the same number."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.fixture
def original():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = mo_gymnasium.make("resource-gathering-v0")
        yield env
        env.close()


@pytest.mark.parametrize(("kill", "dice"), [(0.0, 0.5), (1.0, 0.05)])
def test_steps_equal_mo_gymnasium(kill, dice, original):
    """Property 35: in lockstep, with enemies that never and with enemies that always kill."""
    env = resource_gathering(kill_probability=kill)
    step, key, rng = jax.jit(env.step), jax.random.key(0), np.random.default_rng(0)
    killed = carried = 0
    for _ in range(40):
        state, observation = env.reset(key, env.params)
        np.testing.assert_array_equal(observation, original.reset(seed=0)[0])
        original.unwrapped.np_random = Dice(dice)
        for _ in range(60):
            action = rng.choice(4, p=[0.35, 0.2, 0.15, 0.3])
            result = step(key, state, jnp.asarray(action), env.params)
            expected, reward, terminated, _, _ = original.unwrapped.step(action)
            np.testing.assert_array_equal(result.observation, expected)
            np.testing.assert_array_equal(result.reward, reward)
            assert bool(result.terminated) == terminated
            state = result.state
            killed, carried = killed + int(reward[0] < 0), carried + int(reward[1:].sum() > 0)
            if terminated:
                break
    assert killed > 0 if kill else carried > 0


def test_front_and_its_hypervolume(original, x64):
    """Property 4: the stored front and its hypervolumes."""
    for discount, value in ((1.0, 3.729), (0.99, 3.3451)):
        front = known_front(discount)
        stored = np.array(original.unwrapped.pareto_front(gamma=discount))
        np.testing.assert_allclose(front[np.lexsort(front.T)], stored[np.lexsort(stored.T)], rtol=1e-12)
        assert float(hypervolume(front, -np.ones(3))) == pytest.approx(value, abs=5e-5)


def test_enemies_kill_with_their_probability(key):
    env = resource_gathering()
    state, _ = env.reset(key, env.params)
    state = state._replace(position=jnp.array([2, 2], jnp.int32))
    up = jax.vmap(lambda k: env.step(k, state, jnp.asarray(0), env.params))(jax.random.split(key, 5000))
    assert float(jnp.mean(up.terminated)) == pytest.approx(0.1, abs=0.015)
