"""The law that tokens are drawn from: temperature and truncations of the model's law."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_suite.config import Config, check, field
from jaxrl_suite.lm.layers import wide
from jaxrl_suite.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Config):
    """How continuations are drawn; static under jit.

    The truncations act in this order, each on what the one before left: temperature, top_k, top_p, min_p. Tokens that
    tie with the last one kept are kept too, so that the law does not depend on the order of the vocabulary.
    """

    max_tokens: int = field(64, help="T, most new tokens")
    temperature: float = field(1.0, help="logits are divided by it")
    top_k: int = field(0, help="keep this many most probable tokens; 0 for all")
    top_p: float = field(1.0, help="keep the most probable tokens that together reach this probability")
    min_p: float = field(0.0, help="keep tokens at least this share as probable as the best")
    greedy: bool = field(False, help="always the most probable token (ties: lowest number)")
    stop_tokens: tuple[int, ...] = field((), help="tokens that end a row")
    pad_token: int = field(0, help="what fills a row after its end")

    def __post_init__(self) -> None:
        super().__post_init__()

        def rule(condition: bool, name: str, text: str) -> None:
            check(condition, argument=f"Sampling.{name}", value=getattr(self, name), rule=text)

        rule(self.max_tokens > 0, "max_tokens", "must be positive")
        rule(self.temperature > 0, "temperature", "must be positive; greedy=True is the limit at 0")
        rule(self.top_k >= 0, "top_k", "must not be negative")
        rule(0 < self.top_p <= 1, "top_p", "must be in (0, 1]")
        rule(0 <= self.min_p <= 1, "min_p", "must be in [0, 1]")

    @property
    def is_whole(self) -> bool:
        """Whether every token can be drawn: the law is the model's at this temperature."""
        return not self.greedy and self.top_k == 0 and self.top_p == 1 and self.min_p == 0


def sampling_logits(logits: Array, sampling: Sampling) -> Array:
    """Unnormalised log-probabilities of the sampling law; -inf where a token cannot be drawn.

    Args:
        logits: [..., V], natural units.
        sampling: the law.

    Returns:
        [..., V] in float32 at least.

    References:
        Fan et al. (2018), arXiv 1805.04833 (top-k); Holtzman et al. (2020), arXiv 1904.09751 (top-p);
        Nguyen et al. (2024), arXiv 2407.01082 (min-p).

    >>> sampling_logits(jnp.array([3.0, 1.0, 2.0]), Sampling(top_k=2)).tolist()
    [3.0, -inf, 2.0]
    """
    logits = logits.astype(wide(logits.dtype))
    if sampling.greedy:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        columns = jnp.arange(logits.shape[-1]).reshape((1,) * (logits.ndim - 1) + (-1,))
        return jnp.where(columns == best, jnp.zeros_like(logits), -jnp.inf)
    logits = logits / jnp.asarray(sampling.temperature, logits.dtype)
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = jnp.where(logits >= _top_k_threshold(logits, sampling.top_k), logits, -jnp.inf)
    best = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    if sampling.top_p < 1:
        logits = jnp.where(logits >= _top_p_threshold(logits, best, sampling.top_p), logits, -jnp.inf)
    if sampling.min_p > 0:
        logits = jnp.where(logits >= best + jnp.log(jnp.asarray(sampling.min_p, logits.dtype)), logits, -jnp.inf)
    return logits


def _top_k_threshold(logits: Array, k: int) -> Array:
    """The k-th largest entry of each row, [..., 1]."""
    return _largest_threshold(logits, lambda kept: kept.sum(axis=-1, keepdims=True) >= k)


def _top_p_threshold(logits: Array, best: Array, top_p: float) -> Array:
    weights = jnp.exp(logits - best)
    enough = weights.sum(axis=-1, keepdims=True) * jnp.asarray(top_p, logits.dtype)
    return _largest_threshold(logits, lambda kept: jnp.where(kept, weights, 0).sum(axis=-1, keepdims=True) >= enough)


def _largest_threshold(logits: Array, accepted) -> Array:
    """The largest x of each row for which ``accepted(logits >= x)`` holds, by bisection over the bits of a float.

    A sort of the vocabulary would do too, and costs several times as much on a CPU.
    """
    logits = jax.lax.stop_gradient(logits)
    bits = jnp.finfo(logits.dtype).bits
    integer = jnp.int64 if bits == 64 else jnp.int32
    keys = jax.lax.bitcast_convert_type(logits, integer)
    keys = jnp.where(keys < 0, keys ^ jnp.iinfo(integer).max, keys)  # same order as the floats

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # accepted at low, not at high
        middle = (low & high) + ((low ^ high) >> 1)
        ok = accepted(keys >= middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low = keys.min(axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, bits, halve, (low, keys.max(axis=-1, keepdims=True) + 1))
    return jax.lax.bitcast_convert_type(jnp.where(low < 0, low ^ jnp.iinfo(integer).max, low), logits.dtype)
