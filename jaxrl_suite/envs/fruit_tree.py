"""Fruit tree: walk down a full binary tree, each leaf holds a fruit with a value for every objective.

Same transitions and rewards as mo-gymnasium's ``fruit-tree-v0``; its published fruits (six nutrients, all
Pareto-optimal) are read from that package on use. References: Yang, Sun and Narasimhan (2019), arXiv 1908.08342.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.extras import require
from jaxrl_suite.types import Array, Environment, PRNGKey, TimeStep


class FruitTreeParams(NamedTuple):
    """Parameters of the environment.

    Attributes:
        fruits: [2^depth, K], rewards of the leaves from left to right.
    """

    fruits: Array


class FruitTreeState(NamedTuple):
    """State of an episode.

    Attributes:
        row: int32 [], depth of the node, 0 the root.
        column: int32 [], place in its row.
    """

    row: Array
    column: Array


def _observe(state: FruitTreeState) -> Array:
    return jnp.stack([state.row, state.column])


def _reset(key: PRNGKey, params: FruitTreeParams) -> tuple[FruitTreeState, Array]:
    del key, params
    zero = jnp.zeros((), jnp.int32)
    state = FruitTreeState(zero, zero)
    return state, _observe(state)


def _step(key: PRNGKey, state: FruitTreeState, action: Array, params: FruitTreeParams) -> TimeStep:
    del key
    depth = params.fruits.shape[0].bit_length() - 1
    column = 2 * state.column + action.astype(jnp.int32)
    state = FruitTreeState(state.row + 1, column)
    leaf = state.row == depth
    fruit = params.fruits[jnp.where(leaf, column, 0)]
    reward = jnp.where(leaf, fruit, jnp.zeros_like(fruit))
    observation = _observe(state)
    return TimeStep(state, observation, reward, leaf, jnp.zeros((), bool), {"final_observation": observation})


def fruit_tree(fruits: Any, *, dtype: Any = jnp.float32) -> Environment:
    """The environment. Actions: left, right. Observation: int32 [2], depth and place.

    Args:
        fruits: [2^depth, K], rewards of the leaves; see :func:`published_fruits`.
        dtype: of the rewards.

    Returns:
        Environment with two actions and K objectives.

    Raises:
        ValueError: the number of leaves is no power of two.
    """
    fruits = jnp.asarray(fruits, dtype)
    leaves = fruits.shape[0]
    check(fruits.ndim == 2 and leaves > 1 and leaves & (leaves - 1) == 0, argument="fruits", value=fruits.shape,
          rule="must have shape [2^depth, K]")  # fmt: skip
    return Environment(_reset, _step, FruitTreeParams(fruits), num_actions=2, num_objectives=fruits.shape[1])


def published_fruits(depth: int = 6) -> np.ndarray:
    """The fruits of mo-gymnasium, float64 [2^depth, 6].

    Args:
        depth: 5, 6 or 7.

    Raises:
        ImportError: mo-gymnasium is not installed.
        ValueError: there is no such tree.
    """
    check(depth in (5, 6, 7), argument="depth", value=depth, rule="must be 5, 6 or 7")
    fruits = require("mo_gymnasium.envs.fruit_tree.fruit_tree", "experiments").FRUITS
    return np.array(fruits[str(depth)], float)
