"""The model as an object: a thin Linen module, and the functions that take it."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check_key
from jaxrl_suite.distributions import Mass
from jaxrl_suite.lm.cache import DecodeParams, decode_params, decoder_law
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.decoder import apply, head_table
from jaxrl_suite.lm.generation import Loop, check_prompts, generate_and_keep
from jaxrl_suite.lm.layers import wide
from jaxrl_suite.lm.likelihood import log_probs, weighted_log_probs
from jaxrl_suite.lm.parameters import init_params
from jaxrl_suite.lm.sampling import Sampling
from jaxrl_suite.types import Array, EarlyGradient, Generation, Params, Policy, PRNGKey, SequenceLaw


class LanguageModel(nn.Module):
    """Linen face of the decoder: ``model.init(key, tokens)["params"]``, ``model.apply({"params": params}, tokens)``.

    Attributes:
        config: shape and conventions.
    """

    config: LanguageModelConfig

    @nn.compact
    def __call__(self, tokens: Array, positions: Array | None = None, segments: Array | None = None) -> Array:
        """Logits [B, T, V] of tokens int32 [B, T]; see :func:`jaxrl_suite.lm.forward` for the other arguments."""
        names = jax.eval_shape(lambda key: init_params(key, self.config), jax.random.key(0))
        params = {name: self.param(name, lambda key, n=name: init_params(key, self.config)[n]) for name in names}
        return apply(params, tokens, config=self.config, positions=positions, segments=segments)


def token_log_probs(
    model: LanguageModel,
    params: Params,
    tokens: Array,
    segments: Array | None = None,
    *,
    temperature: float | Array = 1.0,
    start: int = 0,
) -> Array:
    """``log p(token t | tokens before t)`` in nats: [B, T - start], 0 where a segment begins and at padding.

    Logits are made and dropped in chunks, so [B, T, V] never exists, in the backward pass neither. Tokens before
    ``start``, a prompt say, are read but not scored.
    """
    return log_probs(params, tokens, segments, config=model.config, temperature=temperature, start=start)


def weighted_token_log_probs(
    model: LanguageModel,
    params: Params,
    tokens: Array,
    segments: Array | None,
    weights: Array,
    *,
    temperature: float | Array = 1.0,
    start: int = 0,
    laws: Mass | None = None,
    group: int = 1,
) -> tuple[Array, Array]:
    """``sum(weights * token_log_probs)`` with its gradient computed on the way, and those log-probabilities.

    ``laws`` are those that the tokens were drawn from, where they were kept; see :func:`early_gradient`. Rows come in
    runs of ``group`` that agree before ``start``.
    """
    return weighted_log_probs(
        params, tokens, segments, weights, config=model.config, temperature=temperature, start=start, laws=laws,
        group=group,
    )  # fmt: skip


@functools.partial(
    jax.jit,
    static_argnames=("config", "sampling", "loop", "unrolled", "keep", "group"),
    donate_argnames=("spare",),
)
def _generate(
    key: PRNGKey,
    params: Params | DecodeParams,
    prompts: Array,
    mask: Array,
    row_ids: Array,
    *,
    config: LanguageModelConfig,
    sampling: Sampling,
    loop: Loop,
    unrolled: bool,
    keep: bool,
    group: int,
    spare: Array | None,
) -> tuple[Generation, Mass | None]:
    if unrolled and not isinstance(params, DecodeParams):
        params = decode_params(params, config)
    law = decoder_law(config, max_tokens=sampling.max_tokens, group=group)
    return generate_and_keep(
        key, law, params, prompts, mask, row_ids=row_ids, sampling=sampling, loop=loop, keep=keep, spare=spare
    )


def generate(
    key: PRNGKey,
    model: LanguageModel,
    params: Params | DecodeParams,
    prompts: Array | np.ndarray,
    mask: Array | np.ndarray,
    *,
    row_ids: Array | np.ndarray,
    sampling: Sampling,
    loop: Loop = "while",
    unrolled: bool | None = None,
    group: int = 1,
) -> Generation:
    """Draws one continuation a row; compiled once for each shape and sampling.

    Args:
        key: consumed.
        model: the decoder.
        params: its parameters, or :func:`decode_params` of them, which saves a copy of the weights in every call.
        prompts: int32 [B, P], padded on the left (:func:`left_pad`).
        mask: bool [B, P], false at padding.
        row_ids: int [B] or [B, 2], for example (prompt number, sample number): rows with equal ids and prompts get
            equal continuations, wherever they stand and however the batch is cut or padded.
        sampling: law, length and stop tokens.
        loop: "while" stops when every row has ended; "scan" can be vmapped and differentiated.
        unrolled: one step per layer in the program instead of a scan over layers: faster to run on a CPU, slower to
            compile; the default on CPU for models of at most 64 layers.
        group: rows come in runs of this many with equal prompts (samples of one prompt), each of which is read once.

    Returns:
        Generation with T = sampling.max_tokens; log-probabilities are of the sampling law (0 for greedy).

    Raises:
        ValueError: shapes do not fit, padding is not on the left, tokens lie outside the vocabulary, prompts of a
            group differ.
    """
    return _checked(
        key, model, params, prompts, mask, row_ids, sampling=sampling, loop=loop, unrolled=unrolled, keep=False,
        group=group,
    )[0]  # fmt: skip


def _checked(
    key: PRNGKey,
    model: LanguageModel,
    params: Params | DecodeParams,
    prompts: Array | np.ndarray,
    mask: Array | np.ndarray,
    row_ids: Array | np.ndarray,
    *,
    sampling: Sampling,
    loop: Loop = "while",
    unrolled: bool | None = None,
    keep: bool,
    group: int = 1,
    spare: Array | None = None,
) -> tuple[Generation, Mass | None]:
    config = model.config
    check_key(key)
    check_prompts(prompts, mask, row_ids, config.vocab_size, group)
    if unrolled is None:
        unrolled = isinstance(params, DecodeParams) or (jax.default_backend() == "cpu" and config.num_layers <= 64)
    return _generate(
        key, params, jnp.asarray(prompts), jnp.asarray(mask), jnp.asarray(row_ids),
        config=config, sampling=sampling, loop=loop, unrolled=unrolled, keep=keep, group=group, spare=spare,
    )  # fmt: skip


def sequence_law(model: LanguageModel, *, max_tokens: int = 256) -> SequenceLaw:
    """The model as a law over sequences: at most ``max_tokens`` after the prompt."""
    return decoder_law(model.config, max_tokens=max_tokens)


def policy(model: LanguageModel, *, temperature: float = 1.0) -> Policy:
    """The model as a policy.

    Args:
        model: the decoder.
        temperature: of ``log_probs``; use the sampling temperature where both must agree.
    """

    def policy_log_probs(params: Params, tokens: Array, segments: Array | None = None, *, start: int = 0) -> Array:
        return token_log_probs(model, params, tokens, segments, temperature=temperature, start=start)

    def policy_generate(
        key: PRNGKey, params: Params, prompts: Array, mask: Array, row_ids: Array, sampling: Sampling, **options: Any
    ) -> Generation:
        return generate(key, model, params, prompts, mask, row_ids=row_ids, sampling=sampling, **options)

    return Policy(policy_log_probs, policy_generate)


def early_gradient(model: LanguageModel, *, temperature: float = 1.0, keep_bytes: int = 1 << 30) -> EarlyGradient:
    """Gradients of weighted log-probabilities with two or three products with the output table instead of four.

    Args:
        model: the decoder.
        temperature: as of :func:`policy`.
        keep_bytes: most memory for the laws of a rollout, [T, B, V] in float32 at least; they are kept between rollout
            and update where they fit and are the policy's own: drawn at the same temperature without truncation. Beyond
            it, or with 0, the update computes them again in chunks.

    ``generate(..., spare=laws)`` writes over the laws of an earlier rollout, of the same shape, that nobody reads any
    more: no memory is filled with zeros, and none is asked of the system. They are deleted then.
    """

    def early_generate(
        key: PRNGKey,
        params: Params,
        prompts: Array,
        mask: Array,
        row_ids: Array,
        sampling: Sampling,
        *,
        spare: Mass | None = None,
        **options: Any,
    ) -> tuple[Generation, Mass | None]:
        config = model.config
        whole = params.params if isinstance(params, DecodeParams) else params
        dtype = wide(config.activation_dtype(head_table(whole).dtype), config.accumulate_dtype)
        shape = (sampling.max_tokens, prompts.shape[0], config.vocab_size)
        size = math.prod(shape) * dtype.itemsize
        keep = sampling.is_whole and sampling.temperature == temperature and size <= keep_bytes
        memory = None
        if keep and spare is not None and options.get("loop", "while") == "while":
            fits = spare.powers.shape == shape and spare.powers.dtype == dtype
            memory = spare.powers if fits else None
        return _checked(
            key, model, params, prompts, mask, row_ids, sampling=sampling, keep=keep, spare=memory, **options
        )

    return EarlyGradient(early_generate, functools.partial(weighted_token_log_probs, model, temperature=temperature))
