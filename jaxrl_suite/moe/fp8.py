"""Blockwise FP8: real float8 numbers with one scale a block, and what that costs in accuracy.

Activations are scaled in blocks of 1 x 128 along the contracted axis, weights in blocks of 128 x 128. A product takes
the float8 values of a block pair, accumulates in float32 and applies both scales, so its only error is the rounding to
float8; gradients see the rounded operands and pass the rounding unchanged (straight-through).

References:
    DeepSeek-V3 (2024), arXiv:2412.19437, section 3.3.2 (fine-grained quantisation); Micikevicius et al. (2022), FP8
    Formats for Deep Learning, arXiv:2209.05433.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.types import Array

E4M3_MAX = 448.0
E4M3_EPSILON = 2.0**-4  # half a unit in the last of three mantissa bits: the largest relative rounding error


class Quantized(NamedTuple):
    """Blockwise scaled float8 numbers.

    Attributes:
        values: float8_e4m3fn, padded to whole blocks: [rows, columns].
        scales: float32 [row blocks, column blocks]; value times scale is the number.
        shape: of the original.
        block: rows and columns of a block.
    """

    values: Array
    scales: Array
    shape: tuple[int, int]
    block: tuple[int, int]


def quantize(x: Array, block: tuple[int, int] = (1, 128)) -> Quantized:
    """Rounds a matrix to float8 (e4m3) with one float32 scale a block, chosen so that the largest entry is 448.

    Args:
        x: [N, M].
        block: (1, 128) for activations, (128, 128) for weights.

    >>> round(float(quantize(jnp.array([[1.0, -2.0]])).scales[0, 0]) * 448, 4)
    2.0
    """
    rows, columns = x.shape
    high, wide = min(block[0], rows), min(block[1], columns)
    padded = jnp.pad(x.astype(jnp.float32), ((0, -rows % high), (0, -columns % wide)))
    tiles = padded.reshape(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
    largest = jnp.max(jnp.abs(tiles), axis=(1, 3))
    scales = jnp.where(largest > 0, largest / E4M3_MAX, 1.0)
    values = (tiles / scales[:, None, :, None]).astype(jnp.float8_e4m3fn)
    return Quantized(values.reshape(padded.shape), scales, (rows, columns), (high, wide))


def dequantize(q: Quantized) -> Array:
    """The numbers that were stored, float32 [N, M]."""
    (high, wide), (rows, columns) = q.block, q.shape
    tiles = q.values.astype(jnp.float32).reshape(q.scales.shape[0], high, q.scales.shape[1], wide)
    return (tiles * q.scales[:, None, :, None]).reshape(q.values.shape)[:rows, :columns]


@jax.custom_jvp
def round_rows(x: Array) -> Array:
    """[N, M] rounded to float8 in blocks of 1 x 128 and back; the derivative is the identity."""
    return dequantize(quantize(x, (1, 128))).astype(x.dtype)


@jax.custom_jvp
def round_tiles(w: Array) -> Array:
    """[N, M] or [E, N, M] rounded to float8 in blocks of 128 x 128 and back; the derivative is the identity."""

    def one(matrix: Array) -> Array:
        return dequantize(quantize(matrix, (128, 128))).astype(matrix.dtype)

    return one(w) if w.ndim == 2 else jax.vmap(one)(w)


@round_rows.defjvp
def _round_rows_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return round_rows(*primals), tangents[0]


@round_tiles.defjvp
def _round_tiles_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return round_tiles(*primals), tangents[0]


def fp8_matmul(x: Array, w: Array) -> Array:
    """Product of float8 operands: blocks of 128 along the contraction, float32 sums, both scales applied to each.

    Equal to ``round_rows(x) @ round_tiles(w)`` up to float32 rounding; written out because it is what hardware does.

    Args:
        x: [N, K].
        w: [K, M].
    """
    a, b = quantize(x, (1, 128)), quantize(w, (128, 128))
    (_, wide), (_, columns) = a.block, b.block
    total = jnp.zeros((x.shape[0], b.values.shape[1]), jnp.float32)
    for index in range(a.scales.shape[1]):
        part = slice(index * wide, (index + 1) * wide)
        product = jnp.dot(
            a.values[:, part].astype(jnp.float32), b.values[part].astype(jnp.float32), precision="highest"
        )
        total = total + product * a.scales[:, index, None] * jnp.repeat(b.scales[index], columns)[None, :]
    return total[:, : w.shape[1]].astype(x.dtype)
