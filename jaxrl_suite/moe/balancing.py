"""Balancing rules: losses that read the router's probabilities, and the bias that needs no loss.

Invariance of each, with counts and probabilities summed by ``reduce`` over the ranks named:

- batch loss (``load_balance_loss`` over one micro-batch of one data rank): independent of TP and CP, not of DP;
- sequence loss: independent of TP, CP and DP;
- global loss (sums over TP, CP and DP): independent of all three; averaged over micro-batches;
- z-loss and bias update: independent of all three when given global sums.

References:
    Fedus et al. (2021), Switch Transformers, arXiv:2101.03961, equations (4)-(6); Zoph et al. (2022), ST-MoE,
    arXiv:2202.08906, equation (5); Wang et al. (2024), Auxiliary-Loss-Free Load Balancing, arXiv:2408.15664,
    algorithm 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrl_suite.types import Array


def _same(x: Array) -> Array:
    return x


def expert_counts(experts: Array, num_experts: int, mask: Array | None = None) -> Array:
    """Copies routed to each expert before any drop, float32 [E].

    Args:
        experts: int32 [..., k].
        num_experts: E.
        mask: bool [...], tokens that count; all by default.

    >>> expert_counts(jnp.array([[0, 2], [2, 1]]), 3).tolist()
    [1.0, 1.0, 2.0]
    """
    hits = jnp.ones(experts.shape, jnp.float32)
    if mask is not None:
        hits = hits * mask[..., None].astype(jnp.float32)
    one_hot = experts.reshape(-1, 1) == jnp.arange(num_experts, dtype=experts.dtype)[None, :]
    return jnp.sum(one_hot * hits.reshape(-1, 1), axis=0)


def load_balance_loss(
    probs: Array,
    experts: Array,
    *,
    mask: Array | None = None,
    reduce: Callable[[Array], Array] = _same,
) -> Array:
    """Switch's load balance loss, ``E / (k N²) · Σ_i n_i Σ_x p_i(x)``; 1 at perfect balance.

    Args:
        probs: [T, E], full score distribution of each token.
        experts: int32 [T, k], chosen experts before any drop.
        mask: bool [T], tokens that count; all by default.
        reduce: sums an array over the ranks that share this loss; the identity on one device.

    Returns:
        Scalar, to be multiplied by a coefficient. Counts carry no gradient.

    References:
        Fedus et al. (2021), arXiv:2101.03961, equations (4)-(6), with n_i over k choices.
    """
    num_experts, top_k = probs.shape[-1], experts.shape[-1]
    kept = jnp.ones(probs.shape[:1], probs.dtype) if mask is None else mask.astype(probs.dtype)
    counts = expert_counts(experts, num_experts, mask).astype(probs.dtype)
    sums = (counts, jnp.sum(probs * kept[:, None], axis=0), jnp.sum(kept))
    counts, prob_sums, num_tokens = (reduce(part) for part in sums)
    return balance_from_sums(counts, prob_sums, num_tokens, top_k)


def balance_from_sums(counts: Array, prob_sums: Array, num_tokens: Array, top_k: int) -> Array:
    """The balance loss from sums over the tokens that share it, ``E / (k N²) · Σ_i n_i P_i``.

    Args:
        counts: [..., E], copies routed to each expert; no gradient.
        prob_sums: [..., E], summed probabilities.
        num_tokens: [...], N.
        top_k: k.

    Returns:
        [...].
    """
    num = jnp.maximum(num_tokens, 1)[..., None].astype(prob_sums.dtype)
    shares = jax.lax.stop_gradient(counts).astype(prob_sums.dtype) / num
    return prob_sums.shape[-1] / top_k * jnp.sum(shares * (prob_sums / num), axis=-1)


def sequence_balance_loss(
    probs: Array,
    experts: Array,
    *,
    mask: Array | None = None,
    reduce: Callable[[Array], Array] = _same,
) -> Array:
    """:func:`load_balance_loss` of each sequence, averaged over the sequences.

    Args:
        probs: [B, T, E].
        experts: int32 [B, T, k].
        mask: bool [B, T].
        reduce: sums an array over the ranks that share these sequences (TP and CP).
    """
    num_experts, top_k = probs.shape[-1], experts.shape[-1]
    kept = jnp.ones(probs.shape[:2], probs.dtype) if mask is None else mask.astype(probs.dtype)
    one_hot = (experts[..., None] == jnp.arange(num_experts, dtype=experts.dtype)).astype(probs.dtype)
    counts = jnp.sum(one_hot * kept[..., None, None], axis=(1, 2))
    sums = (counts, jnp.sum(probs * kept[..., None], axis=1), jnp.sum(kept, axis=1))
    counts, prob_sums, num_tokens = (reduce(part) for part in sums)
    return jnp.mean(balance_from_sums(counts, prob_sums, num_tokens, top_k))


def z_loss(logits: Array, *, mask: Array | None = None, reduce: Callable[[Array], Array] = _same) -> Array:
    """Mean squared log-partition of the router, ``mean(logsumexp(logits)²)``; keeps logits small.

    Args:
        logits: [T, E].
        mask: bool [T], tokens that count.
        reduce: sums a scalar over the ranks that share this loss.

    References:
        Zoph et al. (2022), arXiv:2202.08906, equation (5).

    >>> float(z_loss(jnp.zeros((3, 1))))
    0.0
    """
    kept = jnp.ones(logits.shape[:1], logits.dtype) if mask is None else mask.astype(logits.dtype)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1)) * kept
    return reduce(jnp.sum(squares)) / jnp.maximum(reduce(jnp.sum(kept)), 1)


def update_balance_bias(bias: Array, counts: Array, rate: Array | float = 1e-3) -> Array:
    """Loss-free balancing: raises the selection bias of experts with less than the mean load, lowers the others'.

    Args:
        bias: [..., E], added to scores for the selection only, never to combine weights.
        counts: [..., E], copies routed to each expert in the whole global batch.
        rate: step.

    References:
        Wang et al. (2024), arXiv:2408.15664, algorithm 1.

    >>> update_balance_bias(jnp.zeros(2), jnp.array([3.0, 1.0]), 0.5).tolist()
    [-0.5, 0.5]
    """
    error = jnp.mean(counts, axis=-1, keepdims=True) - counts
    return jax.lax.stop_gradient(bias + jnp.asarray(rate, bias.dtype) * jnp.sign(error).astype(bias.dtype))


def load_imbalance(counts: Array) -> Array:
    """Largest load over the mean load of the experts, at least 1 when any token was routed."""
    return jnp.max(counts, axis=-1) / jnp.maximum(jnp.mean(counts, axis=-1), 1e-9)
