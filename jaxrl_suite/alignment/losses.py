"""Policy-gradient surrogates with every published choice as a named option, and estimates of the KL divergence."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import Config, check, field
from jaxrl_suite.types import Array

KlKind = Literal["k1", "abs", "k2", "k3", "k1+", "k3+"]


def kl_estimate(log_p: Array, log_q: Array, kind: KlKind = "k3", *, clamp: float | None = None) -> Array:
    """Pointwise estimate of ``KL(p | q)`` at samples from p.

    With ``d = log q - log p``: k1 is ``-d``; abs its magnitude; k2 is ``d^2 / 2``; k3 is ``e^d - d - 1 >= 0``.
    k1 and k3 have the right mean but not the right gradient when differentiated through p; "k1+" and "k3+" keep the
    value and use the gradient of k2, whose mean is the gradient of the divergence at the sampling policy.

    Args:
        log_p: [...], log-probabilities under the policy.
        log_q: [...], under the reference.
        kind: which estimate.
        clamp: bounds of d, ``[-clamp, clamp]``; the official code uses 10.

    Returns:
        [...], in nats.

    Raises:
        ValueError: unknown kind.

    References:
        Schulman (2020), "Approximating KL divergence"; verl for the straight-through forms.

    >>> import jax.numpy as jnp
    >>> float(kl_estimate(jnp.array(0.0), jnp.array(0.0), "k3"))
    0.0
    """
    known = ("k1", "abs", "k2", "k3", "k1+", "k3+")
    check(kind in known, argument="kind", value=kind, rule=f"must be one of {', '.join(known)}")
    d = log_q - log_p
    if clamp is not None:
        d = jnp.clip(d, -clamp, clamp)
    square = 0.5 * d * d
    if kind == "k2":
        return square
    value = {"k1": -d, "abs": jnp.abs(d), "k3": jnp.expm1(d) - d}[kind.rstrip("+")]
    return square + jax.lax.stop_gradient(value - square) if kind.endswith("+") else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    """Options of :func:`policy_loss`. The defaults are those of the paper's baselines."""

    ratio_level: Literal["token", "sequence", "sequence_token"] = field(
        "token", help="likelihood ratio of a token (PPO), of a sequence (GSPO), or its value with token gradients"
    )
    surrogate: Literal["clip", "cispo", "plain"] = field(
        "clip", help="clipped ratio; clipped weight on the log-probability (CISPO); ratio without a clip"
    )
    clip_low: float = field(0.2, help="the ratio is clipped below at 1 - clip_low")
    clip_high: float = field(0.2, help="the ratio is clipped above at 1 + clip_high")
    dual_clip: float | None = field(3.0, help="for negative advantages the loss is at most this times |A|; None is off")
    delta: float | None = field(None, help="upper bound of the unclipped ratio (two-sided clipping); None is off")
    aggregation: Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "constant"] = field(
        "token_mean", help="how token losses become one number"
    )
    constant_length: int = field(0, help="divisor a sequence for aggregation='constant'; 0 for the width T")
    kl_kind: Literal["none", "k1", "abs", "k2", "k3", "k1+", "k3+"] = field("k3", help="penalty on the divergence")
    kl_clamp: float | None = field(10.0, help="bound of the log-ratio inside the penalty; None is off")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.clip_low >= 0, argument="clip_low", value=self.clip_low, rule="must not be negative")
        check(self.clip_high >= 0, argument="clip_high", value=self.clip_high, rule="must not be negative")
        bound = self.dual_clip
        check(bound is None or bound > 1, argument="dual_clip", value=bound, rule="must exceed 1")


class LossTerms(NamedTuple):
    """Sums of a micro-batch: the loss is ``numerator / denominator`` after adding up all micro-batches.

    Attributes:
        numerator: [].
        denominator: [], tokens or sequences.
        num_tokens: [], valid tokens.
        kl: [], sum of the divergence estimate over valid tokens, nats.
        clipped: [], number of tokens whose gradient the clip removed.
        ratio: [], sum of the ratio over valid tokens.
    """

    numerator: Array
    denominator: Array
    num_tokens: Array
    kl: Array
    clipped: Array
    ratio: Array


