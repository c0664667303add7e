"""Weighted ridge regression with its own derivative, and the running statistics that explorers keep of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular

from jaxrl_suite.config import check
from jaxrl_suite.types import Array


def weighted_ridge(
    features: Array, targets: Array, weights: Array, ridge: float | Array, center: Array | None = None
) -> Array:
    """Weighted ridge regression ``argmin_theta sum_i w_i (x_i . theta - y_i)^2 + ridge |theta - center|^2``.

    With ``Sigma = ridge I + sum_i w_i x_i x_i'`` the answer is ``Sigma^-1 (ridge center + sum_i w_i y_i x_i)``. The
    derivative is the implicit one, in both modes and to any order: one Cholesky factor forward, one solve with
    it backward, nothing else stored. In value-targeted regression ``x_i = phi_V(s_i, a_i)`` and ``y_i = V(s_{i+1})``.

    Args:
        features: [N, D].
        targets: [N].
        weights: [N], inverse variances, non-negative.
        ridge: [], positive.
        center: [D], what the estimate is drawn to; 0 if None.

    Returns:
        [D]. Not finite when ``Sigma`` is not positive definite (weights that overflow): see :func:`ridge_residual`.

    Raises:
        ValueError: shapes do not fit, or a concrete ridge is not positive.

    References:
        Zhang, Zhang, Gu, 2023, arXiv 2303.10165, section on high-order moment estimation.

    >>> x = jnp.eye(2)
    >>> weighted_ridge(x, jnp.array([2.0, 4.0]), jnp.ones(2), 1.0).round(4).tolist()
    [1.0, 2.0]
    """
    check(features.ndim == 2, argument="features", value=features.shape, rule="shape must be [N, D]")
    samples, dimension = features.shape
    check(targets.shape == (samples,), argument="targets", value=targets.shape, rule=f"must be [N] = [{samples}]")
    check(weights.shape == (samples,), argument="weights", value=weights.shape, rule=f"must be [N] = [{samples}]")
    if not isinstance(ridge, jax.core.Tracer):
        check(float(ridge) > 0, argument="ridge", value=float(ridge), rule="must be positive")
    center = jnp.zeros(dimension, features.dtype) if center is None else center
    check(center.shape == (dimension,), argument="center", value=center.shape, rule=f"must be [D] = [{dimension}]")
    return _ridge(features, targets, weights, jnp.asarray(ridge, features.dtype), center)


@jax.custom_jvp
def _ridge(features: Array, targets: Array, weights: Array, ridge: Array, center: Array) -> Array:
    return _factor_and_solve(features, targets, weights, ridge, center)[1]


def _factor_and_solve(
    features: Array, targets: Array, weights: Array, ridge: Array, center: Array
) -> tuple[Array, Array]:
    # Solving for theta - center keeps full accuracy when the data barely move the estimate.
    weighted = features * weights[:, None]
    gram = jnp.matmul(weighted.T, features, precision="highest") + ridge * jnp.eye(
        features.shape[1], dtype=features.dtype
    )
    factor = jnp.linalg.cholesky(gram)
    surprise = targets - jnp.matmul(features, center, precision="highest")
    return factor, center + cho_solve((factor, True), jnp.matmul(weighted.T, surprise, precision="highest"))


@_ridge.defjvp
def _ridge_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """Differentiates ``Sigma (theta - center) = X' W (y - X center)`` implicitly: every term meets one solve."""
    features, targets, weights, ridge, center = primals
    d_features, d_targets, d_weights, d_ridge, d_center = tangents
    factor, theta = _factor_and_solve(features, targets, weights, ridge, center)
    residual = targets - jnp.matmul(features, theta, precision="highest")
    d_residual = d_targets - jnp.matmul(d_features, theta, precision="highest")
    right = jnp.matmul(features.T, d_weights * residual + weights * d_residual, precision="highest")
    right = right + jnp.matmul(d_features.T, weights * residual, precision="highest")
    right = right + ridge * d_center - d_ridge * (theta - center)
    return theta, cho_solve((factor, True), right)


