"""Test problems of multi-objective optimisation with exact fronts, written as costs to be minimised, as in the papers.

Negate them where larger is to be better. References: Zitzler, Deb and Thiele (2000) for ZDT; Deb et al. (2002) for
DTLZ; Fonseca and Fleming (1995).
"""

import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.types import Array

# Hypervolumes of the whole fronts: problem -> (reference point of the costs, value).
HYPERVOLUMES = {
    "zdt1": (1.1, 0.21 + 2 / 3),
    "zdt2": (1.1, 0.21 + 1 / 3),
    "dtlz2_2": (1.0, 1 - np.pi / 4),
    "dtlz2_3": (1.0, 1 - np.pi / 6),
    "fonseca_fleming": (1.0, 0.34209),
}


def zdt1(x: Array) -> Array:
    """ZDT1, convex front ``f_2 = 1 - sqrt(f_1)``.

    Args:
        x: [D] in [0, 1], D at least 2; the front has ``x[1:] = 0``.

    Returns:
        [2], costs.
    """
    g = 1 + 9 * jnp.mean(x[1:])
    return jnp.stack([x[0], g * (1 - jnp.sqrt(x[0] / g))])


def zdt2(x: Array) -> Array:
    """ZDT2, concave front ``f_2 = 1 - f_1^2``.

    Args:
        x: [D] in [0, 1], D at least 2; the front has ``x[1:] = 0``.

    Returns:
        [2], costs.
    """
    g = 1 + 9 * jnp.mean(x[1:])
    return jnp.stack([x[0], g * (1 - (x[0] / g) ** 2)])


def dtlz2(x: Array, num_objectives: int) -> Array:
    """DTLZ2, the front is the part of the unit sphere with positive coordinates.

    Args:
        x: [D] in [0, 1], D at least K; the front has ``x[K - 1:] = 0.5``.
        num_objectives: K.

    Returns:
        [K], costs.
    """
    angles, rest = x[: num_objectives - 1] * (np.pi / 2), x[num_objectives - 1 :]
    radius = 1 + jnp.sum((rest - 0.5) ** 2)
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    values = []
    for k in range(num_objectives):
        value = radius * jnp.prod(cosines[: num_objectives - 1 - k])
        values.append(value * sines[num_objectives - 1 - k] if k > 0 else value)
    return jnp.stack(values)


def fonseca_fleming(x: Array) -> Array:
    """Fonseca and Fleming's problem, concave front on the diagonal ``|t| <= 1 / sqrt(D)``; smooth everywhere.

    Args:
        x: [D].

    Returns:
        [2], costs in [0, 1).
    """
    shift = 1 / np.sqrt(x.shape[0])
    return jnp.stack([1 - jnp.exp(-jnp.sum((x - shift) ** 2)), 1 - jnp.exp(-jnp.sum((x + shift) ** 2))])


def quadratics(x: Array, curvature: Array, centres: Array) -> Array:
    """Quadratic costs ``(x - c_i)' A_i (x - c_i) / 2``; the front is convex.

    Args:
        x: [D].
        curvature: [K, D, D], positive definite.
        centres: [K, D].

    Returns:
        [K].
    """
    gap = x[None, :] - centres
    return 0.5 * jnp.einsum("ki,kij,kj->k", gap, curvature, gap)


def known_front(name: str, num_points: int = 101) -> np.ndarray:
    """Points of the front of a problem with two objectives, float64 [num_points, 2], costs.

    Args:
        name: "zdt1", "zdt2", "dtlz2_2" or "fonseca_fleming".
        num_points: how many.

    Returns:
        Costs by rising first objective.

    Raises:
        ValueError: unknown problem.

    >>> known_front("zdt2", 3).tolist()
    [[0.0, 1.0], [0.5, 0.75], [1.0, 0.0]]
    """
    names = ("zdt1", "zdt2", "dtlz2_2", "fonseca_fleming")
    check(name in names, argument="name", value=name, rule=f"must be one of {', '.join(names)}")
    t = np.linspace(0, 1, num_points)
    if name == "dtlz2_2":
        return np.stack([np.sin(t * np.pi / 2), np.cos(t * np.pi / 2)], axis=1)
    if name == "fonseca_fleming":
        s = (1 - 2 * t) / np.sqrt(2)
        return np.stack([1 - np.exp(-2 * (s - np.sqrt(0.5)) ** 2), 1 - np.exp(-2 * (s + np.sqrt(0.5)) ** 2)], axis=1)
    return np.stack([t, 1 - (np.sqrt(t) if name == "zdt1" else t**2)], axis=1)
