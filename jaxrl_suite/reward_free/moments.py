"""Regression weights from estimates of high-order moments (HOME), what makes the horizon disappear from the bound."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_suite.reward_free.regression import width
from jaxrl_suite.types import Array


class MomentWeights(NamedTuple):
    """Weights of one transition, one a moment level.

    Attributes:
        weights: [..., M], inverse variances, what the regression multiplies its squared errors by.
        variances: [..., M], sigma^2: an upper estimate of the variance of ``f^(2^m)``, not below the floor.
        estimated: [..., M], estimated variance alone; 1 at the last level, which has no level above to estimate it.
        error: [..., M], what may be wrong with it; 0 at the last level.
    """

    weights: Array
    variances: Array
    estimated: Array
    error: Array


def squared_powers(values: Array, num_moments: int) -> Array:
    """``values^(2^m)`` for m = 0 … M - 1 by repeated squaring, stacked on a new leading axis.

    >>> squared_powers(jnp.array([0.5]), 3)[:, 0].tolist()
    [0.5, 0.25, 0.0625]
    """
    powers = [values]
    for _ in range(num_moments - 1):
        powers.append(powers[-1] * powers[-1])
    return jnp.stack(powers)


def moment_weights(
    features: Array,
    estimates: Array,
    frozen_inverse: Array,
    running_inverse: Array,
    radius: Array,
    floor: Array,
    cutoff: Array,
) -> MomentWeights:
    """High-order moment estimation: how far to trust one observed transition, level by level.

    With ``phi_m`` the integrated feature of ``f^(2^m)``, for m < M - 1 (clip01 = clip to [0, 1])::

        estimated_m = clip01(phi_{m+1} . theta_{m+1}) - clip01(phi_m . theta_m)^2
        error_m     = min(1, 2 radius |phi_m|) + min(1, radius |phi_{m+1}|)        (norms of the frozen inverses)
        variance_m  = max(cutoff^2 |phi_m|, estimated_m + error_m, floor^2)        (norm of the running inverse)

    and ``variance_{M-1} = max(cutoff^2 |phi_{M-1}|, 1, floor^2)``. One level gives ordinary least squares with variance
    at least 1, two levels the variance only.

    Args:
        features: [..., M, D], integrated features of ``f^(2^m)`` at the visited state and action.
        estimates: [..., M, D], estimates at the start of the episode.
        frozen_inverse: [..., M, D, D], inverse gram matrices at the start of the episode.
        running_inverse: [..., M, D, D], inverse gram matrices that include the earlier steps of the episode.
        radius: [], confidence radius.
        floor: [], the paper's alpha, H^(-1/2) there.
        cutoff: [], the paper's gamma, D^(-1/4) there.

    Returns:
        Weights and what they are made of. The largest of the three is 1 / floor^2.

    References:
        Zhang, Zhang, Gu, 2023, arXiv 2303.10165, algorithm HOME; Zhou, Gu, 2022, arXiv 2205.11507.
    """
    means = jnp.clip(jnp.sum(features * estimates, axis=-1), 0.0, 1.0)
    frozen = radius * width(frozen_inverse, features)
    estimated = means[..., 1:] - means[..., :-1] ** 2
    error = jnp.minimum(1.0, 2.0 * frozen[..., :-1]) + jnp.minimum(1.0, frozen[..., 1:])
    top = jnp.ones_like(means[..., :1])
    estimated = jnp.concatenate([estimated, top], axis=-1)
    error = jnp.concatenate([error, jnp.zeros_like(top)], axis=-1)
    epistemic = cutoff**2 * width(running_inverse, features)
    variances = jnp.maximum(jnp.maximum(epistemic, estimated + error), floor**2)
    return MomentWeights(1.0 / variances, variances, estimated, error)
