"""Hooks of the decoder for tensor parallelism with sequence parallelism.

Between the split matrices every tensor rank holds its own part of the sequence, so norms, routers and residuals work on
distinct tokens; before a column split the sequence is gathered, after a row split partial sums are reduced and
scattered. The vocabulary is split over the same ranks.
"""

import jax
import jax.numpy as jnp

from jaxrl_suite.moe.variance import axis_index, vary
from jaxrl_suite.types import Array, Parallel


def tensor_parallel(axes: tuple[str, ...]) -> Parallel:
    """Hooks over the atoms of tp; the identities of ``Parallel()`` for none.

    Sequences are axis 1 of activations ``[B, T, D]``.

    References:
        Shoeybi et al. (2019), arXiv:1909.08053, section 3; Korthikanti et al. (2022), arXiv:2205.05198, section 4.2.2.
    """
    if not axes:
        return Parallel()

    def before_column(x: Array) -> Array:
        return jax.lax.all_gather(x, axes, axis=1, tiled=True)

    def after_row(x: Array) -> Array:
        return jax.lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True)

    def embedding(table: Array, tokens: Array) -> Array:
        first = axis_index(axes) * table.shape[0]
        index = tokens - first
        inside = (index >= 0) & (index < table.shape[0])
        rows = jnp.take(table, jnp.where(inside, index, 0), axis=0)
        return after_row(jnp.where(inside[..., None], rows, 0))

    def token_log_prob(logits: Array, tokens: Array) -> Array:
        logits = vary(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axes)
        index = tokens - axis_index(axes) * logits.shape[-1]
        inside = (index >= 0) & (index < logits.shape[-1])
        picked = jnp.take_along_axis(logits, jnp.where(inside, index, 0)[..., None], axis=-1)[..., 0]
        top = jax.lax.pmax(jax.lax.stop_gradient(logits).max(axis=-1), axes)
        total = jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)
        picked, total = jax.lax.psum((jnp.where(inside, picked, 0), total), axes)
        return picked - top - jnp.log(total)

    return Parallel(before_column, after_row, embedding, token_log_prob)
