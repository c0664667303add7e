"""Weight rules that read statistics of the batch's rewards or of the objectives, with no further gradient.

They have the signature of :mod:`jaxrl_suite.pareto.weights`. For SAW and CTWA only summaries were at hand when this was
written; the docstrings say what is implemented, and nothing here claims to reproduce the numbers of those papers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import as_number, check
from jaxrl_suite.pareto.hypervolume import as_numbers, check_known
from jaxrl_suite.pareto.weights import Signals, WeightRule, _need, _normalise, check_simplex
from jaxrl_suite.types import Array

_EPSILON = 1e-6


def _spread(values: Array, axis: int | tuple[int, ...]) -> Array:
    """Biased standard deviation with a derivative that stays finite for constant values."""
    centred = values - jnp.mean(values, axis=axis, keepdims=True)
    variance = jnp.mean(centred * centred, axis=axis)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


class AverageState(NamedTuple):
    """Exponential average.

    Attributes:
        average: [K].
        count: int32 [], how many values went in.
    """

    average: Array
    count: Array


def _average(state: AverageState, value: Array, decay: Array | float) -> tuple[AverageState, Array]:
    """Updates an exponential average and returns it without the bias towards its start."""
    count = state.count + 1
    average = decay * state.average + (1 - decay) * value
    return AverageState(average, count), average / (1 - decay ** count.astype(value.dtype))


def saw_weights(weights: Array, *, decay: Array | float = 0.0) -> WeightRule:
    """Weights by the coefficient of variation of each reward over the batch: what still varies still teaches.

    ``w_i ~ base_i * std_i / (|mean_i| + 1e-6)``, optionally averaged over steps. If no reward varies, the base weights.

    Args:
        weights: [K], base weights, on the simplex.
        decay: of the exponential average of the coefficients, in [0, 1).

    References:
        arXiv 2606.07705 (SAW), as summarised publicly: weights from the batch coefficient of variation.
    """
    weights = check_simplex(weights)
    decay = as_number("decay", decay, weights.dtype, interval="[0, 1)")

    def init() -> AverageState:
        return AverageState(jnp.zeros_like(weights), jnp.zeros((), jnp.int32))

    def step(state: AverageState, signals: Signals) -> tuple[AverageState, Array]:
        rewards = _need(signals.rewards, "rewards").astype(weights.dtype)
        mean = jnp.abs(jnp.mean(rewards, axis=(1, 2)))
        state, variation = _average(state, _spread(rewards, (1, 2)) / (mean + _EPSILON), decay)
        raw = weights * variation
        return state, jnp.where(jnp.sum(raw) > 0, _normalise(raw), weights)

    return WeightRule(init, step, ("rewards",))


class CtwaState(NamedTuple):
    """State of :func:`ctwa_weights`.

    Attributes:
        log_weights: [K].
        covariance: exponential average of the covariance of each reward with the advantage.
    """

    log_weights: Array
    covariance: AverageState


def ctwa_weights(weights: Array, rate: Array | float, *, targets: Array, decay: Array | float = 0.9) -> WeightRule:
    """Log-weights rise for rewards that the advantage tracks less than wanted.

    ``c_i = average of cov(r_i, A)``; ``log w_i += rate (target_i - c_i)``, then normalised.

    Args:
        weights: [K], initial weights, on the simplex, all positive.
        rate: step of the log-weights.
        targets: [K], wanted covariances, in the units of reward times advantage.
        decay: of the exponential average, in [0, 1).

    References:
        arXiv 2602.06869 (CTWA), as summarised publicly: log-weight update from the covariance of each reward with the
        advantage, exponential average, targets.
    """
    weights = check_simplex(weights)
    rate = as_number("rate", rate, weights.dtype, interval="[0, inf)")
    decay = as_number("decay", decay, weights.dtype, interval="[0, 1)")
    targets = as_numbers("targets", targets, weights.shape, weights.dtype)
    check_known("targets", targets)

    def init() -> CtwaState:
        return CtwaState(jnp.log(weights), AverageState(jnp.zeros_like(weights), jnp.zeros((), jnp.int32)))

    def step(state: CtwaState, signals: Signals) -> tuple[CtwaState, Array]:
        rewards = _need(signals.rewards, "rewards").astype(weights.dtype)
        advantages = _need(signals.advantages, "advantages").astype(weights.dtype)
        centred = rewards - jnp.mean(rewards, axis=(1, 2), keepdims=True)
        covariance = jnp.mean(centred * (advantages - jnp.mean(advantages))[None], axis=(1, 2))
        average, smooth = _average(state.covariance, covariance, decay)
        change = rate * (targets - smooth)
        log_weights = jax.nn.log_softmax(state.log_weights + change)
        return CtwaState(log_weights, average), jnp.exp(log_weights)

    return WeightRule(init, step, ("rewards", "advantages"))


def mo_grpo_weights(weights: Array) -> WeightRule:
    """Weights that even out the spread of the rewards: ``w_i ~ base_i / std_i`` over the batch.

    The weights of MO-GRPO, whose advantages ``alignment.mo_grpo_advantages`` divides by the spread within each group.
    A reward that does not vary gets the base weight, it moves nothing anyway.

    Args:
        weights: [K], base weights, on the simplex.

    References:
        Ichihara et al. (2025), arXiv 2509.22047 (MO-GRPO).
    """
    weights = check_simplex(weights)

    def step(state: tuple[()], signals: Signals) -> tuple[tuple[()], Array]:
        spread = _spread(_need(signals.rewards, "rewards").astype(weights.dtype), (1, 2))
        return state, _normalise(weights / jnp.where(spread > _EPSILON, spread, 1))

    return WeightRule(lambda: (), step, ("rewards",))


def gdpo_weights(weights: Array) -> WeightRule:
    """The weight form of GDPO: ``w_i ~ base_i / root mean square of the spreads within groups``.

    Scalarising with these weights and then normalising agrees with GDPO where every group spreads alike; the exact
    estimator is ``alignment.gdpo_advantages``, which normalises each reward in each group before it sums.

    Args:
        weights: [K], base weights, on the simplex.

    References:
        Liu et al. (2026), arXiv 2601.05242 (GDPO).
    """
    weights = check_simplex(weights)

    def step(state: tuple[()], signals: Signals) -> tuple[tuple[()], Array]:
        rewards = _need(signals.rewards, "rewards").astype(weights.dtype)
        centred = rewards - jnp.mean(rewards, axis=2, keepdims=True)
        variance = jnp.mean(centred * centred, axis=(1, 2))
        flat = variance <= _EPSILON**2
        return state, _normalise(weights / jnp.where(flat, 1, jnp.sqrt(jnp.where(flat, 1, variance))))

    return WeightRule(lambda: (), step, ("rewards",))


def lagrangian_weights(
    weights: Array, thresholds: Array, rate: Array | float, *, max_multiplier: float = 100.0
) -> WeightRule:
    """Weights as Lagrange multipliers of constraints ``J_i >= threshold_i``.

    ``lambda_i <- clip(lambda_i + rate (threshold_i - J_i), 0, max)`` and ``w ~ base + lambda``.

    Args:
        weights: [K], base weights of the objective proper, on the simplex.
        thresholds: [K], in the units of the objectives; ``-inf`` for an objective without a constraint.
        rate: step of the multipliers, per unit of violation.
        max_multiplier: largest multiplier.

    References:
        Altman (1999), "Constrained Markov decision processes"; Tessler et al. (2018), arXiv 1805.11074.
    """
    weights = check_simplex(weights)
    given, thresholds = thresholds, as_numbers("thresholds", thresholds, weights.shape, weights.dtype)
    known, rule = not isinstance(thresholds, jax.core.Tracer), "must be finite, or -inf where there is no constraint"
    check(not known or bool(np.all(np.asarray(thresholds) < np.inf)), argument="thresholds", value=given, rule=rule)
    rate = as_number("rate", rate, weights.dtype, interval="[0, inf)")
    most = as_number("max_multiplier", max_multiplier, weights.dtype, interval="(0, inf]")

    def step(state: Array, signals: Signals) -> tuple[Array, Array]:
        gap = thresholds - _need(signals.objectives, "objectives").astype(weights.dtype)
        gap = jnp.where(jnp.isfinite(thresholds), gap, -jnp.ones_like(gap))
        state = jnp.clip(state + rate * gap, 0, most)
        return state, _normalise(weights + state)

    return WeightRule(lambda: jnp.zeros_like(weights), step, ("objectives",))
