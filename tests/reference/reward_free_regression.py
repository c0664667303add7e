"""Weighted ridge regression and moment weights by loops over NumPy arrays, written from the equations."""

import numpy as np


def weighted_ridge(features, targets, weights, ridge, center):
    gram = ridge * np.eye(features.shape[1])
    moment = ridge * np.array(center, float)
    for x, y, w in zip(features, targets, weights, strict=True):
        gram += w * np.outer(x, x)
        moment += w * y * x
    return np.linalg.solve(gram, moment)


def moment_variances(features, theta, frozen, running, radius, floor, cutoff):
    """sigma^2 of each level; features and theta [M, D], frozen and running gram matrices [M, D, D]."""
    levels = len(features)

    def norm(gram, x):
        return np.sqrt(x @ np.linalg.inv(gram) @ x)

    def clip(x):
        return min(1.0, max(0.0, x))

    result = []
    for m in range(levels):
        known = 1.0
        if m < levels - 1:
            variance = clip(features[m + 1] @ theta[m + 1]) - clip(features[m] @ theta[m]) ** 2
            error = min(1.0, 2 * radius * norm(frozen[m], features[m]))
            error += min(1.0, radius * norm(frozen[m + 1], features[m + 1]))
            known = variance + error
        result.append(max(cutoff**2 * norm(running[m], features[m]), known, floor**2))
    return np.array(result)
