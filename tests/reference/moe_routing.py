"""Slow NumPy references for routing, capacity, dispatch and groups, written from the definitions."""

import itertools
import math

import numpy as np


def groups(degrees, free):
    """Groups by brute force: ranks with equal digits except one. ``degrees`` innermost first."""
    ranks = range(math.prod(degrees))

    def digits(rank):
        out = []
        for degree in degrees:
            out.append(rank % degree)
            rank //= degree
        return tuple(out)

    found = {}
    for rank in ranks:
        d = digits(rank)
        found.setdefault(d[:free] + d[free + 1 :], []).append(rank)
    return sorted(found.values())


def keep_by_capacity(experts, weights, num_experts, capacity, policy):
    """Explicit loop over experts: sort candidates by rule, keep the first C."""
    keep = np.zeros(experts.shape, bool)
    for e in range(num_experts):
        copies = [tuple(c) for c in np.argwhere(experts == e)]
        order = (lambda c: (-weights[c], c[0], c[1])) if policy == "probs" else (lambda c: c)
        for copy in sorted(copies, key=order)[:capacity]:
            keep[copy] = True
    return keep


def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down


def moe(x, experts, weights, keep, gate, up, down):
    """Sum over kept copies, token by token."""
    y = np.zeros_like(x)
    for t, j in itertools.product(range(experts.shape[0]), range(experts.shape[1])):
        if keep[t, j]:
            e = experts[t, j]
            y[t] += weights[t, j] * swiglu(x[t], gate[e], up[e], down[e])
    return y


def load_balance(probs, experts):
    """E / (k N^2) sum_i n_i sum_x p_i(x)."""
    num_tokens, num_experts = probs.shape
    counts = np.bincount(experts.reshape(-1), minlength=num_experts)
    return num_experts / (experts.shape[1] * num_tokens**2) * float((counts * probs.sum(axis=0)).sum())


def z_loss(logits):
    top = logits.max(axis=-1, keepdims=True)
    return float(np.mean((top[:, 0] + np.log(np.exp(logits - top).sum(axis=-1))) ** 2))
