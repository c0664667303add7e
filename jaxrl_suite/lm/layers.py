"""The small pieces of a block: RMSNorm, projections with wide accumulation, and a cast between varying types."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl_suite.types import Array


def wide(dtype: Any, lowest: str = "float32") -> jnp.dtype:
    """The dtype in which sums of ``dtype`` are taken: at least ``lowest``."""
    return jnp.promote_types(dtype, lowest)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, computed in float32 at least.

    Args:
        x: [..., D].
        scale: [D].
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of ``x``.

    References:
        Zhang and Sennrich (2019), arXiv 1910.07467, equation 4.
    """
    y = x.astype(wide(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + jnp.asarray(eps, y.dtype))
    scale = scale.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return (y * scale).astype(x.dtype)


class RowMajor(flax.struct.PyTreeNode):
    """A matrix stored output by output, which a product with few rows reads faster on a CPU; for decoding.

    Attributes:
        kernel: [outputs, inputs].
        outputs: shape of the output axes.
    """

    kernel: Array
    outputs: tuple[int, ...] = flax.struct.field(pytree_node=False)


def row_major(kernel: Array, *, num_inputs: int = 1) -> RowMajor:
    """Stores a matrix ``[*inputs, *outputs]`` output by output."""
    outputs = kernel.shape[num_inputs:]
    return RowMajor(kernel.reshape(-1, math.prod(outputs)).T, outputs)


class LowRank(flax.struct.PyTreeNode):
    """A matrix plus a trained difference of low rank: ``x kernel + scale (x a) b``.

    Attributes:
        kernel: [*inputs, *outputs].
        a: [*inputs, R].
        b: [R, *outputs].
        scale: factor on the difference.
    """

    kernel: Array
    a: Array
    b: Array
    scale: float = flax.struct.field(pytree_node=False)


def project(x: Array, kernel: Array | RowMajor | LowRank, *, num_inputs: int = 1, accumulate: str = "float32") -> Array:
    """Contracts the last ``num_inputs`` axes of ``x`` with the first of ``kernel``.

    Args:
        x: [..., *inputs].
        kernel: [*inputs, *outputs], cast to the dtype of ``x``; or the same in the layout of decoding, or with a
            difference of low rank.
        num_inputs: number of contracted axes.
        accumulate: lowest dtype of the sums.

    Returns:
        [..., *outputs] in the dtype of ``x``.
    """
    if isinstance(kernel, LowRank):
        low = project(x, kernel.a, num_inputs=num_inputs, accumulate=accumulate)
        difference = project(low, kernel.b, accumulate=accumulate) * jnp.asarray(kernel.scale, x.dtype)
        return project(x, kernel.kernel, num_inputs=num_inputs, accumulate=accumulate) + difference
    # One 2-D product: XLA's CPU backend has a fast path for exactly that.
    rows = x.reshape(-1, math.prod(x.shape[x.ndim - num_inputs :]))
    if isinstance(kernel, RowMajor):
        outputs, matrix, contracted = kernel.outputs, kernel.kernel, 1
    else:
        outputs, matrix, contracted = kernel.shape[num_inputs:], kernel.reshape(rows.shape[1], -1), 0
    y = jax.lax.dot_general(
        rows,
        matrix.astype(x.dtype),
        (((1,), (contracted,)), ((), ())),
        preferred_element_type=wide(x.dtype, accumulate),
    )
    return y.astype(x.dtype).reshape(*x.shape[: x.ndim - num_inputs], *outputs)


def vary_like(x: Array, *others: Array) -> Array:
    """``x`` as varying over every manual mesh axis over which one of ``others`` varies; a no-op outside shard_map.

    A scan inside ``shard_map`` wants its initial carry to vary over the same axes as what its body returns, and a
    custom derivative wants all its arguments to. The cast's transpose is the sum over those axes.
    """
    axes: frozenset[str] = frozenset().union(*(_varying(other) for other in others)) - _varying(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _varying(x: Array) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)
