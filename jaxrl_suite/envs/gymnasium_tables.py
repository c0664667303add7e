"""Gymnasium's tabular worlds as linear mixtures, read from their own transition tables: the slip is the mixture.

``env.unwrapped.P[s][a]`` lists (probability, next state, reward, terminated). FrozenLake, CliffWalking and Taxi write
the outcomes of "as intended" and of the two sideways slips in a fixed order, so each outcome is one base kernel and the
probabilities are theta. Terminal states absorb, a random start becomes first steps from added states, and the rewards
are moved into the class (at most 1 along every path); :meth:`GymnasiumWorld.to_units` moves values back.
"""

from typing import Any, NamedTuple

import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.envs.mixtures import from_kernels
from jaxrl_suite.extras import require
from jaxrl_suite.mdp import LinearMixtureMDP

# Order of (as intended, slip left, slip right) among the outcomes that each table writes.
_ORDERS = {"FrozenLake": (1, 2, 0), "CliffWalking": (1, 0, 2), "Taxi": (0, 1, 2)}


class GymnasiumWorld(NamedTuple):
    """A gymnasium environment as a linear mixture.

    Attributes:
        mdp: the world; its first ``num_states`` states are gymnasium's, added start states follow.
        rewards: [H, S, A], the environment's reward in the class.
        horizon: H, steps of an episode of the mixture.
        num_states: gymnasium's number of states.
        num_start_steps: first steps that only draw gymnasium's start state.
        num_moves: steps after those that move in gymnasium; one more may follow, which pays for where one is.
        scale: value in the class times this, plus ``offset``, is the return in the environment's units.
        offset: see ``scale``.
        env_id: gymnasium's name.
        options: keyword arguments of ``gymnasium.make``.
    """

    mdp: LinearMixtureMDP
    rewards: np.ndarray
    horizon: int
    num_states: int
    num_start_steps: int
    num_moves: int
    scale: float
    offset: float
    env_id: str
    options: dict[str, Any]

    def to_units(self, value: Any) -> Any:
        """Return in the environment's own units, of a value of the class."""
        return value * self.scale + self.offset


def gymnasium_world(env_id: str, *, max_steps: int | None = None, fan_out: int = 4, **options: Any) -> GymnasiumWorld:
    """Reads a slippery FrozenLake, CliffWalking or Taxi from its own table.

    Rewards that are paid only on entering terminal states (FrozenLake) are paid at the last step for being there,
    exactly the return within the time limit. Others are averaged over outcomes, shifted and scaled to [0, 1 / H].

    Args:
        env_id: "FrozenLake-v1", "CliffWalking-v1", "Taxi-v4", ...
        max_steps: moves an episode; the environment's own limit if None.
        fan_out: a random start is drawn by steps of at most this many branches, which keeps successor lists short.
        **options: for ``gymnasium.make`` (``map_name="8x8"``, ``is_slippery=True``, ``is_rainy=True``, ...).

    Returns:
        The world.

    Raises:
        ImportError: gymnasium is not installed.
        ValueError: the environment has no such table, or mixing its base kernels does not give the table back.
    """
    env = _make(env_id, options)
    try:
        table: Any = getattr(env.unwrapped, "P", None)
        check(table is not None, argument="env_id", value=env_id, rule="the environment has no transition table P")
        name = env_id.split("-")[0]
        check(name in _ORDERS, argument="env_id", value=env_id, rule=f"must be one of {', '.join(_ORDERS)}")
        limit: Any = max_steps or (env.spec.max_episode_steps if env.spec is not None else None)
        check(limit is not None, argument="max_steps", value=max_steps, rule=f"{env_id} has no time limit: give one")
        starts = np.asarray(env.unwrapped.initial_state_distrib, float)
    finally:
        env.close()
    kernels, theta, terminal = _read(table, _ORDERS[name])
    _check_mixture(table, kernels, theta, terminal)
    kernels, start, start_steps = _add_starts(kernels, starts, fan_out)
    horizon = limit + start_steps
    by_arrival = _arrival_rewards(table, terminal)
    if by_arrival is not None:
        horizon += 1  # after the last move one step remains, which pays for where one is
        scale, offset = float(by_arrival.max()), 0.0
        rewards = np.zeros((horizon, kernels.shape[1], kernels.shape[2]))
        rewards[-1, : len(by_arrival)] = by_arrival[:, None] / scale
    else:
        mean = np.array([[sum(p * r for p, _, r, _ in row) for row in table[s].values()] for s in range(len(table))])
        mean[terminal] = 0.0
        low, high = min(0.0, float(mean.min())), max(0.0, float(mean.max()))
        step = np.full(kernels.shape[1:3], (0.0 - low) / ((high - low) * horizon))
        step[: len(mean)] = (mean - low) / ((high - low) * horizon)
        rewards = np.broadcast_to(step, (horizon, *step.shape)).copy()
        scale, offset = (high - low) * horizon, low * horizon
    # What one would believe before having slipped: moves go as intended.
    mdp = from_kernels(kernels, theta, start=start, nominal=np.array([1.0, 0.0, 0.0]))
    return GymnasiumWorld(mdp, rewards, horizon, len(table), start_steps, limit, scale, offset, env_id, options)


