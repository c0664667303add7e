"""Greedy couplings in plain Python and NumPy: the two oracles of values and of speed, and the zero-seeking rule."""

import heapq

import numpy as np


def heap_greedy(p, q):
    """Largest against largest by two heaps; cells as (i, j, mass). The fastest plain Python that we could write."""
    rows = [(-mass, i) for i, mass in enumerate(p.tolist()) if mass > 0]
    columns = [(-mass, j) for j, mass in enumerate(q.tolist()) if mass > 0]
    heapq.heapify(rows)
    heapq.heapify(columns)
    cells, append, replace, pop = [], None, heapq.heapreplace, heapq.heappop
    append = cells.append
    while rows and columns:
        a, i = rows[0]
        b, j = columns[0]
        rest = b - a  # masses are negated
        if rest < -1e-15:  # the column is larger
            append((i, j, -a))
            pop(rows)
            replace(columns, (rest, j))
        elif rest > 1e-15:
            append((i, j, -b))
            pop(columns)
            replace(rows, (-rest, i))
        else:
            append((i, j, -a))
            pop(rows)
            pop(columns)
    return cells


def argmax_greedy(p, q):
    """Largest against largest by argmax, the way public code does it."""
    p, q = p.astype(float).copy(), q.astype(float).copy()
    cells = []
    while p.max() > 1e-15 and q.max() > 1e-15:
        i, j = int(np.argmax(p)), int(np.argmax(q))
        mass = min(p[i], q[j])
        cells.append((i, j, mass))
        if p[i] <= q[j]:
            p[i], q[j] = 0.0, q[j] - mass
        else:
            p[i], q[j] = p[i] - mass, 0.0
    return cells


def argmax_greedy_multi(marginals):
    """K marginals: the largest of each, the least of these masses."""
    left = [np.array(p, float) for p in marginals]
    cells = []
    while min(p.max() for p in left) > 1e-15:
        cell = tuple(int(np.argmax(p)) for p in left)
        mass = min(p[i] for p, i in zip(left, cell))
        cells.append((*cell, mass))
        for p, i in zip(left, cell):
            p[i] = 0.0 if p[i] <= mass else p[i] - mass
    return cells


def zero_greedy(p, q):
    """Pairs the two positive masses of least difference."""
    p, q = p.astype(float).copy(), q.astype(float).copy()
    cells = []
    while p.max() > 1e-15 and q.max() > 1e-15:
        gap = np.abs(p[:, None] - q[None, :])
        gap[p <= 1e-15, :] = np.inf
        gap[:, q <= 1e-15] = np.inf
        i, j = np.unravel_index(np.argmin(gap), gap.shape)
        mass = min(p[i], q[j])
        cells.append((int(i), int(j), mass))
        p[i], q[j] = max(p[i] - mass, 0.0), max(q[j] - mass, 0.0)
    return cells


def dense(cells, shape):
    joint = np.zeros(shape)
    for *cell, mass in cells:
        joint[tuple(cell)] += mass
    return joint


def entropy(masses):
    masses = np.asarray(masses, float).ravel()
    masses = masses[masses > 0]
    return float(-(masses * np.log2(masses)).sum())