def likelihood_ratio(log_probs: Array, old_log_probs: Array, mask: Array, level: str) -> Array:
    """Ratio of the policy to the sampling policy, per token [B, T].

    Args:
        log_probs: [B, T].
        old_log_probs: [B, T].
        mask: bool [B, T].
        level: "token"; "sequence" for the geometric mean over the sequence; "sequence_token" for its value with each
            token's own gradient.

    References:
        Schulman et al. (2017), arXiv 1707.06347; Zheng et al. (2025), arXiv 2507.18071 (GSPO), equations 7 and 14.
    """
    change = jnp.where(mask, log_probs - old_log_probs, 0)
    if level == "token":
        return jnp.exp(change)
    length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1).astype(change.dtype)
    mean = jnp.broadcast_to(jnp.sum(change, axis=1, keepdims=True) / length, change.shape)
    if level == "sequence_token":
        mean = jax.lax.stop_gradient(mean - change) + change
    return jnp.exp(mean)


def surrogate_loss(ratio: Array, log_probs: Array, advantages: Array, config: LossConfig) -> tuple[Array, Array]:
    """Loss of each token, and whether the clip removed its gradient.

    Args:
        ratio: [...].
        log_probs: [...].
        advantages: [...].
        config: options.

    Returns:
        Loss [...] and bool [...].

    References:
        Ye et al. (2020), arXiv 1912.09729 for the dual clip; MiniMax (2025), arXiv 2506.13585 for CISPO.
    """
    low, high = 1 - config.clip_low, 1 + config.clip_high
    if config.surrogate == "plain":
        return -ratio * advantages, jnp.zeros(ratio.shape, bool)
    if config.surrogate == "cispo":
        weight = jax.lax.stop_gradient(jnp.clip(ratio, low, high))
        return -weight * advantages * log_probs, jnp.zeros(ratio.shape, bool)
    bounded = ratio if config.delta is None else jnp.minimum(ratio, config.delta)
    free, held = -bounded * advantages, -jnp.clip(ratio, low, high) * advantages
    clipped = held > free
    loss = jnp.where(clipped, held, free)  # jnp.maximum would halve the derivative where both are equal
    if config.dual_clip is not None:
        ceiling = -config.dual_clip * advantages
        beyond = (advantages < 0) & (ceiling < loss)
        loss, clipped = jnp.where(beyond, ceiling, loss), clipped | beyond
    return loss, clipped


def policy_loss_terms(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    config: LossConfig,
    *,
    reference_log_probs: Array | None = None,
    kl_coefficient: Array | float = 0.0,
    entropy_coefficient: Array | float = 0.0,
) -> LossTerms:
    """Sums of the surrogate with its penalty; see :func:`policy_loss` for the arguments."""
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    advantages = jnp.broadcast_to(advantages, log_probs.shape)
    safe = jnp.where(mask, log_probs, 0)
    ratio = likelihood_ratio(safe, jnp.where(mask, old_log_probs, 0), mask, config.ratio_level)
    loss, clipped = surrogate_loss(ratio, safe, advantages, config)
    kl = jnp.zeros_like(loss)
    if config.kl_kind != "none" and reference_log_probs is not None:
        kl = kl_estimate(safe, jnp.where(mask, reference_log_probs, 0), config.kl_kind, clamp=config.kl_clamp)
        loss = loss + jnp.asarray(kl_coefficient, loss.dtype) * kl
    if not (isinstance(entropy_coefficient, float | int) and entropy_coefficient == 0):
        # E[ratio log p] is minus the entropy, and so is its gradient: E[ratio * grad log p] vanishes.
        change = jnp.exp(safe - jnp.where(mask, old_log_probs, 0))
        loss = loss + jnp.asarray(entropy_coefficient, loss.dtype) * jax.lax.stop_gradient(safe) * change
    valid = mask.astype(loss.dtype)
    masked = jnp.where(mask, loss, 0)
    lengths = jnp.sum(valid, axis=1)
    rows = jnp.asarray(log_probs.shape[0], loss.dtype)
    live_rows = jnp.sum(lengths > 0).astype(loss.dtype)
    if config.aggregation == "token_mean":
        numerator, denominator = jnp.sum(masked), jnp.sum(valid)
    elif config.aggregation == "sequence_mean_token_mean":
        numerator, denominator = jnp.sum(jnp.sum(masked, axis=1) / jnp.maximum(lengths, 1)), live_rows
    elif config.aggregation == "sequence_mean_token_sum":
        numerator, denominator = jnp.sum(masked), live_rows
    else:
        length = config.constant_length or log_probs.shape[1]
        numerator, denominator = jnp.sum(masked) / length, rows
    return LossTerms(
        numerator,
        denominator,
        jnp.sum(valid),
        jnp.sum(jnp.where(mask, jax.lax.stop_gradient(kl), 0)),
        jnp.sum(clipped & mask).astype(loss.dtype),
        jnp.sum(jnp.where(mask, jax.lax.stop_gradient(ratio), 0)),
    )


