"""Fronts of a linear mixture world with several objectives: by planning after exploration, and by learning on the way.

Everything is a pure function of one run; the study vmaps over runs. A *weighting* is a point of the simplex; the reward
of a weighting is the weighted sum of the objectives' rewards, so that every weighting is one reward of the class.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite import pareto
from jaxrl_suite.config import check
from jaxrl_suite.envs.mixtures import gridworld
from jaxrl_suite.mdp import LinearMixtureMDP
from jaxrl_suite.reward_free import (
    Exploration,
    ExplorerConfig,
    HParams,
    advance,
    check_rewards,
    finish,
    init_explorer,
)
from jaxrl_suite.reward_free.planning import plan_model, policy_values
from jaxrl_suite.types import Array, PRNGKey

LAYOUT = ("aabbcc", "aabbcc", "aaSbcc", "aabbcc")
WIND = (0.4, 0.05, 0.45, 0.05, 0.05)
_BLOCK = 500  # weightings planned side by side


class World(NamedTuple):
    """A world with several objectives.

    Attributes:
        mdp: the linear mixture; the truth is read by evaluation alone.
        objectives: [K, H, S, A], each a reward of the class: at most 1 in total along every path.
    """

    mdp: LinearMixtureMDP
    objectives: Array


class Front(NamedTuple):
    """What planning for every weighting reaches.

    Attributes:
        true: [W, K], values of the plans in the true world.
        claimed: [W, K], values of the same plans in the model that they were made with.
    """

    true: Array
    claimed: Array


def windy_rooms(horizon: int, *, bend: float = 0.5) -> World:
    """Three rooms with strong winds of their own, D = 13; light falls off from one corner, warmth from the other.

    Both fall off as a power of the distance below one, so that places in between are worth something for both: the
    front is round and has many corners.

    Args:
        horizon: steps H.
        bend: the power.
    """
    check(horizon >= 1, argument="horizon", value=horizon, rule="must be at least 1")
    check(0 < bend <= 1, argument="bend", value=bend, rule="must be in (0, 1]")
    mdp = gridworld(LAYOUT, wind=WIND, rooms=True)
    rows, columns = len(LAYOUT), len(LAYOUT[0])
    row, column = np.divmod(np.arange(rows * columns), columns)
    far = rows + columns - 2
    distance = np.stack([row + column, far - row - column])
    field = (1 - distance / far) ** bend / horizon
    objectives = np.broadcast_to(field[:, None, :, None], (2, horizon, rows * columns, mdp.num_actions))
    return World(mdp, jnp.asarray(objectives, mdp.features.dtype))


def check_world(world: World) -> None:
    """Raises a ValueError that names the path if an objective pays more than 1 along it."""
    check_rewards(world.mdp, world.objectives, "objectives")


def weightings(count: int) -> np.ndarray:
    """Weightings [count, 2] in equal steps, both ends included."""
    check(count >= 2, argument="num_weightings", value=count, rule="must be at least 2")
    first = np.linspace(0.0, 1.0, count)
    return np.stack([first, 1 - first], axis=1)


def mixed_reward(world: World, weights: Array) -> Array:
    """Reward [..., H, S, A] of weightings [..., K]."""
    return jnp.einsum("...k,khsa->...hsa", weights, world.objectives, precision="highest")


def values_of(world: World, policies: Array, model: Array | None = None) -> Array:
    """Values [N, K] of policies [N, H, S], in the true world or in a model."""
    mdp = world.mdp
    kernel = mdp.kernel() if model is None else model
    columns = [
        policy_values(kernel, mdp.successors, mdp.start, policies, jnp.broadcast_to(r, (policies.shape[0], *r.shape)))
        for r in world.objectives
    ]
    return jnp.stack(columns, axis=1)


def plan_all(world: World, model: Array, weights: Array | np.ndarray) -> Front:
    """Plans for every weighting in one call, in blocks that fit the cache.

    Args:
        world: the world.
        model: [S, A, N], kernel to plan in; the true one gives the true front.
        weights: [W, K].
    """
    count = weights.shape[0]
    size = min(_BLOCK, count)
    padded = jnp.pad(jnp.asarray(weights, world.objectives.dtype), ((0, -count % size), (0, 0)), mode="edge")

    def block(part: Array) -> Front:
        actions = plan_model(model, world.mdp.successors, world.mdp.start, mixed_reward(world, part)).actions
        return Front(values_of(world, actions), values_of(world, actions, model))

    planned = jax.lax.map(block, padded.reshape(-1, size, weights.shape[1]))
    return Front(*(part.reshape(-1, part.shape[-1])[:count] for part in planned))


def explore_at(
    key: PRNGKey, mdp: LinearMixtureMDP, config: ExplorerConfig, hparams: HParams, episodes: tuple[int, ...]
) -> list[Exploration]:
    """One exploration without a reward, read at several numbers of episodes (increasing)."""
    state, found, done = init_explorer(key, mdp, config, hparams), [], 0
    for total in episodes:
        state, history = advance(mdp, config, hparams, state, jnp.int32(done), total - done)
        found.append(finish(mdp, config, state, history))
        done = total
    return found


def learn_dynamic(
    key: PRNGKey,
    world: World,
    config: ExplorerConfig,
    rule: pareto.WeightRule,
    first: Array,
    num_episodes: int,
    *,
    num_played: Array | None = None,
    memory: float = 0.8,
) -> tuple[Array, Array, Array]:
    """One agent whose weights follow a rule from episode to episode, told the weighted reward of each.

    The regression learns from all episodes, whatever their reward; the rule sees a running mean of the returns.

    Args:
        key: consumed.
        world: the world.
        config: with ``algorithm="hf_ucrl_vtr_plus"``.
        rule: weight rule on the objectives.
        first: [K], weights of the first episode.
        num_episodes: K of the explorer.
        num_played: int [], after how many episodes the agent stops, so that agents of several lengths share a program;
            what is returned of later ones says nothing. By default all are played.
        memory: of the running mean.

    Returns:
        True values [num_episodes, K] of every policy that was played, the last model [S, A, N], and the weights
        [num_episodes, K].
    """
    hparams, mdp = HParams(), world.mdp
    steps = jnp.arange(config.horizon)

    def episode(carry, number):
        state, rule_state, weights, mean = carry
        state, record = advance(mdp, config, hparams, state, number, 1, reward=mixed_reward(world, weights))
        returns = jnp.sum(world.objectives[:, steps, record.states[0, :-1], record.actions[0]], axis=1)
        mean = jnp.where(number == 0, returns, memory * mean + (1 - memory) * returns)
        rule_state, following = rule.step(rule_state, pareto.Signals(objectives=mean))
        return (state, rule_state, following.astype(weights.dtype), mean), (state.inner.answer.policy, weights, record)

    def episode_in_time(carry, number):
        if num_played is None:
            return episode(carry, number)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(episode, carry, number)[1])
        return jax.lax.cond(number < num_played, episode, lambda same, _: (same, nothing), carry, number)

    start = (init_explorer(key, mdp, config, hparams), rule.init(), first, jnp.zeros_like(first))
    (state, *_), (policies, weights, records) = jax.lax.scan(episode_in_time, start, jnp.arange(num_episodes))
    history = jax.tree.map(lambda part: part.reshape(num_episodes, *part.shape[2:]), records)
    return values_of(world, policies), finish(mdp, config, state, history).model, weights


def sweep_rule(num_episodes: int | Array, first: Array | None = None, last: Array | None = None) -> pareto.WeightRule:
    """A schedule from one weighting to another within the episodes.

    Args:
        num_episodes: may be traced.
        first: [K], where it begins; by default all weight is on the second of two objectives.
        last: [K], where it ends; by default all weight is on the first.
    """
    first = jnp.array([0.0, 1.0]) if first is None else first
    last = first[::-1] if last is None else last

    def schedule(step: Array) -> Array:
        share = jnp.minimum((step + 1) / jnp.maximum(1, num_episodes - 1), 1.0)
        return first + share * (last - first)

    return pareto.scheduled_weights(schedule)


def corners(points: Array | np.ndarray, *, digits: int = 9) -> np.ndarray:
    """The points [N, K] that no other one dominates, each once, in the order of the first objective.

    NumPy on the host, as the number is not known beforehand; two objectives.
    """
    points = np.unique(np.asarray(points).round(digits), axis=0)[::-1]  # first objective falling, then the second
    highest = np.concatenate([[-np.inf], np.maximum.accumulate(points[:, 1])[:-1]])
    return points[points[:, 1] > highest][::-1]


def padded(points: Array | np.ndarray, multiple: int = 512) -> Array:
    """The corners of a set, the last one repeated up to a multiple: few shapes, few compilations."""
    front = corners(points)
    return jnp.asarray(np.pad(front, ((0, -len(front) % multiple), (0, 0)), mode="edge"))


def measures(reference: Array, slack: float) -> Callable[[Array, Array], tuple[Array, Array, Array]]:
    """Quality of a set of points beside the true front, of any number of points.

    Args:
        reference: [K].
        slack: within which a point of the true front counts as reached.

    Returns:
        ``measure(points [N, K], front [M, K]) -> (hypervolume, IGD+, share of the front reached)``; a point of the
        front is reached if some point is within ``slack`` of it, or better, in every objective.
    """

    return functools.partial(_measure, jnp.asarray(reference), slack)


@jax.jit
def _measure(reference: Array, slack: Array | float, points: Array, front: Array) -> tuple[Array, Array, Array]:
    volume = pareto.hypervolume(points, reference)
    reached = jnp.any(jnp.all(points[None] >= front[:, None] - slack, axis=-1), axis=1)
    return volume, pareto.igd_plus(points, front), jnp.mean(reached.astype(points.dtype))
