"""Several objectives in one optax chain: a transformation from stacked gradients to one update; and FAMO's weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_suite.config import as_number, check, check_count
from jaxrl_suite.pareto.aggregate import Aggregator, aggregate, check_rule
from jaxrl_suite.pareto.hypervolume import as_numbers, check_known
from jaxrl_suite.pareto.influence import gram_influence, gram_of
from jaxrl_suite.pareto.weights import Signals, WeightRule, _need, check_simplex
from jaxrl_suite.types import Array


class MultiObjectiveState(NamedTuple):
    """State of :func:`multi_objective`.

    Attributes:
        rule_state: state of the weight rule; empty for a gradient aggregator.
        weights: [K], coefficients of the last update.
        gram: [K, K], inner products of the last gradients.
        step: int32 [].
    """

    rule_state: Any
    weights: Array
    gram: Array
    step: Array


def multi_objective(
    num_objectives: int,
    rule: WeightRule | Aggregator | Callable[[Array], Array],
    *,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Combines stacked per-objective gradients into one update; chains with any optimiser.

    ``update(stacked, state, params, objectives=..., rewards=..., advantages=...)`` takes gradients whose leaves have a
    leading axis K, and returns the update ``sum_i w_i g_i`` without it. A weight rule gets its influence from the Gram
    matrix of these gradients and its other signals from the keyword arguments; weights change before they are used,
    as in the paper (D7).

    Args:
        num_objectives: K.
        rule: a weight rule, the name of an aggregator, or ``gram -> [K]``.
        clip_norm: largest norm of one gradient in the influence (D5; the official code uses 1.0); none by default.

    Returns:
        An optax transformation.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(multi_objective(2, "mgda"), optax.sgd(1.0))
    >>> params = {"x": jnp.zeros(2)}
    >>> updates, _ = tx.update({"x": jnp.array([[1.0, 0.0], [0.0, 1.0]])}, tx.init(params), params)
    >>> updates["x"].tolist()
    [-0.5, -0.5]
    """
    check_count(1, num_objectives=num_objectives)
    if not isinstance(rule, WeightRule):
        check_rule(rule)
    longest = jnp.inf if clip_norm is None else clip_norm
    as_number("clip_norm", longest, jnp.result_type(float), interval="(0, inf]")

    def init(params: Any) -> MultiObjectiveState:
        dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(params)), jnp.float32)
        rule_state = rule.init() if isinstance(rule, WeightRule) else ()
        weights = jnp.full((num_objectives,), 1.0 / num_objectives, dtype)
        gram = jnp.zeros((num_objectives, num_objectives), dtype)
        return MultiObjectiveState(rule_state, weights, gram, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **signals: Any) -> tuple[Any, MultiObjectiveState]:
        del params
        gram = gram_of(updates)
        if isinstance(rule, WeightRule):
            known = {name: value for name, value in signals.items() if name in Signals._fields}
            known.setdefault("influence", gram_influence(gram, clip_norm=clip_norm))
            rule_state, weights = rule.step(state.rule_state, Signals(**known))
        else:
            rule_state, weights = (), aggregate(gram, rule)
        combined = jax.tree.map(lambda leaf: jnp.tensordot(weights.astype(leaf.dtype), leaf, axes=1), updates)
        weights = weights.astype(state.weights.dtype)
        return combined, MultiObjectiveState(rule_state, weights, gram, state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


class FamoState(NamedTuple):
    """State of :func:`famo_weights`.

    Attributes:
        logits: [K].
        losses: [K], losses at the previous step; infinite before the first.
    """

    logits: Array
    losses: Array


def famo_weights(
    weights: Array, ideal: Array, *, rate: Array | float = 0.025, decay: Array | float = 0.001
) -> WeightRule:
    """FAMO: weights that make all log-losses fall at the same pace, from loss values alone, O(1) beyond one gradient.

    With losses ``l_i = ideal_i - J_i > 0`` and ``z = softmax(logits)``: weights ``~ z_i / l_i``; after the step the
    logits move by ``-rate ((dz/dlogits)' (log l_i(before) - log l_i(after)) + decay logits)``. The change of the
    losses is read from the objectives of two successive steps.

    Args:
        weights: [K], initial weights, on the simplex, all positive.
        ideal: [K], above every value that the objectives take.
        rate: beta > 0.
        decay: gamma >= 0.

    Returns:
        A weight rule, to be combined with any optimiser.

    References:
        Liu et al. (2023), arXiv 2306.03792, algorithm 1. Differs: plain gradient steps on the logits where the authors'
        code runs Adam.
    """
    weights = check_simplex(weights)
    known, rule = not isinstance(weights, jax.core.Tracer), "must all be positive: what has no weight never gets any"
    check(not known or bool(np.all(np.asarray(weights) > 0)), argument="weights", value=weights, rule=rule)
    ideal = as_numbers("ideal", ideal, weights.shape, weights.dtype)
    check_known("ideal", ideal)
    rate = as_number("rate", rate, weights.dtype, interval="[0, inf)")
    decay = as_number("decay", decay, weights.dtype, interval="[0, inf)")
    tiny = jnp.finfo(weights.dtype).eps

    def init() -> FamoState:
        return FamoState(jnp.log(weights), jnp.full_like(weights, jnp.inf))

    def step(state: FamoState, signals: Signals) -> tuple[FamoState, Array]:
        losses = jnp.maximum(ideal - _need(signals.objectives, "objectives").astype(weights.dtype), tiny)
        started = jnp.all(jnp.isfinite(state.losses))
        before = jnp.where(started, state.losses, losses)
        (slope,) = jax.vjp(jax.nn.softmax, state.logits)[1](jnp.log(before) - jnp.log(losses))
        shrink = jnp.where(started, decay, 0) * state.logits
        logits = state.logits - rate * (slope + shrink)
        raw = jax.nn.softmax(logits) / losses
        return FamoState(logits, losses), raw / jnp.sum(raw)

    return WeightRule(init, step, ("objectives",))
