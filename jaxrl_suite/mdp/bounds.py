"""How far a parameter can be from a point when all that is known is that it gives a kernel."""

import itertools

import numpy as np

from jaxrl_suite.config import check


def valid_constraints(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The set of parameters that give a kernel, ``{theta: G theta >= 0, E theta = 1}``.

    Args:
        features: [S, A, N, D].

    Returns:
        Distinct rows G [R, D] (features of single successors) and E [Q, D] (features summed over successors).
    """
    dimension = features.shape[-1]
    rows = np.unique(np.round(features.reshape(-1, dimension), 12), axis=0)
    sums = np.unique(np.round(features.sum(axis=2).reshape(-1, dimension), 12), axis=0)
    return rows[np.any(rows != 0, axis=1)], sums


def parameter_bound(features: np.ndarray, center: np.ndarray) -> float:
    """Largest ``|theta - center|`` over all parameters that give a kernel: exact in small cases, else a box.

    The set is a polytope. With at most a few thousand candidate vertices (choices of as many tight constraints as free
    directions) it is searched exactly; otherwise linear programs give the box around it, whose farthest corner is an
    upper bound.

    Args:
        features: [S, A, N, D].
        center: [D].

    Returns:
        The bound.

    Raises:
        ValueError: the set is unbounded (a direction of theta changes no kernel).
    """
    rows, sums = valid_constraints(features)
    dimension = features.shape[-1]
    check(
        bool(np.linalg.matrix_rank(np.concatenate([rows, sums])) == dimension),
        argument="features",
        value=features.shape,
        rule="some direction of theta changes no transition, so theta cannot be bounded",
        remedy="Drop that direction",
    )
    free = dimension - np.linalg.matrix_rank(sums)
    if _choices(len(rows), free) <= 5000:
        return max(float(np.linalg.norm(vertex - center)) for vertex in _vertices(rows, sums, free))
    from scipy.optimize import linprog

    far = []
    for index, sign in itertools.product(range(dimension), (1.0, -1.0)):
        cost = np.zeros(dimension)
        cost[index] = sign
        found = linprog(
            cost, A_ub=-rows, b_ub=np.zeros(len(rows)), A_eq=sums, b_eq=np.ones(len(sums)), bounds=(None, None)
        )
        check(found.status == 0, argument="features", value=features.shape, rule=f"no bound on theta: {found.message}")
        far.append(abs(sign * found.fun - center[index]))
    return float(np.linalg.norm(np.max(np.array(far).reshape(dimension, 2), axis=1)))


def _choices(count: int, size: int) -> float:
    return float(np.prod([(count - i) / (i + 1) for i in range(size)])) if size else 1.0


def _vertices(rows: np.ndarray, sums: np.ndarray, free: int) -> list[np.ndarray]:
    found = []
    for tight in itertools.combinations(range(len(rows)), int(free)):
        matrix = np.concatenate([sums, rows[list(tight)]])
        right = np.concatenate([np.ones(len(sums)), np.zeros(len(tight))])
        theta, _, rank, _ = np.linalg.lstsq(matrix, right, rcond=None)
        if rank == rows.shape[1] and np.all(rows @ theta >= -1e-8) and np.allclose(matrix @ theta, right, atol=1e-8):
            found.append(theta)
    return found
