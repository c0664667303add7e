"""One number out of several objectives, larger is better; the gradient of that number gives the effective weights.

All take objectives ``[K]`` and weights ``[K]`` on the simplex, and are functions to ascend. A linear scalarisation
reaches supported points of a front only; the Tchebycheff family reaches every Pareto point for some weights.

NaN in an argument is an error where values are known, and NaN in the result inside jit.
"""

import jax
import jax.numpy as jnp

from jaxrl_suite.config import as_number, check
from jaxrl_suite.pareto.hypervolume import as_numbers, check_known
from jaxrl_suite.types import Array


def _vectors(**vectors: Array) -> list[Array]:
    """The arguments as vectors of one length and floating dtype.

    Raises:
        ValueError: no vector of numbers, of different lengths, or NaN (where values are known).
    """
    arrays = {argument: as_numbers(argument, vector) for argument, vector in vectors.items()}
    first = next(iter(arrays))
    shape, dtype = arrays[first].shape, jnp.result_type(*arrays.values())
    check(len(shape) == 1, argument=first, value=shape, rule="must have shape [K]", remedy="vmap a batch")
    for argument, array in arrays.items():
        arrays[argument] = as_numbers(argument, array, shape, dtype)
        check_known(argument, array)
    return list(arrays.values())


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
    objectives, weights = _vectors(objectives=objectives, weights=weights)
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
    objectives, weights, ideal = _vectors(objectives=objectives, weights=weights, ideal=ideal)
    augmentation = as_number("augmentation", augmentation, objectives.dtype, interval="[0, inf]")
    gaps = weights * (ideal - objectives)
    return -jnp.max(gaps) - augmentation * jnp.sum(gaps)


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
    objectives, weights, ideal = _vectors(objectives=objectives, weights=weights, ideal=ideal)
    temperature = as_number("temperature", temperature, objectives.dtype, interval="(0, inf]")
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
    objectives, weights, ideal = _vectors(objectives=objectives, weights=weights, ideal=ideal)
    penalty = as_number("penalty", penalty, objectives.dtype, interval="[0, inf]")
    gaps = ideal - objectives
    direction = weights / jnp.sqrt(jnp.sum(weights * weights))
    along = jnp.sum(gaps * direction)
    across = gaps - along * direction
    square = jnp.sum(across * across)
    distance = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return -(along + penalty * distance)
