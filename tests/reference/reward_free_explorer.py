"""HF-UCRL-RFE++ in NumPy, written from the paper: one world, one seed, episode by episode.

Vectorised over starts, states and actions, since that is how one would write it; steps and episodes are loops. Random
numbers are arguments, so that another implementation can be held to the same ones.
"""

import numpy as np

LEAK = 0.1


class World:
    def __init__(self, features, successors, theta, nominal, start):
        self.features, self.successors = np.array(features), np.array(successors)
        self.theta, self.nominal, self.start = np.array(theta), np.array(nominal), int(start)
        self.mask = np.any(self.features != 0, axis=-1)
        self.shape = self.features.shape[:2]


def norms(inverse, x):
    direction = x @ inverse
    return np.sqrt(np.maximum((x * direction).sum(-1), 0.0)), direction


def pseudo_rewards(world, logits):
    """Rewards [L, H, S, A] from logits, the scale of each, and its longest path as a 0/1 array."""
    squashed = 1.0 / (1.0 + np.exp(-logits))
    starts, horizon, states, actions = logits.shape
    totals, sums = np.zeros((horizon + 1, starts, states)), np.zeros((horizon, starts, states, actions))
    for h in range(horizon - 1, -1, -1):
        ahead = np.where(world.mask, totals[h + 1][:, world.successors], 0.0).max(-1)
        sums[h] = squashed[:, h] + ahead
        totals[h] = sums[h].max(-1)
    scale = np.maximum(1.0, totals[0, :, world.start])
    path, place, lane = np.zeros_like(logits), np.full(starts, world.start), np.arange(starts)
    for h in range(horizon):
        action = sums[h, lane, place].argmax(-1)
        path[lane, h, place, action] = 1.0
        options = world.successors[place, action]
        value = np.where(world.mask[place, action], totals[h + 1][lane[:, None], options], -1.0)
        place = options[lane, value.argmax(-1)]
    return squashed, scale, path


def sweep(world, theta, tilde, hat, radius, rewards, keep=False):
    """Both value families with the greedy policy; everything has a leading axis of starts."""
    starts, horizon, states, _ = rewards.shape
    values, widths = np.zeros((2, horizon + 1, starts, states))
    policy, kept, score = np.zeros((horizon, starts, states), int), [], None
    lane, state = np.arange(starts)[:, None], np.arange(states)[None]
    for h in range(horizon - 1, -1, -1):
        x = np.einsum("sajd,lsaj->lsad", world.features, values[h + 1][:, world.successors])
        y = np.einsum("sajd,lsaj->lsad", world.features, widths[h + 1][:, world.successors])
        x_norm, x_direction = norms(tilde, x)
        y_norm, y_direction = norms(hat, y)
        bracket = np.minimum(1.0, radius * x_norm) + 2 * radius * y_norm + y @ theta
        action = bracket.argmax(-1)
        policy[h] = action
        pick = (lane, state, action)
        score = bracket[pick]
        worth = (rewards[:, h] + x @ theta)[pick]
        widths[h], values[h] = np.clip(score, 0, 1), np.clip(worth, 0, 1)
        if keep:
            slope = np.where(radius * x_norm > 1, LEAK, 1.0) * radius / np.maximum(x_norm, 1e-12)
            to_x = (slope[..., None] * x_direction)[pick]
            to_y = ((2 * radius / np.maximum(y_norm, 1e-12))[..., None] * y_direction)[pick] + theta
            leak = [np.where((v > 1) | (v < 0), LEAK, 1.0) for v in (worth, score)]
            kept.append((to_x, to_y, *leak))
    return score[:, world.start], values, widths, policy, kept[::-1]


def gradient(world, theta, policy, kept):
    """Derivative of the score with respect to the rewards, [L, H, S, A]."""
    horizon, starts, states = policy.shape
    result = np.zeros((starts, horizon, states, world.shape[1]))
    lane, state = np.arange(starts)[:, None], np.arange(states)[None]
    by_value, by_width = np.zeros((2, starts, states))
    by_width[:, world.start] = 1.0
    for h in range(horizon):
        to_x, to_y, value_leak, width_leak = kept[h]
        to_reward = by_value * value_leak
        to_bracket = by_width * (1.0 if h == 0 else width_leak)
        result[lane, h, state, policy[h]] = to_reward
        rows = world.features[state, policy[h]]  # [L, S, N, D]
        after = world.successors[state, policy[h]]
        flow = np.einsum("lsjd,lsd->lsj", rows, to_reward[..., None] * theta + to_bracket[..., None] * to_x)
        spread = np.einsum("lsjd,lsd->lsj", rows, to_bracket[..., None] * to_y)
        by_value, by_width = np.zeros((2, starts, states))
        np.add.at(by_value, (lane[..., None], after), flow)
        np.add.at(by_width, (lane[..., None], after), spread)
    return result


