"""Gradient aggregation on explicit gradients, row by row, from the papers; slow and in float64."""

import numpy as np
from scipy import optimize


def minimise_on_simplex(function, size, seed=0):
    """Best of several SLSQP runs over the simplex."""
    rng = np.random.default_rng(seed)
    runs = [
        optimize.minimize(
            function,
            start,
            method="SLSQP",
            bounds=[(0, 1)] * size,
            constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1}],
            options={"ftol": 1e-15, "maxiter": 500},
        )
        for start in [np.full(size, 1 / size), *rng.dirichlet(np.ones(size), 4)]
    ]
    return min(runs, key=lambda run: run.fun).x


def mgda(gradients):
    return minimise_on_simplex(lambda w: np.sum((w @ gradients) ** 2), len(gradients)) @ gradients


def cagrad(gradients, radius):
    """Liu et al. (2021), algorithm 1."""
    mean = gradients.mean(0)
    length = np.linalg.norm(mean)

    def dual(w):
        combined = w @ gradients
        return combined @ mean + radius * length * np.linalg.norm(combined)

    combined = minimise_on_simplex(dual, len(gradients)) @ gradients
    return mean + radius * length * combined / np.linalg.norm(combined)


def pcgrad(gradients):
    """Yu et al. (2020), algorithm 1, others visited in the order 0..K-1."""
    total = np.zeros_like(gradients[0])
    for i, gradient in enumerate(gradients):
        changed = gradient.copy()
        for j, other in enumerate(gradients):
            if i != j and changed @ other < 0:
                changed -= (changed @ other) / (other @ other) * other
        total += changed
    return total


def upgrad(gradients):
    """Quinton and Rey (2024): the mean of the projections on the cone of harmless directions."""
    total = np.zeros_like(gradients[0])
    for gradient in gradients:
        # the nearest d with <g_j, d> >= 0 is gradient + sum_j v_j g_j, v >= 0: a non-negative least-squares problem
        multipliers, _ = optimize.nnls(gradients.T, -gradient)
        total += gradient + multipliers @ gradients
    return total / len(gradients)


def aligned_mtl(gradients):
    """Senushkin et al. (2023): the nearest matrix with orthogonal rows, scaled by the least singular value."""
    left, values, right = np.linalg.svd(gradients, full_matrices=False)
    return (values[-1] * left @ right).mean(0)


def imtl_g(gradients):
    """Liu et al. (2021), equation 6: differences of gradients against differences of unit gradients."""
    units = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    d, u = gradients[0] - gradients[1:], units[0] - units[1:]
    rest = gradients[0] @ u.T @ np.linalg.inv(d @ u.T)
    return np.concatenate([[1 - rest.sum()], rest]) @ gradients
