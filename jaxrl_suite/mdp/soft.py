"""Soft (entropy-regularised) planning: maximum-entropy values and their policies as distrax categoricals."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.distributions import softmax_policy
from jaxrl_suite.mdp.planning import _stepwise_reward, bellman_fixed_point, bellman_values, has_converged
from jaxrl_suite.mdp.tabular import TabularMDP, expected_value
from jaxrl_suite.types import Array


class SoftPlan(NamedTuple):
    """A maximum-entropy plan.

    Attributes:
        values: [S] (discounted) or [H + 1, S], soft values; entropy counts in nats times the temperature.
        action_values: [S, A] or [H, S, A].
        temperature: [], the beta of ``V = beta log sum exp(Q / beta)``.
        residual: [], largest soft Bellman error, without derivative; 0 for a finite horizon, which is exact.
        converged: bool [].
    """

    values: Array
    action_values: Array
    temperature: Array
    residual: Array
    converged: Array

    @property
    def policy(self) -> Any:
        """The distrax categorical ``pi(a | s) = exp((Q(s, a) - V(s)) / beta)``, batch shape [S] or [H, S]."""
        return softmax_policy(self.action_values, self.temperature)


def soft_value_iteration(
    mdp: TabularMDP,
    temperature: float | Array,
    *,
    tolerance: float | None = None,
    max_iterations: int = 10_000,
) -> SoftPlan:
    """Maximises ``E sum_t discount^t (r_t + beta H(A_t | S_t))``: the fixed point of the soft Bellman operator.

    ``Q = r + discount P V``, ``V(s) = beta log sum_a exp(Q(s, a) / beta)``. Differentiable in the floats of ``mdp``
    and in ``temperature``, in both modes, by the implicit function theorem.

    Args:
        mdp: reward [S, A].
        temperature: beta > 0, in units of reward a nat; traced, so it may be swept.
        tolerance: soft Bellman residual at which to stop, relative to ``max(1, |V|)``; by dtype if None.
        max_iterations: limit.

    Returns:
        The plan, with its residual.

    Raises:
        ValueError: the temperature is not positive, or the reward depends on the step.

    References:
        Haarnoja, Tang, Abbeel, Levine, 2017, arXiv 1702.08165, theorem 2.
    """
    temperature = _temperature(temperature, mdp)
    values = bellman_fixed_point(mdp, lambda q: soft_maximum(q, temperature), tolerance, max_iterations)
    action_values = bellman_values(mdp, values)
    residual = jax.lax.stop_gradient(jnp.max(jnp.abs(soft_maximum(action_values, temperature) - values)))
    return SoftPlan(values, action_values, temperature, residual, has_converged(residual, values, tolerance))


def soft_backward_induction(mdp: TabularMDP, temperature: float | Array, horizon: int | None = None) -> SoftPlan:
    """Maximises ``E sum_h (r_h + beta H(A_h | S_h))`` over H steps without discount.

    Args:
        mdp: reward [H, S, A], or [S, A] together with ``horizon``.
        temperature: beta > 0.
        horizon: number of steps H when the reward does not depend on the step.

    Returns:
        The plan, values [H + 1, S].
    """
    temperature = _temperature(temperature, mdp)
    reward = _stepwise_reward(mdp, horizon)

    def back(values: Array, step_reward: Array) -> tuple[Array, tuple[Array, Array]]:
        action_values = step_reward + expected_value(mdp, values)
        values = soft_maximum(action_values, temperature)
        return values, (values, action_values)

    last = jnp.zeros(mdp.num_states, reward.dtype)
    _, (values, action_values) = jax.lax.scan(back, last, reward, reverse=True)
    values = jnp.concatenate([values, last[None]])
    return SoftPlan(values, action_values, temperature, jnp.zeros((), reward.dtype), jnp.array(True))


def soft_maximum(action_values: Array, temperature: Array) -> Array:
    """``beta log sum_a exp(Q / beta)`` over the last axis: at least the maximum, at most ``beta log A`` above it."""
    return temperature * jax.nn.logsumexp(action_values / temperature, axis=-1)


def _temperature(temperature: float | Array, mdp: TabularMDP) -> Array:
    if not isinstance(temperature, jax.core.Tracer):
        value = float(temperature)
        check(
            value > 0, argument="temperature", value=value, rule="must be positive", remedy="use value_iteration for 0"
        )
    return jnp.asarray(temperature, mdp.reward.dtype)
