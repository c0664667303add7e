"""Categorical laws: distrax behind one lazy door, and the token draw that is faster beside it.

distrax rests on tfp-nightly, which takes a second to import and has broken with JAX releases; nothing else in the
toolkit imports it, and importing this package does not either.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.types import Array, PRNGKey


def _distrax() -> Any:
    try:
        with warnings.catch_warnings():  # tfp-nightly touches names that JAX deprecates
            warnings.simplefilter("ignore")
            import distrax
    except Exception as error:  # tfp-nightly fails in many ways when it lags behind JAX
        raise ImportError(
            "distrax could not be imported: its tfp-nightly may lag behind your jax. "
            "Remedy: python -m pip install --upgrade distrax tfp-nightly"
        ) from error
    return distrax


def categorical(*, logits: Array | None = None, probs: Array | None = None) -> Any:
    """``distrax.Categorical`` over the last axis; exactly one of the arguments is given.

    Args:
        logits: [..., N], unnormalised natural log-probabilities.
        probs: [..., N], probabilities.

    Returns:
        A distrax distribution: ``sample(seed=key)``, ``log_prob`` (nats), ``entropy()`` (nats), ``kl_divergence``.

    Raises:
        ValueError: neither or both of ``logits`` and ``probs`` are given.
        ImportError: distrax does not import.
    """
    if (logits is None) == (probs is None):
        raise ValueError("categorical: give exactly one of logits and probs")
    with jax.numpy_dtype_promotion("standard"):
        return _distrax().Categorical(logits=logits, probs=probs)


def softmax_policy(preferences: Array, temperature: float | Array = 1.0) -> Any:
    """``distrax.Softmax``: probabilities proportional to ``exp(preferences / temperature)``.

    Args:
        preferences: [..., A], action values.
        temperature: positive scale; traced, so it may be swept.
    """
    # distrax.Softmax takes a static temperature only, hence the division outside.
    return categorical(logits=preferences / temperature)


def greedy(preferences: Array) -> Any:
    """``distrax.Greedy``: all mass on the best action, shared equally between ties. ``preferences [..., A]``."""
    with jax.numpy_dtype_promotion("standard"):
        return _distrax().Greedy(preferences)


def epsilon_greedy(preferences: Array, epsilon: float) -> Any:
    """``distrax.EpsilonGreedy``: greedy with probability ``1 - epsilon``, else uniform. ``preferences [..., A]``."""
    with jax.numpy_dtype_promotion("standard"):
        return _distrax().EpsilonGreedy(preferences, epsilon)


class Mass(NamedTuple):
    """Unnormalised laws of a batch: ``p = powers / total``, ``log p = logit - best - log(total)``.

    Attributes:
        powers: [..., V], ``exp(logit - best)``.
        best: [...], largest logit.
        total: [...], sum of the powers.
    """

    powers: Array
    best: Array
    total: Array


def draw_token(keys: PRNGKey, logits: Array) -> tuple[Array, Array]:
    """One draw a row from a large vocabulary, by inverting the distribution function in two levels.

    Equal in law to ``categorical(logits=logits).sample(seed=key)``, which draws a Gumbel variable for each entry of
    the vocabulary and is several times slower on a CPU. First a block of entries is drawn by its mass, then
    the entry inside the block; both cumulative sums are short, which also keeps float32 rounding small.

    Args:
        keys: [B], consumed; row b depends on key b alone.
        logits: [B, V], natural log-probabilities up to a constant; ``-inf`` excludes an entry.

    Returns:
        Drawn entries int32 [B], and their log-probabilities [B] in nats, float32 at least.
    """
    return draw_with_mass(keys, logits)[:2]


def draw_with_mass(keys: PRNGKey, logits: Array) -> tuple[Array, Array, Mass]:
    """:func:`draw_token`, and the laws that it drew from: what it exponentiates and sums anyway."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    batch, size = logits.shape
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,), logits.dtype))(keys)
    best = jax.lax.stop_gradient(logits.max(axis=-1))
    # Written out once: XLA would otherwise take them anew, on one core of a CPU, for each of their readers.
    powers = jax.lax.optimization_barrier(jnp.exp(logits - best[:, None]))
    width = _block_width(size)
    parts = jnp.pad(powers, ((0, 0), (0, -size % width))).reshape(batch, -1, width)
    blocks = jax.lax.optimization_barrier(parts.sum(axis=-1))  # or XLA sums all powers a second time for the total
    block = invert_cdf(blocks, uniforms[:, 0])
    inside = invert_cdf(jnp.take_along_axis(parts, block[:, None, None], axis=1)[:, 0], uniforms[:, 1])
    tokens = block * width + inside
    mass = Mass(powers, best, blocks.sum(axis=-1))
    return tokens, jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - best - jnp.log(mass.total), mass


def _block_width(size: int) -> int:
    """Near the root of the vocabulary; a divisor of a large one, of which a padded copy costs more than the draw.

    >>> _block_width(49152), _block_width(100)
    (192, 10)
    """
    root = max(1, int(size**0.5))
    divisors = [width for width in range(root, root // 2, -1) if size % width == 0]
    return divisors[0] if divisors and size >= 4096 else root


def invert_cdf(mass: Array, uniform: Array) -> Array:
    """Index of the first entry whose running sum exceeds ``uniform`` times the total; never one without mass.

    Args:
        mass: [..., N], non-negative, some of it positive; it need not sum to one. No derivative.
        uniform: [...], in [0, 1).

    Returns:
        int32 [...].

    >>> invert_cdf(jnp.array([0.0, 1.0, 0.0, 3.0]), jnp.array(0.5)).tolist()
    3
    """
    mass = jax.lax.stop_gradient(mass)
    sums = jnp.cumsum(mass, axis=-1)
    columns = jax.lax.broadcasted_iota(jnp.int32, mass.shape, mass.ndim - 1)
    # The sums are taken in parallel, so that they rise up to rounding only: an entry without mass may seem to raise
    # them, and the target may lie beyond all of them.
    reached = (mass > 0) & (sums > uniform[..., None] * sums[..., -1:])
    last = jnp.max(jnp.where(mass > 0, columns, 0), axis=-1, keepdims=True)
    return jnp.min(jnp.where(reached, columns, last), axis=-1)
