"""Supervised fine-tuning: the token-mean loss, a step with gradient accumulation, and rows cut from a text."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_suite.config import check
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.decoder import final_norm, forward, head_table
from jaxrl_suite.lm.likelihood import shifted_targets
from jaxrl_suite.lm.lora import LoraConfig, apply_lora
from jaxrl_suite.lm.scores import weighted_log_prob
from jaxrl_suite.types import Array, Params


class SupervisedBatch(NamedTuple):
    """Rows to learn from.

    Attributes:
        tokens: int32 [B, T].
        weights: [B, T], weight of predicting each token (0 for prompts and padding); the first token of a segment
            counts for nothing whatever its weight.
        segments: int32 [B, T] for packed or padded rows, 0 is padding; None for one sequence a row.
    """

    tokens: Array
    weights: Array
    segments: Array | None = None


class SupervisedState(NamedTuple):
    """State of training.

    Attributes:
        params: what is trained: model parameters, or those of the low-rank differences.
        optimizer: state of the optimiser.
        step: int32 [], steps taken.
    """

    params: Any
    optimizer: Any
    step: Array


def supervised_loss(
    params: Params, batch: SupervisedBatch, *, config: LanguageModelConfig, total: Array | None = None
) -> Array:
    """Mean of ``-log p(token | tokens before)`` over tokens, by weight.

    Args:
        params: model parameters.
        batch: rows.
        config: conventions of the model.
        total: divisor; the sum of the batch's own weights by default.

    Returns:
        Scalar in nats a token; 0 where no token counts.
    """
    x, _ = forward(params, batch.tokens, config=config, segments=batch.segments)
    h = final_norm(params, x, config=config)
    weights = _effective_weights(batch)
    # Row t - 1 predicts token t; the last row predicts nothing, since the first weight is zero.
    targets, weight = (jnp.roll(part, -1, axis=1).reshape(-1) for part in (batch.tokens, weights))
    score = weighted_log_prob(h.reshape(-1, h.shape[-1]), head_table(params), targets, weight)
    total = weights.sum() if total is None else total
    return -score / jnp.where(total > 0, total, 1).astype(score.dtype)


def _effective_weights(batch: SupervisedBatch) -> Array:
    _, real = shifted_targets(batch.tokens, batch.segments)
    return jnp.where(real, batch.weights, jnp.zeros_like(batch.weights))


def init_supervised(params: Any, optimizer: optax.GradientTransformation) -> SupervisedState:
    """State before the first step; ``params`` is whatever is trained (see :func:`supervised_step`)."""
    with jax.numpy_dtype_promotion("standard"):
        return SupervisedState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def supervised_step(
    state: SupervisedState,
    batch: SupervisedBatch,
    *,
    config: LanguageModelConfig,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    base: Params | None = None,
    lora: LoraConfig | None = None,
) -> tuple[SupervisedState, dict[str, Array]]:
    """One optimiser step on the token-mean loss of the whole batch.

    Args:
        state: from :func:`init_supervised`.
        batch: B rows; B divides by ``accumulate``.
        config: conventions of the model.
        optimizer: any optax transformation.
        accumulate: micro-batches, one after another; they share one divisor, so that their number does not change the
            result beyond rounding.
        base: frozen model parameters where ``state.params`` are low-rank differences.
        lora: configuration of the differences.

    Returns:
        The new state, and ``loss/nats_per_token`` and ``gradient/norm``.

    Raises:
        ValueError: B does not divide, or only one of ``base`` and ``lora`` is given.
    """
    rows = batch.tokens.shape[0]
    check(rows % accumulate == 0, argument="accumulate", value=accumulate, rule=f"must divide the {rows} rows")
    check((base is None) == (lora is None), argument="lora", value=lora, rule="base and lora go together")
    total = _effective_weights(batch).sum()

    def loss(trained: Any, part: SupervisedBatch) -> Array:
        params = trained if lora is None or base is None else apply_lora(base, trained, lora)
        return supervised_loss(params, part, config=config, total=total)

    value, gradient = _accumulated(jax.value_and_grad(loss), state.params, batch, accumulate)
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss/nats_per_token": value, "gradient/norm": optax.tree.norm(gradient)}
    return SupervisedState(params, optimizer_state, state.step + 1), metrics


def _accumulated(function: Any, params: Any, batch: SupervisedBatch, count: int) -> tuple[Array, Any]:
    if count == 1:
        return function(params, batch)
    parts = jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)

    def add(total: Any, part: SupervisedBatch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(params, part)), None

    shapes = jax.eval_shape(function, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


jit_supervised_step = functools.partial(
    jax.jit, static_argnames=("config", "optimizer", "accumulate", "lora"), donate_argnames=("state",)
)(supervised_step)


def text_rows(tokens: Sequence[int], length: int) -> np.ndarray:
    """Cuts a token stream into rows; what does not fill the last row is left out.

    Args:
        tokens: the stream.
        length: T.

    Returns:
        int32 [N, T].

    Raises:
        ValueError: fewer tokens than one row.
    """
    rule, remedy = f"holds fewer tokens than one row of {length}", "Give a longer text or a smaller length"
    check(len(tokens) >= length, argument="text", value=len(tokens), rule=rule, remedy=remedy)
    count = len(tokens) // length
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)
