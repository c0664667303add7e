"""The algorithms of the package for the list of contracts. Import ``ALGORITHMS``; each entry is one line there."""

import jax
import jax.numpy as jnp

from jaxrl_suite import pareto
from jaxrl_suite.testing import Algorithm, Loop

K = 3


def points(num_points, num_objectives):
    def example(key):
        key, other = jax.random.split(key)
        return jax.random.uniform(key, (num_points, num_objectives)), -jax.random.uniform(other, (num_objectives,))

    return example


def vectors(*shapes):
    """Standard normal arrays, one key each."""

    def example(key):
        keys = jax.random.split(key, len(shapes))
        return tuple(jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))

    return example


def weighted(example):
    """Puts weights on the simplex before the arguments of another example."""

    def extended(key):
        key, other = jax.random.split(key)
        return (jax.random.dirichlet(other, jnp.full(K, 3.0)), *example(key))

    return extended


def square(outputs):
    """A loss that does not vanish on the simplex, where plain sums of weights are one."""
    weights = outputs[1]
    return jnp.sum(jnp.arange(1.0, K + 1, dtype=weights.dtype) * weights**2)


def rule(make, *, objectives=False, influence=False, rewards=False, advantages=False):
    """Two steps of a rule on one signal: the second sees a state that moved."""
    names = [
        name
        for name, used in zip(pareto.Signals._fields, (objectives, influence, rewards, advantages), strict=True)
        if used
    ]

    def function(weights, *signals):
        built = make(weights)
        values = pareto.Signals(**dict(zip(names, signals, strict=True)))
        state, _ = built.step(built.init(), values)
        return built.step(state, values)

    return function


def keep_sum(key, point):
    """Tangents that keep weights on the simplex; Gaussian for everything else."""
    keys = jax.random.split(key, len(point))
    tangents = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, point, strict=True)]
    tangents[0] = 0.1 * point[0] * (tangents[0] - jnp.sum(point[0] * tangents[0]))
    return tuple(tangents)


def zeros(weights):
    return jnp.zeros_like(weights)


def decaying(weights):
    """A schedule from given weights to their mirror image."""
    return lambda step: weights * jnp.exp(-0.1 * step.astype(weights.dtype)) + 0.1 * weights[::-1]


REWARDS = vectors((K, 4, 5))
RULES = {
    "fixed_weights": (rule(pareto.fixed_weights), weighted(vectors()), (0,)),
    "scheduled_weights": (rule(lambda w: pareto.scheduled_weights(decaying(w))), weighted(vectors()), (0,)),
    "influence_weights": (
        rule(lambda w: pareto.influence_weights(w, 0.1), influence=True),
        weighted(vectors((K,))),
        (0, 1),
    ),
    "hypervolume_gradient_weights": (
        rule(
            lambda w: pareto.hypervolume_gradient_weights(
                w, zeros(w), front=jnp.array([[0.9, 0.3, 0.4], [0.2, 0.8, 0.5], [0.3, 0.4, 0.9]], w.dtype)
            ),
            objectives=True,
        ),
        weighted(lambda key: (0.7 + 0.1 * jax.random.uniform(key, (K,)),)),
        (1,),
    ),
    "tchebycheff_weights": (
        rule(lambda w: pareto.tchebycheff_weights(w, jnp.ones_like(w), temperature=0.2), objectives=True),
        weighted(vectors((K,))),
        (0, 1),
    ),
    "saw_weights": (
        rule(lambda w: pareto.saw_weights(w, decay=0.5), rewards=True),
        weighted(lambda key: (jax.random.uniform(key, (K, 4, 5)),)),
        (0, 1),
    ),
    "ctwa_weights": (
        rule(lambda w: pareto.ctwa_weights(w, 0.1, targets=zeros(w)), rewards=True, advantages=True),
        weighted(vectors((K, 4, 5), (4, 5))),
        (0, 1, 2),
    ),
    "gdpo_weights": (rule(pareto.gdpo_weights, rewards=True), weighted(REWARDS), (0, 1)),
    "mo_grpo_weights": (rule(pareto.mo_grpo_weights, rewards=True), weighted(REWARDS), (0, 1)),
    "famo_weights": (
        rule(lambda w: pareto.famo_weights(w, jnp.full_like(w, 4.0)), objectives=True),
        weighted(vectors((K,))),
        (1,),
    ),
    "lagrangian_weights": (
        rule(lambda w: pareto.lagrangian_weights(w, jnp.full_like(w, 4.0), 0.1), objectives=True),
        weighted(vectors((K,))),
        (0, 1),
    ),
}


def gain_rule(weights, objectives):
    """Gain of the hypervolume rule after two different points; what it puts on the reward is what it learns."""
    built = pareto.hypervolume_gain_weights(weights, capacity=2, reference=jnp.zeros_like(weights))
    state, _ = built.step(built.init(), pareto.Signals(objectives=objectives))
    state, weights = built.step(
        state, pareto.Signals(objectives=objectives + jnp.arange(1.0, K + 1, dtype=weights.dtype) / 9)
    )
    return state.gain, state.gain * weights


