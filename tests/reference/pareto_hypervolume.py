"""Volume of a union of boxes by counting the cells of the grid that all coordinates span, by the definition."""

import itertools

import numpy as np


def hypervolume(points, reference):
    """Every cell of the grid through all coordinates is dominated or not; larger is better."""
    points = np.asarray(points, float).reshape(-1, len(reference))
    axes = [np.unique(np.concatenate([[r], np.maximum(column, r)])) for column, r in zip(points.T, reference)]
    total = 0.0
    for cell in itertools.product(*[range(len(axis) - 1) for axis in axes]):
        corner = np.array([axis[i + 1] for axis, i in zip(axes, cell)])
        if np.any(np.all(points >= corner, axis=1)):
            total += np.prod([axis[i + 1] - axis[i] for axis, i in zip(axes, cell)])
    return total


def gradient(points, reference, step=1e-6):
    """Central differences of the above."""
    points = np.array(points, float)
    result = np.zeros_like(points)
    for index in np.ndindex(points.shape):
        shifted = points.copy(), points.copy()
        shifted[0][index] += step
        shifted[1][index] -= step
        result[index] = (hypervolume(shifted[0], reference) - hypervolume(shifted[1], reference)) / (2 * step)
    return result


def non_dominated(points):
    """Row by row, by the definition."""
    points = np.asarray(points)
    return np.array([not any(np.all(q >= p) and np.any(q > p) for q in points) for p in points], bool)
