"""Runs against each other: at equal tokens, in steps, with paired intervals."""

from collections.abc import Mapping

import numpy as np


def at_tokens(traces: Mapping[str, np.ndarray], budget: np.ndarray) -> np.ndarray:
    """Hypervolume of each run's archive at its first checkpoint with at least that many tokens, or its last one.

    Args:
        traces: "hypervolume" and "tokens" [N, C].
        budget: [N], tokens.

    Returns:
        [N].
    """
    reached = traces["tokens"] >= budget[:, None]
    index = np.where(reached.any(1), reached.argmax(1), reached.shape[1] - 1)
    return traces["hypervolume"][np.arange(len(index)), index]


def steps_to_reach(hypervolume: np.ndarray, level: np.ndarray, eval_every: int) -> np.ndarray:
    """Steps until each run's archive covers as much as asked; infinity where it never does.

    >>> steps_to_reach(np.array([[0.1, 0.2, 0.3], [0.1, 0.1, 0.1]]), np.array([0.2, 0.2]), eval_every=4)
    array([ 4., inf])

    Args:
        hypervolume: [N, C], of archives at checkpoints, the first before any step.
        level: [N].
        eval_every: steps between two checkpoints.

    Returns:
        [N].
    """
    reached = hypervolume >= level[:, None]
    return np.where(reached.any(1), reached.argmax(1) * eval_every, np.inf)


def median_steps(steps: np.ndarray) -> float | None:
    """Median of what :func:`steps_to_reach` returns; None where half of the runs or more never got there."""
    median = float(np.median(steps))
    return median if np.isfinite(median) else None


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of Student's t of paired differences [N]."""
    mean, half = float(differences.mean()), half_width(differences)
    return mean, mean - half, mean + half


def half_width(values: np.ndarray) -> float:
    """Half of the 95 % interval of the mean of values [N], Student's t; NaN for one value."""
    from scipy import stats

    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