def search(world, theta, tilde, hat, radius, logits, rate, steps):
    """Adam on the logits from all starts at once; best iterate of all."""
    logits = np.clip(logits, -12.0, 8.0)
    first, second = np.zeros_like(logits), np.zeros_like(logits)
    best_score, best = -np.inf, None
    for count in range(steps + 1):
        squashed, scale, path = pseudo_rewards(world, logits)
        rewards = squashed / scale[:, None, None, None]
        score, _, _, policy, kept = sweep(world, theta, tilde, hat, radius, rewards, keep=count < steps)
        if score.max() > best_score:
            best_score, best = score.max(), logits[score.argmax()].copy()
        if count == steps:
            break
        slope = gradient(world, theta, policy, kept)
        along = (slope * rewards).sum((1, 2, 3)) * (scale > 1)
        slope = (slope - path * along[:, None, None, None]) / scale[:, None, None, None]
        slope = slope * squashed * (1 - squashed)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        update = first / (1 - 0.9 ** (count + 1)) / (np.sqrt(second / (1 - 0.999 ** (count + 1))) + 1e-8)
        logits = np.clip(logits + rate * update, -12.0, 8.0)
    return best, best_score


class Explorer:
    """State of a run; ``episode`` plays one."""

    def __init__(self, world, horizon, moments, ridge, floor, cutoff, radius, rate=0.5, steps=10):
        self.world, self.horizon, self.moments = world, horizon, moments
        self.floor, self.cutoff, self.radius, self.rate, self.steps = floor, cutoff, radius, rate, steps
        size = world.theta.size
        self.gram = np.tile(ridge * np.eye(size), (2, moments, 1, 1))
        self.moment = np.tile(ridge * world.nominal, (2, moments, 1))
        self.logits = np.zeros((horizon, *world.shape))

    def episode(self, starts, uniforms):
        """One episode with random starts [L - 1, H, S, A] and uniforms [H]; returns the uncertainty value."""
        world, inverse = self.world, np.linalg.inv(self.gram)
        theta = np.einsum("fmij,fmj->fmi", inverse, self.moment)
        pooled = np.linalg.solve(self.gram[:, 0].sum(0), self.moment[:, 0].sum(0))
        start = np.concatenate([self.logits[None], starts])
        tilde, hat = inverse[0, 0], inverse[1, 0]
        self.logits, score = search(world, pooled, tilde, hat, self.radius, start, self.rate, self.steps)
        squashed, scale, _ = pseudo_rewards(world, self.logits[None])
        _, values, widths, policy, _ = sweep(world, pooled, tilde, hat, self.radius, squashed / scale)
        self.play(policy[:, 0], (values[:, 0], widths[:, 0]), theta, inverse, uniforms)
        return min(1.0, max(0.0, score)), pooled

    def play(self, policy, functions, theta, frozen, uniforms):
        world, running, place = self.world, frozen.copy(), self.world.start
        for h in range(self.horizon):
            action = policy[h, place]
            rows, successors = world.features[place, action], world.successors[place, action]
            total = np.cumsum(rows @ world.theta)
            index = min(int((total <= uniforms[h] * total[-1]).sum()), len(total) - 1)
            for family, function in enumerate(functions):
                powers = function[h + 1][successors] ** (2.0 ** np.arange(self.moments))[:, None]
                phi = powers @ rows
                variances = self.variances(phi, theta[family], frozen[family], running[family])
                for m in range(self.moments):
                    x, w = phi[m], 1.0 / variances[m]
                    self.gram[family, m] += w * np.outer(x, x)
                    self.moment[family, m] += w * powers[m, index] * x
                    direction = running[family, m] @ x
                    running[family, m] -= np.outer(direction, direction) * w / (1 + w * x @ direction)
            place = successors[index]

    def variances(self, phi, theta, frozen, running):
        mean = np.clip((phi * theta).sum(-1), 0, 1)
        spread = self.radius * np.sqrt(np.einsum("md,mde,me->m", phi, frozen, phi))
        known = np.ones(self.moments)
        error = np.minimum(1, 2 * spread[:-1]) + np.minimum(1, spread[1:])
        known[:-1] = mean[1:] - mean[:-1] ** 2 + error
        epistemic = self.cutoff**2 * np.sqrt(np.einsum("md,mde,me->m", phi, running, phi))
        return np.maximum(np.maximum(epistemic, known), self.floor**2)
