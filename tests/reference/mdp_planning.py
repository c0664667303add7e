"""Planning in finite models by plain loops over NumPy arrays."""

import numpy as np


def q_value(kernel, reward, discount, values, state, action):
    return reward[state, action] + discount * sum(kernel[state, action, j] * values[j] for j in range(len(values)))


def value_iteration(kernel, reward, discount, sweeps=3000):
    states, actions = reward.shape
    values = np.zeros(states)
    for _ in range(sweeps):
        values = np.array(
            [max(q_value(kernel, reward, discount, values, s, a) for a in range(actions)) for s in range(states)]
        )
    return values


def soft_value_iteration(kernel, reward, discount, beta, sweeps=3000):
    states, actions = reward.shape
    values = np.zeros(states)
    for _ in range(sweeps):
        rows = [[q_value(kernel, reward, discount, values, s, a) for a in range(actions)] for s in range(states)]
        values = np.array([beta * np.log(np.sum(np.exp(np.array(row) / beta))) for row in rows])
    return values


def finite_values(kernel, reward, policy):
    """Values [H + 1, S] of an integer policy [H, S] under a reward [H, S, A]."""
    horizon, states, _ = reward.shape
    values = np.zeros((horizon + 1, states))
    for h in range(horizon - 1, -1, -1):
        for s in range(states):
            a = policy[h, s]
            values[h, s] = reward[h, s, a] + kernel[s, a] @ values[h + 1]
    return values


def best_finite_policy(kernel, reward):
    """Optimal policy [H, S] and values [H + 1, S]; ties to the lowest action."""
    horizon, states, actions = reward.shape
    values, policy = np.zeros((horizon + 1, states)), np.zeros((horizon, states), int)
    for h in range(horizon - 1, -1, -1):
        for s in range(states):
            scores = [reward[h, s, a] + kernel[s, a] @ values[h + 1] for a in range(actions)]
            policy[h, s] = int(np.argmax(scores))
            values[h, s] = max(scores)
    return policy, values
