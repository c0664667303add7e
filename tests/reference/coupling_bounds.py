"""Lower bounds on joint entropies, one definition at a time, by loops."""

import numpy as np

from tests.reference.coupling_greedy import entropy


def majorization(*laws):
    size = max(len(p) for p in laws)
    sums = [np.cumsum(np.sort(np.pad(p, (0, size - len(p))))[::-1]) for p in laws]
    meet = np.min(sums, axis=0)
    return entropy(np.diff(np.concatenate([[0.0], meet])))


def profile(*laws):
    total, at = 0.0, 0.0
    ends = sorted(float(u) for p in laws for u in np.cumsum(np.sort(p)))
    for end in ends:
        if end - at > 1e-15:
            sizes = []
            for p in laws:
                cumulative = np.cumsum(np.sort(p))
                inside = int(np.argmax(cumulative >= min((at + end) / 2, cumulative[-1])))
                sizes.append(np.sort(p)[inside])
            total += (end - at) * -np.log2(min(sizes))
            at = end
    return total


def majorize_profile(*laws):
    vertices = [(0.0, 0.0)]
    for p in laws:
        ordered = np.sort(p)
        vertices += list(zip(np.cumsum(ordered).tolist(), ordered.tolist()))
    left, states = 1.0, []
    while left > 1e-14:
        state = min(max(y, left - x) for x, y in vertices)
        states.append(state)
        left -= state
    return entropy(states), len(states)
