"""Random windows of a text."""

import jax
import jax.numpy as jnp


def windows(key: jax.Array, step: int | jax.Array, text: jax.Array, batch_size: int, length: int) -> jax.Array:
    """Random windows of a text for one step, int32 [B, length + 1]; the same for every layout of the model."""
    starts = jax.random.randint(jax.random.fold_in(key, step), (batch_size, 1), 0, text.shape[0] - length - 1)
    return text[starts + jnp.arange(length + 1)[None, :]].astype(jnp.int32)
