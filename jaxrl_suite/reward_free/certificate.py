"""A bound on what any reward can lose, valid on the good event: what the uncertainty value is not."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.mdp import LinearMixtureMDP, integrated_features
from jaxrl_suite.reward_free.config import WIDTH_ALGORITHMS, ExplorerConfig, HParams
from jaxrl_suite.reward_free.hf import num_families
from jaxrl_suite.reward_free.radius import confidence_radius, least_deviation, scales
from jaxrl_suite.reward_free.regression import RidgeStatistics, fit, width
from jaxrl_suite.reward_free.types import Exploration
from jaxrl_suite.reward_free.widths import width_bound
from jaxrl_suite.types import Array


class CertificateOutput(NamedTuple):
    """Bounds on ``V*(start; r) - V^pi_r(start; r)`` for every reward of the class at once, on the good event.

    Attributes:
        bound: [], the smaller of the two below, at most 1; 1 if a factorisation failed (``Exploration.finite``).
        decoupled: [], ``4 Vbar``, the decoupled bound in the paper's constants (the pooled one for a single family).
        pooled: [], ``2 W`` in the norm of all data together; what a model error at the planned parameter can cost.
        radius: [F], confidence radii that both rest on.
        slack: [], part of the bounds that pays for rounding the parameter to a kernel.
        values: [H + 1, S], the W of ``pooled``, from each step and state on.
    """

    bound: Array
    decoupled: Array
    pooled: Array
    radius: Array
    slack: Array
    values: Array


def certificate(
    mdp: LinearMixtureMDP,
    config: ExplorerConfig,
    hparams: HParams,
    exploration: Exploration,
    *,
    scale: float | Array = 1.0,
) -> CertificateOutput:
    """Certifies the plans of an exploration, for all rewards of the class at once.

    Good event: in each regression f the truth is within ``radius_f`` of the estimate. Then the pooled parameter, and
    its projection on the kernels, is within ``rho = sqrt(sum_f radius_f^2)`` of the truth in the norm of ``Sigma =
    sum_f Sigma_f``, and for every reward and policy the value error D obeys ``D_h <= min(1, |phi_V . (theta - theta*)|
    + P* D_{h+1})`` with V in [0, 1]. Hence D is below the optimistic recursion ::

        W_h(s) = max_a min(1, rho max_f |phi_f(s, a)| + phi_W . theta + rho |phi_W(s, a)|)

    and a plan loses at most ``2 W_1``. Both kernels have rows of sum 1, so f may be taken into [-1/2, 1/2]. The bound
    in the paper's constants is ``4 Vbar_1`` with widths by family and bonus ``2 radius``. Each (s, a) picks an f of
    its own, so that neither bound is free of the horizon. With ``config.radius`` "subgaussian" (or "paper") the good
    event has probability at least 1 - delta (1 - 4 M delta); with "selfnorm" and "fixed" it is not proven.

    Args:
        mdp: model (its true parameter is not read).
        config: the configuration of the exploration, with the radius mode that the certificate shall use.
        hparams: as in the exploration, ``delta`` free; ``radius_scale`` is not applied here.
        exploration: its estimate is the one that :func:`plan` plans with, and with which the covariances go.
        scale: multiplies the radius; 1.3 in mode "fixed" covered 95 % of runs where it was measured.

    Returns:
        The bounds.

    Raises:
        ValueError: the plan comes from the one-hot refit or from counts, which these covariances do not bound; the
            configuration is not that of the exploration.

    References:
        Zhang, Zhang, Gu, 2023, arXiv 2303.10165, lemma on the suboptimality of the plan; derivation above.
    """
    check(
        config.planner_estimator == "pooled" and config.algorithm not in ("rf_ucrl", "hf_ucrl_vtr_plus"),
        argument="config",
        value=(config.algorithm, config.planner_estimator),
        rule="the certificate bounds plans made with the pooled estimate only",
        remedy='Explore with planner_estimator="pooled"',
    )
    estimate = exploration.estimate
    families = num_families(config) if config.algorithm not in WIDTH_ALGORITHMS else 1
    made = estimate.gram.shape[0]
    check(
        made == families,
        argument="config",
        value=(config.algorithm, config.families, config.targets),
        rule=f"asks for {families} regressions where the exploration was made with {made}",
        remedy="Pass the configuration of the exploration",
    )
    sizes = scales(mdp, config, hparams)
    radius = scale * confidence_radius(
        config.radius,
        estimate.gram,
        sizes,
        horizon=config.horizon,
        num_episodes=config.num_episodes,
        delta=jnp.asarray(hparams.delta, sizes.floor.dtype),
        least_deviation=least_deviation(config, sizes.floor),
    )
    rho = jnp.sqrt(jnp.sum(radius**2))
    inverses = fit(RidgeStatistics(estimate.gram, jnp.zeros_like(estimate.gram[..., 0]))).inverse
    joint = fit(RidgeStatistics(jnp.sum(estimate.gram, axis=0), jnp.zeros_like(estimate.theta))).inverse
    rounding = jnp.max(jnp.sum(jnp.abs(exploration.model - mdp.kernel(estimate.theta)), axis=-1))
    # Twice for the values of two policies, once for rows of phi . theta that miss a sum of 1 by as much.
    slack = 3.0 * config.horizon * rounding
    centred = config.project  # an unprojected estimate may have rows that do not sum to 1
    values = optimistic_total(
        mdp, config.horizon, estimate.theta, rho * width_bound(mdp, joint, centred=centred), rho, joint
    )
    pooled = 2.0 * values[0, mdp.start] + slack
    decoupled = pooled
    if inverses.shape[0] == 2:
        beta = jnp.max(radius)  # the paper's argument knows one radius
        tilde = beta * width_bound(mdp, inverses[0], centred=False)
        paper = optimistic_total(mdp, config.horizon, estimate.theta, tilde, 2.0 * beta, inverses[1])
        decoupled = 4.0 * paper[0, mdp.start] + slack
    bound = jnp.minimum(1.0, jnp.minimum(pooled, decoupled))
    bound = jnp.where(exploration.finite & jnp.isfinite(bound), bound, 1.0)  # nothing is known after a failure
    return CertificateOutput(bound, decoupled, pooled, radius, slack, values)


def optimistic_total(
    mdp: LinearMixtureMDP, horizon: int, theta: Array, surprise: Array, bonus: Array, inverse: Array
) -> Array:
    """``W_h = max_a clip01(surprise + phi_W . theta + bonus |phi_W|)``, [H + 1, S]."""
    surprise = jnp.minimum(1.0, surprise)

    def back(values: Array, _: None) -> tuple[Array, Array]:
        features = integrated_features(mdp, values)
        bracket = surprise + features @ theta + bonus * width(inverse, features)
        values = jnp.clip(jnp.max(bracket, axis=-1), 0.0, 1.0)
        return values, values

    last = jnp.zeros(mdp.num_states, theta.dtype)
    _, values = jax.lax.scan(back, last, None, length=horizon)
    return jnp.concatenate([values[::-1], last[None]])
