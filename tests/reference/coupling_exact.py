"""Exact minimum entropy couplings of small alphabets, for many pairs at once.

The optimum is a vertex of the transportation polytope, and the cells of a vertex form a forest, which edges of mass
zero complete to a spanning tree of the N + M symbols. An edge of a tree carries the imbalance of the side that it cuts
off, d(S) = p(S) - q(S). So dynamic programming over subsets: best[S][v] is the least entropy of the edges of a tree on
S in which all symbols but v are settled, and v keeps |d(S)|; hang[S][side] adds the edge that hangs S on a symbol
of the other side.
"""

import numpy as np


def _terms(mass):
    mass = np.abs(mass)
    return np.where(mass > 1e-15, -mass * np.log2(np.where(mass > 1e-15, mass, 1.0)), 0.0)


def exact_entropies(p, q):
    """Least joint entropies in bits of ``p [B, N]`` and ``q [B, M]``; rows may be padded by zeros."""
    signed = np.concatenate([p, -q], axis=1)
    num_pairs, size = signed.shape
    is_row = np.arange(size) < p.shape[1]
    full = (1 << size) - 1
    members = [[v for v in range(size) if subset >> v & 1] for subset in range(full + 1)]
    imbalance = [signed[:, m].sum(axis=1) for m in members]
    best, hang = {}, {}
    for subset in range(1, full + 1):
        for v in members[subset]:
            allowed = imbalance[subset] >= -1e-12 if is_row[v] else imbalance[subset] <= 1e-12
            rest = subset & ~(1 << v)
            if rest == 0:
                value = np.zeros(num_pairs)
            else:
                value = np.full(num_pairs, np.inf)
                lowest, branch = rest & -rest, rest
                while branch:
                    if branch & lowest:  # the branch that holds the lowest symbol is cut off first
                        np.minimum(value, best[subset & ~branch, v] + hang[branch, not is_row[v]], out=value)
                    branch = (branch - 1) & rest
            best[subset, v] = np.where(allowed, value, np.inf)
        edge = _terms(imbalance[subset])
        for side in (False, True):
            choices = [best[subset, v] for v in members[subset] if is_row[v] == side]
            hang[subset, side] = edge + np.min(choices, axis=0) if choices else np.full(num_pairs, np.inf)
    return np.min([best[full, v] for v in range(size)], axis=0)


def exact_entropy_by_search(p, q):
    """The same for one pair by exhausting the orders of elimination; slow, and sees each vertex many times."""
    seen = {}

    def search(p, q):
        state = (tuple(np.round(p, 12)), tuple(np.round(q, 12)))
        if state not in seen:
            options = [0.0]
            if max(p) > 1e-12 and max(q) > 1e-12:
                options = []
                for i in np.flatnonzero(p > 1e-12):
                    for j in np.flatnonzero(q > 1e-12):
                        mass = min(p[i], q[j])
                        next_p, next_q = p.copy(), q.copy()
                        next_p[i] -= mass
                        next_q[j] -= mass
                        options.append(float(_terms(mass)) + search(next_p, next_q))
            seen[state] = min(options)
        return seen[state]

    return search(np.array(p, float), np.array(q, float))
