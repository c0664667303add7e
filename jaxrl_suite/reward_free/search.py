"""The oracle of the explorer: which reward and policy is the model most uncertain about? Greedy sweeps, reward ascent.

The search runs on lanes, a trailing axis that holds the starts of every instance side by side, so that each operation
of the backward sweep is a long vector operation; ``vmap`` over seeds or radii widens the lanes (``custom_vmap``). The
derivative of the sweep is written by hand: one backward and one forward scan, only the chosen actions carry weight.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxrl_suite.mdp import LinearMixtureMDP
from jaxrl_suite.types import Array

LEAK = 0.1  # slope of a cut beyond its limit, so that saturated values still say where to go
_LOGIT_RANGE = (-12.0, 8.0)
_UNROLL = 8  # sums over at most this many terms are written out: they then fuse into one vector loop
_DENSE_STATES = 16  # up to here the transpose of a gather is a product with a 0/1 matrix


class Lanes(NamedTuple):
    """A model and parameters laid out for the search. X = S A, row s A + a; L lanes.

    Attributes:
        features: [N, D, X], shared by all lanes.
        successors: int32 [N, X].
        mask: bool [N, X].
        start: int32 [].
        theta: [D, L].
        tilde: [D, D, L], ``radius^2`` times the inverse gram matrix of the pseudo-value regression.
        hat: [D, D, L], ``4 radius^2`` times that of the uncertainty regression.
    """

    features: Array
    successors: Array
    mask: Array
    start: Array
    theta: Array
    tilde: Array
    hat: Array


class SearchSpec(NamedTuple):
    """Static part of a search: sizes and number of ascent steps."""

    num_states: int
    num_actions: int
    num_steps: int
    leak: float = LEAK


def search_rewards(
    mdp: LinearMixtureMDP,
    theta: Array,
    tilde_inverse: Array,
    hat_inverse: Array,
    radius: Array,
    logits: Array,
    rate: Array,
    *,
    num_steps: int,
) -> tuple[Array, Array]:
    """Ascends the uncertainty value over pseudo rewards from several starts; greedy policy inside each sweep.

    Rewards are ``sigmoid(w) / max(1, longest path)``, hence always in the class. Adam on w; gradients pass the policy
    by, and leak through the cut at 1. The best of all iterates of all starts is returned.

    Args:
        mdp: model (its true parameter is not read).
        theta: [D].
        tilde_inverse: [D, D].
        hat_inverse: [D, D].
        radius: [].
        logits: [L, H, S, A], starts w.
        rate: [], step size of Adam.
        num_steps: ascent steps; 0 compares the starts only.

    Returns:
        Best w [H, S, A] and its score [], the uncertainty value before the cut at 1.
    """
    spec = SearchSpec(mdp.num_states, mdp.num_actions, num_steps)
    count, horizon = logits.shape[:2]
    rows = mdp.num_states * mdp.num_actions
    lanes = Lanes(
        jnp.transpose(mdp.features, (2, 3, 0, 1)).reshape(-1, mdp.dimension, rows),
        jnp.transpose(mdp.successors, (2, 0, 1)).reshape(-1, rows),
        jnp.transpose(mdp.mask, (2, 0, 1)).reshape(-1, rows),
        mdp.start,
        jnp.broadcast_to(theta[:, None], (*theta.shape, count)),
        jnp.broadcast_to((radius**2 * tilde_inverse)[..., None], (*tilde_inverse.shape, count)),
        jnp.broadcast_to((4 * radius**2 * hat_inverse)[..., None], (*hat_inverse.shape, count)),
    )
    flat = jnp.moveaxis(logits.reshape(count, horizon, rows), 0, -1)
    best, scores = _ascend(spec)(lanes, flat, jnp.broadcast_to(rate, (count,)))
    chosen = jnp.argmax(scores)
    return best[..., chosen].reshape(logits.shape[1:]), scores[chosen]


@functools.cache
def _ascend(spec: SearchSpec) -> Callable[[Lanes, Array, Array], tuple[Array, Array]]:
    """``(lanes, logits [H, X, L], rate [L]) -> (best logits [H, X, L], score [L])``, vmap merges into the lanes."""

    @jax.custom_batching.custom_vmap
    def ascend(lanes: Lanes, logits: Array, rate: Array) -> tuple[Array, Array]:
        return _run_ascent(spec, lanes, logits, rate)

    @ascend.def_vmap
    def _(size: int, batched: tuple, lanes: Lanes, logits: Array, rate: Array) -> tuple:
        if any(batched[0][:4]):  # every instance has a model of its own: nothing to share between lanes
            full = jax.tree.map(
                lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)), (lanes, logits, rate), tuple(batched)
            )
            return jax.lax.map(lambda one: ascend(*one), full), (True, True)

        def widen(x: Array, is_batched: bool) -> Array:
            x = (
                jnp.moveaxis(x, 0, -2)
                if is_batched
                else jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], size, x.shape[-1]))
            )
            return x.reshape(*x.shape[:-2], -1)

        wide = Lanes(*lanes[:4], *(widen(x, b) for x, b in zip(lanes[4:], batched[0][4:], strict=True)))
        best, scores = ascend(wide, widen(logits, batched[1]), widen(rate, batched[2]))

        def split(x: Array) -> Array:
            return jnp.moveaxis(x.reshape(*x.shape[:-1], size, -1), -2, 0)

        return (split(best), split(scores)), (True, True)

    return ascend


def _run_ascent(spec: SearchSpec, lanes: Lanes, logits: Array, rate: Array) -> tuple[Array, Array]:
    low, high = _LOGIT_RANGE
    logits = jnp.clip(logits, low, high)
    scatter = _scatter_matrix(spec, lanes)

    def keep(best: tuple[Array, Array], logits: Array, score: Array) -> tuple[Array, Array]:
        better = score > best[1]
        return jnp.where(better, logits, best[0]), jnp.where(better, score, best[1])

    def step(carry: tuple, count: Array) -> tuple[tuple, None]:
        logits, first, second, best = carry
        score, gradient = score_and_gradient(spec, lanes, logits, scatter)
        best = keep(best, logits, score)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient * gradient
        time = count.astype(logits.dtype) + 1.0
        update = (first / (1.0 - 0.9**time)) / (jnp.sqrt(second / (1.0 - 0.999**time)) + 1e-8)
        return (jnp.clip(logits + rate * update, low, high), first, second, best), None

    zeros = jnp.zeros_like(logits)
    empty = (logits, jnp.full(logits.shape[-1:], -jnp.inf, logits.dtype))
    carry, _ = jax.lax.scan(step, (logits, zeros, zeros, empty), jnp.arange(spec.num_steps))
    rewards, _ = pseudo_rewards(spec, lanes, carry[0], with_path=False)
    return keep(carry[3], carry[0], _sweep(spec, lanes, rewards, with_residuals=False)[0])


def score_and_gradient(spec: SearchSpec, lanes: Lanes, logits: Array, scatter: Array | None) -> tuple[Array, Array]:
    """Uncertainty value before its last cut, [L], and its derivative with respect to the logits, [H, X, L].

    The derivative treats the greedy policy as fixed (right almost everywhere) and leaks through the cuts.
    """
    rewards, path = pseudo_rewards(spec, lanes, logits, with_path=True)
    score, residuals = _sweep(spec, lanes, rewards, with_residuals=True)
    gradient = _sweep_gradient(spec, lanes, cast(_Residuals, residuals), scatter)
    scale, visited = cast(tuple, path)
    # r = s / c with c = max(1, longest path of s), whose derivative is 1 along that path where c > 1.
    along = jnp.sum(gradient * rewards, axis=(0, 1)) * (scale > 1.0)
    gradient = (gradient - jnp.where(visited, along, 0.0)) / scale
    squashed = jax.nn.sigmoid(logits)
    return score, gradient * squashed * (1.0 - squashed)


def pseudo_rewards(spec: SearchSpec, lanes: Lanes, logits: Array, *, with_path: bool) -> tuple[Array, tuple | None]:
    """Rewards ``sigmoid(w) / c`` with ``c = max(1, longest path)``; optionally c [L] and the path, bool [H, X, L]."""
    squashed = jax.nn.sigmoid(logits)
    shape = (spec.num_states, spec.num_actions, logits.shape[-1])
    mask = lanes.mask[..., None]

    def back(totals: Array, step: Array) -> tuple[Array, tuple]:
        ahead = _fold(jnp.maximum, [jnp.where(mask[n], totals[lanes.successors[n]], 0.0) for n in range(mask.shape[0])])
        sums = step + ahead
        return jnp.max(sums.reshape(shape), axis=1), (sums if with_path else None, totals if with_path else None)

    totals, (sums, following) = jax.lax.scan(back, jnp.zeros(shape[::2], logits.dtype), squashed, reverse=True)
    scale = jnp.maximum(1.0, totals[lanes.start])
    if not with_path:
        return squashed / scale, None
    lane = jnp.arange(shape[-1])

    def forward(state: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        step_sums, step_totals = inputs
        action = jnp.argmax(step_sums.reshape(shape)[state, :, lane], axis=-1)
        row = state * spec.num_actions + action
        options = lanes.successors[:, row]
        value = jnp.where(lanes.mask[:, row], step_totals[options, lane], -1.0)
        return jnp.take_along_axis(options, jnp.argmax(value, axis=0)[None], axis=0)[0], row

    _, visited = jax.lax.scan(forward, jnp.broadcast_to(lanes.start, lane.shape), (sums, following))
    rows = jnp.arange(shape[0] * shape[1])
    return squashed / scale, (scale, visited[:, None, :] == rows[None, :, None])


class _Residuals(NamedTuple):
    """What the derivative of the sweep needs, of each step h: slopes of the brackets, and where they lead.

    Attributes:
        action: int [H, S, L].
        value_slope: [H, S, L], derivative of the cut of V.
        width_slope: [H, S, L], derivative of the cut of W.
        by_surprise: [H, N, S, L], derivative of the chosen bracket with respect to V_{h+1} at each successor.
        by_width: [H, N, S, L], the same for W_{h+1}.
    """

    action: Array
    value_slope: Array
    width_slope: Array
    by_surprise: Array
    by_width: Array


def _sweep(spec: SearchSpec, lanes: Lanes, rewards: Array, *, with_residuals: bool) -> tuple[Array, _Residuals | None]:
    """Backward sweep of both families with the greedy policy, on lanes. Returns the score [L] and the residuals."""
    shape = (spec.num_states, spec.num_actions, rewards.shape[-1])
    theta = lanes.theta[:, None, :]

    def back(carry: tuple[Array, Array, Array], reward: Array) -> tuple[tuple, _Residuals | None]:
        values, widths, _ = carry
        x, y = _integrate(lanes, values), _integrate(lanes, widths)
        x_direction, y_direction = _product(lanes.tilde, x), _product(lanes.hat, y)
        surprise, spread = _root(_dot(x, x_direction)), _root(_dot(y, y_direction))
        bracket = jnp.minimum(1.0, surprise) + spread + _dot(y, theta)
        score, value, action = _best_action(bracket.reshape(shape), (reward + _dot(x, theta)).reshape(shape))
        carry = (jnp.clip(value, 0.0, 1.0), jnp.clip(score, 0.0, 1.0), score[lanes.start])
        if not with_residuals:
            return carry, None
        by_x = x_direction * (jnp.where(surprise > 1.0, spec.leak, 1.0) * _reciprocal(surprise))
        by_y = y_direction * _reciprocal(spread) + theta
        residuals = _Residuals(
            action,
            _slope(value, spec.leak),
            _slope(score, spec.leak),
            _at_action(spec, _spread(lanes, by_x), action),
            _at_action(spec, _spread(lanes, by_y), action),
        )
        return carry, residuals

    zeros = jnp.zeros(shape[::2], rewards.dtype)
    (_, _, score), residuals = jax.lax.scan(back, (zeros, zeros, zeros[0]), rewards, reverse=True)
    return score, residuals


def _sweep_gradient(spec: SearchSpec, lanes: Lanes, residuals: _Residuals, scatter: Array | None) -> Array:
    """Derivative of the score [L] with respect to the rewards, [H, X, L]: one scan forward in time."""
    lanes_count = residuals.action.shape[-1]
    shape = (spec.num_states, spec.num_actions, lanes_count)
    kernel = _spread(
        lanes, jnp.broadcast_to(lanes.theta[:, None, :], (lanes.theta.shape[0], *lanes.mask.shape[1:], lanes_count))
    )
    actions = jnp.arange(spec.num_actions)[None, :, None]
    start = (jnp.arange(spec.num_states) == lanes.start)[:, None]

    def forward(carry: tuple[Array, Array], step: tuple) -> tuple[tuple[Array, Array], Array]:
        by_value, by_width_value = carry  # derivatives with respect to V_h and to W_h before its cut, [S, L]
        residual, is_first = step
        slope = jnp.where(is_first, 1.0, residual.width_slope)  # the score is W before its last cut
        chosen = residual.action[:, None, :] == actions
        to_reward = jnp.where(chosen, (by_value * residual.value_slope)[:, None], 0.0).reshape(-1, lanes_count)
        to_bracket = by_width_value * slope

        def expand(x: Array) -> Array:  # [N, S, L] to [N, X, L], 0 off the chosen action
            return jnp.where(chosen, (to_bracket * x)[:, :, None], 0.0).reshape(x.shape[0], -1, lanes_count)

        value_flow = to_reward * kernel + expand(residual.by_surprise)
        flows = jnp.concatenate([value_flow, expand(residual.by_width)], axis=-1)
        summed = _collect(spec, lanes, flows, scatter)
        return (summed[:, :lanes_count], summed[:, lanes_count:]), to_reward

    horizon = residuals.action.shape[0]
    first = jnp.broadcast_to(start, shape[::2]).astype(lanes.theta.dtype)
    _, gradient = jax.lax.scan(forward, (jnp.zeros_like(first), first), (residuals, jnp.arange(horizon) == 0))
    return gradient


def _integrate(lanes: Lanes, values: Array) -> Array:
    """``phi_f`` [D, X, L] of a function [S, L]."""
    width = lanes.successors.shape[0]
    if width > _UNROLL:
        return jnp.einsum("ndx,nxl->dxl", lanes.features, values[lanes.successors], precision="highest")
    return _fold(jnp.add, [lanes.features[n][..., None] * values[lanes.successors[n]][None] for n in range(width)])


def _spread(lanes: Lanes, direction: Array) -> Array:
    """Transpose of the sum over features: [N, X, L] from [D, X, L]."""
    dimension = direction.shape[0]
    if dimension > _UNROLL:
        return jnp.einsum("ndx,dxl->nxl", lanes.features, direction, precision="highest")
    return _fold(jnp.add, [lanes.features[:, d, :, None] * direction[d][None] for d in range(dimension)])


def _product(matrix: Array, x: Array) -> Array:
    """[D, X, L] from a symmetric matrix a lane, [D, D, L], and vectors [D, X, L]."""
    dimension = x.shape[0]
    if dimension > _UNROLL:
        return jnp.einsum("del,exl->dxl", matrix, x, precision="highest")
    return _fold(jnp.add, [matrix[:, e, None, :] * x[e][None] for e in range(dimension)])


def _dot(x: Array, y: Array) -> Array:
    return _fold(jnp.add, [x[d] * y[d] for d in range(x.shape[0])]) if x.shape[0] <= _UNROLL else jnp.sum(x * y, axis=0)


def _best_action(scores: Array, values: Array) -> tuple[Array, Array, Array]:
    """Largest score over the middle axis, the value beside it, and its smallest index."""
    if scores.shape[1] > _UNROLL:
        action = jnp.argmax(scores, axis=1)
        score, value = (jnp.take_along_axis(x, action[:, None], axis=1)[:, 0] for x in (scores, values))
        return score, value, action
    score, value, action = scores[:, 0], values[:, 0], jnp.zeros_like(scores[:, 0], jnp.int32)
    for index in range(1, scores.shape[1]):
        better = scores[:, index] > score
        score = jnp.where(better, scores[:, index], score)
        value = jnp.where(better, values[:, index], value)
        action = jnp.where(better, index, action)
    return score, value, action


def _at_action(spec: SearchSpec, x: Array, action: Array) -> Array:
    """[N, S, L] from [N, X, L]: the rows of the chosen actions [S, L]."""
    x = x.reshape(x.shape[0], spec.num_states, spec.num_actions, -1)
    if spec.num_actions > _UNROLL:
        return jnp.take_along_axis(x, action[None, :, None], axis=2)[:, :, 0]
    rows = [jnp.where(action == index, x[:, :, index], 0.0) for index in range(spec.num_actions)]
    return _fold(jnp.add, rows)


def _collect(spec: SearchSpec, lanes: Lanes, flows: Array, scatter: Array | None) -> Array:
    """Adds flows [N, X, L] up at the successors they lead to, [S, L]."""
    flat = flows.reshape(-1, flows.shape[-1])
    if scatter is not None:
        return jnp.matmul(scatter, flat, precision="highest")
    return jax.ops.segment_sum(flat, lanes.successors.reshape(-1), spec.num_states)


def _scatter_matrix(spec: SearchSpec, lanes: Lanes) -> Array | None:
    if spec.num_states > _DENSE_STATES:
        return None
    return jax.nn.one_hot(lanes.successors.reshape(-1), spec.num_states, dtype=lanes.theta.dtype).T


def _fold(operation: Callable[[Array, Array], Array], terms: list[Array]) -> Array:
    return functools.reduce(operation, terms)


def _root(square: Array) -> Array:
    return jnp.sqrt(jnp.maximum(square, 0.0))


def _reciprocal(root: Array) -> Array:
    return jnp.where(root > 1e-9, 1.0 / jnp.maximum(root, 1e-9), 0.0)


def _slope(x: Array, leak: float) -> Array:
    return jnp.where((x > 1.0) | (x < 0.0), jnp.asarray(leak, x.dtype), 1.0)