def ridge_residual(features: Array, targets: Array, weights: Array, ridge: Array, center: Array, theta: Array) -> Array:
    """Largest entry of the gradient of the ridge objective at ``theta``, relative to its terms; NaN if it failed.

    Args:
        features: [N, D].
        targets: [N].
        weights: [N].
        ridge: [].
        center: [D].
        theta: [D], what :func:`weighted_ridge` returned.

    Returns:
        [], about the rounding of the dtype for a good solve.
    """
    data = jnp.matmul(features.T, weights * (targets - features @ theta), precision="highest")
    size = jnp.matmul(jnp.abs(features).T, weights * jnp.abs(targets), precision="highest") + ridge * jnp.abs(center)
    return jnp.max(jnp.abs(data - ridge * (theta - center))) / jnp.maximum(jnp.max(size), jnp.finfo(theta.dtype).tiny)


class RidgeStatistics(NamedTuple):
    """What a weighted ridge regression needs of its data. Leading axes stack regressions (families, moments).

    Attributes:
        gram: [..., D, D], ``Sigma = ridge I + sum w x x'``.
        moment: [..., D], ``ridge center + sum w y x``.
    """

    gram: Array
    moment: Array


class RidgeFit(NamedTuple):
    """A solved regression.

    Attributes:
        theta: [..., D], estimate.
        inverse: [..., D, D], inverse of the gram matrix.
        finite: bool [], whether every Cholesky factor existed.
    """

    theta: Array
    inverse: Array
    finite: Array


def init_statistics(batch: tuple[int, ...], ridge: Array, center: Array) -> RidgeStatistics:
    """Statistics of no data for a stack ``batch`` of regressions with a ridge [] and a center [D]."""
    dimension = center.shape[0]
    gram = jnp.broadcast_to(ridge * jnp.eye(dimension, dtype=center.dtype), (*batch, dimension, dimension))
    return RidgeStatistics(gram, jnp.broadcast_to(ridge * center, (*batch, dimension)))


def add_samples(statistics: RidgeStatistics, features: Array, targets: Array, weights: Array) -> RidgeStatistics:
    """Adds N samples to a stack of regressions.

    Args:
        statistics: stack [...].
        features: [N, ..., D].
        targets: [N, ...].
        weights: [N, ...].
    """
    weighted = features * weights[..., None]
    gram = jnp.einsum("n...d,n...e->...de", weighted, features, precision="highest")
    moment = jnp.einsum("n...d,n...->...d", weighted, targets, precision="highest")
    return RidgeStatistics(statistics.gram + gram, statistics.moment + moment)


def fit(statistics: RidgeStatistics) -> RidgeFit:
    """Estimates and inverse gram matrices by Cholesky factors; ``finite`` is false if one does not exist."""
    factor = jnp.linalg.cholesky(statistics.gram)
    identity = jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape)
    root = solve_triangular(factor, identity, lower=True)
    inverse = jnp.einsum("...ki,...kj->...ij", root, root, precision="highest")
    theta = jnp.einsum("...ij,...j->...i", inverse, statistics.moment, precision="highest")
    return RidgeFit(theta, inverse, jnp.all(jnp.isfinite(theta)))


def sherman_morrison(inverse: Array, feature: Array, weight: Array) -> Array:
    """Inverse of ``Sigma + weight x x'`` from the inverse of ``Sigma``.

    Accurate for one episode; explorers rebuild the inverse from the gram matrix at the end of each.

    Args:
        inverse: [..., D, D].
        feature: [..., D], x.
        weight: [...], non-negative.
    """
    direction = jnp.einsum("...ij,...j->...i", inverse, feature, precision="highest")
    scale = weight / (1.0 + weight * jnp.sum(feature * direction, axis=-1))
    return inverse - scale[..., None, None] * direction[..., :, None] * direction[..., None, :]


def width(inverse: Array, feature: Array) -> Array:
    """``sqrt(x' Sigma^-1 x)`` with a finite derivative at ``x = 0``.

    Args:
        inverse: [..., D, D], inverse gram matrix.
        feature: [..., D].

    Returns:
        [...].
    """
    direction = jnp.einsum("...ij,...j->...i", inverse, feature, precision="highest")
    return safe_root(jnp.sum(feature * direction, axis=-1))


def safe_root(square: Array) -> Array:
    """Square root that is 0 with derivative 0 below the smallest square that matters."""
    positive = square > 1e-18
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def log_determinant(gram: Array) -> Array:
    """Logarithm of the determinant of positive definite matrices ``[..., D, D]``; NaN where one is not."""
    diagonal = jnp.diagonal(jnp.linalg.cholesky(gram), axis1=-2, axis2=-1)
    return 2.0 * jnp.sum(jnp.log(diagonal), axis=-1)
