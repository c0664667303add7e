"""Deep-sea treasure: a submarine weighs the worth of a treasure against the time to reach it. Known Pareto fronts.

Three maps: ``convex``, ``concave`` (most of its front lies inside the convex hull, where no fixed linear weight finds
it) and ``mirrored`` (the concave front on a wider map). Same transitions and rewards as mo-gymnasium's
``deep-sea-treasure-v0``, ``deep-sea-treasure-concave-v0`` and ``deep-sea-treasure-mirrored-v0``.

References: Vamplew et al. (2011), "Empirical evaluation methods for multiobjective reinforcement learning algorithms";
Yang et al. (2019), arXiv 1908.08342; Felten et al. (2022).
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.types import Array, Environment, PRNGKey, TimeStep

Layout = Literal["convex", "concave", "mirrored"]

ROCK = -10.0
# (row, column, treasure); the sea floor is one row below the deepest free cell of each column.
_CELLS = ((1, 0), (2, 1), (3, 2), (4, 3), (4, 4), (4, 5), (7, 6), (7, 7), (9, 8), (10, 9))
_TREASURES = {
    "convex": (0.7, 8.2, 11.5, 14.0, 15.1, 16.1, 19.6, 20.3, 22.4, 23.7),
    "concave": (1.0, 2.0, 3.0, 5.0, 8.0, 16.0, 24.0, 50.0, 74.0, 124.0),
}
# Mirrored map, row by row: where the rock of the left slope begins (20: no rock).
_MIRRORED_LEFT = (20, 20, 9, 8, 7, 4, 4, 4, 2, 2, 1)


class DeepSeaParams(NamedTuple):
    """Parameters of the environment.

    Attributes:
        sea_map: [rows, columns], worth of each cell: 0 water, ``ROCK`` rock, anything else a treasure.
        start: int32 [2], row and column.
        max_steps: int32 [], time limit; mo-gymnasium registers 100.
    """

    sea_map: Array
    start: Array
    max_steps: Array


class DeepSeaState(NamedTuple):
    """State of an episode.

    Attributes:
        position: int32 [2], row and column.
        time: int32 [], steps taken.
    """

    position: Array
    time: Array


def sea_map(layout: Layout = "convex") -> np.ndarray:
    """The map as a table [rows, columns]; 0 water, -10 rock, otherwise a treasure."""
    check(layout in ("convex", "concave", "mirrored"), argument="layout", value=layout, rule="unknown map",
          remedy="Choose convex, concave or mirrored")  # fmt: skip
    if layout == "mirrored":
        table = np.zeros((11, 20))
        right = sea_map("concave")
        table[:, 10:] = right[:, :10]
        for row, first in enumerate(_MIRRORED_LEFT):
            table[row, first:10] = ROCK
        table[1:3, 10] = (1.0, ROCK)
        return table
    table = np.zeros((11, 11))
    for (row, column), treasure in zip(_CELLS, _TREASURES[layout]):
        table[row, column] = treasure
        table[row + 1 :, column] = ROCK
    return table


def known_front(layout: Layout = "convex", *, discount: float = 1.0) -> np.ndarray:
    """The Pareto front of deterministic policies: (treasure, -steps), discounted from the first reward on.

    Args:
        layout: the map.
        discount: in (0, 1].

    Returns:
        float64 [10, 2], by rising treasure.

    >>> known_front("concave")[-1].tolist()
    [124.0, -19.0]
    """
    check(0 < discount <= 1, argument="discount", value=discount, rule="must lie in (0, 1]")
    treasures = np.array(_TREASURES["convex" if layout == "convex" else "concave"])
    steps = np.array([row + column for row, column in _CELLS])
    elapsed = steps if discount == 1 else (1 - discount**steps) / (1 - discount)
    return np.stack([treasures * discount ** (steps - 1), -np.asarray(elapsed, float)], axis=1)


def _reset(key: PRNGKey, params: DeepSeaParams) -> tuple[DeepSeaState, Array]:
    del key  # the start is always the same
    return DeepSeaState(params.start, jnp.zeros((), jnp.int32)), params.start


def _step(key: PRNGKey, state: DeepSeaState, action: Array, params: DeepSeaParams) -> TimeStep:
    del key  # the sea is calm
    moves = jnp.asarray(np.array([[-1, 0], [1, 0], [0, -1], [0, 1]], np.int32))
    wanted = state.position + moves[action]
    inside = jnp.all((wanted >= 0) & (wanted < jnp.asarray(np.array(params.sea_map.shape, np.int32))))
    safe = jnp.where(inside, wanted, state.position)
    free = params.sea_map[safe[0], safe[1]] != ROCK
    position = jnp.where(free, safe, state.position)
    worth = params.sea_map[position[0], position[1]]
    found = (worth != 0) & (worth != ROCK)
    reward = jnp.stack([jnp.where(found, worth, jnp.zeros_like(worth)), -jnp.ones_like(worth)])
    state = DeepSeaState(position, state.time + 1)
    truncated = state.time >= params.max_steps
    return TimeStep(state, position, reward, found, truncated, {"final_observation": position})


def deep_sea_treasure(layout: Layout = "convex", *, max_steps: int = 100, dtype: Any = jnp.float32) -> Environment:
    """The environment. Actions: up, down, left, right. Observation: int32 [2], row and column. Rewards: treasure, -1.

    Args:
        layout: convex, concave or mirrored.
        max_steps: time limit.
        dtype: of the rewards.

    Returns:
        Environment with four actions and two objectives.

    Raises:
        ValueError: unknown layout.

    >>> import jax
    >>> env = deep_sea_treasure("concave")
    >>> state, _ = env.reset(jax.random.key(0), env.params)
    >>> env.step(jax.random.key(1), state, jax.numpy.array(1), env.params).reward.tolist()
    [1.0, -1.0]
    """
    start = (0, 10) if layout == "mirrored" else (0, 0)
    params = DeepSeaParams(
        sea_map=jnp.asarray(sea_map(layout), dtype),
        start=jnp.asarray(np.array(start, np.int32)),
        max_steps=jnp.asarray(max_steps, jnp.int32),
    )
    return Environment(_reset, _step, params, num_actions=4, num_objectives=2)
