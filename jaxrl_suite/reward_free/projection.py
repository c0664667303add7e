"""Projection of an estimate onto the parameters that give a kernel, in the metric of its covariance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

from jaxrl_suite.mdp import LinearMixtureMDP
from jaxrl_suite.types import Array


class Projection(NamedTuple):
    """A projected parameter.

    Attributes:
        theta: [D].
        residual: [], largest violation left: of positivity, or of a row's sum.
    """

    theta: Array
    residual: Array


def project_parameter(mdp: LinearMixtureMDP, theta: Array, gram: Array, *, num_iterations: int = 1000) -> Projection:
    """``argmin |x - theta|_gram`` over the x whose ``phi(s' | s, a) . x`` are distributions.

    Non-expansive towards every valid parameter, so that a confidence radius around ``theta`` survives it. Solved by the
    alternating direction method of multipliers with a fixed number of iterations; the residual is reported.

    Args:
        mdp: model; features only.
        theta: [D].
        gram: [D, D], metric, positive definite.
        num_iterations: iterations.

    Returns:
        The projection.
    """
    dimension = mdp.dimension
    rows = mdp.features.reshape(-1, dimension)
    sums = jnp.sum(mdp.features, axis=2).reshape(-1, dimension)
    stacked = jnp.concatenate([rows, sums])
    low = jnp.concatenate([jnp.zeros(rows.shape[0], theta.dtype), jnp.ones(sums.shape[0], theta.dtype)])
    high = jnp.concatenate([jnp.full(rows.shape[0], jnp.inf, theta.dtype), jnp.ones(sums.shape[0], theta.dtype)])
    # Scaling: the constraints' own gram matrix sets the penalty at the size of the metric.
    outer = jnp.matmul(stacked.T, stacked, precision="highest")
    penalty = jnp.sqrt(jnp.trace(gram) / jnp.trace(outer) * _least_ratio(gram, outer))
    factor = cho_factor(gram + penalty * outer, lower=True)
    pull = jnp.matmul(gram, theta, precision="highest")

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        slack, dual = carry[1], carry[2]
        right = pull + penalty * jnp.matmul(stacked.T, slack - dual, precision="highest")
        point = cho_solve(factor, right)
        image = jnp.matmul(stacked, point, precision="highest")
        slack = jnp.clip(image + dual, low, high)
        return (point, slack, dual + image - slack), None

    image = jnp.matmul(stacked, theta, precision="highest")
    carry = (theta, jnp.clip(image, low, high), jnp.zeros_like(image))
    (point, _, _), _ = jax.lax.scan(step, carry, None, length=num_iterations)
    valid = jnp.all((image >= low - 1e-12) & (image <= high + 1e-12))
    point = jnp.where(valid, theta, point)
    image = jnp.matmul(stacked, point, precision="highest")
    return Projection(point, jnp.max(jnp.maximum(low - image, image - high)))


def _least_ratio(gram: Array, outer: Array) -> Array:
    trace = jnp.trace(
        jnp.linalg.solve(outer + 1e-9 * jnp.trace(outer) * jnp.eye(outer.shape[0], dtype=outer.dtype), gram)
    )
    return trace / gram.shape[0]
