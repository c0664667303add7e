"""Running mean of completion lengths, exact however long the run."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxrl_suite.types import Array


class RunningMean(NamedTuple):
    """Mean of everything seen so far.

    Attributes:
        mean: [].
        count: int32 [], how many values.
    """

    mean: Array
    count: Array


def init_running_mean(dtype: jnp.dtype | type = jnp.float32) -> RunningMean:
    """Mean of nothing: zero."""
    return RunningMean(jnp.zeros((), dtype), jnp.zeros((), jnp.int32))


def update_running_mean(state: RunningMean, values: Array, *, mask: Array | None = None) -> RunningMean:
    """Adds a batch: ``m += (mean of batch - m) n / (N + n)``, which loses no units where a plain sum would.

    Args:
        state: mean so far.
        values: [B].
        mask: bool [B], values that count.

    Returns:
        Mean with the batch included.

    >>> import jax.numpy as jnp
    >>> float(update_running_mean(init_running_mean(), jnp.array([1.0, 3.0])).mean)
    2.0
    """
    keep = jnp.ones(values.shape, bool) if mask is None else mask
    number = jnp.sum(keep, dtype=jnp.int32)
    values = values.astype(state.mean.dtype)
    batch = jnp.sum(jnp.where(keep, values - state.mean, 0))
    count = state.count + number
    return RunningMean(state.mean + batch / jnp.maximum(count, 1).astype(state.mean.dtype), count)
