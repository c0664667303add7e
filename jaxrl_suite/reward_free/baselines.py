"""The predecessors, UCRL-RFE and UCRL-RFE+, and the tabular RF-UCRL, rescaled to a total reward of at most 1."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.mdp import LinearMixtureMDP, step_index
from jaxrl_suite.reward_free.config import ExplorerConfig, HParams
from jaxrl_suite.reward_free.hf import add_onehot, parameter_error, ridge_center
from jaxrl_suite.reward_free.oracles import OracleAnswer, optimistic_plan
from jaxrl_suite.reward_free.radius import confidence_radius, scales
from jaxrl_suite.reward_free.regression import (
    RidgeFit,
    RidgeStatistics,
    add_samples,
    fit,
    init_statistics,
    log_determinant,
    width,
)
from jaxrl_suite.reward_free.types import Estimate, Record
from jaxrl_suite.reward_free.widths import Widest, widest_functions
from jaxrl_suite.types import Array, PRNGKey


class WidthState(NamedTuple):
    """State of UCRL-RFE between episodes. F = 1, or 3 for UCRL-RFE+: widths, values, squared values.

    Attributes:
        statistics: gram [F, 1, D, D] and moment [F, 1, D]; the first regression serves planning.
        onehot: gram [D, D] and moment [D] of next-state indicators.
        policy: int32 [H, S], last exploration policy.
        finite: bool [].
    """

    statistics: RidgeStatistics
    onehot: RidgeStatistics
    policy: Array
    finite: Array


def init_width(mdp: LinearMixtureMDP, config: ExplorerConfig, hparams: HParams) -> WidthState:
    """The state before the first episode; the ridge is ``1 / B^2`` here, not ``D / B^2``."""
    ridge, center = scales(mdp, config, hparams).ridge, ridge_center(mdp, config)
    count = 3 if config.algorithm == "ucrl_rfe_plus" else 1
    policy = jnp.zeros((config.horizon, mdp.num_states), jnp.int32)
    return WidthState(
        init_statistics((count, 1), ridge, center), init_statistics((), ridge, center), policy, jnp.array(True)
    )


def width_episode(
    mdp: LinearMixtureMDP,
    config: ExplorerConfig,
    hparams: HParams,
    state: WidthState,
    key: PRNGKey,
    episode: Array,
    reward: Array | None,
) -> tuple[WidthState, Record]:
    """One episode of UCRL-RFE(+): plan for the widths as a reward, regress on the widest functions met.

    The pseudo reward is ``min(1, 2 beta max_f |phi_f|)`` and the policy is optimistic for it. Differs: the paper lets
    total rewards reach H; here f is into [0, 1] and values are cut at 1. Its pseudo reward prints a root over the
    norm, its proof needs the norm. Planning afterwards uses no bonus, as for every explorer of this package.

    References:
        Zhang, Zhou, Gu, 2021, arXiv 2110.06394, algorithms 1 to 3.
    """
    del episode, reward
    solved = fit(state.statistics)
    radius = _radii(mdp, config, hparams, state.statistics)
    widest = widest_functions(mdp, solved.inverse[0, 0])
    pseudo = jnp.minimum(1.0, 2.0 * radius[0] * widest.widths)
    rewards = jnp.broadcast_to(pseudo, (config.horizon, *pseudo.shape))
    planner = min(1, len(radius) - 1)  # UCRL-RFE+ plans with its variance-weighted regression
    answer = optimistic_plan(mdp, solved.theta[planner, 0], solved.inverse[planner, 0], radius[planner], rewards)
    states, actions, indices, *samples = _play(mdp, config, solved, radius, answer, widest, key)
    statistics = add_samples(state.statistics, *samples)
    record = Record(
        states=states,
        actions=actions,
        uncertainty=jnp.clip(answer.score, 0.0, 1.0),
        radius=radius,
        log_det=log_determinant(state.statistics.gram),
        det_growth=log_determinant(statistics.gram) - log_determinant(state.statistics.gram),
        parameter_error=parameter_error(mdp, solved.theta, state.statistics.gram),
        pooled_error=parameter_error(mdp, solved.theta[0, 0], state.statistics.gram[0, 0]),
        mean_weight=jnp.mean(samples[2], axis=0),
        asked=jnp.array(True),
        finite=solved.finite,
    )
    onehot = add_onehot(mdp, state.onehot, states, actions, indices)
    return WidthState(statistics, onehot, answer.policy, state.finite & solved.finite), record


def finish_width(config: ExplorerConfig, state: WidthState, history: Record) -> Estimate:
    """The estimate after the last episode, which both papers plan with."""
    main = RidgeStatistics(state.statistics.gram[0, 0], state.statistics.moment[0, 0])
    return Estimate(
        fit(main).theta, main.gram[None], state.policy, history.uncertainty[-1], jnp.int32(config.num_episodes)
    )


def _radii(mdp: LinearMixtureMDP, config: ExplorerConfig, hparams: HParams, statistics: RidgeStatistics) -> Array:
    """Radii of the regressions; with the constants of the paper, rescaled, in mode "paper"."""
    sizes = scales(mdp, config, hparams)
    dtype, count = sizes.floor.dtype, statistics.gram.shape[0]
    if config.radius != "paper":
        deviations = jnp.asarray([1.0, mdp.dimension**-0.5, 1.0][:count], dtype)
        return hparams.radius_scale * confidence_radius(
            config.radius,
            statistics.gram[:, 0],
            sizes,
            horizon=config.horizon,
            num_episodes=config.num_episodes,
            delta=jnp.asarray(hparams.delta, dtype),
            least_deviation=deviations,
        )
    steps, delta, d = config.num_episodes * config.horizon, hparams.delta, mdp.dimension
    information = jnp.log1p(steps * mdp.norm_bound**2)
    if count == 1:
        radii = [jnp.sqrt(d * (jnp.log(3.0 / delta) + information)) + 1.0]
    else:
        log_term = jnp.log(48.0 * steps**2 / delta)
        root = jnp.sqrt(d * information * log_term)
        radii = [
            jnp.sqrt(d * (jnp.log(12.0 / delta) + information)) + 1.0,
            8.0 * root + 4.0 * d**0.5 * log_term + 1.0,
            8.0 * root + 4.0 * log_term + 1.0,
        ]
    return hparams.radius_scale * jnp.stack([jnp.asarray(value, dtype) for value in radii])


def _play(
    mdp: LinearMixtureMDP,
    config: ExplorerConfig,
    solved: RidgeFit,
    radius: Array,
    answer: OracleAnswer,
    widest: Widest,
    key: PRNGKey,
) -> tuple[Array, ...]:
    """States, actions, indices, features [H, F, 1, D], targets [H, F, 1] and weights [H, F, 1] of one episode."""
    uniforms = jax.random.uniform(key, (config.horizon,), mdp.features.dtype)

    def step(state: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, tuple]:
        row, ahead, uniform = inputs
        action = row[state]
        index = step_index(mdp, uniform, state, action)
        successors, features = mdp.successors[state, action], mdp.features[state, action]
        functions = widest.functions[state, action][None]
        if config.algorithm == "ucrl_rfe_plus":
            values = ahead[successors]
            functions = jnp.stack([functions[0], values, values * values])
        phi = functions @ features
        weights = jnp.ones(functions.shape[0], features.dtype)
        if config.algorithm == "ucrl_rfe_plus":
            weights = weights.at[1].set(1.0 / _variance(mdp, solved, radius, phi))
        sample = (phi[:, None], functions[:, index, None], weights[:, None])
        following = successors[index]
        return following, (following, action, index, *sample)

    _, (states, actions, indices, *samples) = jax.lax.scan(
        step, mdp.start, (answer.policy, answer.values[1:], uniforms)
    )
    return jnp.concatenate([mdp.start[None], states]), actions, indices, *samples


def _variance(mdp: LinearMixtureMDP, solved: RidgeFit, radius: Array, phi: Array) -> Array:
    """``max(1 / D, variance estimate + what may be wrong with it)`` of UCRL-RFE+, for values in [0, 1]."""
    first = jnp.clip(phi[1] @ solved.theta[1, 0], 0.0, 1.0)
    second = jnp.clip(phi[2] @ solved.theta[2, 0], 0.0, 1.0)
    error = jnp.minimum(1.0, radius[2] * width(solved.inverse[2, 0], phi[2]))
    # The paper's radius in this term is about sqrt(D) times that of the regression itself.
    check = mdp.dimension**0.5 * radius[1]
    error = error + jnp.minimum(1.0, 2.0 * check * width(solved.inverse[1, 0], phi[1]))
    return jnp.maximum(1.0 / mdp.dimension, second - first**2 + error)


class CountState(NamedTuple):
    """State of RF-UCRL: visits.

    Attributes:
        counts: [S, A, N], transitions seen.
        policy: int32 [H, S].
    """

    counts: Array
    policy: Array


def init_counts(mdp: LinearMixtureMDP, config: ExplorerConfig) -> CountState:
    """No visits."""
    policy = jnp.zeros((config.horizon, mdp.num_states), jnp.int32)
    return CountState(jnp.zeros(mdp.successors.shape, mdp.features.dtype), policy)


def empirical_kernel(mdp: LinearMixtureMDP, counts: Array) -> Array:
    """Frequencies [S, A, N]; uniform over the listed successors where nothing was seen."""
    visits = jnp.sum(counts, axis=-1, keepdims=True)
    uniform = mdp.mask / jnp.sum(mdp.mask, axis=-1, keepdims=True)
    return jnp.where(visits > 0, counts / jnp.maximum(visits, 1.0), uniform.astype(counts.dtype))


def count_episode(
    mdp: LinearMixtureMDP,
    config: ExplorerConfig,
    hparams: HParams,
    state: CountState,
    key: PRNGKey,
    episode: Array,
    reward: Array | None,
) -> tuple[CountState, Record]:
    """One episode of RF-UCRL, which knows nothing of the linear structure.

    Greedy on ``E_h(s, a) = min(1, c sqrt(b(n) / n) + Phat max_a E_{h+1})`` with
    ``b(n) = log(2 S A H / delta) + (S - 1) log(e (1 + n / (S - 1)))``; c is ``hparams.radius_scale``.

    References:
        Kaufmann, Menard, Domingues, Jonsson, Leurent, Valko, 2021, arXiv 2006.06294.
    """
    del episode, reward
    visits, kernel = jnp.sum(state.counts, axis=-1), empirical_kernel(mdp, state.counts)
    others = max(mdp.num_states - 1, 1)
    pairs = 2.0 * mdp.num_states * mdp.num_actions * config.horizon
    log_term = jnp.log(pairs / hparams.delta) + others * (1.0 + jnp.log1p(visits / others))
    bonus = hparams.radius_scale * jnp.sqrt(log_term / jnp.maximum(visits, 1.0))
    bonus = jnp.where(visits > 0, bonus, 1.0)

    def back(errors: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        scores = bonus + jnp.sum(kernel * errors[mdp.successors], axis=-1)
        errors = jnp.clip(jnp.max(scores, axis=-1), 0.0, 1.0)
        return errors, (jnp.argmax(scores, axis=-1).astype(jnp.int32), errors[mdp.start])

    last = jnp.zeros(mdp.num_states, kernel.dtype)
    _, (policy, starts) = jax.lax.scan(back, last, None, length=config.horizon)
    policy = policy[::-1]
    uniforms = jax.random.uniform(key, (config.horizon,), kernel.dtype)

    def step(place: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array, Array]]:
        row, uniform = inputs
        action = row[place]
        index = step_index(mdp, uniform, place, action)
        following = mdp.successors[place, action, index]
        return following, (following, action, index)

    _, (states, actions, indices) = jax.lax.scan(step, mdp.start, (policy, uniforms))
    states = jnp.concatenate([mdp.start[None], states])
    counts = state.counts.at[states[:-1], actions, indices].add(1.0)
    zero = jnp.zeros((1, 1), kernel.dtype)
    record = Record(
        states=states,
        actions=actions,
        uncertainty=starts[-1],
        radius=jnp.asarray(hparams.radius_scale, kernel.dtype)[None],
        log_det=zero,
        det_growth=zero,
        parameter_error=zero,
        pooled_error=zero[0, 0],
        mean_weight=jnp.ones_like(zero),
        asked=jnp.array(True),
        finite=jnp.array(True),
    )
    return CountState(counts, policy), record