def insert_two(first, second, reference):
    archive = pareto.init_archive(2, reference)
    archive, gain, _ = pareto.archive_insert(archive, first)
    archive, other, overflow = pareto.archive_insert(archive, second, label=1)
    return archive, gain, other, overflow


def quadratics(params, centres):
    """Influence and pullback of quadratic bowls around the rows of ``centres``."""

    def objectives(x):
        return -0.5 * jnp.sum((x[None, :] - centres) ** 2, axis=1)

    result = pareto.linearise(objectives, params)
    return result.values, result.influence, result.pullback(jnp.ones_like(result.values))


def scalarised(objectives, raw):
    """All scalarisations at weights on the simplex and an ideal point above the objectives."""
    weights, ideal = jax.nn.softmax(raw), jnp.full_like(objectives, 5.0)
    arguments = (objectives, weights, ideal)
    return jnp.stack([
        pareto.linear(objectives, weights), pareto.tchebycheff(*arguments, augmentation=0.1),
        pareto.smooth_tchebycheff(*arguments), pareto.boundary_intersection(*arguments),
    ])  # fmt: skip


def indicators(points, front, raw):
    weights = jax.nn.softmax(raw)
    return pareto.igd_plus(points, front), pareto.r2(points, weights, jnp.full_like(points[0], 5.0))


def conflicting(key):
    """Inner products of random gradients."""
    rows = jax.random.normal(key, (K, 5))
    return (rows @ rows.T,)


ALGORITHMS = [
    Algorithm("pareto.scalarisers", scalarised, vectors((K,), (K,)), differentiable=(0, 1)),
    Algorithm("pareto.indicators", indicators, vectors((4, K), (5, K), (6, K)), differentiable=(0,)),
    *[Algorithm(f"pareto.aggregate[{name}]", lambda g, name=name: pareto.aggregate(g, name), conflicting)
      for name in ("mgda", "imtl_g", "upgrad")],
    *[
        Algorithm(f"pareto.hypervolume[{k}]", pareto.hypervolume, points(6, k), differentiable=(0, 1))
        for k in (2, 3, 4)
    ],
    Algorithm("pareto.hypervolume_improvement", lambda p, r: pareto.hypervolume_improvement(p[0] + 0.5, p[1:], r),
              points(5, 3), differentiable=(0, 1)),
    Algorithm("pareto.hypervolume_contributions", pareto.hypervolume_contributions, points(5, 3),
              differentiable=(0, 1)),
    Algorithm("pareto.hypervolume_gradient", lambda p, r: pareto.hypervolume_gradient(p[0] + 0.3, p[1:], r),
              points(5, 3), differentiable=(0, 1)),
    Algorithm("pareto.non_dominated", lambda p, r: pareto.non_dominated(p, jnp.all(p > r, axis=1)), points(7, 3)),
    Algorithm("pareto.archive_insert", insert_two, vectors((K,), (K,), (K,))),
    Algorithm("pareto.influence_step", lambda log_w, i, rate: pareto.influence_step(log_w, i, rate),
              vectors((K,), (K,), ()), differentiable=(0, 1, 2), loss=lambda x: jnp.sum(jnp.cos(x))),
    Algorithm("pareto.hypervolume_gain", pareto.hypervolume_gain, vectors((4,)), differentiable=(0,)),
    Algorithm("pareto.linearise", quadratics, vectors((4,), (K, 4)), differentiable=(0, 1)),
    Algorithm("pareto.hypervolume_gain_weights", gain_rule,
              weighted(lambda key: (0.2 + jax.random.uniform(key, (K,)),)), differentiable=(0, 1), tangent=keep_sum),
    *[
        Algorithm(f"pareto.{name}", function, example, differentiable=positions, loss=square,
                  tangent=keep_sum if 0 in positions else None)
        for name, (function, example, positions) in RULES.items()
    ],
]  # fmt: skip


def _learn_weights(rule, key):
    """A rule fed with signals of ``fold_in(key, t)``."""

    def advance(state, start, num_steps):
        for t in range(start, start + num_steps):
            keys = jax.random.split(jax.random.fold_in(key, t), 2)
            objectives, influence = jax.random.uniform(keys[0], (K,)), jax.random.normal(keys[1], (K,))
            state, _ = rule.step(state, pareto.Signals(objectives=objectives, influence=influence))
        return state

    return advance


_INFLUENCE = pareto.influence_weights(jnp.full(K, 1 / K), 0.1)
_GAIN = pareto.hypervolume_gain_weights(jnp.full(K, 1 / K), capacity=4, reference=jnp.zeros(K))
LOOPS = [
    Loop("pareto.influence_weights", lambda key: _INFLUENCE.init(), _learn_weights(_INFLUENCE, jax.random.key(1))),
    Loop("pareto.hypervolume_gain_weights", lambda key: _GAIN.init(), _learn_weights(_GAIN, jax.random.key(1))),
]
