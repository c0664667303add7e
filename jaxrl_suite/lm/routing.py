"""Which experts a token goes to: scores, top-k, combine weights."""

import jax
import jax.numpy as jnp

from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.layers import wide
from jaxrl_suite.types import Array, Routing


def route(logits: Array, config: LanguageModelConfig, bias: Array | None = None) -> Routing:
    """Sends each token to its k best experts.

    Scores are a softmax or sigmoids over all experts. The k largest of score + bias are chosen (ties: lowest index);
    their scores, without the bias, are the combine weights: raw (``router_normalize=False``), or divided by their sum,
    which for softmax scores is the softmax over the chosen logits; then times ``router_scale``. With groups, a
    group's score is the sum of its k/g largest selection scores and only the g best groups compete.

    How the loss sees the choice (``router_top_k``), with the same k experts run in all three:

    * "hard": weights as above. Their derivative depends on the chosen logits alone (with raw softmax weights on all
      through the normaliser); an expert that was not chosen learns nothing from the token.
    * "straight_through": the same values, but the derivative of the scores over all experts, ``d probs``. Every logit
      learns, from a gradient that is not that of the loss (biased).
    * "continuous": weights in proportion to how far a score exceeds that of the best expert left out. Weights and layer
      are continuous in the logits, since an expert leaves with weight zero, and the gradient is the exact one; it
      reaches the k chosen and the runner-up (softmax scores: all logits). Values differ from "hard", so that a
      pretrained model has to be tuned to it.

    Args:
        logits: [T, E], router outputs.
        config: the ``router_*`` fields and ``experts_per_token``.
        bias: [E], added for the selection only; never a path of gradients.

    Returns:
        ``Routing(experts int32 [T, k], weights [T, k] in the dtype of logits, probs [T, E])``; ``probs`` are the
        scores in float32 at least, for sigmoid scores divided by their sum over all experts.

    References:
        Jiang et al. (2024), arXiv 2401.04088, section 2.1 (top-k first); Liu et al. (2024), arXiv 2412.19437,
        equations 12 to 16 (sigmoid, bias); DeepSeek-V2 (2024), arXiv 2405.04434, section 2.2.2 (groups).

    >>> logits = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    >>> route(logits, LanguageModelConfig(num_experts=3, experts_per_token=2)).experts
    Array([[2, 1]], dtype=int32)
    """
    k = config.experts_per_token
    wide_logits = logits.astype(wide(logits.dtype, config.router_dtype))
    softmax = config.router_score == "softmax"
    scores = jax.nn.softmax(wide_logits, axis=-1) if softmax else jax.nn.sigmoid(wide_logits)
    selection = jax.lax.stop_gradient(scores)
    if bias is not None:
        selection = selection + jax.lax.stop_gradient(bias).astype(selection.dtype)[None, :]
    if config.router_groups > 1:
        selection = _mask_groups(selection, config)
    experts = top_k_indices(selection, k)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    tiny = jnp.asarray(1e-20, scores.dtype)
    if config.router_normalize:
        if softmax:  # from the logits, exact also where the scores underflow
            weights = jax.nn.softmax(jnp.take_along_axis(wide_logits, experts, axis=-1), axis=-1)
        else:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + tiny)
    probs = scores if softmax else scores / (scores.sum(axis=-1, keepdims=True) + tiny)
    if config.router_top_k == "straight_through":
        dense = jnp.take_along_axis(probs, experts, axis=-1)
        weights = jax.lax.stop_gradient(weights - dense) + dense
    elif config.router_top_k == "continuous":
        weights = _margins(scores, experts)
        if config.router_normalize:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + tiny)
    weights = weights * jnp.asarray(config.router_scale, weights.dtype)
    return Routing(experts, weights.astype(logits.dtype), probs)


def _margins(scores: Array, experts: Array) -> Array:
    """By how much the chosen scores [T, k] exceed the largest that was not chosen (zero if all were)."""
    chosen = jax.nn.one_hot(experts, scores.shape[-1], dtype=bool).any(axis=1)
    left_out = jnp.where(chosen, 0.0, scores)
    # Read at its place: the derivative of a maximum divides 0 by 0 where a compiler rounds its operand in two ways.
    runner_up = top_k_indices(jax.lax.stop_gradient(left_out), 1)
    return jnp.take_along_axis(scores, experts, axis=-1) - jnp.take_along_axis(left_out, runner_up, axis=-1)


def _mask_groups(selection: Array, config: LanguageModelConfig) -> Array:
    tokens, experts = selection.shape
    groups = selection.reshape(tokens, config.router_groups, experts // config.router_groups)
    per_group = max(1, config.experts_per_token // config.router_top_groups)
    best = jax.lax.top_k(groups, min(per_group, groups.shape[-1]))[0].sum(axis=-1)
    chosen = top_k_indices(best, config.router_top_groups)
    open_group = jax.nn.one_hot(chosen, config.router_groups, dtype=bool).any(axis=1)
    return jnp.where(open_group[:, :, None], groups, -jnp.inf).reshape(tokens, experts)


def top_k_indices(scores: Array, k: int) -> Array:
    """Indices of the k largest entries of each row, largest first, ties to the lowest index.

    Args:
        scores: [T, E].
        k: static count, at most E.

    Returns:
        int32 [T, k]. A row that holds NaN gets valid but arbitrary indices.
    """
    if k > 8:  # one sort beats many passes
        return jax.lax.top_k(scores, k)[1].astype(jnp.int32)
    columns = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, :]
    last = jnp.asarray(scores.shape[-1] - 1, jnp.int32)
    chosen = []
    for _ in range(k):
        # Maximum and then smallest index where equal: XLA's CPU backend vectorises it, and argmax not.
        best = scores.max(axis=-1, keepdims=True)
        index = jnp.minimum(jnp.where(scores == best, columns, last).min(axis=-1), last)
        chosen.append(index)
        scores = jnp.where(columns == index[:, None], -jnp.inf, scores)
    return jnp.stack(chosen, axis=-1)
