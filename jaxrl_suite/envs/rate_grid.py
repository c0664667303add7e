"""Grid worlds for coding games: the 8x8 grid of the rate-limited game and the 4x4 CodeGrid, as tabular models.

A cell is '.' (free), '#' (obstacle), 'S' (start, one), 'G' (goal, +1 on entering), 'T' (trap, -1 on entering). Goals
and traps end the episode. A move goes as intended with probability 1 - noise and turns left or right with half of the
noise each; walls and obstacles stop it.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl_suite.config import Config, check, field
from jaxrl_suite.mdp import TabularMDP, soft_backward_induction, soft_value_iteration, tabular_mdp
from jaxrl_suite.types import Array, Environment, PRNGKey, TimeStep

_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left: turning is a step in this list

LAYOUT_8X8 = (
    "S.......",
    "..##....",
    "......#.",
    ".#..T...",
    ".#......",
    "....##..",
    ".T......",
    ".......G",
)
LAYOUT_4X4 = ("S...", "....", "....", "...G")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateGridConfig(Config):
    """Layout, noise, rewards and horizon. The paper leaves positions, noise, step reward and horizon open."""

    layout: tuple[str, ...] = field(LAYOUT_8X8, help="rows of cells: . # S G T")
    noise: float = field(0.2, help="probability that a move turns left or right")
    step_reward: float = field(0.0, help="reward of every step")
    discount: float = field(0.95, help="discount of the reward in planning")
    horizon: int = field(400, help="steps after which an episode is cut off")

    def __post_init__(self) -> None:
        super().__post_init__()
        cells = "".join(self.layout)
        width = {len(row) for row in self.layout}
        check(len(width) == 1, argument="layout", value=self.layout, rule="rows must have equal length")
        check(set(cells) <= set(".#SGT"), argument="layout", value=self.layout, rule="cells must be one of . # S G T")
        check(cells.count("S") == 1, argument="layout", value=self.layout, rule="must have one start S")
        check("G" in cells, argument="layout", value=self.layout, rule="must have a goal G")
        check(0 <= self.noise <= 1, argument="noise", value=self.noise, rule="must be a probability")
        check(0 <= self.discount < 1, argument="discount", value=self.discount, rule="must be in [0, 1)")
        check(self.horizon > 0, argument="horizon", value=self.horizon, rule="must be positive")


class RateGrid(struct.PyTreeNode):
    """A grid world as arrays.

    Attributes:
        mdp: states are cells, row by row; three successors a move (as intended, left, right); reward [S, A] is the
            expected one of a step; terminal states lead to themselves without reward.
        entry_reward: [S], reward on entering a cell.
        terminal: bool [S].
        start: int32 [].
        horizon: steps after which an episode is cut off, static.
    """

    mdp: TabularMDP
    entry_reward: Array
    terminal: Array
    start: Array
    horizon: int = struct.field(pytree_node=False)

    @property
    def successors(self) -> Array:
        """int32 [S, A, 3], cells that a move may lead to; a grid is always stored by lists."""
        return cast(Array, self.mdp.successors)


def rate_grid(config: RateGridConfig) -> RateGrid:
    """Builds the grid world of a configuration.

    >>> grid = rate_grid(RateGridConfig())
    >>> grid.mdp.num_states, grid.mdp.num_actions, int(grid.start)
    (64, 4, 0)
    """
    cells = np.array([list(row) for row in config.layout])
    height, width = cells.shape
    flat = cells.reshape(-1)
    terminal = np.isin(flat, ["G", "T"])
    entry = np.where(flat == "G", 1.0, np.where(flat == "T", -1.0, 0.0)) + config.step_reward

    def move(state: int, action: int) -> int:
        row, column = state // width + _MOVES[action][0], state % width + _MOVES[action][1]
        free = 0 <= row < height and 0 <= column < width and cells[row, column] != "#"
        return row * width + column if free else state

    successors = np.zeros((flat.size, 4, 3), np.int32)
    for state in range(flat.size):
        for action in range(4):
            turns = (action, (action - 1) % 4, (action + 1) % 4)
            successors[state, action] = state if terminal[state] else [move(state, turn) for turn in turns]
    probs = np.array([1 - config.noise, config.noise / 2, config.noise / 2])
    transition = np.broadcast_to(probs, successors.shape)
    reward = np.where(terminal[:, None], 0.0, (transition * entry[successors]).sum(-1))
    dtype = jnp.result_type(float)
    mdp = tabular_mdp(
        jnp.asarray(transition, dtype), jnp.asarray(reward, dtype), config.discount, jnp.asarray(successors)
    )
    start = jnp.asarray(int(np.argmax(flat == "S")), jnp.int32)
    return RateGrid(mdp, jnp.asarray(entry, dtype), jnp.asarray(terminal), start, config.horizon)


def soft_policy(grid: RateGrid, temperature: float | Array, *, horizon: int | None = None) -> Array:
    """Maximum-entropy policy ``[S, A]`` by soft value iteration; the value of a terminal state is zero.

    Entropy would go on to be paid in a terminal state for ever. A reward of ``-temperature log A`` there cancels it
    exactly.

    Args:
        grid: the world.
        temperature: beta, reward a nat.
        horizon: plan exactly for so many steps instead, by backward induction.

    Returns:
        Probabilities [S, A], or [H, S, A] with a horizon.
    """
    temperature = jnp.asarray(temperature, grid.mdp.reward.dtype)
    silent = -temperature * jnp.log(jnp.asarray(grid.mdp.num_actions, temperature.dtype))
    reward = jnp.where(grid.terminal[:, None], silent, grid.mdp.reward)
    mdp = grid.mdp.replace(reward=reward)
    if horizon is not None:
        return soft_backward_induction(mdp, temperature, horizon=horizon).policy.probs
    return soft_value_iteration(mdp, temperature).policy.probs


def next_state(key: PRNGKey, grid: RateGrid, state: Array, action: Array) -> Array:
    """Draws the cell after a move, int32 []. The key is consumed."""
    turn = jnp.searchsorted(jnp.cumsum(grid.mdp.transition[state, action])[:-1], jax.random.uniform(key), side="right")
    return grid.successors[state, action, turn]


def environment(config: RateGridConfig) -> Environment:
    """The grid behind the toolkit's environment interface; state is (cell, step), observation the cell."""
    grid = rate_grid(config)

    def reset(key: PRNGKey, params: RateGrid) -> tuple[Any, Array]:
        del key
        return (params.start, jnp.zeros((), jnp.int32)), params.start

    def step(key: PRNGKey, state: Any, action: Array, params: RateGrid) -> TimeStep:
        cell, time = state
        cell = next_state(key, params, cell, action)
        terminated = params.terminal[cell]
        truncated = (time + 1 >= params.horizon) & ~terminated
        reward = params.entry_reward[cell][None]
        return TimeStep((cell, time + 1), cell, reward, terminated, truncated, {"final_observation": cell})

    return Environment(reset, step, grid, 4)
