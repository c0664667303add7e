"""Confidence radii: the theorem's constants, and three that are usable at the sizes that one runs."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_suite.mdp import LinearMixtureMDP
from jaxrl_suite.reward_free.config import PLAIN_ALGORITHMS, WIDTH_ALGORITHMS, ExplorerConfig, HParams, RadiusMode
from jaxrl_suite.reward_free.regression import log_determinant
from jaxrl_suite.types import Array


class Scales(NamedTuple):
    """Scalars that the paper derives from sizes.

    Attributes:
        ridge: lambda, ``D / B^2`` times its scale.
        floor: alpha, ``H^(-1/2)`` times its scale.
        cutoff: gamma, ``D^(-1/4)`` times its scale.
        norm: bound on the distance between the true parameter and the centre of the ridge.
    """

    ridge: Array
    floor: Array
    cutoff: Array
    norm: Array


def scales(mdp: LinearMixtureMDP, config: ExplorerConfig, hparams: HParams) -> Scales:
    """Ridge, floor and cutoff of the theorem, each times its scale in ``hparams``."""
    dtype, dimension = mdp.features.dtype, mdp.dimension
    norm = mdp.center_bound if config.center == "nominal" else mdp.norm_bound
    ridge = hparams.ridge_scale * dimension / mdp.norm_bound**2
    if config.algorithm in WIDTH_ALGORITHMS:
        ridge = ridge / dimension  # the predecessors take 1 / B^2
    floor = hparams.floor_scale * config.horizon**-0.5
    cutoff = hparams.cutoff_scale * dimension**-0.25
    return Scales(*(jnp.asarray(value, dtype) for value in (ridge, floor, cutoff, norm)))


def least_deviation(config: ExplorerConfig, floor: Array) -> Array:
    """Smallest standard deviation that a weight of the output regression can stand for."""
    if config.algorithm in PLAIN_ALGORITHMS:
        return jnp.ones((), floor.dtype)
    one_level = config.num_moments == 1 and config.targets == "values"  # the top level's variance is at least 1
    return jnp.maximum(floor, 1.0) if one_level else floor


def paper_radius(
    dimension: int,
    horizon: int,
    episode: Array | int,
    ridge: Array,
    floor: Array,
    cutoff: Array,
    norm: Array,
    delta: Array | float,
) -> Array:
    """The radius of the theorem, ``12 sqrt(D eta tau) + 30 tau / gamma^2 + sqrt(lambda) B`` at episode k.

    ``eta = log(1 + k H / (alpha^2 D lambda))``, ``tau = log(32 (log(gamma^2 / alpha) + 1) k^2 H^2 / delta)``.
    Differs: the inner logarithm is cut at 0, where the paper's is negative (H < D).

    Args:
        dimension: D.
        horizon: H.
        episode: k, from 1.
        ridge: lambda.
        floor: alpha.
        cutoff: gamma.
        norm: B.
        delta: failure probability a moment level (the theorem fails with at most 4 M delta).

    Returns:
        [], in the thousands for D = 3 … 10: exploration with it is arbitrary at any runnable K.

    References:
        Zhang, Zhang, Gu, 2023, arXiv 2303.10165, theorem on the sample complexity.
    """
    steps = episode * horizon
    eta = jnp.log1p(steps / (floor**2 * dimension * ridge))
    levels = jnp.maximum(0.0, jnp.log(cutoff**2 / floor)) + 1.0
    tau = jnp.log(32.0 * levels / delta) + 2.0 * jnp.log(1.0 * steps)
    return 12.0 * jnp.sqrt(dimension * eta * tau) + 30.0 * tau / cutoff**2 + jnp.sqrt(ridge) * norm


def self_normalised_radius(gram: Array, ridge: Array, norm: Array, delta: Array, noise: Array | float = 1.0) -> Array:
    """``R sqrt(log det Sigma - D log lambda + 2 log(1 / delta)) + sqrt(lambda) |theta* - theta0|``.

    Holds for all sample sizes at once with probability 1 - delta if the weighted noise is R-sub-Gaussian.

    Args:
        gram: [..., D, D].
        ridge: [], lambda.
        norm: [], bound on the distance between truth and centre.
        delta: [], failure probability.
        noise: R.

    Returns:
        [...].

    References:
        Abbasi-Yadkori, Pal, Szepesvari, 2011, theorem 2.
    """
    information = log_determinant(gram) - gram.shape[-1] * jnp.log(ridge)
    return noise * jnp.sqrt(jnp.maximum(information, 0.0) - 2.0 * jnp.log(delta)) + jnp.sqrt(ridge) * norm


def confidence_radius(
    mode: RadiusMode,
    gram: Array,
    sizes: Scales,
    *,
    horizon: int,
    num_episodes: int,
    delta: Array,
    least_deviation: Array,
) -> Array:
    """Radius of each regression of a stack.

    Args:
        mode: "paper" (the theorem's beta_K), "selfnorm" (weighted noise taken to be 1-sub-Gaussian, not proven),
            "fixed" (sqrt(D)), "subgaussian" (proven for targets in [0, 1]: R = 1 / (2 least deviation); delta is
            split over the stack; grows with the horizon through the floor).
        gram: [F, D, D].
        sizes: scalars of the regression.
        horizon: H.
        num_episodes: K.
        delta: [].
        least_deviation: [], smallest standard deviation that a weight can stand for.

    Returns:
        [F].
    """
    families, dimension = gram.shape[0], gram.shape[-1]
    if mode == "fixed":
        return jnp.full(families, dimension**0.5, gram.dtype)
    if mode == "paper":
        value = paper_radius(dimension, horizon, num_episodes, *sizes, delta)
        return jnp.broadcast_to(value.astype(gram.dtype), (families,))
    if mode == "selfnorm":
        return self_normalised_radius(gram, sizes.ridge, sizes.norm, delta)
    return self_normalised_radius(gram, sizes.ridge, sizes.norm, delta / families, 0.5 / least_deviation)
