"""Planning afterwards: policies for any number of rewards from one explored model, and how good they are in truth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.mdp import LinearMixtureMDP
from jaxrl_suite.reward_free.rewards import check_rewards_on, class_tolerance, listed_successors, longest_from
from jaxrl_suite.reward_free.types import Exploration
from jaxrl_suite.types import Array

_BLOCK = 500  # rewards planned side by side


class Policies(NamedTuple):
    """Plans for R rewards.

    Attributes:
        actions: int32 [R, H, S], greedy; ties to the lowest index.
        values: [R], value of each plan at the start in the model that it was made with.
        outside: bool [R], whether the reward is outside the class, so that no certificate holds for its plan: some
            path from the start collects more than 1, or meets an entry that is negative or not finite. Also where the
            value itself is above 1, negative or NaN (then the model is no kernel).
    """

    actions: Array
    values: Array
    outside: Array


def plan(exploration: Exploration, rewards: Array) -> Policies:
    """Optimal policies of the explored model for many rewards at once. Reads ``exploration.model`` alone, no bonus.

    Args:
        exploration: what :func:`jaxrl_suite.reward_free.explore` returned.
        rewards: [R, H, S, A], in the class (see :func:`jaxrl_suite.reward_free.check_rewards`).

    Returns:
        The plans.

    Raises:
        ValueError: the rewards do not have the shape of the model; concrete rewards are negative or not finite (the
            entry is named), or collect more than 1 along a path (it is named). Inside jit see ``Policies.outside``.
    """
    rewards = jnp.asarray(rewards)  # NumPy's float64 becomes what JAX computes in, without a warning
    if rewards.ndim == 4:
        check_rewards_on(exploration.support, exploration.successors, exploration.start, rewards, "rewards")
    return plan_model(exploration.model, exploration.successors, exploration.start, rewards, exploration.support)


def plan_model(model: Array, successors: Array, start: Array, rewards: Array, support: Array | None = None) -> Policies:
    """Backward induction in a kernel over successor lists, with the rewards side by side on the last axis.

    Args:
        model: [S, A, N].
        successors: int32 [S, A, N].
        start: int32 [].
        rewards: [R, H, S, A].
        support: bool [S, A, N], successors that count for "every path" of the class; if None, the class is not looked
            at and ``Policies.outside`` speaks of the values alone.
    """
    states, actions, _ = model.shape
    check(
        rewards.ndim == 4 and rewards.shape[2:] == (states, actions),
        argument="rewards",
        value=rewards.shape,
        rule=f"shape must be [R, H, S, A] with S={states}, A={actions}",
        remedy="Add a leading axis for a single reward",
    )
    count = rewards.shape[0]
    listed = None if support is None else listed_successors(support, successors)
    if count <= _BLOCK:
        return _plan_block(model, successors, start, rewards, listed)
    # Blocks that fit the cache; the last one is filled up with rewards of 0.
    padded = jnp.pad(rewards, ((0, -count % _BLOCK), (0, 0), (0, 0), (0, 0)))
    blocks = padded.reshape(-1, _BLOCK, *rewards.shape[1:])
    planned = jax.lax.map(lambda block: _plan_block(model, successors, start, block, listed), blocks)
    return Policies(*(part.reshape(-1, *part.shape[2:])[:count] for part in planned))


def _plan_block(model: Array, successors: Array, start: Array, rewards: Array, listed: Array | None) -> Policies:
    lanes = jnp.transpose(rewards, (1, 2, 3, 0))

    def back(carry: tuple[Array, Array | None], reward: Array) -> tuple[tuple[Array, Array | None], Array]:
        values, totals = carry
        if listed is not None and totals is not None:
            totals = longest_from(listed, totals, reward)
        values, policy = _best_action(reward + _ahead(model, successors, values))
        return (values, totals), policy

    last = jnp.zeros((model.shape[0], rewards.shape[0]), model.dtype)
    carry = (last, None if listed is None else last.astype(rewards.dtype))
    (values, totals), policy = jax.lax.scan(back, carry, lanes, reverse=True)
    worth, slack = values[start], class_tolerance(model.dtype)
    outside = (worth > 1.0 + slack) | ~(worth >= -slack)
    if totals is not None:
        outside = outside | (totals[start] > 1.0 + class_tolerance(rewards.dtype))
    return Policies(jnp.moveaxis(policy, -1, 0), worth, outside)


def policy_values(model: Array, successors: Array, start: Array, policies: Array, rewards: Array) -> Array:
    """Values [R] of policies [R, H, S] for rewards [R, H, S, A] in a kernel over successor lists."""
    lanes, actions = jnp.transpose(rewards, (1, 2, 3, 0)), jnp.moveaxis(policies, 0, -1)

    def back(values: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        reward, action = step
        scores = reward + _ahead(model, successors, values)
        return jnp.take_along_axis(scores, action[:, None], axis=1)[:, 0], None

    values, _ = jax.lax.scan(
        back, jnp.zeros((model.shape[0], rewards.shape[0]), model.dtype), (lanes, actions), reverse=True
    )
    return values[start]


def suboptimality(mdp: LinearMixtureMDP, policy: Array, rewards: Array) -> Array:
    """``V*(start; r) - V^pi(start; r)`` under the true kernel.

    Args:
        mdp: model, its true parameter included.
        policy: int [R, H, S], a policy a reward.
        rewards: [R, H, S, A].

    Returns:
        [R], not negative up to rounding.

    Raises:
        ValueError: policies and rewards do not fit each other or the model.
    """
    check(
        policy.shape == rewards.shape[:3],
        argument="policy",
        value=policy.shape,
        rule=f"must be [R, H, S] with the rewards' R, H, S = {rewards.shape[:3]}",
    )
    kernel = mdp.kernel()
    best = plan_model(kernel, mdp.successors, mdp.start, rewards).values
    return best - policy_values(kernel, mdp.successors, mdp.start, policy, rewards)


def value_error(mdp: LinearMixtureMDP, exploration: Exploration, policy: Array, rewards: Array) -> Array:
    """``|V^pi in the explored model - V^pi in truth|`` at the start, [R]; arguments as :func:`suboptimality`."""
    claimed = policy_values(exploration.model, mdp.successors, mdp.start, policy, rewards)
    return jnp.abs(claimed - policy_values(mdp.kernel(), mdp.successors, mdp.start, policy, rewards))


def goal_value_errors(mdp: LinearMixtureMDP, exploration: Exploration, horizon: int) -> Array:
    """:func:`value_error` of the plans for all goals: 1 for being in state s at step t, and nothing else.

    The kernel does not change with time, so that one backward sweep from ``V = 1[s]`` meets every such reward: after t
    steps it holds the value of being in s at step t. A model's error over all rewards of H steps never falls with H,
    because a reward may be 0 from some step on; a bank that asks for the last step alone does not see that.

    Args:
        mdp: model, its true parameter included.
        exploration: what was explored.
        horizon: steps H.

    Returns:
        [H, S], not negative; row 0 is 0.

    Raises:
        ValueError: the horizon is below 1.
    """
    check(horizon >= 1, argument="horizon", value=horizon, rule="must be at least 1")
    claimed_kernel, true_kernel, successors = exploration.model, mdp.kernel(), mdp.successors

    def back(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        claimed, true = carry
        following, action = _best_action(_ahead(claimed_kernel, successors, claimed))
        truly = jnp.take_along_axis(_ahead(true_kernel, successors, true), action[:, None], axis=1)[:, 0]
        return (following, truly), jnp.abs(claimed - true)[mdp.start]

    goals = jnp.eye(mdp.num_states, dtype=claimed_kernel.dtype)
    _, errors = jax.lax.scan(back, (goals, goals), None, length=horizon)
    return errors


def _ahead(model: Array, successors: Array, values: Array) -> Array:
    """``[P V]`` [S, A, R] of values [S, R]; short lists are summed term by term, which fuses."""
    width = model.shape[-1]
    if width > 8:
        return jnp.einsum("saj,sajr->sar", model, values[successors], precision="highest")
    total = model[..., 0, None] * values[successors[..., 0]]
    for index in range(1, width):
        total = total + model[..., index, None] * values[successors[..., index]]
    return total


def _best_action(scores: Array) -> tuple[Array, Array]:
    """Maximum over the action axis of [S, A, R] and its smallest index."""
    best = jnp.max(scores, axis=1)
    count = scores.shape[1]
    index = jnp.arange(count, dtype=jnp.int32)[None, :, None]
    return best, jnp.min(jnp.where(scores == best[:, None], index, count - 1), axis=1)
