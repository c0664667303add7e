"""Entropy-bounded information maximisation by definition: the sequential algorithm 1, and all partitions."""

import numpy as np

from tests.reference.coupling_greedy import entropy


def sequential_path(p):
    """Entropies and blocks of L_0, S_1, L_1, ..., as (entropy, list of blocks of symbols)."""
    order = [int(i) for i in np.argsort(-np.asarray(p), kind="stable") if p[i] > 0]
    blocks = [[i] for i in order]

    def mass(block):
        return sum(p[i] for i in block)

    def score(blocks):
        return entropy([mass(block) for block in blocks])

    path = [(score(blocks), blocks)]
    while len(blocks) > 1:
        ranked = sorted(blocks, key=mass, reverse=True)
        split = ranked[:-2] + [ranked[-2] + ranked[-1]]
        path.append((score(split), split))
        blocks = [ranked[0] + ranked[1], *ranked[2:]]
        path.append((score(blocks), blocks))
    return path


def sequential_ebim(p, rate, slack=1e-12):
    """Entropy and blocks of the first map that fits."""
    for value, blocks in sequential_path(p):
        if value <= rate + slack:
            return value, blocks
    raise AssertionError("the constant map has entropy zero")


def partitions(size):
    """Restricted-growth strings: every partition of ``size`` symbols once, as tuples of labels."""
    strings = [(0,)]
    for _ in range(size - 1):
        strings = [s + (label,) for s in strings for label in range(max(s) + 2)]
    return strings


def partition_entropies(p):
    return np.array([entropy(np.bincount(s, weights=p)) for s in partitions(len(p))])
