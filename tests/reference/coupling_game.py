"""The rate-limited coding game, one episode and one step at a time, in NumPy."""

import numpy as np


def greedy_encoder(belief, rate):
    """Labels and code law of algorithm 1, vectorised in closed form over the sorted belief."""
    order = np.argsort(-belief, kind="stable")
    s = belief[order]
    n = int((s > 0).sum())
    f = np.zeros_like(s)
    f[:n] = -s[:n] * np.log2(s[:n])
    tail = np.concatenate([np.cumsum(f[::-1])[::-1][1:], [0.0]])
    blocks = np.minimum(np.cumsum(s), 1.0)
    giant = -blocks * np.log2(blocks) + tail
    giant[n - 1 :] = 0
    labels = np.arange(len(s))
    if giant[0] <= rate + 1e-6:
        return order, labels, s
    last, second = s[n - 1], s[n - 2]
    both = last + second
    split = giant[:-1] - (f[n - 1] + f[n - 2] + both * np.log2(both))
    split[max(n - 2, 0) :] = 0
    i = int(np.argmax((split <= rate + 1e-6) | (giant[1:] <= rate + 1e-6))) + 1
    code = s.copy()
    if split[i - 1] <= rate + 1e-6:
        if i >= n - 1:  # the giant block and the last symbol: everything is one code
            labels[:n] = 0
        else:
            labels[1:i] = 0
            labels[n - 1] = n - 2
    else:
        labels[1 : i + 1] = 0
    code = np.bincount(labels, weights=s, minlength=len(s))
    return order, labels, code


def play_episode(
    rng, policy, successors, turn_law, reward, terminal, start, message, num_messages, rate, horizon, greedy
):
    """One episode; ``greedy(p, q)`` returns cells (i, j, mass). Returns decoded message, reward, length, KL check."""
    belief = np.full(num_messages, 1 / num_messages)
    state, total, worst = start, 0.0, 0.0
    length = 0
    while length < horizon:
        length += 1
        order, labels, code = greedy_encoder(belief, rate)
        law = policy[state]
        joint = np.zeros((num_messages, len(law)))
        for i, j, mass in greedy(code, law):
            joint[i, j] = mass
        worst = max(worst, float(np.abs(joint.sum(0) - law).max()))
        given = joint[labels] / np.where(code[labels] > 0, code[labels], 1)[:, None]  # by rank
        rank = int(np.flatnonzero(order == message)[0])
        row = given[rank] / given[rank].sum()
        action = int(np.searchsorted(np.cumsum(row)[:-1], rng.random(), side="right"))
        posterior = belief[order] * given[:, action]
        belief = np.empty_like(belief)
        belief[order] = posterior / posterior.sum()
        turn = int(np.searchsorted(np.cumsum(turn_law[state, action])[:-1], rng.random(), side="right"))
        state = int(successors[state, action, turn])
        total += float(reward[state])
        if terminal[state]:
            break
    return int(np.argmax(belief)), total, length, worst
