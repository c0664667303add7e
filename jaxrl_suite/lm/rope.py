"""Rotary position embedding, with the stretched variants of the supported families."""

import math

import jax.numpy as jnp
import numpy as np

from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.types import Array


def rope_frequencies(config: LanguageModelConfig) -> tuple[np.ndarray, float]:
    """Angular frequency of each pair of dimensions, and the factor on cos and sin.

    Args:
        config: read for head_dim and the ``rope_*`` fields.

    Returns:
        float64 ``[C / 2]`` in radians per token, and the factor (1 except for yarn).

    References:
        Su et al. (2021), arXiv 2104.09864, equation 15; Chen et al. (2023), arXiv 2306.15595 (linear);
        Peng et al. (2023), arXiv 2309.00071, equations 17 to 23 (yarn); Llama 3.1 model card (llama3).
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** -(np.arange(half) / half)
    if config.rope_scaling == "linear":
        return frequencies / config.rope_factor, 1.0
    if config.rope_scaling == "llama3":
        return _llama3(frequencies, config), 1.0
    if config.rope_scaling == "yarn":
        attention = config.rope_attention_factor
        if attention is None:
            attention = 0.1 * math.log(config.rope_factor) + 1.0 if config.rope_factor > 1 else 1.0
        return _yarn(frequencies, config), attention
    return frequencies, 1.0


def _llama3(frequencies: np.ndarray, config: LanguageModelConfig) -> np.ndarray:
    # Share that is kept: 0 below low_freq_factor turns in the original length, 1 above high_freq_factor.
    turns = config.rope_original_length * frequencies / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / config.rope_factor)


def _yarn(frequencies: np.ndarray, config: LanguageModelConfig) -> np.ndarray:
    def dimension(turns: float) -> float:  # the pair that makes this many turns in the original length
        return (
            config.head_dim
            * math.log(config.rope_original_length / (turns * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    low, high = dimension(config.rope_beta_fast), dimension(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    stretched = np.clip((np.arange(len(frequencies)) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return frequencies * (1 - stretched + stretched / config.rope_factor)


def rope_tables(positions: Array, config: LanguageModelConfig, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Cosine and sine of the angle of every position.

    Args:
        positions: int [..., T].
        config: see :func:`rope_frequencies`.
        dtype: dtype in which the rotation is computed.

    Returns:
        Two arrays [..., T, C / 2].
    """
    frequencies, factor = rope_frequencies(config)
    angles = positions[..., None].astype(dtype) * jnp.asarray(frequencies, dtype).reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(angles) * jnp.asarray(factor, dtype), jnp.sin(angles) * jnp.asarray(factor, dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates dimension i against dimension i + C/2 by the angle of the position.

    Args:
        x: [..., T, H, C].
        cos: [..., T, C / 2].
        sin: [..., T, C / 2].

    Returns:
        [..., T, H, C] in the dtype of ``x``.
    """
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
