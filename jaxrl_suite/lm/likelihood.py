"""Log-probabilities of given tokens, without ever holding logits for all of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.distributions import Mass
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.decoder import IDENTITY, final_norm, forward, head_table, logits_of
from jaxrl_suite.lm.groups import forward_groups
from jaxrl_suite.lm.layers import wide
from jaxrl_suite.lm.scores import Chunks, chunk_size, cut, weighted_scores
from jaxrl_suite.types import Array, Parallel, Params


def log_probs(
    params: Params,
    tokens: Array,
    segments: Array | None = None,
    *,
    config: LanguageModelConfig,
    temperature: float | Array = 1.0,
    parallel: Parallel = IDENTITY,
    chunk: int | None = None,
    start: int = 0,
    **options: Any,
) -> Array:
    """``log p(token t | tokens before t)`` for every token from ``start`` on.

    Args:
        params: see the parameter table of the package.
        tokens: int32 [B, T].
        segments: int32 [B, T] for packed or padded rows, 0 is padding; None for one sequence a row.
        config: conventions of the model.
        temperature: logits are divided by it.
        parallel: hooks; ``token_log_prob`` reads each chunk of logits.
        chunk: rows of logits held at once; chosen from the vocabulary by default.
        start: first token wanted; the output table, the dearest matrix of a small model, is not applied before it.
        **options: as for :func:`jaxrl_suite.lm.decoder.forward`.

    Returns:
        [B, T - start] in nats, float32 at least; 0 at the first token of each segment and at padding.

    Raises:
        ValueError: ``start`` does not lie in ``0 .. T - 1``.
    """
    rows, targets, real = _scored(params, tokens, segments, config, parallel, start, options)
    return jnp.where(real, _picked(params, rows, targets, config, temperature, parallel, chunk), 0.0)


def weighted_log_probs(
    params: Params,
    tokens: Array,
    segments: Array | None,
    weights: Array,
    *,
    config: LanguageModelConfig,
    temperature: float | Array = 1.0,
    chunk: int | None = None,
    start: int = 0,
    laws: Mass | None = None,
    group: int = 1,
    **options: Any,
) -> tuple[Array, Array]:
    """``sum_t weights_t log_probs_t`` with its gradient computed on the way, and the log-probabilities themselves.

    For whoever knows the weights beforehand: it saves one of four products with the output table, see
    :func:`jaxrl_suite.lm.weighted_log_prob`. Only the sum has a derivative.

    Args:
        params: see the parameter table of the package.
        tokens: int32 [B, T].
        segments: int32 [B, T]; None for one sequence a row.
        weights: [B, T - start].
        config: conventions of the model.
        temperature: logits are divided by it.
        chunk: rows of logits held at once; chosen from the vocabulary by default.
        start: first token wanted.
        laws: [T - start, B, V] of the powers, where the tokens were drawn from these very laws (same parameters, same
            temperature) and :func:`jaxrl_suite.lm.generate_and_keep` kept them. They save one more product and the
            exponentials; the log-probabilities are then of logits computed here under their normalisers.
        group: rows come in runs of this many that agree before ``start``: samples of one prompt, which is read once.
        **options: as for :func:`jaxrl_suite.lm.decoder.forward`; with a group, of :func:`forward_groups`.

    Returns:
        The sum [] and the log-probabilities [B, T - start], see :func:`log_probs`.

    Raises:
        ValueError: ``start`` does not lie in ``0 .. T - 1``; ``group`` does not divide B, or has no prompt to share.
    """
    rows, targets, real = _scored(params, tokens, segments, config, IDENTITY, start, options, group)
    table = head_table(params)
    # Time first, as laws are kept.
    flat, targets, kept = (
        x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for x in (rows, targets, jnp.where(real, weights, 0))
    )
    if laws is not None:  # a step that was not taken has no mass
        total = jnp.where(real.T, laws.total, jnp.ones_like(laws.total))
        laws = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), laws._replace(total=total))
    flat = flat / jnp.asarray(temperature, rows.dtype)
    chunks = Chunks(chunk_size(flat, table, chunk), wide(rows.dtype, config.accumulate_dtype))
    total, scores = weighted_scores(chunks, flat, table, targets, kept, laws)
    scores = jax.lax.stop_gradient(scores).reshape(real.T.shape).T
    return total, jnp.where(real, scores, 0.0)


def _scored(
    params: Params,
    tokens: Array,
    segments: Array | None,
    config: LanguageModelConfig,
    parallel: Parallel,
    start: int,
    options: dict[str, Any],
    group: int = 1,
) -> tuple[Array, Array, Array]:
    """What the output table reads: rows [B, T - start, D], what each predicts, and whether it predicts anything."""
    length = tokens.shape[1]
    check(0 <= start < length, argument="start", value=start, rule=f"must lie in 0 .. {length - 1}: rows have {length}")
    if group > 1:
        x = forward_groups(params, tokens, segments, config=config, start=start, group=group, **options)
        rows = final_norm(params, x, config=config)
    else:
        x, _ = forward(params, tokens, config=config, segments=segments, parallel=parallel, **options)
        h = parallel.before_column(final_norm(params, x, config=config))
        # Row t - 1 predicts token t; the row before the first does not matter, since it is masked.
        rows = jnp.roll(h, 1, axis=1)[:, start:]
    targets, real = shifted_targets(tokens, segments)
    return rows, targets[:, start:], real[:, start:]


def shifted_targets(tokens: Array, segments: Array | None) -> tuple[Array, Array]:
    """What each place predicts, written at the place that is predicted.

    Returns:
        tokens int32 [B, T] and a bool mask [B, T], true where the token before belongs to the same segment.
    """
    first = jnp.zeros_like(tokens[:, :1], bool)
    if segments is None:
        return tokens, jnp.concatenate([first, jnp.ones_like(tokens[:, 1:], bool)], axis=1)
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return tokens, jnp.concatenate([first, same], axis=1)


def _picked(
    params: Params,
    rows: Array,
    targets: Array,
    config: LanguageModelConfig,
    temperature: float | Array,
    parallel: Parallel,
    chunk: int | None,
) -> Array:
    table = head_table(params)
    shape, width = targets.shape, rows.shape[-1]
    rows, targets = rows.reshape(-1, width), targets.reshape(-1)
    size = chunk_size(rows, table, chunk)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(rows: Array, wanted: Array) -> Array:
        logits = logits_of(table, rows, config=config)
        return parallel.token_log_prob(logits / jnp.asarray(temperature, logits.dtype), wanted)

    _, picked = jax.lax.scan(lambda carry, item: (carry, one(*item)), (), (cut(size, rows), cut(size, targets)))
    return picked.reshape(-1)[: targets.shape[0]].reshape(shape)
