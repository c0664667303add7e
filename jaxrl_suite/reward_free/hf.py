"""HF-UCRL-RFE++ and its variants: one episode as a pure function of the statistics of a few weighted regressions.

The line of the paper's algorithm that maximises over policy, parameter and pseudo reward at once is handed to an oracle
there. Here the parameter is the pooled estimate of both regressions, which keeps every step of the proof with a best
iterate as output, and policy and reward are searched for (:mod:`jaxrl_suite.reward_free.search`).
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxrl_suite.mdp import LinearMixtureMDP, step_index
from jaxrl_suite.reward_free.config import ExplorerConfig, HParams
from jaxrl_suite.reward_free.moments import moment_weights, squared_powers
from jaxrl_suite.reward_free.oracles import OracleAnswer, ask_oracle, optimistic_plan
from jaxrl_suite.reward_free.radius import Scales, confidence_radius, least_deviation, scales
from jaxrl_suite.reward_free.regression import (
    RidgeFit,
    RidgeStatistics,
    add_samples,
    fit,
    init_statistics,
    log_determinant,
    sherman_morrison,
)
from jaxrl_suite.reward_free.types import Estimate, Record
from jaxrl_suite.reward_free.widths import widest_functions
from jaxrl_suite.types import Array, PRNGKey


class HFState(NamedTuple):
    """State between episodes. F families (pseudo value, uncertainty), M moment levels.

    Attributes:
        statistics: gram [F, M, D, D] and moment [F, M, D] of the weighted regressions.
        onehot: gram [D, D] and moment [D] of the regression on indicators of next states.
        answer: what the oracle last said; its logits start the next search.
        asked_log_det: [F], log determinants (level 0) when the oracle was last asked.
        best: estimate of the most certain episode so far.
        finite: bool [], whether every Cholesky factor existed.
    """

    statistics: RidgeStatistics
    onehot: RidgeStatistics
    answer: OracleAnswer
    asked_log_det: Array
    best: Estimate
    finite: Array


def init_hf(mdp: LinearMixtureMDP, config: ExplorerConfig, hparams: HParams) -> HFState:
    """The state before the first episode."""
    sizes, dtype = scales(mdp, config, hparams), mdp.features.dtype
    families, horizon = num_families(config), config.horizon
    center = ridge_center(mdp, config)
    statistics = init_statistics((families, num_levels(config)), sizes.ridge, center)
    plane = (horizon, mdp.num_states)
    answer = OracleAnswer(
        logits=jnp.zeros((*plane, mdp.num_actions), dtype),
        rewards=jnp.zeros((*plane, mdp.num_actions), dtype),
        policy=jnp.zeros(plane, jnp.int32),
        values=jnp.zeros((horizon + 1, mdp.num_states), dtype),
        uncertainty=jnp.zeros((horizon + 1, mdp.num_states), dtype),
        theta=center,
        score=jnp.asarray(jnp.inf, dtype),
    )
    best = estimate(statistics, answer, jnp.int32(-1))
    return HFState(
        statistics,
        init_statistics((), sizes.ridge, center),
        answer,
        jnp.full(families, -jnp.inf, dtype),
        best,
        jnp.array(True),
    )


def hf_episode(
    mdp: LinearMixtureMDP,
    config: ExplorerConfig,
    hparams: HParams,
    state: HFState,
    key: PRNGKey,
    episode: Array,
    reward: Array | None,
) -> tuple[HFState, Record]:
    """One episode: fit, ask, play, weigh, update.

    Args:
        mdp: model; its true parameter draws next states and feeds diagnostics, nothing else.
        config: "hf_ucrl_rfe_pp", "unweighted", "uniform" or "hf_ucrl_vtr_plus".
        hparams: traced scalars.
        state: state before.
        key: consumed.
        episode: int [], index k from 0.
        reward: [H, S, A], for "hf_ucrl_vtr_plus" alone.

    Returns:
        State after, and the record of the episode.
    """
    sizes = scales(mdp, config, hparams)
    oracle_key, play_key = jax.random.split(key)
    solved = fit(state.statistics)
    log_det = log_determinant(state.statistics.gram)
    radius = exploration_radius(config, hparams, sizes, state.statistics)
    theta = pooled(state.statistics)

    def ask() -> OracleAnswer:
        if config.algorithm == "hf_ucrl_vtr_plus":
            return optimistic_plan(mdp, solved.theta[0, 0], solved.inverse[0, 0], radius[0], cast(Array, reward))
        inverses = (solved.inverse[0, 0], solved.inverse[-1, 0])
        return ask_oracle(mdp, config, hparams, oracle_key, theta, inverses, radius, state.answer, state.statistics)

    doubled = jnp.any(log_det[:, 0] > state.asked_log_det + jnp.log(2.0))
    if config.lazy:
        answer = jax.lax.cond(doubled, ask, lambda: state.answer)
        asked_log_det = jnp.where(doubled, log_det[:, 0], state.asked_log_det)
    else:
        answer, asked_log_det, doubled = ask(), log_det[:, 0], jnp.array(True)

    played = _play(mdp, config, sizes, radius, solved, answer, play_key)
    statistics = add_samples(state.statistics, played.features, played.targets, played.weights)
    onehot = add_onehot(mdp, state.onehot, played.states, played.actions, played.indices)
    now = estimate(state.statistics, answer, episode)
    better = (now.uncertainty <= state.best.uncertainty) | (state.best.episode < 0)
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), now, state.best)
    if config.output == "last":
        best = now
    record = Record(
        states=played.states,
        actions=played.actions,
        uncertainty=now.uncertainty,
        radius=radius,
        log_det=log_det,
        det_growth=log_determinant(statistics.gram) - log_det,
        parameter_error=parameter_error(mdp, solved.theta, state.statistics.gram),
        pooled_error=parameter_error(mdp, theta, jnp.sum(state.statistics.gram[:, 0], axis=0)),
        mean_weight=jnp.mean(played.weights, axis=0),
        asked=doubled,
        finite=solved.finite,
    )
    return HFState(statistics, onehot, answer, asked_log_det, best, state.finite & solved.finite), record


def num_families(config: ExplorerConfig) -> int:
    """Regressions that run side by side."""
    single = config.families == "one" or config.targets == "widths" or config.algorithm == "hf_ucrl_vtr_plus"
    return 1 if single else 2


def num_levels(config: ExplorerConfig) -> int:
    """Moment levels; indicators equal their own powers, so that one regression estimates every moment of a widest f."""
    return 1 if config.targets == "widths" else config.num_moments


def ridge_center(mdp: LinearMixtureMDP, config: ExplorerConfig) -> Array:
    """What the ridge draws the estimates to."""
    return mdp.nominal if config.center == "nominal" else jnp.zeros_like(mdp.nominal)


def exploration_radius(config: ExplorerConfig, hparams: HParams, sizes: Scales, statistics: RidgeStatistics) -> Array:
    """Radius of each family, [F], times the scale that exploration asks for."""
    radius = confidence_radius(
        config.radius,
        statistics.gram[:, 0],
        sizes,
        horizon=config.horizon,
        num_episodes=config.num_episodes,
        delta=jnp.asarray(hparams.delta, sizes.floor.dtype),
        least_deviation=least_deviation(config, sizes.floor),
    )
    return hparams.radius_scale * radius


def pooled(statistics: RidgeStatistics) -> Array:
    """One estimate [D] from all families at level 0: ``(sum Sigma)^-1 (sum b)``.

    On the good event it is within sqrt(2) radius of the truth in the norms of both families.
    """
    return fit(RidgeStatistics(*(jnp.sum(part[:, 0], axis=0) for part in statistics))).theta


def estimate(statistics: RidgeStatistics, answer: OracleAnswer, episode: Array) -> Estimate:
    """What planning and certificate would read if this episode were the output."""
    gram = statistics.gram[:, 0]
    uncertainty = jnp.clip(answer.score, 0.0, 1.0)
    return Estimate(pooled(statistics), gram, answer.policy, uncertainty, jnp.asarray(episode, jnp.int32))


def parameter_error(mdp: LinearMixtureMDP, theta: Array, gram: Array) -> Array:
    """Diagnostic: ``|theta* - theta|_Sigma`` of a stack, [...]."""
    gap = mdp.theta - theta
    return jnp.sqrt(jnp.maximum(jnp.einsum("...i,...ij,...j->...", gap, gram, gap, precision="highest"), 0.0))


def add_onehot(
    mdp: LinearMixtureMDP, statistics: RidgeStatistics, states: Array, actions: Array, indices: Array
) -> RidgeStatistics:
    """Adds one episode to the regression of next-state indicators on their features."""
    rows = mdp.features[states[:-1], actions]  # [H, N, D]
    seen = jnp.take_along_axis(rows, indices[:, None, None], axis=1)[:, 0]
    gram = jnp.einsum("hnd,hne->de", rows, rows, precision="highest")
    return RidgeStatistics(statistics.gram + gram, statistics.moment + jnp.sum(seen, axis=0))


class _Played(NamedTuple):
    states: Array  # int32 [H + 1]
    actions: Array  # int32 [H]
    indices: Array  # int32 [H], position of the next state in its list
    features: Array  # [H, F, M, D]
    targets: Array  # [H, F, M]
    weights: Array  # [H, F, M]


def _play(
    mdp: LinearMixtureMDP,
    config: ExplorerConfig,
    sizes: Scales,
    radius: Array,
    solved: RidgeFit,
    answer: OracleAnswer,
    key: PRNGKey,
) -> _Played:
    """Plays the policy and weighs each transition with the covariances as they stand at that step."""
    families, moments = solved.theta.shape[:2]
    widest = widest_functions(mdp, solved.inverse[0, 0]).functions if config.targets == "widths" else None
    functions = jnp.stack([answer.values, answer.uncertainty][:families], axis=1)[1:]  # [H, F, S]
    powers = jnp.moveaxis(squared_powers(functions, moments), 0, 2)  # [H, F, M, S]
    draw_key, action_key = jax.random.split(key)
    uniforms = jax.random.uniform(draw_key, (config.horizon,), mdp.features.dtype)
    rows = answer.policy
    if config.algorithm == "uniform":
        random_actions = jax.random.randint(action_key, (config.horizon,), 0, mdp.num_actions)
        rows = jnp.broadcast_to(random_actions[:, None], rows.shape)

    def step(carry: tuple[Array, Array], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Array], tuple]:
        state, running = carry
        row, power, uniform = inputs
        action = row[state]
        index = step_index(mdp, uniform, state, action)
        ahead = power[..., mdp.successors[state, action]]  # [F, M, N]
        if widest is not None:
            ahead = widest[state, action][None, None]
        features = jnp.einsum("fmn,nd->fmd", ahead, mdp.features[state, action], precision="highest")
        targets = ahead[..., index]
        if config.algorithm == "unweighted":
            weights = jnp.ones_like(targets)
        elif widest is not None:
            weights = _indicator_weights(features, solved, running, radius, sizes)
        else:
            weights = moment_weights(
                features, solved.theta, solved.inverse, running, radius[:, None], sizes.floor, sizes.cutoff
            ).weights
        running = sherman_morrison(running, features, weights)
        following = mdp.successors[state, action, index]
        return (following, running), (following, action, index, features, targets, weights)

    inputs = (rows, powers, uniforms)
    _, (states, actions, indices, *samples) = jax.lax.scan(step, (mdp.start, solved.inverse), inputs)
    return _Played(jnp.concatenate([mdp.start[None], states]), actions, indices, *samples)


def _indicator_weights(features: Array, solved: RidgeFit, running: Array, radius: Array, sizes: Scales) -> Array:
    """Moment weights of an indicator f, whose powers are f: the variance is p (1 - p) from its own mean p."""
    phi, theta, inverse, running = (
        jnp.concatenate([x, x], axis=1) for x in (features, solved.theta, solved.inverse, running)
    )
    return moment_weights(phi, theta, inverse, running, radius[:, None], sizes.floor, sizes.cutoff).weights[:, :1]