def play(world: GymnasiumWorld, policy: np.ndarray, num_episodes: int, seed: int) -> np.ndarray:
    """Plays a policy in gymnasium itself.

    Args:
        world: the world.
        policy: int [H, S], as planned in the mixture.
        num_episodes: episodes.
        seed: of the environment.

    Returns:
        [num_episodes], returns in the environment's units.
    """
    env = _make(world.env_id, world.options).unwrapped  # the time limit is the policy's own length
    policy, returns = np.asarray(policy), np.zeros(num_episodes)
    moves = range(world.num_start_steps, world.num_start_steps + world.num_moves)
    try:
        for episode in range(num_episodes):
            state, _ = env.reset(seed=seed if episode == 0 else None)
            for step in moves:
                state, reward, terminated, _, _ = env.step(int(policy[step, state]))
                returns[episode] += reward
                if terminated:
                    break
    finally:
        env.close()
    return returns


def _make(env_id: str, options: dict[str, Any]) -> Any:
    return require("gymnasium", "experiments").make(env_id, **options)


def _read(table: dict, order: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Base kernels [3, S, A, S], their weights [3], and which states end an episode."""
    states, actions = len(table), len(table[0])
    ends = {int(following) for rows in table.values() for row in rows.values() for _, following, _, end in row if end}
    terminal = np.isin(np.arange(states), list(ends))
    kernels, theta = np.zeros((3, states, actions, states)), None
    for state in range(states):
        for action in range(actions):
            row = table[state][action]
            if terminal[state] or len(row) == 1:
                kernels[:, state, action, state if terminal[state] else int(row[0][1])] = 1.0
                continue
            check(len(row) == 3, argument="table", value=(state, action), rule="a move must list one or three outcomes")
            for kernel, position in enumerate(order):
                kernels[kernel, state, action, int(row[position][1])] = 1.0
            theta = np.array([row[position][0] for position in order]) if theta is None else theta
    return kernels, np.array([1.0, 0.0, 0.0]) if theta is None else theta / theta.sum(), terminal


def _check_mixture(table: dict, kernels: np.ndarray, theta: np.ndarray, terminal: np.ndarray) -> None:
    mixed = np.tensordot(theta, kernels, axes=1)
    for state in np.flatnonzero(~terminal):
        for action, row in table[int(state)].items():
            expected = np.zeros(len(table))
            for probability, following, _, _ in row:
                expected[int(following)] += probability
            if not np.allclose(mixed[state, action], expected, atol=1e-9):
                raise ValueError(
                    f"table[{state}][{action}] is not the mixture of its outcomes with weights {theta.tolist()}: "
                    "its slip differs from that of the other states."
                )


def _arrival_rewards(table: dict, terminal: np.ndarray) -> np.ndarray | None:
    """[S], reward of entering each terminal state, or None if rewards are paid elsewhere too."""
    rewards = np.zeros(len(table))
    for state in np.flatnonzero(~terminal):
        for row in table[int(state)].values():
            for _, following, reward, _ in row:
                if reward != 0 and (not terminal[int(following)] or reward < 0):
                    return None
                if terminal[int(following)]:
                    rewards[int(following)] = reward
    return rewards if rewards.any() else None


def _add_starts(kernels: np.ndarray, starts: np.ndarray, fan_out: int) -> tuple[np.ndarray, int, int]:
    """Adds states that draw the start: a tree with at most ``fan_out`` branches a node, of equal depth everywhere."""
    check(fan_out >= 2, argument="fan_out", value=fan_out, rule="must be at least 2")
    level, mass = np.flatnonzero(starts), starts[starts > 0]
    if len(level) == 1:
        return kernels, int(level[0]), 0
    count, nodes, depth = kernels.shape[1], [], 0
    while len(level) > 1:
        groups = np.array_split(np.arange(len(level)), -(-len(level) // fan_out))
        fresh = count + len(nodes) + np.arange(len(groups))
        nodes.extend((level[group], mass[group] / mass[group].sum()) for group in groups)
        level, mass, depth = fresh, np.array([mass[group].sum() for group in groups]), depth + 1
    total = count + len(nodes)
    grown = np.zeros((len(kernels), total, kernels.shape[2], total))
    grown[:, :count, :, :count] = kernels
    for offset, (following, weights) in enumerate(nodes):
        grown[:, count + offset, :, following] = weights[:, None, None]
    return grown, total - 1, depth
