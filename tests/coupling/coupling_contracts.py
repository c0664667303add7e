"""The algorithms of the package for the list of contracts. Import ``ALGORITHMS``; each entry is one line there."""

import jax
import jax.numpy as jnp

from jaxrl_suite.coupling import (
    coupling_bounds,
    ebim_greedy,
    ebim_path,
    ebim_refine,
    greedy_coupling,
    greedy_coupling_multi,
    mecb,
    polished_coupling,
    soft_coupling,
)
from jaxrl_suite.testing import Algorithm


def laws(*sizes):
    """Random laws, one key for all."""

    def example(key):
        keys = jax.random.split(key, len(sizes))
        return tuple(jax.random.dirichlet(k, jnp.ones(size)) for k, size in zip(keys, sizes, strict=True))

    return example


def mass_preserving(key, point):
    """Tangents that sum to zero, about a tenth of the masses: laws stay laws."""
    keys = jax.random.split(key, len(point))
    tangents = []
    for k, p in zip(keys, point, strict=True):
        change = p * jax.random.normal(k, p.shape, p.dtype)
        tangents.append(change - p * jnp.sum(change))
    return tuple(tangents)


def law_and_rate(key, point):
    """Tangents of a law and of a rate."""
    return *mass_preserving(key, point[:1]), jnp.ones_like(point[1])


def polynomial(coupling):
    """A loss of the weights without the poles of an entropy at small masses, where central differences are poor."""
    weights = coupling.weights
    return jnp.sum(weights**2) + jnp.sum(weights * jnp.cos(jnp.arange(weights.shape[0], dtype=weights.dtype)))


ALGORITHMS = [
    Algorithm(
        "coupling.greedy_coupling[max]",
        greedy_coupling,
        laws(4, 3),
        differentiable=(0, 1),
        loss=polynomial,
        tangent=mass_preserving,
    ),
    Algorithm(
        "coupling.greedy_coupling[small alphabet]",
        greedy_coupling,
        laws(2, 16),
        differentiable=(0, 1),
        loss=polynomial,
        tangent=mass_preserving,
    ),
    Algorithm(
        "coupling.greedy_coupling[best]",
        lambda p, q: greedy_coupling(p, q, rule="best"),
        laws(4, 3),
        differentiable=(0, 1),
        loss=polynomial,
        tangent=mass_preserving,
    ),
    Algorithm("coupling.coupling_bounds", coupling_bounds, laws(4, 3), differentiable=(0, 1), tangent=mass_preserving),
    Algorithm("coupling.ebim_path", ebim_path, laws(5), differentiable=(0,), tangent=mass_preserving),
    Algorithm(
        "coupling.ebim_greedy",
        lambda p: ebim_greedy(p, 1.2),
        laws(5),
        differentiable=(0,),
        loss=lambda encoder: encoder.information + jnp.sum(encoder.code**2),
        tangent=mass_preserving,
    ),
    Algorithm(
        "coupling.greedy_coupling_multi",
        lambda p, q, r: greedy_coupling_multi(jnp.stack([p, q, r])),
        laws(3, 3, 3),
        differentiable=(0, 1, 2),
        loss=polynomial,
        tangent=mass_preserving,
    ),
    Algorithm(
        "coupling.soft_coupling",
        lambda p, q: soft_coupling(p, q, 0.3),
        laws(4, 3),
        differentiable=(0, 1),
        loss=lambda joint: jnp.sum(joint**2),
        tangent=mass_preserving,
    ),
    Algorithm(
        "coupling.ebim_refine",
        ebim_refine,
        lambda key: (*laws(4)(key), jnp.asarray(1.2)),
        differentiable=(0, 1),
        loss=lambda encoder: encoder.information + encoder.entropy,
        tangent=law_and_rate,
    ),
    Algorithm(
        "coupling.mecb",
        lambda p, q: mecb(p, q, 1.2),
        laws(4, 3),
        differentiable=(0, 1),
        loss=lambda bottleneck: bottleneck.information + jnp.sum(bottleneck.encoder.code**2),
        tangent=mass_preserving,
    ),
    Algorithm(
        "coupling.polished_coupling",
        lambda p, q: polished_coupling(p, q, rule="max"),
        laws(3, 3),
        differentiable=(0, 1),
        loss=polynomial,
        tangent=mass_preserving,
    ),
]
