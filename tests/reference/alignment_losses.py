"""Advantages and losses one completion and one token at a time, in plain Python floats, from the papers."""

import math

import numpy as np


def gdpo(rewards, weights, epsilon=1e-4):
    """TRL's normalise-then-sum on rewards [K, B, G] with NaN where there is no score; unbiased deviations."""
    rewards = np.asarray(rewards, float)
    num_objectives, batch, group = rewards.shape
    total = np.zeros((batch, group))
    for k in range(num_objectives):
        for b in range(batch):
            row = rewards[k, b]
            known = row[~np.isnan(row)]
            mean = known.mean() if len(known) else 0.0
            spread = known.std(ddof=1) if len(known) > 1 else 0.0
            for g in range(group):
                if not math.isnan(row[g]):
                    total[b, g] += weights[k] * (row[g] - mean) / (spread + epsilon)
    return (total - total.mean()) / (total.std(ddof=1) + epsilon)


def token_loss(ratio, advantage, low, high, dual):
    """PPO's clipped loss with a dual clip for negative advantages, one token."""
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = max(-ratio * advantage, -clipped * advantage)
    return min(loss, -dual * advantage) if advantage < 0 else loss


def reinforce(rewards, lengths, width, epsilon=1e-8):
    """Rewards at every valid token, whitened with the token-weighted mean and Bessel-corrected variance."""
    tokens = [r for r, n in zip(rewards, lengths) for _ in range(n)]
    mean = sum(tokens) / len(tokens)
    variance = sum((t - mean) ** 2 for t in tokens) / (len(tokens) - 1)
    return np.array(
        [
            [(r - mean) / math.sqrt(variance + epsilon) if t < n else 0.0 for t in range(width)]
            for r, n in zip(rewards, lengths)
        ]
    )
