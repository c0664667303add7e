"""Samples of one prompt as a group: the body reads the prompt once, and each sample sees its keys and values."""

from typing import Any

import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.lm.attention import attention_with_normaliser, blockwise_attend
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.decoder import forward, sequence_positions
from jaxrl_suite.types import Array, Params


def check_group(group: int, num_rows: int) -> None:
    """Refuses a group that does not fit.

    Raises:
        ValueError: naming the argument.
    """
    check(group > 0 and num_rows % group == 0, argument="group", value=group, rule=f"must divide the {num_rows} rows")


def forward_groups(
    params: Params,
    tokens: Array,
    segments: Array | None,
    *,
    config: LanguageModelConfig,
    start: int,
    group: int,
    **options: Any,
) -> Array:
    """What predicts the tokens from ``start`` on, where groups of rows share the tokens before it.

    The prompts and what follows them lie behind one another in one long row, which all products of the body read at
    once; only attention tells the rows apart.

    Args:
        params: see the parameter table of the package.
        tokens: int32 [B, T]; rows come in runs of ``group`` that agree before ``start``.
        segments: int32 [B, T], 0 is padding, on the left or right of a row; None for one sequence a row.
        config: conventions of the model.
        start: length of the prompts, at least 1.
        group: rows of a prompt.
        **options: ``feed_forward`` and ``remat`` of :func:`jaxrl_suite.lm.forward`.

    Returns:
        Residual stream before the final norm, [B, T - start, D]; entry t predicts token ``start + t``.

    Raises:
        ValueError: ``group`` does not divide B, or ``start`` is 0.
    """
    check_group(group, tokens.shape[0])
    check(start > 0, argument="start", value=start, rule="must be positive: rows of a group share the tokens before it")
    segments = jnp.ones_like(tokens) if segments is None else segments
    positions = sequence_positions(segments)
    number = tokens.shape[0] // group * start  # tokens of all prompts
    prompt_places = positions[::group, :start], segments[::group, :start]
    rest_places = positions[:, start:-1], positions[:, :-1], segments[:, start:-1], segments[:, :-1]
    usual = config.layer_windows[0]

    def joined(prompts: Array, rest: Array) -> Array:
        return jnp.concatenate([x.reshape(1, -1, *x.shape[2:]) for x in (prompts, rest)], axis=1)

    def parted(x: Array) -> tuple[Array, Array]:
        shape = x.shape[2:]
        return x[0, :number].reshape(-1, start, *shape), x[0, number:].reshape(tokens.shape[0], -1, *shape)

    def flat(x: Array) -> Array:  # the last token predicts nothing
        return joined(x[::group, :start], x[:, start:-1])

    def attend(
        q: Array, k: Array, v: Array, positions: Array, segments: Array | None, window: int | None = usual
    ) -> Array:
        del positions, segments  # of the long row
        (q_prompt, q), (k_prompt, k), (v_prompt, v) = parted(q), parted(k), parted(v)
        read = blockwise_attend(q_prompt, k_prompt, v_prompt, *prompt_places, window=window)
        if not q.shape[1]:  # one token a sample, which the prompt predicts
            return joined(read, q)
        k, v = (
            jnp.concatenate([jnp.repeat(prompt, group, axis=0), rest], axis=1)
            for prompt, rest in ((k_prompt, k), (v_prompt, v))
        )
        y = attention_with_normaliser(q, k, v, *rest_places, window=window, ordered=True)[0]
        return joined(read, y)

    x, _ = forward(params, flat(tokens), config=config, positions=flat(positions), attend=attend, **options)
    prompts, rest = parted(x)
    return jnp.concatenate([jnp.repeat(prompts[:, -1:], group, axis=0), rest], axis=1)
