"""Exact planning in finite models: discounted and finite-horizon, with derivatives by the implicit function theorem."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check, check_count
from jaxrl_suite.mdp.tabular import TabularMDP, action_probabilities, expected_value, policy_kernel
from jaxrl_suite.types import Array


class PlanOutput(NamedTuple):
    """An optimal plan of a discounted problem.

    Attributes:
        values: [S], optimal values.
        action_values: [S, A].
        policy: int32 [S], greedy; ties go to the lowest index.
        residual: [], largest Bellman error of ``values``; without derivative.
        converged: bool [], whether the residual reached the tolerance.
    """

    values: Array
    action_values: Array
    policy: Array
    residual: Array
    converged: Array


class FinitePlan(NamedTuple):
    """An optimal plan over H steps.

    Attributes:
        values: [H + 1, S], optimal values from step h on; the last row is 0.
        action_values: [H, S, A].
        policy: int32 [H, S], greedy; ties go to the lowest index.
    """

    values: Array
    action_values: Array
    policy: Array


def default_tolerance(dtype: jnp.dtype) -> float:
    """Bellman residual at which the iterations of this package stop, relative to the scale of the values."""
    return 1e-10 if jnp.finfo(dtype).bits == 64 else 1e-5


def bellman_values(mdp: TabularMDP, values: Array) -> Array:
    """``Q(s, a) = r(s, a) + discount * [P values](s, a)``, shape [S, A], from ``values`` [S]."""
    return mdp.reward + mdp.discount * expected_value(mdp, values)


def value_iteration(mdp: TabularMDP, *, tolerance: float | None = None, max_iterations: int = 10_000) -> PlanOutput:
    """Optimal values and policy of a discounted process, ``V = max_a (r + discount P V)``.

    Differentiable in every float of ``mdp``, in both modes, by the implicit function theorem at the fixed point
    (almost everywhere: where the greedy action is unique); no iterate is stored.

    Args:
        mdp: reward [S, A].
        tolerance: Bellman residual at which to stop, relative to ``max(1, |V|)``; by dtype if None.
        max_iterations: limit.

    Returns:
        The plan, with its residual.

    Raises:
        ValueError: the reward depends on the step.

    References:
        Puterman, Markov Decision Processes, 1994, section 6.3.

    >>> from jaxrl_suite.mdp.tabular import tabular_mdp
    >>> float(value_iteration(tabular_mdp(jnp.ones((1, 2, 1)), jnp.array([[0.0, 1.0]]), 0.5)).values[0].round(4))
    2.0
    """
    values = bellman_fixed_point(mdp, greedy_value, tolerance, max_iterations)
    action_values = bellman_values(mdp, values)
    residual = jax.lax.stop_gradient(jnp.max(jnp.abs(greedy_value(action_values) - values)))
    policy = jnp.argmax(action_values, axis=-1).astype(jnp.int32)
    return PlanOutput(values, action_values, policy, residual, has_converged(residual, values, tolerance))


def greedy_value(action_values: Array) -> Array:
    """The largest of the action values ``[..., A]``, whose derivative is that of the first greedy action.

    The derivative of ``jnp.max`` compares the values with their maximum again. A compiler that rounds the two
    computations differently finds no equal one, and divides zero by zero: seen on jax 0.12 without optimisation.
    """
    chosen = jnp.argmax(action_values, axis=-1, keepdims=True)
    return jnp.take_along_axis(action_values, chosen, axis=-1)[..., 0]


def has_converged(residual: Array, values: Array, tolerance: float | None) -> Array:
    """Whether a Bellman residual is within ``tolerance`` of the scale ``max(1, |V|)``; bool []."""
    tolerance = default_tolerance(values.dtype) if tolerance is None else tolerance
    # A float32 residual cannot fall below a few units in the last place of the values.
    floor = 8 * float(jnp.finfo(values.dtype).eps)
    return residual <= max(tolerance, floor) * jnp.maximum(1.0, jnp.max(jnp.abs(values)))


def bellman_fixed_point(
    mdp: TabularMDP, backup: Callable[[Array], Array], tolerance: float | None, max_iterations: int
) -> Array:
    """Solves ``V = backup(r + discount P V)`` by iteration, differentiable implicitly in both modes.

    Args:
        mdp: reward [S, A].
        backup: ``[S, A] -> [S]``, non-expansive in the largest norm (maximum, soft maximum).
        tolerance: relative Bellman residual at which to stop; by dtype if None.
        max_iterations: limit.

    Returns:
        [S], values.
    """
    check(mdp.reward.ndim == 2, argument="mdp.reward", value=mdp.reward.shape, rule="must be [S, A]")

    def residual(values: Array) -> Array:
        return backup(bellman_values(mdp, values)) - values

    def solve(residual_of: Callable[[Array], Array], start: Array) -> Array:
        def unfinished(carry: tuple[Array, Array, Array]) -> Array:
            step, values, error = carry
            return (step < max_iterations) & ~has_converged(jnp.max(jnp.abs(error)), values, tolerance)

        def advance(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            step, values, error = carry
            values = values + error
            return step + 1, values, residual_of(values)

        return jax.lax.while_loop(unfinished, advance, (jnp.int32(0), start, residual_of(start)))[1]

    def tangent_solve(linear: Callable[[Array], Array], cotangent: Array) -> Array:
        identity = jnp.eye(cotangent.shape[0], dtype=cotangent.dtype)
        return jnp.linalg.solve(jax.vmap(linear, in_axes=1, out_axes=1)(identity), cotangent)

    start = jnp.zeros(mdp.num_states, mdp.reward.dtype)
    return jax.lax.custom_root(residual, start, solve, tangent_solve)


def backward_induction(mdp: TabularMDP, horizon: int | None = None) -> FinitePlan:
    """Optimal plan over a finite horizon without discount, ``V_h = max_a (r_h + P V_{h+1})``.

    Args:
        mdp: reward [H, S, A], or [S, A] together with ``horizon``.
        horizon: number of steps H when the reward does not depend on the step.

    Returns:
        The plan.

    Raises:
        ValueError: ``horizon`` is missing or contradicts the reward.
    """
    reward = _stepwise_reward(mdp, horizon)

    def back(values: Array, step_reward: Array) -> tuple[Array, tuple[Array, Array]]:
        action_values = step_reward + expected_value(mdp, values)
        values = greedy_value(action_values)
        return values, (values, action_values)

    last = jnp.zeros(mdp.num_states, reward.dtype)
    _, (values, action_values) = jax.lax.scan(back, last, reward, reverse=True)
    values = jnp.concatenate([values, last[None]])
    return FinitePlan(values, action_values, jnp.argmax(action_values, axis=-1).astype(jnp.int32))


def policy_evaluation(mdp: TabularMDP, policy: Array) -> Array:
    """Discounted values of a stationary policy, by one linear solve of ``(I - discount P) V = r``.

    Args:
        mdp: reward [S, A].
        policy: int [S], or probabilities [S, A].

    Returns:
        [S].
    """
    check(mdp.reward.ndim == 2, argument="mdp.reward", value=mdp.reward.shape, rule="must be [S, A]")
    kernel, reward = policy_kernel(mdp, policy)
    identity = jnp.eye(mdp.num_states, dtype=kernel.dtype)
    return jnp.linalg.solve(identity - mdp.discount * kernel, reward)


def finite_policy_evaluation(mdp: TabularMDP, policy: Array) -> Array:
    """Values of a step-dependent policy over H steps without discount.

    Args:
        mdp: reward [H, S, A] or [S, A].
        policy: int [H, S], or probabilities [H, S, A].

    Returns:
        [H + 1, S], values from step h on; the last row is 0.
    """
    reward = _stepwise_reward(mdp, policy.shape[0])
    probs = action_probabilities(policy, mdp.num_actions, reward.dtype)

    def back(values: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        step_reward, step_probs = step
        values = jnp.sum(step_probs * (step_reward + expected_value(mdp, values)), axis=-1)
        return values, values

    last = jnp.zeros(mdp.num_states, reward.dtype)
    _, values = jax.lax.scan(back, last, (reward, probs), reverse=True)
    return jnp.concatenate([values, last[None]])


def _stepwise_reward(mdp: TabularMDP, horizon: int | None) -> Array:
    if mdp.reward.ndim == 3:
        steps = mdp.reward.shape[0]
        check(horizon in (None, steps), argument="horizon", value=horizon, rule=f"the reward has {steps} steps")
        return mdp.reward
    check(horizon is not None, argument="horizon", value=horizon, rule="needed when the reward is [S, A]")
    check_count(1, horizon=horizon)
    return jnp.broadcast_to(mdp.reward, (horizon, *mdp.reward.shape))
