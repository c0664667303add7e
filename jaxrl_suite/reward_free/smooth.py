"""Smooth realisations of the oracle: policy logits beside the reward, and optionally the parameter, by plain autodiff.

Slower than the greedy search and about as good; "full" is the one that maximises over theta as the paper writes it.
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxrl_suite.distributions import softmax_policy
from jaxrl_suite.mdp import LinearMixtureMDP, integrated_features
from jaxrl_suite.reward_free.projection import project_parameter
from jaxrl_suite.reward_free.regression import RidgeStatistics, fit, width
from jaxrl_suite.reward_free.rewards import normalise_rewards
from jaxrl_suite.reward_free.search import LEAK
from jaxrl_suite.reward_free.uncertainty import uncertainty_value
from jaxrl_suite.types import Array

_CYCLES = 3  # passes of the pulls over all ellipsoids


class SmoothAnswer(NamedTuple):
    """What a smooth search found.

    Attributes:
        logits: [H, S, A], parameters of the reward.
        policy: int32 [H, S], the rounded policy.
        theta: [D], the parameter; the given one unless it was searched for.
        score: [], uncertainty value before its last cut.
    """

    logits: Array
    policy: Array
    theta: Array
    score: Array


class _Point(NamedTuple):
    logits: Array
    preferences: Array
    theta: Array


def smooth_search(
    mdp: LinearMixtureMDP,
    theta: Array,
    tilde_inverse: Array,
    hat_inverse: Array,
    radius: Array,
    logits: Array,
    rate: Array,
    confined_by: RidgeStatistics | None,
    num_steps: int,
) -> SmoothAnswer:
    """Joint ascent on reward and policy logits, then rounding, then ascent on the reward alone.

    Args:
        mdp: model.
        theta: [D], pooled estimate, where the search for a parameter starts.
        tilde_inverse: [D, D].
        hat_inverse: [D, D].
        radius: [].
        logits: [H, S, A], start.
        rate: [], step size of Adam.
        confined_by: statistics [F, M]; if given, theta moves too, inside the ellipsoids
            ``|theta - theta_fm|_Sigma_fm <= radius`` (pulled back one after the other), and ends as a kernel.
        num_steps: steps of each of the two ascents.

    Returns:
        The best iterate of the second ascent.
    """
    rewards = normalise_rewards(mdp, jax.nn.sigmoid(logits))
    greedy = uncertainty_value(mdp, theta, rewards, tilde_inverse, hat_inverse, radius).policy
    preferences = 2.0 * jax.nn.one_hot(greedy, mdp.num_actions, dtype=logits.dtype)

    def pull(point: _Point) -> _Point:
        point = point._replace(logits=jnp.clip(point.logits, -12.0, 8.0))
        return point if confined_by is None else point._replace(theta=pull_back(point.theta, confined_by, radius))

    def joint(point: _Point) -> Array:
        parameter = theta if confined_by is None else point.theta
        reward = normalise_rewards(mdp, jax.nn.sigmoid(point.logits))
        probs = softmax_policy(point.preferences).probs
        return _mixed_value(mdp, parameter, reward, tilde_inverse, hat_inverse, radius, probs)

    point, _ = _ascend(joint, pull, _Point(logits, preferences, theta), rate, num_steps)
    policy = jnp.argmax(point.preferences, axis=-1).astype(jnp.int32)
    if confined_by is not None:
        point = point._replace(theta=project_parameter(mdp, point.theta, jnp.sum(confined_by.gram[:, 0], axis=0)).theta)
    parameter = point.theta if confined_by is not None else theta

    def rounded(point: _Point) -> Array:
        reward = normalise_rewards(mdp, jax.nn.sigmoid(point.logits))
        probs = jax.nn.one_hot(policy, mdp.num_actions, dtype=logits.dtype)
        return _mixed_value(mdp, parameter, reward, tilde_inverse, hat_inverse, radius, probs)

    point, score = _ascend(rounded, pull, point, rate, num_steps)
    return SmoothAnswer(point.logits, policy, parameter, score)


def pull_back(theta: Array, statistics: RidgeStatistics, radius: Array) -> Array:
    """Moves theta into the newest ellipsoids, ``c + (theta - c) min(1, radius / |theta - c|)``, one after the other."""
    solved = fit(statistics)
    grams = statistics.gram.reshape(-1, *statistics.gram.shape[-2:])
    centers = solved.theta.reshape(-1, theta.shape[0])

    def one(theta: Array, ball: tuple[Array, Array]) -> tuple[Array, None]:
        center, gram = ball
        gap = theta - center
        distance = jnp.sqrt(jnp.maximum(gap @ gram @ gap, 1e-18))
        return center + gap * jnp.minimum(1.0, radius / distance), None

    for _ in range(_CYCLES):
        theta, _ = jax.lax.scan(one, theta, (centers, grams))
    return theta


def _mixed_value(
    mdp: LinearMixtureMDP, theta: Array, rewards: Array, tilde: Array, hat: Array, radius: Array, probs: Array
) -> Array:
    """Score of a stochastic policy [H, S, A]; that of ``uncertainty_value`` where the policy is deterministic."""

    def back(carry: tuple[Array, Array, Array], step: tuple[Array, Array]) -> tuple[tuple, None]:
        values, uncertainty, _ = carry
        reward, row = step
        x, y = integrated_features(mdp, values), integrated_features(mdp, uncertainty)
        surprise = _leaky_cut(radius * width(tilde, x))
        bracket = jnp.sum(row * (surprise + 2.0 * radius * width(hat, y) + y @ theta), axis=-1)
        values = _leaky_cut(jnp.sum(row * (reward + x @ theta), axis=-1))
        return (values, _leaky_cut(bracket), bracket[mdp.start]), None

    zeros = jnp.zeros(mdp.num_states, rewards.dtype)
    (_, _, score), _ = jax.lax.scan(back, (zeros, zeros, zeros[0]), (rewards, probs), reverse=True)
    return score


def _leaky_cut(x: Array) -> Array:
    """Clip to [0, 1] whose derivative outside is a small slope instead of 0."""
    hard = jnp.clip(x, 0.0, 1.0)
    soft = hard + LEAK * (x - hard)
    return soft + jax.lax.stop_gradient(hard - soft)


def _ascend(value, pull, point: _Point, rate: Array, num_steps: int) -> tuple[_Point, Array]:
    """Adam ascent; the best iterate and its value."""
    optimiser = optax.scale_by_adam()

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        point, state, best, best_score = carry
        score, gradient = jax.value_and_grad(value)(point)
        best = jax.tree.map(lambda new, old: jnp.where(score > best_score, new, old), point, best)
        tree, state = optimiser.update(gradient, state)
        updates = cast(_Point, tree)
        scaled = updates._replace(theta=0.02 * updates.theta)  # the parameter lives on a smaller scale than logits
        point = pull(jax.tree.map(lambda x, u: x + rate * u, point, scaled))
        return (point, state, best, jnp.maximum(score, best_score)), None

    start = (point, optimiser.init(point), point, jnp.asarray(-jnp.inf, rate.dtype))
    (point, _, best, best_score), _ = jax.lax.scan(step, start, None, length=num_steps)
    last = value(point)
    better = last > best_score
    return jax.tree.map(lambda new, old: jnp.where(better, new, old), point, best), jnp.maximum(last, best_score)
