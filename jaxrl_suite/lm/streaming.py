"""One answer, token by token, for people who watch it appear."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.distributions import draw_token
from jaxrl_suite.lm.cache import DecodeParams, DecodeState, decode_params, decode_step, prefill
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.generation import check_prompts, left_pad, row_keys
from jaxrl_suite.lm.model import LanguageModel
from jaxrl_suite.lm.sampling import Sampling, sampling_logits
from jaxrl_suite.types import Array, Params, PRNGKey

prepare_decode = functools.partial(jax.jit, static_argnames=("config",))(decode_params)


def stream(
    key: PRNGKey,
    model: LanguageModel,
    params: Params | DecodeParams,
    prompt: Sequence[int],
    *,
    sampling: Sampling,
    row_id: int | Sequence[int] = 0,
    pad_to: int = 32,
) -> Iterator[int]:
    """Draws one continuation and hands out each token as soon as it is drawn.

    The tokens are those of :func:`jaxrl_suite.lm.generate` for a row with the same key and ``row_id``.

    Args:
        key: consumed.
        model: the decoder.
        params: its parameters, or :func:`decode_params` of them.
        prompt: tokens, at least one.
        sampling: law, length and stop tokens.
        row_id: the row's identity.
        pad_to: prompts are padded to a multiple of this, so that few lengths are compiled.

    Yields:
        Tokens, the stop token included.

    Raises:
        ValueError: the prompt is empty or holds tokens outside the vocabulary.
    """
    length = -(-len(prompt) // pad_to) * pad_to
    prompts, mask = left_pad([list(prompt)], length=length)
    row_ids = np.asarray(row_id).reshape(1, -1)
    check_prompts(prompts, mask, row_ids, model.config.vocab_size)
    if not isinstance(params, DecodeParams):
        params = prepare_decode(params, config=model.config)
    keys = row_keys(key, jnp.asarray(row_ids))
    token, state = _begin(params, prompts, mask, keys, config=model.config, sampling=sampling)
    for step in range(1, sampling.max_tokens + 1):
        number = int(token[0])
        yield number
        if number in sampling.stop_tokens or step == sampling.max_tokens:
            return
        token, state = _continue(params, state, token, keys, step, config=model.config, sampling=sampling)


def _pick(logits: Array, keys: PRNGKey, step: Any, sampling: Sampling) -> Array:
    if sampling.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return draw_token(jax.vmap(jax.random.fold_in, (0, None))(keys, step), sampling_logits(logits, sampling))[0]


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def _begin(
    params: DecodeParams, prompts: Array, mask: Array, keys: PRNGKey, *, config: LanguageModelConfig, sampling: Sampling
) -> tuple[Array, DecodeState]:
    capacity = prompts.shape[1] + sampling.max_tokens
    state = prefill(params, prompts, mask, config=config, capacity=capacity)
    return _pick(state.logits, keys, 0, sampling), state


@functools.partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames=("state",))
def _continue(
    params: DecodeParams,
    state: DecodeState,
    token: Array,
    keys: PRNGKey,
    step: int,
    *,
    config: LanguageModelConfig,
    sampling: Sampling,
) -> tuple[Array, DecodeState]:
    state = decode_step(params, state, token, config=config)
    return _pick(state.logits, keys, step, sampling), state
