"""A synthetic language for three rewards: sums or products with work shown at varying length.

Tokens: digits 0-9, an operator, ``= ; > stop pad``. A prompt is ``a+b=`` with two-digit numbers, or ``a*b=`` where b
has one digit; a completion is any number of steps, each ``;`` and two digits of work, then ``>`` and the digits of the
result, lowest first, and the stop token::

    37+25=  ;21 ;50 >260 stop       (steps are the column sums, lowest digit first; further steps repeat them)
    37*05=  ;53 ;51 >581 stop       (the products of the digits, 35 and 15)

Accuracy: what stands after the last ``>`` is the result. Conciseness: shorter than the running mean. Clarity: two
steps or more.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_suite.alignment import RunningMean
from jaxrl_suite.lm import SupervisedBatch
from jaxrl_suite.types import Array, PRNGKey

Operation = Literal["sums", "products"]
OPERATOR, EQUALS, STEP, ANSWER, STOP, PAD = 10, 11, 12, 13, 14, 15  # a model knows one operation, so one token serves
VOCABULARY = 16
PROMPT_LENGTH = 6
MAX_STEPS = 4
STEP_LENGTH = 3
COMPLETION_LENGTH = MAX_STEPS * STEP_LENGTH + 5


def draw_prompts(key: PRNGKey, number: int, *, digits: int = 2, operation: Operation = "sums") -> tuple[Array, Array]:
    """Prompts int32 [number, 6] and their mask; no padding is needed.

    Args:
        key: consumed.
        number: how many.
        digits: of each summand or of the first factor, 1 or 2; shorter numbers are written with a leading zero.
        operation: "sums", or "products" with a second factor of one digit.
    """
    drawn = jax.random.randint(key, (number, 4), 0, 10, jnp.int32)
    kept = jnp.array([digits > 1, True, digits > 1 and operation == "sums", True])
    operands = jnp.where(kept, drawn, 0)
    operator = jnp.full((number, 1), OPERATOR, jnp.int32)
    tokens = jnp.concatenate([operands[:, :2], operator, operands[:, 2:], operator - OPERATOR + EQUALS], axis=1)
    return tokens, jnp.ones(tokens.shape, bool)


def _columns(prompts: Array, operation: Operation) -> tuple[Array, Array]:
    """Work of the lower and of the upper digit, each [B]; the result is ``low + 10 high``."""
    if operation == "products":
        return prompts[:, 1] * prompts[:, 4], prompts[:, 0] * prompts[:, 4]
    return prompts[:, 1] + prompts[:, 4], prompts[:, 0] + prompts[:, 3]


def answer_digits(prompts: Array, operation: Operation = "sums") -> Array:
    """Digits of the results, lowest first, int32 [B, 3]."""
    low, high = _columns(prompts, operation)
    total = low + 10 * high
    return jnp.stack([total % 10, total // 10 % 10, total // 100], axis=1)


def supervised_batch(key: PRNGKey, number: int, *, digits: int = 2, operation: Operation = "sums") -> SupervisedBatch:
    """Correct traces with 0 to 4 steps, equally often.

    Args:
        key: consumed.
        number: rows.
        digits: as in :func:`draw_prompts`.
        operation: likewise.
    """
    prompt_key, step_key = jax.random.split(key)
    prompts, _ = draw_prompts(prompt_key, number, digits=digits, operation=operation)
    count = jax.random.randint(step_key, (number,), 0, MAX_STEPS + 1, jnp.int32)
    low, high = _columns(prompts, operation)
    columns = [(low % 10, low // 10), (high % 10, high // 10)]
    steps = [jnp.stack([jnp.full_like(low, STEP), *columns[i % 2]], axis=1) for i in range(MAX_STEPS)]
    tail = jnp.concatenate(
        [
            jnp.full((number, 1), ANSWER, jnp.int32),
            answer_digits(prompts, operation),
            jnp.full((number, 1), STOP, jnp.int32),
        ],
        axis=1,
    )
    # Every row is laid out by a gather: steps that are used, then the tail, then padding.
    source = jnp.concatenate([*steps, tail, jnp.full((number, 1), PAD, jnp.int32)], axis=1)
    place = jnp.arange(COMPLETION_LENGTH)[None]
    used = (STEP_LENGTH * count)[:, None]
    shifted = place - used + MAX_STEPS * STEP_LENGTH
    index = jnp.where(place < used, place, jnp.minimum(shifted, COMPLETION_LENGTH))
    completion = jnp.take_along_axis(source, index, axis=1)
    tokens = jnp.concatenate([prompts, completion], axis=1)
    weights = jnp.concatenate([jnp.zeros(prompts.shape), (completion != PAD).astype(jnp.float32)], axis=1)
    return SupervisedBatch(tokens, weights)


def objectives_of(
    prompts: Array, tokens: Array, mask: Array, operation: Operation = "sums"
) -> tuple[Array, Array, Array]:
    """Accuracy [B], length in tokens [B] and clarity [B] of completions.

    Args:
        prompts: int32 [B, 6].
        tokens: int32 [B, T].
        mask: bool [B, T].
        operation: that the prompts ask for.
    """
    place = jnp.arange(tokens.shape[1])[None]
    marker = jnp.max(jnp.where(mask & (tokens == ANSWER), place, -1), axis=1)
    wanted = jnp.concatenate(
        [answer_digits(prompts, operation), jnp.full((prompts.shape[0], 1), STOP, jnp.int32)], axis=1
    )
    index = marker[:, None] + 1 + jnp.arange(4)[None]
    inside = index < tokens.shape[1]
    safe = jnp.minimum(index, tokens.shape[1] - 1)
    given = jnp.where(inside & jnp.take_along_axis(mask, safe, 1), jnp.take_along_axis(tokens, safe, 1), -1)
    correct = (marker >= 0) & jnp.all(given == wanted, axis=1)
    steps = jnp.sum(mask & (tokens == STEP), axis=1)
    length = jnp.sum(mask, axis=1)
    return correct.astype(jnp.float32), length.astype(jnp.float32), (steps >= 2).astype(jnp.float32)


def rewards_of(
    prompts: Array, tokens: Array, mask: Array, lengths: RunningMean, operation: Operation = "sums"
) -> Array:
    """The paper's three rewards [3, B]; ``lengths`` holds the running mean with this batch."""
    correct, length, clear = objectives_of(prompts, tokens, mask, operation)
    return jnp.stack([correct, (length < lengths.mean).astype(jnp.float32), clear])
