"""Moving rows by gathers alone, forward and backward.

Scatter-add is slow on every backend. A permutation with holes is a gather in one direction and, since both index maps
are known, a gather in the other: :func:`spread_rows` and :func:`collect_rows` are transposes of each other, and each is
the derivative of the other.
"""

import jax
import jax.numpy as jnp

from jaxrl_suite.types import Array


def _gather(rows: Array, index: Array) -> Array:
    """``rows[index]``, zero where the index is out of range."""
    return rows.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def spread_rows(rows: Array, source: Array, slots: Array) -> Array:
    """Copies rows to slots: ``out[m] = rows[source[m]]``.

    Args:
        rows: [N, D].
        source: int32 [M], row for each slot, N for an empty slot (it becomes zero).
        slots: int32 [N, k], the slots that hold a copy of each row, M for none; the inverse map of ``source``.

    Returns:
        [M, D].
    """
    return _gather(rows, source)


@jax.custom_vjp
def collect_rows(values: Array, source: Array, slots: Array) -> Array:
    """Sums the copies of each row: ``out[n] = Σ_j values[slots[n, j]]``; the transpose of :func:`spread_rows`.

    Args:
        values: [M, D].
        source: int32 [M].
        slots: int32 [N, k].

    Returns:
        [N, D], summed in float32 at least.
    """
    return _collect(values, slots)


def _collect(values: Array, slots: Array) -> Array:
    wide = jnp.promote_types(values.dtype, jnp.float32)
    total = _gather(values, slots[:, 0])
    for j in range(1, slots.shape[1]):
        total = total.astype(wide) + _gather(values, slots[:, j]).astype(wide)
    return total.astype(values.dtype)


def _spread_forward(rows: Array, source: Array, slots: Array) -> tuple[Array, tuple[Array, Array]]:
    return _gather(rows, source), (source, slots)


def _spread_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    return collect_rows(cotangent, *residuals), None, None


def _collect_forward(values: Array, source: Array, slots: Array) -> tuple[Array, tuple[Array, Array]]:
    return _collect(values, slots), (source, slots)


def _collect_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    return spread_rows(cotangent, *residuals), None, None


spread_rows.defvjp(_spread_forward, _spread_backward)
collect_rows.defvjp(_collect_forward, _collect_backward)
