"""The class of rewards: non-negative, and at most 1 in total along every path. Membership, projection, banks."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxrl_suite.config import check
from jaxrl_suite.mdp import LinearMixtureMDP
from jaxrl_suite.types import Array, PRNGKey


class LongestPath(NamedTuple):
    """The path of largest total reward among those that the features allow.

    Attributes:
        total: [], its total.
        states: int32 [H + 1].
        actions: int32 [H].
    """

    total: Array
    states: Array
    actions: Array


def longest_totals(mdp: LinearMixtureMDP, rewards: Array) -> Array:
    """``c_h(s) = max_a (r_h(s, a) + max over reachable s' of c_{h+1}(s'))``, reachable under some parameter.

    Args:
        mdp: model; only its support is read.
        rewards: [H, S, A], non-negative.

    Returns:
        [H + 1, S], largest total from step h on; the last row is 0. Differentiable almost everywhere.
    """
    return totals_on(mdp.mask, mdp.successors, rewards)


def totals_on(mask: Array, successors: Array, rewards: Array) -> Array:
    """:func:`longest_totals` on lists [S, A, N] of successors and which of them count."""

    def back(totals: Array, step_reward: Array) -> tuple[Array, Array]:
        # Totals are non-negative, so 0 may stand for the successors that do not exist.
        ahead = jnp.max(jnp.where(mask, totals[successors], 0.0), axis=-1)
        totals = jnp.max(step_reward + ahead, axis=-1)
        return totals, totals

    last = jnp.zeros(mask.shape[0], rewards.dtype)
    _, totals = jax.lax.scan(back, last, rewards, reverse=True)
    return jnp.concatenate([totals, last[None]])


def rewards_outside(mdp: LinearMixtureMDP, rewards: Array) -> Array:
    """Whether each reward is outside the class, exactly and also inside jit, where :func:`check_rewards` cannot refuse.

    One backward recursion: an entry that is negative or not finite counts as infinite, so that the longest path from
    the start is at most 1 if and only if every path collects at most 1 from entries that are not negative. Entries
    that no path from the start meets do not matter (:func:`check_rewards` refuses them nevertheless).

    Args:
        mdp: model; only its support and start are read.
        rewards: [R, H, S, A].

    Returns:
        bool [R].
    """
    listed = listed_successors(mdp.mask, mdp.successors)

    def back(totals: Array, reward: Array) -> tuple[Array, None]:
        return longest_from(listed, totals, reward), None

    last = jnp.zeros((mdp.num_states, rewards.shape[0]), rewards.dtype)
    totals, _ = jax.lax.scan(back, last, jnp.transpose(rewards, (1, 2, 3, 0)), reverse=True)
    return totals[mdp.start] > 1.0 + class_tolerance(rewards.dtype)


def class_tolerance(dtype: DTypeLike) -> float:
    """By how much the total of a path may exceed 1 for rounding."""
    return 1e-9 if jnp.finfo(dtype).bits >= 64 else 1e-5


def listed_successors(mask: Array, successors: Array) -> Array:
    """Lists [S, A, N] in which every entry is a successor: padding repeats the first one that is."""
    first = jnp.argmax(mask, axis=-1, keepdims=True)
    return jnp.where(mask, successors, jnp.take_along_axis(successors, first, axis=-1))


def longest_from(listed: Array, totals: Array, reward: Array) -> Array:
    """One step back of the longest path, [S, R] from totals [S, R] and a step's rewards [S, A, R], R side by side.

    Entries that are negative or NaN count as infinite. ``listed`` is from :func:`listed_successors`.
    """
    width = listed.shape[-1]
    if width > 8:
        ahead = jnp.max(totals[listed], axis=2)
    else:  # term by term, which fuses
        ahead = totals[listed[..., 0]]
        for index in range(1, width):
            ahead = jnp.maximum(ahead, totals[listed[..., index]])
    reward = jax.lax.stop_gradient(reward)
    return jnp.max(jnp.where(reward >= 0.0, reward, jnp.inf) + ahead, axis=1)


def longest_path(mdp: LinearMixtureMDP, rewards: Array) -> LongestPath:
    """The path behind :func:`longest_totals` at the start state."""
    return path_on(mdp.mask, mdp.successors, mdp.start, rewards)


def path_on(mask: Array, successors: Array, start: Array, rewards: Array) -> LongestPath:
    """:func:`longest_path` on lists [S, A, N] of successors and which of them count."""
    totals = totals_on(mask, successors, rewards)

    def step(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        step_reward, ahead = inputs
        reachable = jnp.where(mask[state], ahead[successors[state]], -1.0)
        action = jnp.argmax(step_reward[state] + jnp.max(reachable, axis=-1))
        following = successors[state, action, jnp.argmax(reachable[action])]
        return following, (following, action.astype(jnp.int32))

    _, (states, actions) = jax.lax.scan(step, start, (rewards, totals[1:]))
    return LongestPath(totals[0, start], jnp.concatenate([start[None], states]), actions)


def normalise_rewards(mdp: LinearMixtureMDP, rewards: Array) -> Array:
    """Scales non-negative rewards ``[H, S, A]`` into the class: ``r / max(1, c_1(start))``."""
    return rewards / jnp.maximum(1.0, longest_totals(mdp, rewards)[0, mdp.start])


def check_rewards(mdp: LinearMixtureMDP, rewards: Array, name: str = "rewards") -> None:
    """Checks that concrete rewards are in the class; does nothing on traced values (:func:`rewards_outside` does).

    Args:
        mdp: model.
        rewards: [R, H, S, A] or [H, S, A].
        name: argument name for the message.

    Raises:
        ValueError: the shape is wrong, an entry is negative or not finite (it is named), or a path collects more
            than 1 (it is named).
    """
    check_rewards_on(mdp.mask, mdp.successors, mdp.start, rewards, name)


def check_rewards_on(mask: Array, successors: Array, start: Array, rewards: Array, name: str) -> None:
    """:func:`check_rewards` on lists [S, A, N] of successors and which of them count."""
    shape = mask.shape[:2]
    check(
        rewards.ndim in (3, 4) and rewards.shape[-2:] == shape,
        argument=name,
        value=rewards.shape,
        rule=f"shape must be [R, H, S, A] or [H, S, A] with S, A = {shape}",
        remedy="" if rewards.ndim in (3, 4) else "Add the missing axes",
    )
    if any(isinstance(x, jax.core.Tracer) for x in (mask, successors, start, rewards)):
        return
    bank = np.asarray(rewards).reshape(-1, *rewards.shape[-3:])
    wrong = ~(bank >= 0) | ~np.isfinite(bank)
    if np.any(wrong):
        where = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"{name}[reward, h, s, a = {where}]={bank[where]}: must be finite and not negative.")
    totals = np.asarray(_start_totals(mask, successors, start, jnp.asarray(bank)))
    if np.any(totals > 1 + class_tolerance(bank.dtype)):
        index = int(np.argmax(totals))
        path = jax.jit(path_on)(mask, successors, start, jnp.asarray(bank[index]))
        steps = ", ".join(f"({int(s)}, {int(a)})" for s, a in list(zip(path.states, path.actions, strict=False))[:20])
        raise ValueError(
            f"{name}[{index}]: the path of (state, action) pairs {steps}{' ...' if len(path.actions) > 20 else ''} "
            f"collects {totals[index]:.6g}, above 1. Remedy: jaxrl_suite.reward_free.normalise_rewards."
        )


@jax.jit
def _start_totals(mask: Array, successors: Array, start: Array, bank: Array) -> Array:
    return jax.vmap(lambda rewards: totals_on(mask, successors, rewards)[0, start])(bank)


def reward_bank(mdp: LinearMixtureMDP, key: PRNGKey, horizon: int, num_random: int = 50) -> Array:
    """Rewards to try a plan on, all in the class: goals, occupancies, random sparse ones.

    Args:
        mdp: model.
        key: consumed.
        horizon: steps H.
        num_random: number of random sparse rewards.

    Returns:
        [2 S + num_random, H, S, A]: for each state 1 at the last step, then 1 / H at each step, then random rewards
        with about one entry in ten, scaled by the longest path.
    """
    check(horizon >= 1, argument="horizon", value=horizon, rule="must be at least 1")
    return _bank(mdp, key, horizon, num_random)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _bank(mdp: LinearMixtureMDP, key: PRNGKey, horizon: int, num_random: int) -> Array:
    states, actions, dtype = mdp.num_states, mdp.num_actions, mdp.features.dtype
    place = jnp.broadcast_to(jnp.eye(states, dtype=dtype)[:, :, None], (states, states, actions))
    goal = jnp.zeros((states, horizon, states, actions), dtype).at[:, -1].set(place)
    stay = jnp.broadcast_to(place[:, None] / horizon, goal.shape)
    where_key, size_key = jax.random.split(key)
    shape = (num_random, horizon, states, actions)
    sparse = jax.random.bernoulli(where_key, 0.1, shape) * jax.random.uniform(size_key, shape, dtype)
    totals = jax.vmap(lambda r: longest_totals(mdp, r)[0, mdp.start])(sparse)
    return jnp.concatenate([goal, stay, sparse / jnp.maximum(totals, 1e-9)[:, None, None, None]])
