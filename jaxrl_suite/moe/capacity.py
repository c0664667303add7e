"""Capacity: which copies of tokens an expert keeps when it may take only so many.

Invariance: with dropping the result depends on which tokens are decided upon together, hence on TP · CP and on the
order of the sequence ("sub-sequence" dropping); only dropless routing does not depend on the folding. Full-sequence
dropping decides over all ranks of a sequence together and is independent of TP and CP.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.moe.grouped import exclusive_cumsum
from jaxrl_suite.types import Array

DropPolicy = Literal["probs", "position"]


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Slots of one expert for one source rank, ``ceil(T · k / E · factor)``, never more than T.

    "Tokens" of the paper's equation (4) are token copies, as in its code.

    >>> expert_capacity(16, 8, 2, 1.25)
    5
    """
    check(capacity_factor > 0, argument="capacity_factor", value=capacity_factor, rule="must be positive")
    # A factor like 1.1 must not gain a slot from rounding, so the product is rounded before the ceiling.
    return min(num_tokens, max(1, math.ceil(round(num_tokens * top_k * capacity_factor / num_experts, 9))))


def rank_in_expert(experts: Array, weights: Array, num_experts: int, policy: DropPolicy = "probs") -> Array:
    """Place of each copy among those sent to the same expert.

    Args:
        experts: int32 [T, k]; ``num_experts`` or more for a copy that takes no part.
        weights: [T, k], routing probabilities of the copies.
        num_experts: E.
        policy: "probs" ranks by falling probability, ties to the lowest token; "position" by token index.

    Returns:
        int32 [T, k], 0 for the first.

    References:
        Liu et al. (2025), arXiv:2504.14960, section 3.3 (drop policies).
    """
    check(policy in ("probs", "position"), argument="policy", value=policy, rule="must be 'probs' or 'position'")
    flat = experts.reshape(-1)
    copies = jnp.arange(flat.size, dtype=jnp.int32)
    if policy == "probs":
        # Sorted as integers: the bits of a non-negative float are ordered like the float, and floats sort slowly.
        # NaN is the largest pattern; -0.0 is cleared by the maximum.
        bits = jax.lax.bitcast_convert_type(jnp.maximum(weights.astype(jnp.float32), 0.0), jnp.int32).reshape(-1)
        _, _, order = jax.lax.sort((flat, -jax.lax.stop_gradient(bits), copies), num_keys=3)
    else:
        _, order = jax.lax.sort((flat, copies), num_keys=2)
    place = jnp.zeros_like(order).at[order].set(copies, unique_indices=True)
    counts = jnp.zeros(num_experts, jnp.int32).at[flat].add(1, mode="drop")
    start = exclusive_cumsum(counts)[jnp.minimum(flat, num_experts - 1)]
    return (place - start).reshape(experts.shape)


def keep_by_capacity(
    experts: Array, weights: Array, num_experts: int, capacity: int, policy: DropPolicy = "probs"
) -> Array:
    """Which copies survive: the first ``capacity`` of each expert in the order of the policy. Bool [T, k].

    Kept probabilities are not renormalised; a token that loses every copy contributes nothing.

    >>> keep_by_capacity(jnp.array([[0], [0], [0]]), jnp.array([[0.2], [0.9], [0.2]]), 2, 2).ravel().tolist()
    [True, True, False]
    """
    inside = experts < num_experts
    return inside & (rank_in_expert(experts, weights, num_experts, policy) < capacity)
