"""Realisations of the explorer's oracle behind one call, and the optimistic planner of the reward-aware explorer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.mdp import LinearMixtureMDP, integrated_features
from jaxrl_suite.reward_free.config import ExplorerConfig, HParams
from jaxrl_suite.reward_free.regression import RidgeStatistics, width
from jaxrl_suite.reward_free.rewards import normalise_rewards
from jaxrl_suite.reward_free.search import search_rewards
from jaxrl_suite.reward_free.smooth import smooth_search
from jaxrl_suite.reward_free.uncertainty import uncertainty_value
from jaxrl_suite.types import Array, PRNGKey

_ON, _OFF = 4.0, -8.0  # logits of a one-step reward: nearly 1 and nearly 0, but with a gradient


class OracleAnswer(NamedTuple):
    """A choice of the oracle.

    Attributes:
        logits: [H, S, A], parameters of the reward, the start of the next search.
        rewards: [H, S, A], pseudo reward, in the class.
        policy: int32 [H, S].
        values: [H + 1, S], pseudo value.
        uncertainty: [H + 1, S], uncertainty value.
        theta: [D], parameter that both were computed with.
        score: [], uncertainty value at the start before the cut at 1.
    """

    logits: Array
    rewards: Array
    policy: Array
    values: Array
    uncertainty: Array
    theta: Array
    score: Array


def ask_oracle(
    mdp: LinearMixtureMDP,
    config: ExplorerConfig,
    hparams: HParams,
    key: PRNGKey,
    theta: Array,
    inverses: tuple[Array, Array],
    radius: Array,
    last: OracleAnswer,
    statistics: RidgeStatistics,
) -> OracleAnswer:
    """The most uncertain reward and policy that the configured search finds.

    Args:
        mdp: model (its true parameter is not read).
        config: names the oracle, its steps and starts.
        hparams: step size.
        key: consumed, for the random starts.
        theta: [D], pooled estimate.
        inverses: inverse gram matrices [D, D] of the pseudo-value and the uncertainty regression.
        radius: [F].
        last: answer of the episode before.
        statistics: all regressions, for the oracle that moves theta too.

    Returns:
        The answer.
    """
    tilde, hat = inverses
    base = radius[0]
    hat = hat * (radius[-1] / base) ** 2  # the search knows one radius; a second one rescales its matrix
    starts = start_logits(key, last.logits, config.num_starts)
    rate = jnp.asarray(hparams.ascent_rate, theta.dtype)
    if config.oracle != "greedy":
        parts = (theta, tilde, hat, base)
        return smooth_oracle(mdp, config, parts, starts, rate, statistics if config.oracle == "full" else None)
    logits, _ = search_rewards(mdp, theta, tilde, hat, base, starts, rate, num_steps=config.ascent_steps)
    rewards = normalise_rewards(mdp, jax.nn.sigmoid(logits))
    found = uncertainty_value(mdp, theta, rewards, tilde, hat, base)
    return OracleAnswer(logits, rewards, found.policy, found.values, found.uncertainty, theta, found.score)


def smooth_oracle(
    mdp: LinearMixtureMDP,
    config: ExplorerConfig,
    parts: tuple[Array, Array, Array, Array],
    starts: Array,
    rate: Array,
    statistics: RidgeStatistics | None,
) -> OracleAnswer:
    """The joint softmax search, which moves theta too if it is given the statistics that confine it."""
    theta, tilde, hat, radius = parts
    search = jax.vmap(
        lambda start: smooth_search(mdp, theta, tilde, hat, radius, start, rate, statistics, config.ascent_steps)
    )
    found = search(starts)
    best = jnp.argmax(found.score)
    logits, policy, theta = (x[best] for x in (found.logits, found.policy, found.theta))
    rewards = normalise_rewards(mdp, jax.nn.sigmoid(logits))
    swept = uncertainty_value(mdp, theta, rewards, tilde, hat, radius, policy)
    return OracleAnswer(logits, rewards, policy, swept.values, swept.uncertainty, theta, swept.score)


def start_logits(key: PRNGKey, last: Array, num_starts: int) -> Array:
    """The last logits, then random one-step rewards ``r_{h0}(s, a) = 1[s in T]``; [L, H, S, A]."""
    horizon, states, _ = last.shape
    if num_starts == 1:
        return last[None]
    # One draw for all starts: every call of the generator is compiled anew, and costs as much as a sweep.
    uniforms = jax.random.uniform(key, (num_starts - 1, states + 1), last.dtype)
    first = min(1, horizon - 1)
    steps = first + jnp.floor(uniforms[:, 0] * (horizon - first)).astype(jnp.int32)
    on = (jnp.arange(horizon) == steps[:, None])[:, :, None] & (uniforms[:, None, 1:] < 0.5)
    drawn = jnp.where(on, _ON, _OFF).astype(last.dtype)[..., None]
    return jnp.concatenate([last[None], jnp.broadcast_to(drawn, (num_starts - 1, *last.shape))])


def optimistic_plan(mdp: LinearMixtureMDP, theta: Array, inverse: Array, radius: Array, rewards: Array) -> OracleAnswer:
    """Optimistic values ``Q_h = clip01(r_h + phi_V . theta + radius |phi_V|)`` and their greedy policy.

    Args:
        mdp: model.
        theta: [D].
        inverse: [D, D], inverse gram matrix.
        radius: [].
        rewards: [H, S, A].

    Returns:
        An answer whose ``values`` and ``uncertainty`` are both the optimistic values.

    References:
        Zhou, Gu, 2022, arXiv 2205.11507 (HF-UCRL-VTR+); Zhang, Zhou, Gu, 2021, PLAN of UCRL-RFE.
    """

    def back(values: Array, step_reward: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        features = integrated_features(mdp, values)
        bracket = step_reward + features @ theta + radius * width(inverse, features)
        score = jnp.max(bracket, axis=-1)
        values = jnp.clip(score, 0.0, 1.0)
        return values, (values, jnp.argmax(bracket, axis=-1).astype(jnp.int32), score[mdp.start])

    last = jnp.zeros(mdp.num_states, rewards.dtype)
    _, (values, policy, scores) = jax.lax.scan(back, last, rewards, reverse=True)
    values = jnp.concatenate([values, last[None]])
    return OracleAnswer(rewards, rewards, policy, values, values, theta, scores[0])
