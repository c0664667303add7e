"""Categorical laws: distrax behind one lazy door, and the token draw that is faster beside it.

distrax rests on tfp-nightly, which takes a second to import and has broken with JAX releases; nothing else in the
toolkit imports it, and importing this package does not either.
"""

import warnings
from typing import Any

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


def draw_token(key: PRNGKey, logits: Array, *, block: int = 256) -> Array:
    """One draw from a large vocabulary by a two-level inverse CDF with one uniform a row.

    Equal in law to ``categorical(logits=logits).sample(seed=key)``, which draws a Gumbel variable for each entry of
    the vocabulary and is several times slower on a CPU. First a block of entries is drawn by its mass, then
    the entry inside the block; both cumulative sums are short, which also keeps float32 rounding small.

    Args:
        key: consumed; a single key, or keys ``[B]`` for logits ``[B, V]`` (row b then depends on key b alone).
        logits: [V] or [B, V], natural log-probabilities up to a constant; ``-inf`` excludes an entry.
        block: entries a block.

    Returns:
        int32 [] or [B], drawn entries.
    """
    if logits.ndim == 2:
        uniform = (
            jax.vmap(lambda k: jax.random.uniform(k))(key) if key.ndim else jax.random.uniform(key, logits.shape[:1])
        )
        return jax.vmap(lambda u, row: _inverse_cdf(u, row, block))(uniform, logits)
    return _inverse_cdf(jax.random.uniform(key), logits, block)


def _inverse_cdf(uniform: Array, logits: Array, block: int) -> Array:
    size = logits.shape[0]
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mass = jnp.exp(logits - jnp.max(logits))
    rows = jnp.pad(mass, (0, -size % block)).reshape(-1, block)
    target, chosen = _pick(uniform, jnp.sum(rows, axis=1))
    _, column = _pick_below(target, rows[chosen])
    return (chosen * block + column).astype(jnp.int32)


def _pick(uniform: Array, mass: Array) -> tuple[Array, Array]:
    """Index drawn by ``uniform`` in [0, 1) and the mass left over inside it."""
    return _pick_below(uniform.astype(mass.dtype) * jnp.sum(mass), mass)


def _pick_below(target: Array, mass: Array) -> tuple[Array, Array]:
    cumulative = jnp.cumsum(mass)
    # Rounding may carry the target past the end, or onto an empty entry: step back to the last entry that has mass.
    last = mass.shape[0] - 1 - jnp.argmax((mass > 0)[::-1])
    index = jnp.minimum(jnp.sum(cumulative <= target), last)
    return target - (cumulative[index] - mass[index]), index
