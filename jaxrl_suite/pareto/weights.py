"""Weights of several rewards that change in training, all with one signature: ``(state, signals) -> (state, weights)``.

A rule is a pair of functions, built from its settings, which may be traced (so that a run can be vmapped over them)::

    rule = influence_weights(jnp.full(3, 1 / 3), rate=0.1)
    state = rule.init()
    state, weights = rule.step(state, Signals(influence=influence(objectives, params)))

A rule reads the signals that it needs and leaves the others alone. Weights lie on the simplex.
Settings are checked when the rule is built, where their values are known: not inside jit.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import as_number, check, check_count
from jaxrl_suite.pareto.dominance import Archive, archive_insert, init_archive
from jaxrl_suite.pareto.hypervolume import as_numbers, check_known, check_set, hypervolume, hypervolume_improvement
from jaxrl_suite.types import Array


class Signals(NamedTuple):
    """What a step of training tells a weight rule. Leave out what the rule does not read.

    Attributes:
        objectives: [K], present values of the objectives, larger is better.
        influence: [K], row sums of the Gram matrix of the objectives' gradients.
        rewards: [K, B, G], rewards of this batch, B prompts in groups of G.
        advantages: [B, G], advantages of the combined reward.
    """

    objectives: Array | None = None
    influence: Array | None = None
    rewards: Array | None = None
    advantages: Array | None = None


class WeightRule(NamedTuple):
    """A weight rule.

    Attributes:
        init: ``init() -> state``.
        step: ``step(state, signals) -> (state, weights [K])``.
        reads: names of the signals that the rule reads, so that nobody computes the others.

    One of your own, with more weight where an objective is lower:

    >>> def lowest_first(state, signals):
    ...     return state, jax.nn.softmax(-signals.objectives)
    >>> rule = WeightRule(lambda: (), lowest_first, ("objectives",))
    >>> _, weights = rule.step(rule.init(), Signals(objectives=jnp.array([0.0, 2.0])))
    >>> [round(float(weight), 2) for weight in weights]
    [0.88, 0.12]
    """

    init: Callable[[], Any]
    step: Callable[[Any, Signals], tuple[Any, Array]]
    reads: tuple[str, ...] = ()


def check_simplex(weights: Any, *, argument: str = "weights") -> Array:
    """Returns the weights as an array after checking, if they are known, that they lie on the simplex (to 1e-6).

    Raises:
        ValueError: a weight is negative or not finite, or they do not sum to one.
    """
    weights = as_numbers(argument, weights)
    check(weights.ndim == 1, argument=argument, value=weights.shape, rule="must have shape [K]")
    if not isinstance(weights, jax.core.Tracer):
        values = np.asarray(weights, np.float64)
        check(
            bool(np.all(np.isfinite(values)) and np.all(values >= 0) and abs(values.sum() - 1) <= 1e-6 * len(values)),
            argument=argument,
            value=values.tolist(),
            rule="must be non-negative and sum to one",
            remedy="Divide them by their sum",
        )
    return weights


def _need(signal: Array | None, name: str) -> Array:
    check(signal is not None, argument=f"signals.{name}", value=None, rule="this weight rule reads it")
    assert signal is not None
    return signal


def _normalise(weights: Array) -> Array:
    return weights / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)


def weight_gain(state: Any) -> Array | float:
    """The factor that a rule puts on the whole reward: the gain of the hypervolume rule, 1 for all others."""
    return state.gain if isinstance(state, HypervolumeGainState) else 1.0


def fixed_weights(weights: Array) -> WeightRule:
    """Weights that never change.

    Args:
        weights: [K], on the simplex.
    """
    weights = check_simplex(weights)
    return WeightRule(lambda: weights, lambda state, signals: (state, state))


def scheduled_weights(schedule: Callable[[Array], Array]) -> WeightRule:
    """Weights that are a function of the step alone.

    Args:
        schedule: ``schedule(step int32 []) -> [K]``, on the simplex (normalised here), any optax schedule per entry.
    """
    kind = type(schedule).__name__
    check(callable(schedule), argument="schedule", value=kind, rule="must be a function of the step")

    def step(state: Array, signals: Signals) -> tuple[Array, Array]:
        return state + 1, _normalise(schedule(state))

    return WeightRule(lambda: jnp.zeros((), jnp.int32), step)


def hypervolume_gain(delta: Array) -> Array:
    """The paper's map from a gain of hypervolume to a factor on the reward: ``0.5 + 1.5 tanh(delta)``, in [0.5, 2).

    Args:
        delta: [...], gain, not negative.

    References:
        Lu et al. (2025), arXiv 2509.11452, hypervolume-guided adaptation.

    >>> round(float(hypervolume_gain(0.5)), 6)
    1.193176
    """
    return 0.5 + 1.5 * jnp.tanh(delta)


class HypervolumeGainState(NamedTuple):
    """State of :func:`hypervolume_gain_weights`.

    Attributes:
        archive: the points that extended the front.
        gain: [], factor on the reward, 1 before the first step.
        delta: [], last gain of hypervolume, in the product of the units of the (scaled) objectives.
        started: bool [], whether the archive's reference has been set.
    """

    archive: Archive
    gain: Array
    delta: Array
    started: Array


def hypervolume_gain_weights(
    weights: Array, *, capacity: int = 64, reference: Array | None = None, scale: Array | None = None
) -> WeightRule:
    """The paper's first method: fixed weights, and a gain on the reward that grows when the front grows.

    The weights never change; the gain (read it with :func:`weight_gain`) does. The gain that a step computes is meant
    for the next step. The first objectives that arrive become the reference point, as in the official code, unless one
    is given.

    Differs: the official code measures objectives in raw units, so that the tanh saturates (D3): pass ``scale`` to
    normalise them, or leave it out for the published behaviour.

    Args:
        weights: [K], on the simplex.
        capacity: members of the archive (the paper's list is unbounded; the archive keeps only its front).
        reference: [K], reference point, in the units of the objectives.
        scale: [K], positive; objectives and reference are divided by it.

    References:
        Lu et al. (2025), arXiv 2509.11452, hypervolume-guided adaptation.
    """
    weights = check_simplex(weights)
    init_archive(capacity, weights)  # a bad capacity is an error here, not when the rule starts
    shape, dtype = weights.shape, weights.dtype
    unit = jnp.ones_like(weights) if scale is None else as_numbers("scale", scale, shape, dtype)
    known = not isinstance(unit, jax.core.Tracer)
    check(not known or bool(np.all(np.asarray(unit) > 0)), argument="scale", value=scale, rule="must be positive")
    base = jnp.zeros_like(weights) if reference is None else as_numbers("reference", reference, shape, dtype) / unit
    check_known("reference", base)

    def init() -> HypervolumeGainState:
        one = jnp.ones((), weights.dtype)
        return HypervolumeGainState(init_archive(capacity, base), one, 0 * one, jnp.asarray(reference is not None))

    def step(state: HypervolumeGainState, signals: Signals) -> tuple[HypervolumeGainState, Array]:
        point = _need(signals.objectives, "objectives") / unit
        origin = jnp.where(state.started, state.archive.reference, point)
        archive, delta, _ = _insert(state.archive._replace(reference=origin), point)
        gain = jnp.where(state.started, hypervolume_gain(delta), state.gain)
        return HypervolumeGainState(archive, gain, delta, state.started | ~jnp.any(jnp.isnan(point))), weights

    return WeightRule(init, step, ("objectives",))


def influence_step(
    log_weights: Array, influence: Array, rate: Array | float, *, max_log_step: float | None = None
) -> Array:
    """One exponentiated-gradient step on the weights: ``w_i ~ w_i exp(rate * I_i)``.

    It maximises ``eta <w, I> - mu KL(w | w_previous)`` over the simplex, with ``rate = eta / mu``.

    Args:
        log_weights: [K], log of weights on the simplex (any common constant is removed).
        influence: [K].
        rate: scale of the exponent, eta / mu, not negative.
        max_log_step: largest change of a log-weight before normalisation; unbounded by default.

    Returns:
        [K], log of weights on the simplex.

    Raises:
        ValueError: ``rate`` or ``max_log_step`` is no single number, or outside, where it is known.

    References:
        Lu et al. (2025), arXiv 2509.11452, gradient-based weight optimisation; Fan, Pagliardini and Jaggi (2024),
        arXiv 2310.15393 (DoGE), the same rule for data domains.

    >>> import jax.numpy as jnp
    >>> w = influence_step(jnp.log(jnp.array([0.334, 0.333, 0.333])), jnp.array([1.58, 0.70, 0.23]), 0.1)
    >>> [round(float(x), 4) for x in jnp.exp(w)]
    [0.3592, 0.3279, 0.3129]
    """
    # Differences first: a common part of the influences moves no weight and must not cost digits.
    rate = as_number("rate", rate, log_weights.dtype, interval="[0, inf)")
    change = rate * (influence - jax.lax.stop_gradient(jnp.max(influence)))
    if max_log_step is not None:
        longest = as_number("max_log_step", max_log_step, log_weights.dtype, interval="(0, inf]")
        change = jnp.clip(change - jnp.mean(change), -longest, longest)
    return jax.nn.log_softmax(log_weights + change)


class InfluenceState(NamedTuple):
    """State of :func:`influence_weights`.

    Attributes:
        log_weights: [K].
        accumulated: [K], sum of the influences since the last step of the weights.
        count: int32 [], how many.
    """

    log_weights: Array
    accumulated: Array
    count: Array


def influence_weights(
    weights: Array, rate: Array | float, *, interval: int = 1, max_log_step: float | None = None, floor: float = 0.0
) -> WeightRule:
    """The paper's second method: weights follow the influence of each objective on all.

    Args:
        weights: [K], initial weights, on the simplex, all positive.
        rate: scale of the exponent eta / mu; it may be a traced scalar or ``rate(log-weight step int32 []) -> []``
            by wrapping :func:`influence_step` in a rule of your own.
        interval: W, steps between two changes of the weights; influences are averaged in between.
        max_log_step: see :func:`influence_step`.
        floor: smallest weight, mixed in after normalisation as ``(1 - K floor) w + floor``; 0 (the paper) is off.

    References:
        Lu et al. (2025), arXiv 2509.11452, gradient-based weight optimisation.
    """
    weights = check_simplex(weights)
    num_objectives = weights.shape[0]
    check_count(1, interval=interval)
    rate = as_number("rate", rate, weights.dtype, interval="[0, inf)")
    longest = jnp.inf if max_log_step is None else max_log_step
    as_number("max_log_step", longest, weights.dtype, interval="(0, inf]")
    as_number("floor", floor, weights.dtype)
    check(0 <= floor * num_objectives <= 1, argument="floor", value=floor, rule="must lie in [0, 1 / K]")

    def init() -> InfluenceState:
        return InfluenceState(jnp.log(weights), jnp.zeros_like(weights), jnp.zeros((), jnp.int32))

    def step(state: InfluenceState, signals: Signals) -> tuple[InfluenceState, Array]:
        total = state.accumulated + _need(signals.influence, "influence").astype(weights.dtype)
        count = state.count + 1
        due = count == interval
        moved = influence_step(state.log_weights, total / interval, rate, max_log_step=max_log_step)
        log_weights = jnp.where(due, moved, state.log_weights)
        state = InfluenceState(log_weights, jnp.where(due, 0, total), jnp.where(due, 0, count))
        result = jnp.exp(log_weights)
        return state, result if floor == 0 else (1 - num_objectives * floor) * result + floor

    return WeightRule(init, step, ("influence",))


def tchebycheff_weights(weights: Array, ideal: Array, *, temperature: Array | float) -> WeightRule:
    """Effective weights of the smooth Tchebycheff scalarisation: the objective that lags most counts most.

    ``w_i ~ w_i softmax_i(w_i (ideal_i - J_i) / temperature)``, the gradient of the smooth maximum of the weighted
    distances to the ideal point. As the temperature falls, the whole front becomes reachable, convex or not.

    Args:
        weights: [K], preference, on the simplex.
        ideal: [K], a point that no policy surpasses.
        temperature: mu > 0, in the units of the objectives.

    References:
        Lin et al. (2024), arXiv 2402.19078, "Smooth Tchebycheff scalarization".
    """
    weights = check_simplex(weights)
    ideal = as_numbers("ideal", ideal, weights.shape, weights.dtype)
    check_known("ideal", ideal)
    temperature = as_number("temperature", temperature, weights.dtype, interval="(0, inf]")

    def step(state: tuple[()], signals: Signals) -> tuple[tuple[()], Array]:
        gaps = weights * (ideal - _need(signals.objectives, "objectives"))
        return state, _normalise(weights * jax.nn.softmax(gaps / temperature))

    return WeightRule(lambda: (), step, ("objectives",))


def hypervolume_gradient(point: Array, points: Array, reference: Array, *, mask: Array | None = None) -> Array:
    """Derivative of ``HV(P + p)`` with respect to ``p``: the areas of the facets that p exposes.

    The facet along coordinate c is the box of the other coordinates less what the members at or above ``p_c`` cover of
    it: a hypervolume in one dimension less, so it can be differentiated again.

    Args:
        point: [K].
        points: [N, K].
        reference: [K].
        mask: bool [N], rows that count; the others may hold NaN.

    Returns:
        [K], not negative; zero where the set covers the point; NaN if the point or a row that counts holds NaN.

    Raises:
        ValueError: shapes do not fit, or NaN as above (where values are known: not inside jit).

    References:
        Emmerich and Deutz (2014), "Time complexity and zeros of the hypervolume indicator gradient field".
    """
    points, reference, known = check_set(points, reference, mask)
    point = as_numbers("point", point, reference.shape, points.dtype)
    known = known * check_known("point", point)
    rows = jnp.ones(points.shape[0], bool) if mask is None else jnp.asarray(mask, bool)
    inside = jnp.all(point > reference)
    facets = []
    for axis in range(point.shape[0]):
        rest = np.array([other for other in range(point.shape[0]) if other != axis], dtype=np.int32)
        higher = rows & (points[:, axis] >= point[axis])
        facets.append(hypervolume_improvement(point[rest], points[:, rest], reference[rest], mask=higher))
    return known * jnp.where(inside, jnp.stack(facets), 0)


# Rules pass NaN on instead of raising: whoever trains decides what a step without objectives does.
_insert, _slope = jax.jit(archive_insert), jax.jit(hypervolume_gradient)


def hypervolume_gradient_weights(
    weights: Array, reference: Array, *, front: Array | None = None, capacity: int = 64, mixing: Array | float = 0.0
) -> WeightRule:
    """Weights along the gradient of the hypervolume: ``w ~ dHV(P + J) / dJ`` (not in the paper).

    An objective counts by how much the front would grow if it improved. The set P is a given front (the other
    members of a population), or else the archive of what this run has visited. Where the set covers the present point
    the gradient vanishes and the fallback weights are used.

    Args:
        weights: [K], fallback, on the simplex.
        reference: [K].
        front: [N, K], the other members; without it an archive of visited points is kept.
        capacity: members of that archive.
        mixing: share of the fallback weights that is always mixed in, in [0, 1].

    References:
        Deist et al. (2021), arXiv 2102.04523, "Multi-objective learning to predict Pareto fronts using hypervolume
        maximization".
    """
    weights = check_simplex(weights)
    reference = as_numbers("reference", reference, weights.shape, weights.dtype)
    init_archive(capacity, reference)  # a bad capacity is an error here, not when the rule starts
    mixing = as_number("mixing", mixing, weights.dtype, interval="[0, 1]")
    if front is not None:
        front, columns = as_numbers("front", front, None, weights.dtype), weights.shape[0]
        fits = front.ndim == 2 and front.shape[1] == columns
        check(fits, argument="front", value=front.shape, rule=f"must have shape [N, K] with K = {columns}")
        check_known("front", front)

    def step(state: Archive, signals: Signals) -> tuple[Archive, Array]:
        point = _need(signals.objectives, "objectives").astype(weights.dtype)
        members, mask = (state.points, state.mask) if front is None else (front, None)
        slope = _slope(point, members, reference, mask=mask)
        total = jnp.sum(slope)
        covered = total == 0
        chosen = jnp.where(covered, weights, slope / jnp.where(covered, 1, total))
        if front is None:
            state = _insert(state, jax.lax.stop_gradient(point))[0]
        return state, (1 - mixing) * chosen + mixing * weights

    return WeightRule(lambda: init_archive(capacity if front is None else 1, reference), step, ("objectives",))


def hypervolume_weights_population(objectives: Array, reference: Array) -> Array:
    """Hypervolume-gradient weights of a whole population, one row a member, not normalised.

    Args:
        objectives: [N, K].
        reference: [K].

    Returns:
        [N, K], derivatives of the hypervolume of the population.
    """
    return jax.grad(hypervolume)(as_numbers("objectives", objectives), reference)
