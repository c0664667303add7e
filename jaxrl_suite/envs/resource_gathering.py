"""Resource gathering: fetch gold and a diamond past two enemies and come home. Three objectives, stochastic.

Same transitions and rewards as mo-gymnasium's ``resource-gathering-v0``. References: Barrett and Narayanan (2008),
"Learning all optimal policies with multiple criteria".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.types import Array, Environment, PRNGKey, TimeStep

SIZE = 5
HOME, GOLD, DIAMOND, ENEMIES = (4, 2), (0, 2), (1, 4), ((1, 2), (0, 3))


class GatheringParams(NamedTuple):
    """Parameters of the environment.

    Attributes:
        kill_probability: [], chance that an enemy kills whoever steps on its cell.
        max_steps: int32 [], time limit; mo-gymnasium registers 100.
    """

    kill_probability: Array
    max_steps: Array


class GatheringState(NamedTuple):
    """State of an episode.

    Attributes:
        position: int32 [2], row and column.
        has_gold: bool [].
        has_diamond: bool [].
        time: int32 [], steps taken.
    """

    position: Array
    has_gold: Array
    has_diamond: Array
    time: Array


def _observe(state: GatheringState) -> Array:
    flags = jnp.stack([state.has_gold, state.has_diamond]).astype(jnp.int32)
    return jnp.concatenate([state.position, flags])


def _at(position: Array, cell: tuple[int, int]) -> Array:
    return jnp.all(position == jnp.asarray(np.array(cell, np.int32)))


def _reset(key: PRNGKey, params: GatheringParams) -> tuple[GatheringState, Array]:
    del key, params  # the start is always home, with empty hands
    no = jnp.zeros((), bool)
    state = GatheringState(jnp.asarray(np.array(HOME, np.int32)), no, no, jnp.zeros((), jnp.int32))
    return state, _observe(state)


def _step(key: PRNGKey, state: GatheringState, action: Array, params: GatheringParams) -> TimeStep:
    moves = jnp.asarray(np.array([[-1, 0], [1, 0], [0, -1], [0, 1]], np.int32))
    wanted = state.position + moves[action]
    position = jnp.where(jnp.all((wanted >= 0) & (wanted < SIZE)), wanted, state.position)
    gold, diamond = state.has_gold | _at(position, GOLD), state.has_diamond | _at(position, DIAMOND)
    danger = _at(position, ENEMIES[0]) | _at(position, ENEMIES[1])
    dtype = params.kill_probability.dtype
    killed = danger & (jax.random.uniform(key, (), dtype) < params.kill_probability)
    home = _at(position, HOME)
    reward = jnp.stack([-killed.astype(dtype), (home & gold).astype(dtype), (home & diamond).astype(dtype)])
    state = GatheringState(position, gold, diamond, state.time + 1)
    observation = _observe(state)
    truncated = state.time >= params.max_steps
    return TimeStep(state, observation, reward, killed | home, truncated, {"final_observation": observation})


def resource_gathering(*, kill_probability: float = 0.1, max_steps: int = 100, dtype: Any = jnp.float32) -> Environment:
    """The environment. Actions: up, down, left, right. Observation: int32 [4], row, column, gold, diamond.

    Rewards: -1 when killed; 1 for gold and 1 for the diamond on coming home.

    Args:
        kill_probability: of each visit to an enemy.
        max_steps: time limit.
        dtype: of the rewards.

    Returns:
        Environment with four actions and three objectives.
    """
    check(0 <= kill_probability <= 1, argument="kill_probability", value=kill_probability, rule="must lie in [0, 1]")
    params = GatheringParams(jnp.asarray(kill_probability, dtype), jnp.asarray(max_steps, jnp.int32))
    return Environment(_reset, _step, params, num_actions=4, num_objectives=3)


def known_front(discount: float = 1.0) -> np.ndarray:
    """The Pareto front of expected returns, float64 [3, 3], for discounts of 0.99 and above.

    Three ways: both past one enemy (14 steps after the first), the gold alone past none (12), the diamond alone (10).

    >>> known_front().tolist()
    [[-0.1, 0.9, 0.9], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    check(0.99 <= discount <= 1, argument="discount", value=discount, rule="must lie in [0.99, 1]")
    both = 0.9 * discount**14
    return np.array([[-0.1 * discount**7, both, both], [0.0, discount**12, 0.0], [0.0, 0.0, discount**10]])
