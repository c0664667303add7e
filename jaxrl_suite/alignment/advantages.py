"""Advantages of groups of sampled completions: what a reward says about each one relative to the others.

Per group where the estimator is per group (callers vmap over prompts), per batch where it normalises over the batch. A
mask switches off completions that could not be scored: they enter no statistic and get advantage zero.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.distributions import masked_mean, masked_variance, masked_whiten
from jaxrl_suite.types import Array

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce"]


def _full(rewards: Array, mask: Array | None) -> Array:
    return jnp.ones(rewards.shape, bool) if mask is None else jnp.asarray(mask, bool)


def _deviation(rewards: Array, mask: Array, axis: int | tuple[int, ...] | None, *, keepdims: bool = False) -> Array:
    """Unbiased standard deviation with a finite derivative for constant rewards."""
    variance = masked_variance(rewards, mask, axis=axis, unbiased=True, keepdims=keepdims)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def grpo_advantages(rewards: Array, *, mask: Array | None = None, epsilon: float = 1e-6) -> Array:
    """Group-relative: ``A_b = (r_b - mean) / (std + epsilon)``, standard deviation unbiased.

    A group of one has mean 0 and standard deviation 1, as in the official code; a constant group gets zeros.

    Args:
        rewards: [G].
        mask: bool [G], completions that were scored.
        epsilon: added to the standard deviation.

    Returns:
        [G].

    References:
        Shao et al. (2024), arXiv 2402.03300, section 4.1; Lu et al. (2025), arXiv 2509.11452 for epsilon.

    >>> import jax.numpy as jnp
    >>> grpo_advantages(jnp.array([0.0, 1.0, 2.0])).round(3).tolist()
    [-1.0, 0.0, 1.0]
    """
    keep = _full(rewards, mask)
    if rewards.shape[0] == 1:
        return jnp.where(keep, rewards / (1 + epsilon), 0)
    centred = rewards - masked_mean(rewards, keep)
    return jnp.where(keep, centred / (_deviation(rewards, keep, None) + epsilon), 0)


def dr_grpo_advantages(rewards: Array, *, mask: Array | None = None) -> Array:
    """Group-relative without the division: ``A_b = r_b - mean``; linear in the rewards.

    Args:
        rewards: [G].
        mask: bool [G], completions that were scored.

    Returns:
        [G], sum zero.

    References:
        Liu et al. (2025), arXiv 2503.20783 (Dr. GRPO), section 3.

    >>> import jax.numpy as jnp
    >>> dr_grpo_advantages(jnp.array([0.0, 1.0])).tolist()
    [-0.5, 0.5]
    """
    keep = _full(rewards, mask)
    return jnp.where(keep, rewards - masked_mean(rewards, keep), 0)


def rloo_advantages(rewards: Array, *, mask: Array | None = None) -> Array:
    """Reward less the mean of the others in the group: ``n / (n - 1) (r_b - mean)``; zero where there are no others.

    Args:
        rewards: [G].
        mask: bool [G], completions that were scored.

    Returns:
        [G], sum zero.

    References:
        Kool et al. (2019); Ahmadian et al. (2024), arXiv 2402.14740, equation for RLOO.

    >>> import jax.numpy as jnp
    >>> rloo_advantages(jnp.array([0.0, 1.0])).tolist()
    [-1.0, 1.0]
    """
    keep = _full(rewards, mask)
    count = jnp.sum(keep).astype(rewards.dtype)
    factor = jnp.where(count > 1, count / jnp.maximum(count - 1, 1), 0)
    return jnp.where(keep, factor * (rewards - masked_mean(rewards, keep)), 0)


def reinforce_advantages(rewards: Array, mask: Array, *, epsilon: float = 1e-8) -> Array:
    """REINFORCE++: the reward at every token, whitened over all valid tokens of the batch. No group baseline.

    Long completions weigh more in the statistics. The variance is unbiased and ``epsilon`` is added to it.

    Args:
        rewards: [B].
        mask: bool [B, T], valid tokens, the stop token included.
        epsilon: added to the variance.

    Returns:
        [B, T], zero where masked.

    References:
        Hu et al. (2025), arXiv 2501.03262 (REINFORCE++), equation for global normalisation with discount 1.
    """
    return masked_whiten(jnp.broadcast_to(rewards[:, None], mask.shape), mask, epsilon=epsilon)


def reinforce_baseline_advantages(rewards: Array, mask: Array, *, epsilon: float = 1e-8) -> Array:
    """REINFORCE++ with a group baseline: the group mean is taken off first, then whitened over the batch's tokens.

    Args:
        rewards: [B, G].
        mask: bool [B, G, T].
        epsilon: added to the variance.

    Returns:
        [B, G, T].

    References:
        Hu et al. (2025), arXiv 2501.03262, the variant with a baseline.
    """
    centred = jax.vmap(dr_grpo_advantages)(rewards).reshape(-1)
    flat = mask.reshape(-1, mask.shape[-1])
    return reinforce_advantages(centred, flat, epsilon=epsilon).reshape(mask.shape)


def remax_advantages(rewards: Array, greedy: Array) -> Array:
    """Reward less that of the greedy completion of the same prompt.

    Args:
        rewards: [G].
        greedy: [], reward of the greedy completion.

    Returns:
        [G].

    References:
        Li et al. (2023), arXiv 2310.10505 (ReMax), algorithm 1.
    """
    return rewards - greedy


def gdpo_advantages(rewards: Array, weights: Array, mask: Array | None = None, *, epsilon: float = 1e-4) -> Array:
    """Each reward standardised within each group, then the weighted sum standardised over the batch.

    Combinations of rewards that sum to the same number stay apart, which sum-then-normalise merges.

    Args:
        rewards: [K, B, G].
        weights: [K].
        mask: bool [K, B, G], what was scored; a completion without any score gets zero and enters no statistic.
        epsilon: added to the standard deviations, both unbiased.

    Returns:
        [B, G].

    References:
        Liu et al. (2026), arXiv 2601.05242 (GDPO); epsilon as in TRL.
    """
    keep = _full(rewards, mask)
    centred = rewards - masked_mean(rewards, keep, axis=2, keepdims=True)
    scores = jnp.where(keep, centred / (_deviation(rewards, keep, 2, keepdims=True) + epsilon), 0)
    total = jnp.sum(weights[:, None, None] * scores, axis=0)
    any_score = jnp.any(keep, axis=0)
    spread = _deviation(total, any_score, None)
    return jnp.where(any_score, (total - masked_mean(total, any_score)) / (spread + epsilon), 0)


def mo_grpo_advantages(rewards: Array, weights: Array, mask: Array | None = None, *, epsilon: float = 1e-6) -> Array:
    """Each reward divided by its spread within the group, then summed: no reward dominates by its variance.

    Args:
        rewards: [K, B, G].
        weights: [K].
        mask: bool [K, B, G], what was scored.
        epsilon: added to the standard deviations.

    Returns:
        [B, G].

    References:
        Ichihara et al. (2025), arXiv 2509.22047 (MO-GRPO).
    """
    keep = _full(rewards, mask)

    def each(reward: Array, rows: Array) -> Array:
        return grpo_advantages(reward, mask=rows, epsilon=epsilon)

    return jnp.sum(weights[:, None, None] * jax.vmap(jax.vmap(each))(rewards, keep), axis=0)


def soft_min_rewards(rewards: Array, *, temperature: Array | float) -> Array:
    """Smooth minimum over objectives, ``-tau log mean_i exp(-r_i / tau)``: the weakest objective decides.

    Args:
        rewards: [K, ...].
        temperature: tau > 0, in the units of the rewards.

    Returns:
        [...].
    """
    temperature = jnp.asarray(temperature, rewards.dtype)
    size = jnp.log(jnp.asarray(rewards.shape[0], rewards.dtype))
    return -temperature * (jax.nn.logsumexp(-rewards / temperature, axis=0) - size)


_PER_GROUP: dict[str, Callable[..., Array]] = {
    "grpo": grpo_advantages,
    "dr_grpo": dr_grpo_advantages,
    "rloo": rloo_advantages,
}


def estimate_advantages(estimator: Estimator, rewards: Array, token_mask: Array, *, mask: Array | None = None) -> Array:
    """Advantages of every token by the name of the estimator.

    Args:
        estimator: "grpo", "dr_grpo", "rloo" or "reinforce".
        rewards: [B, G].
        token_mask: bool [B, G, T].
        mask: bool [B, G], completions that were scored.

    Returns:
        [B, G, T], zero where masked.

    Raises:
        ValueError: unknown estimator.
    """
    keep = _full(rewards, mask)
    valid = token_mask & keep[..., None]
    if estimator == "reinforce":
        flat = valid.reshape(-1, valid.shape[-1])
        return reinforce_advantages(jnp.where(keep, rewards, 0).reshape(-1), flat).reshape(valid.shape)
    known = (*_PER_GROUP, "reinforce")
    check(estimator in known, argument="estimator", value=estimator, rule=f"must be one of {', '.join(known)}")
    values = jax.vmap(lambda r, m: _PER_GROUP[estimator](r, mask=m))(rewards, keep)
    return jnp.where(valid, values[..., None], 0)


def combined_advantages(
    estimator: Estimator,
    rewards: Array,
    weights: Array,
    token_mask: Array,
    *,
    mask: Array | None = None,
    combine: Literal["reward", "advantage", "gdpo", "mo_grpo"] = "reward",
    gain: Array | float = 1.0,
    gain_on: Literal["reward", "advantage", "lr"] = "advantage",
) -> Array:
    """Advantages of several weighted rewards, with the switches in which code and paper differ.

    ``combine="reward"`` sums the rewards and then estimates (the official update); ``"advantage"`` estimates each
    reward alone and sums (linear in the weights, D8); ``"gdpo"`` and ``"mo_grpo"`` are the estimators of those papers.
    A gain on the reward cancels in every estimator that divides by a spread (D1); on the advantage it does not; "lr"
    leaves it to the optimiser.

    Args:
        estimator: of the advantages.
        rewards: [K, B, G].
        weights: [K].
        token_mask: bool [B, G, T].
        mask: bool [K, B, G], what was scored; an unscored objective adds nothing to the sum of its completion.
        combine: how objectives are joined.
        gain: factor from the hypervolume rule.
        gain_on: where the gain acts.

    Returns:
        [B, G, T].
    """
    keep = _full(rewards, mask)
    before = jnp.asarray(gain if gain_on == "reward" else 1.0, rewards.dtype)
    after = jnp.asarray(gain if gain_on == "advantage" else 1.0, rewards.dtype)
    clean = before * jnp.where(keep, rewards, 0)
    if combine == "reward":
        total = jnp.sum(weights[:, None, None] * clean, axis=0)
        result = estimate_advantages(estimator, total, token_mask, mask=jnp.any(keep, axis=0))
    elif combine == "advantage":
        each = jax.vmap(lambda r, m: estimate_advantages(estimator, r, token_mask, mask=m))(clean, keep)
        result = jnp.tensordot(weights, each, axes=1)
    else:
        known = {"gdpo": gdpo_advantages, "mo_grpo": mo_grpo_advantages}
        check(combine in known, argument="combine", value=combine, rule="must be reward, advantage, gdpo or mo_grpo")
        result = jnp.where(token_mask, known[combine](clean, weights, keep)[..., None], 0)
    return after * result
