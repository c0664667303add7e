"""Runs an explorer: one scan over episodes, cut into chunks at will, and the model that planning reads."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check, check_key
from jaxrl_suite.mdp import LinearMixtureMDP, check_kernel
from jaxrl_suite.reward_free.baselines import (
    CountState,
    count_episode,
    empirical_kernel,
    finish_width,
    init_counts,
    init_width,
    width_episode,
)
from jaxrl_suite.reward_free.config import WIDTH_ALGORITHMS, ExplorerConfig, HParams
from jaxrl_suite.reward_free.hf import hf_episode, init_hf, pooled
from jaxrl_suite.reward_free.precision import rounding_error, warn_if_imprecise
from jaxrl_suite.reward_free.projection import project_parameter
from jaxrl_suite.reward_free.regression import RidgeStatistics, fit
from jaxrl_suite.reward_free.rewards import check_rewards
from jaxrl_suite.reward_free.types import Estimate, Exploration, Record
from jaxrl_suite.types import Array, PRNGKey


class ExplorerState(NamedTuple):
    """What a run carries from episode to episode; checkpoint it to resume.

    Attributes:
        key: base key; episode k draws from ``fold_in(key, k)``.
        inner: state of the algorithm.
    """

    key: PRNGKey
    inner: Any


def explore(
    key: PRNGKey,
    mdp: LinearMixtureMDP,
    config: ExplorerConfig,
    hparams: HParams | None = None,
    *,
    reward: Array | None = None,
) -> Exploration:
    """Explores for K episodes without a reward; plan for any reward afterwards with :func:`plan`.

    A pure function: jit it (``config`` static), vmap it over keys and hyperparameters. One scan, one compilation an
    algorithm. See :func:`advance` for runs in chunks.

    Args:
        key: consumed.
        mdp: the world; its true parameter draws the transitions and is otherwise read by diagnostics only.
        config: algorithm and sizes.
        hparams: traced scalars.
        reward: [H, S, A], required by "hf_ucrl_vtr_plus" and refused by the others; inside jit, where it cannot be
            refused, :func:`rewards_outside` says whether it is in the class.

    Returns:
        History, statistics, estimate and model.

    Raises:
        ValueError: a reward is missing, superfluous, of the wrong shape, or outside the class (the path is named); a
            concrete hyperparameter cannot be.

    Warns:
        PrecisionWarning: in float32, if rounding may reach the confidence radius at these sizes. What happened is in
            ``Exploration.precise``.

    References:
        Zhang, Zhang, Gu, 2023, arXiv 2303.10165 (HF-UCRL-RFE++); Zhang, Zhou, Gu, 2021, arXiv 2110.06394 (UCRL-RFE and
        UCRL-RFE+); Zhou, Gu, 2022, arXiv 2205.11507 (HF-UCRL-VTR+); Kaufmann et al., 2021, arXiv 2006.06294 (RF-UCRL).
    """
    check_key(key)
    hparams = HParams() if hparams is None else hparams
    _check_reward(mdp, config, reward)
    _check_hparams(hparams)
    _check_world(mdp)
    warn_if_imprecise(mdp, config, hparams)
    state = init_explorer(key, mdp, config, hparams)
    state, history = advance(mdp, config, hparams, state, jnp.int32(0), config.num_episodes, reward=reward)
    return finish(mdp, config, state, history)


def init_explorer(key: PRNGKey, mdp: LinearMixtureMDP, config: ExplorerConfig, hparams: HParams) -> ExplorerState:
    """The state before the first episode."""
    if config.algorithm == "rf_ucrl":
        return ExplorerState(key, init_counts(mdp, config))
    if config.algorithm in WIDTH_ALGORITHMS:
        return ExplorerState(key, init_width(mdp, config, hparams))
    return ExplorerState(key, init_hf(mdp, config, hparams))


@functools.partial(jax.jit, static_argnames=("config", "num_episodes"))
def advance(
    mdp: LinearMixtureMDP,
    config: ExplorerConfig,
    hparams: HParams,
    state: ExplorerState,
    start: Array,
    num_episodes: int,
    *,
    reward: Array | None = None,
) -> tuple[ExplorerState, Record]:
    """Plays episodes ``start … start + num_episodes - 1``; chunks add up to the whole run, bit for bit.

    Args:
        mdp: the world.
        config: static.
        hparams: traced scalars.
        state: state before.
        start: int [], index of the first episode.
        num_episodes: episodes in this chunk, static.
        reward: as in :func:`explore`.

    Returns:
        State after, and the records [num_episodes, ...].
    """

    play_episode = hf_episode
    if config.algorithm == "rf_ucrl":
        play_episode = count_episode
    elif config.algorithm in WIDTH_ALGORITHMS:
        play_episode = width_episode

    def body(inner: Any, episode: Array) -> tuple[Any, Record]:
        episode_key = jax.random.fold_in(state.key, episode)
        return play_episode(mdp, config, hparams, inner, episode_key, episode, reward)

    inner, records = jax.lax.scan(body, state.inner, start + jnp.arange(num_episodes, dtype=jnp.int32))
    return ExplorerState(state.key, inner), records


def finish(mdp: LinearMixtureMDP, config: ExplorerConfig, state: ExplorerState, history: Record) -> Exploration:
    """Turns the final state and the joined records into an :class:`Exploration`."""
    inner = state.inner
    if config.algorithm == "rf_ucrl":
        return _finish_counts(mdp, config, inner, history)
    if config.algorithm in WIDTH_ALGORITHMS:
        chosen = finish_width(config, inner, history)
    elif config.output == "final":
        chosen = Estimate(
            pooled(inner.statistics),
            inner.statistics.gram[:, 0],
            inner.answer.policy,
            history.uncertainty[-1],
            jnp.int32(config.num_episodes),
        )
    else:
        chosen = inner.best
    theta, metric = chosen.theta, jnp.sum(chosen.gram, axis=0)
    if config.planner_estimator == "onehot":
        theta, metric = fit(inner.onehot).theta, inner.onehot.gram
    theta, model, residual = kernel_of(mdp, config, theta, metric)
    finite = inner.finite & jnp.all(jnp.isfinite(model))
    rounding = rounding_error(metric, theta)
    return Exploration(
        history,
        inner.statistics,
        chosen._replace(theta=theta),
        model,
        mdp.successors,
        mdp.start,
        residual,
        finite,
        mdp.mask,
        rounding,
        rounding <= 0.1 * jnp.min(history.radius[-1]),
    )


def _finish_counts(mdp: LinearMixtureMDP, config: ExplorerConfig, state: CountState, history: Record) -> Exploration:
    """RF-UCRL has counts instead of regressions; its parameter is left at the centre of the ridge."""
    dimension, dtype = mdp.dimension, mdp.features.dtype
    chosen = Estimate(
        mdp.nominal,
        jnp.broadcast_to(jnp.eye(dimension, dtype=dtype), (1, dimension, dimension)),
        state.policy,
        history.uncertainty[-1],
        jnp.int32(config.num_episodes),
    )
    visits = RidgeStatistics(jnp.sum(state.counts, axis=-1), state.counts)
    model, zero = empirical_kernel(mdp, state.counts), jnp.zeros((), dtype)
    true = jnp.array(True)
    return Exploration(history, visits, chosen, model, mdp.successors, mdp.start, zero, true, mdp.mask, zero, true)


def kernel_of(mdp: LinearMixtureMDP, config: ExplorerConfig, theta: Array, gram: Array) -> tuple[Array, Array, Array]:
    """Parameter and kernel [S, A, N] that planning uses, and how far the estimate was from a kernel.

    With ``config.project`` the estimate is projected first; what rounding leaves is cut at 0 and rescaled. Without, the
    raw ``phi . theta`` is returned.
    """
    raw = mdp.kernel(theta)
    violation = jnp.maximum(-jnp.min(raw), jnp.max(jnp.abs(jnp.sum(raw, axis=-1) - 1.0)))
    if not config.project:
        return theta, raw, violation
    theta = project_parameter(mdp, theta, gram).theta
    kernel = jnp.maximum(mdp.kernel(theta), 0.0)
    return theta, kernel / jnp.sum(kernel, axis=-1, keepdims=True), violation


def _check_reward(mdp: LinearMixtureMDP, config: ExplorerConfig, reward: Array | None) -> None:
    needs = config.algorithm == "hf_ucrl_vtr_plus"
    if (reward is None) == needs:
        verb = "is required by" if needs else "is refused by"
        raise ValueError(
            f"reward: {verb} algorithm={config.algorithm!r}, which explores {'for' if needs else 'without'} it."
        )
    shape = (config.horizon, mdp.num_states, mdp.num_actions)
    check(
        reward is None or reward.shape == shape,
        argument="reward",
        value=None if reward is None else reward.shape,
        rule=f"must be [H, S, A] = {shape}",
    )
    if reward is not None:
        check_rewards(mdp, reward, "reward")


def _check_world(mdp: LinearMixtureMDP) -> None:
    """A concrete world must be a kernel; names the row that is not a distribution."""
    parts = (mdp.features, mdp.theta)
    if not any(isinstance(part, jax.core.Tracer) for part in parts):
        check_kernel(cast(Array, np.asarray(mdp.features) @ np.asarray(mdp.theta)), "mdp: kernel")


def _check_hparams(hparams: HParams) -> None:
    """Concrete hyperparameters must make sense; traced ones (a sweep) are not looked at."""
    for name, value in hparams._asdict().items():
        if isinstance(value, jax.core.Tracer):
            continue
        values = np.asarray(value)
        low = values > 0 if name in ("ridge_scale", "delta") else values >= 0
        fits = bool(np.all(low & np.isfinite(values)))
        fits = fits and (name != "delta" or bool(np.all(values < 1)))
        rule = {"delta": "must be in (0, 1)", "ridge_scale": "must be positive"}.get(name, "must not be negative")
        check(fits, argument=f"HParams.{name}", value=value, rule=rule)
