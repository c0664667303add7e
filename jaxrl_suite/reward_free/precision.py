"""Where float32 loses the result: a warning before a run, and a bound on the rounding error after it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.mdp import LinearMixtureMDP
from jaxrl_suite.reward_free.config import PLAIN_ALGORITHMS, ExplorerConfig, HParams
from jaxrl_suite.reward_free.regression import RidgeStatistics, fit
from jaxrl_suite.types import Array

_MAX_FLOAT32_MOMENTS = 8  # V^(2^m) loses 2^m roundings


class PrecisionWarning(UserWarning):
    """A run in float32 may lose its result."""


def warn_if_imprecise(mdp: LinearMixtureMDP, config: ExplorerConfig, hparams: HParams) -> None:
    """Warns, while a run is traced, if its sizes allow rounding to reach the confidence radius.

    The gram matrix is at most ``ridge + K H / alpha^2`` (features are normalised, weights at most ``1 / alpha^2``), so
    rounding of the moments may move the estimate by about ``eps |theta| (ridge + K H / alpha^2) / sqrt(ridge)`` in the
    norm of the gram matrix. The bound is pessimistic; :attr:`Exploration.precise` tells what happened.

    Args:
        mdp: the world; its dtype decides.
        config: algorithm and sizes.
        hparams: scales; traced ones count as 1.
    """
    eps = float(jnp.finfo(mdp.features.dtype).eps)
    if eps < 1e-10 or config.algorithm == "rf_ucrl":
        return
    dimension, norm = mdp.dimension, _concrete(mdp.norm_bound, mdp.dimension**0.5)
    ridge = _concrete(hparams.ridge_scale, 1.0) * dimension / norm**2
    plain = config.algorithm in PLAIN_ALGORITHMS
    largest = 1.0 if plain else config.horizon / max(_concrete(hparams.floor_scale, 1.0), 1e-6) ** 2
    gram = ridge + config.num_episodes * config.horizon * largest
    rounding, radius = eps * norm * gram / ridge**0.5, dimension**0.5
    remedy = "Remedy: jax.config.update('jax_enable_x64', True) before the first array, and a world made after it."
    if rounding > radius:
        warnings.warn(
            f"explore in {mdp.features.dtype} with H={config.horizon}, K={config.num_episodes}: rounding may move the "
            f"estimate by up to {rounding:.2g}, the confidence radius is about {radius:.2g}. {remedy}",
            PrecisionWarning,
            stacklevel=3,
        )
    if config.num_moments > _MAX_FLOAT32_MOMENTS:
        warnings.warn(
            f"explore in {mdp.features.dtype} with num_moments={config.num_moments}: V^(2^m) loses 2^m roundings, "
            f"which shows in the weights above {_MAX_FLOAT32_MOMENTS} levels. {remedy}",
            PrecisionWarning,
            stacklevel=3,
        )


def rounding_error(gram: Array, theta: Array) -> Array:
    """Bound on the rounding error of a ridge estimate in the norm of its gram matrix.

    ``eps sqrt(kappa) |theta|_Sigma`` with the condition number kappa of the gram matrix scaled to a unit diagonal
    (componentwise errors of sums scale with the coordinates, and so does a Cholesky factor).

    Args:
        gram: [D, D].
        theta: [D].

    Returns:
        [], NaN where the gram matrix has no Cholesky factor.

    References:
        Higham, 2002, Accuracy and Stability of Numerical Algorithms, theorem 10.6 (scaled condition number).
    """
    root = jnp.sqrt(jnp.diagonal(gram))
    scaled = gram / (root[:, None] * root)
    inverse = fit(RidgeStatistics(scaled, jnp.zeros_like(theta))).inverse
    condition = _norm(scaled) * _norm(inverse)
    size = jnp.sqrt(jnp.maximum(jnp.einsum("i,ij,j->", theta, gram, theta, precision="highest"), 0.0))
    return jnp.finfo(theta.dtype).eps * jnp.sqrt(condition) * size


def _norm(matrix: Array) -> Array:
    return jnp.max(jnp.sum(jnp.abs(matrix), axis=-1))


def _concrete(value: Array | float, default: float) -> float:
    return default if isinstance(value, jax.core.Tracer) else float(np.asarray(value).reshape(-1).min())
