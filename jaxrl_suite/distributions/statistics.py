"""Means and variances over the valid entries of a padded array. Accumulated in float32 at least."""

import jax.numpy as jnp

from jaxrl_suite.types import Array


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def masked_mean(x: Array, mask: Array, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
    """Mean of the entries where ``mask`` is true; 0 where there is none. Masked entries may be NaN.

    Args:
        x: [...], values.
        mask: [...], bool, broadcastable to ``x``.
        axis: axes to reduce; None reduces all.
        keepdims: keep reduced axes with length one.

    Returns:
        Mean over the given axes.
    """
    mask = jnp.broadcast_to(mask, x.shape).astype(bool)
    x = _wide(x)
    total = jnp.sum(jnp.where(mask, x, 0.0), axis=axis, keepdims=keepdims)
    count = jnp.sum(mask, axis=axis, keepdims=keepdims)
    return total / jnp.maximum(count, 1).astype(x.dtype)


def masked_variance(
    x: Array, mask: Array, *, axis: int | tuple[int, ...] | None = None, unbiased: bool = False, keepdims: bool = False
) -> Array:
    """Variance of the entries where ``mask`` is true; 0 where there are too few.

    Args:
        x: [...], values.
        mask: [...], bool, broadcastable to ``x``.
        axis: axes to reduce; None reduces all.
        unbiased: divide by ``n - 1`` (Bessel) rather than ``n``.
        keepdims: keep reduced axes with length one.

    Returns:
        Variance over the given axes.
    """
    mask = jnp.broadcast_to(mask, x.shape).astype(bool)
    x = jnp.where(mask, _wide(x), 0.0)
    centred = jnp.where(mask, x - masked_mean(x, mask, axis=axis, keepdims=True), 0.0)
    count = jnp.sum(mask, axis=axis, keepdims=keepdims)
    total = jnp.sum(centred * centred, axis=axis, keepdims=keepdims)
    return total / jnp.maximum(count - int(unbiased), 1).astype(x.dtype)


def masked_whiten(x: Array, mask: Array, *, epsilon: float = 1e-8) -> Array:
    """Shifts and scales the valid entries to mean 0 and unbiased variance 1; masked entries become 0.

    Args:
        x: [...], values.
        mask: [...], bool, broadcastable to ``x``.
        epsilon: added to the variance.

    Returns:
        [...], whitened values.
    """
    mean = masked_mean(x, mask)
    scale = 1.0 / jnp.sqrt(masked_variance(x, mask, unbiased=True) + epsilon)
    return jnp.where(jnp.broadcast_to(mask, x.shape).astype(bool), (_wide(x) - mean) * scale, 0.0)
