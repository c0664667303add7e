"""One number out of several objectives, larger is better; the gradient of that number gives the effective weights.

All take objectives ``[K]`` and weights ``[K]`` on the simplex, and are functions to ascend. A linear scalarisation
reaches supported points of a front only; the Tchebycheff family reaches every Pareto point for some weights.
"""

import jax
import jax.numpy as jnp

from jaxrl_suite.types import Array


def linear(objectives: Array, weights: Array) -> Array:
    """Weighted sum.

    Args:
        objectives: [K], larger is better.
        weights: [K].

    Returns:
        Scalar.

    >>> import jax.numpy as jnp
    >>> float(linear(jnp.array([1.0, 3.0]), jnp.array([0.5, 0.5])))
    2.0
    """
    return jnp.sum(weights * objectives)


def tchebycheff(objectives: Array, weights: Array, ideal: Array, *, augmentation: Array | float = 0.0) -> Array:
    """Minus the largest weighted distance to the ideal point: ``-max_i w_i (z_i - J_i) - rho sum_i w_i (z_i - J_i)``.

    Args:
        objectives: [K], larger is better.
        weights: [K].
        ideal: [K], z, a point that nothing surpasses.
        augmentation: rho >= 0; a small positive value rules out weakly Pareto-optimal points.

    Returns:
        Scalar, at most 0.

    References:
        Bowman (1976); Steuer and Choo (1983) for the augmented form.
    """
    gaps = weights * (ideal - objectives)
    return -jnp.max(gaps) - jnp.asarray(augmentation, gaps.dtype) * jnp.sum(gaps)


def smooth_tchebycheff(objectives: Array, weights: Array, ideal: Array, *, temperature: Array | float = 0.1) -> Array:
    """Smooth form ``-mu log sum_i exp(w_i (z_i - J_i) / mu)``, at most ``mu log K`` below the Tchebycheff value.

    Args:
        objectives: [K], larger is better.
        weights: [K].
        ideal: [K], z.
        temperature: mu > 0, in the units of the objectives.

    Returns:
        Scalar.

    References:
        Lin et al. (2024), arXiv 2402.19078, equation for smooth Tchebycheff scalarisation.
    """
    temperature = jnp.asarray(temperature, objectives.dtype)
    return -temperature * jax.nn.logsumexp(weights * (ideal - objectives) / temperature)


def boundary_intersection(objectives: Array, weights: Array, ideal: Array, *, penalty: Array | float = 5.0) -> Array:
    """Penalty boundary intersection (PBI): ``-(d_1 + theta d_2)``, distances along and across the weights' direction.

    Args:
        objectives: [K], larger is better.
        weights: [K], the direction from the ideal point, not zero.
        ideal: [K], z.
        penalty: theta >= 0.

    Returns:
        Scalar.

    References:
        Zhang and Li (2007), "MOEA/D", section on the penalty-based boundary intersection.
    """
    gaps = ideal - objectives
    direction = weights / jnp.sqrt(jnp.sum(weights * weights))
    along = jnp.sum(gaps * direction)
    across = gaps - along * direction
    square = jnp.sum(across * across)
    distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return -(along + jnp.asarray(penalty, gaps.dtype) * distance)