def policy_loss(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    config: LossConfig | None = None,
    *,
    reference_log_probs: Array | None = None,
    kl_coefficient: Array | float = 0.0,
    entropy_coefficient: Array | float = 0.0,
) -> tuple[Array, LossTerms]:
    """Clipped surrogate plus KL penalty, to be minimised.

    ``max(-rho A, -clip(rho, 1 - low, 1 + high) A)``, for negative A at most ``dual_clip |A|``. Where ``rho = 1`` the
    gradient is that of the plain policy gradient, whatever the clips. Masked tokens change nothing, whatever they hold.

    Args:
        log_probs: [B, T], under the policy that is trained.
        old_log_probs: [B, T], under the policy that sampled; its gradient is not taken.
        advantages: [B] or [B, T].
        mask: bool [B, T], valid tokens, the stop token included.
        config: options; the paper's baselines by default.
        reference_log_probs: [B, T], for the penalty; none without.
        kl_coefficient: factor on the penalty.
        entropy_coefficient: factor on the entropy bonus: an estimate of ``-c H`` at the sampled tokens joins
            their loss, with a gradient that is right in expectation.

    Returns:
        Loss [] and the sums that it was made of.

    References:
        Schulman et al. (2017), arXiv 1707.06347, equation 7; Shao et al. (2024), arXiv 2402.03300, equation 3; Yu et
        al. (2025), arXiv 2503.14476 (DAPO) for the token mean and the higher upper clip.
    """
    terms = policy_loss_terms(
        log_probs,
        jax.lax.stop_gradient(old_log_probs),
        advantages,
        mask,
        LossConfig() if config is None else config,
        reference_log_probs=reference_log_probs,
        kl_coefficient=kl_coefficient,
        entropy_coefficient=entropy_coefficient,
    )
    return terms.numerator / jnp.maximum(terms.denominator, 1), terms


def kl_in_rewards(
    rewards: Array, log_probs: Array, reference_log_probs: Array, mask: Array, coefficient: Array | float
) -> Array:
    """Rewards less the sequence's summed k1 divergence (D9; off in the paper).

    Args:
        rewards: [B].
        log_probs: [B, T].
        reference_log_probs: [B, T].
        mask: bool [B, T].
        coefficient: factor.

    Returns:
        [B].
    """
    divergence = jnp.sum(jnp.where(mask, log_probs - reference_log_probs, 0), axis=1)
    return rewards - jnp.asarray(coefficient, rewards.dtype) * jax.lax.stop_gradient(divergence)


def mask_truncated(mask: Array, tokens: Array, stop_tokens: tuple[int, ...]) -> Array:
    """Switches off completions that ended for want of room rather than by a stop token.

    Args:
        mask: bool [B, T].
        tokens: int32 [B, T].
        stop_tokens: tokens that end a completion.

    Returns:
        bool [B, T].
    """
    stopped = jnp.zeros(tokens.shape, bool)
    for token in stop_tokens:
        stopped = stopped | (tokens == token)
    return mask & jnp.any(stopped & mask, axis=1, keepdims=True)
