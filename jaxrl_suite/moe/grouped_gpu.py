"""Grouped products for NVIDIA GPUs: the two kernels of :mod:`jaxrl_suite.moe.grouped`, one program a tile.

The layout is the same: blocks of rows that each belong to one expert. A loop over blocks, which is right for a CPU,
would run them one after the other on a GPU; here every tile of the result is a program of its own that looks up the
expert of its block. Written in Pallas with its Triton lowering, which jax and its CUDA plugin bring along.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.moe.variance import unify
from jaxrl_suite.types import Array


class Tiles(NamedTuple):
    """Sizes of a tile of the result and of a step of the contracted axis; warps of a program, stages of its loads."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def tiles_of(num_rows: int, num_columns: int, num_inner: int, largest: int = 128) -> Tiles | None:
    """Tiles that divide a product exactly, or None where there are none of 16 or more.

    >>> tiles_of(128, 3584, 1024)
    Tiles(rows=128, columns=128, inner=64, warps=8, stages=3)
    >>> tiles_of(128, 100, 1024) is None
    True
    """
    # The largest power of two in each size: programs have no edges to mask.
    rows, columns, inner = (
        math.gcd(n, limit) for n, limit in ((num_rows, largest), (num_columns, 128), (num_inner, 64))
    )
    if min(rows, columns, inner) < 16:
        return None
    return Tiles(rows, columns, inner, warps=8 if rows * columns >= 128 * 128 else 4, stages=3)


def _has_triton() -> bool:
    """JAX says that it will drop this lowering one day; the loops of :mod:`jaxrl_suite.moe.grouped` take over then."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def fits(rows: Array, weights_shape: tuple[int, ...], width: int, num_blocks: int) -> bool:
    """Whether the kernels take these operands: tiles divide them, dtypes are of 4 bytes or less, offsets of 32 bits."""
    num_rows, inner = rows.shape
    block = num_rows // max(num_blocks, 1)
    sizes = (num_rows * inner, num_rows * width, math.prod(weights_shape))
    narrow = rows.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    square = tiles_of(block, width, inner) is not None and tiles_of(inner, width, block) is not None
    return narrow and square and max(sizes) < 2**31 and _has_triton()


def gpu_block_matmul(
    rows: Array, weights: Array, expert: Array, live: Array, transposed: bool, *, interpret: bool = False
) -> Array:
    """See :func:`jaxrl_suite.moe.grouped.block_matmul`; operands must pass :func:`fits`.

    Args:
        rows: [M, D], aligned.
        weights: [E, D, F], or [E, F, D] if transposed.
        expert: int32 [M / block].
        live: bool [M / block].
        transposed: multiply with the transposed matrices.
        interpret: run on any platform, slowly, for tests.

    Returns:
        [M, F], summed in float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (num_rows, inner), num_blocks = rows.shape, expert.shape[0]
    width = weights.shape[1 if transposed else 2]
    block = num_rows // num_blocks
    tiles = tiles_of(block, width, inner)
    assert tiles is not None
    programs_a_block = block // tiles.rows

    def kernel(expert: Any, live: Any, rows: Any, weights: Any, out: Any) -> None:
        column, row = pl.program_id(0), pl.program_id(1)
        which = row // programs_a_block
        mine, columns = pl.ds(row * tiles.rows, tiles.rows), pl.ds(column * tiles.columns, tiles.columns)
        matrix = triton.load(expert.at[which])

        def step(k: Array, total: Array) -> Array:
            along = pl.ds(k * tiles.inner, tiles.inner)
            if transposed:
                other = triton.load(weights.at[matrix, columns, along]).T
            else:
                other = triton.load(weights.at[matrix, along, columns])
            return total + _dot(triton.load(rows.at[mine, along]), other)

        steps = triton.load(live.at[which]) * (inner // tiles.inner)  # none for a block without rows: it stays zero
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
        triton.store(out.at[mine, columns], total.astype(out.dtype))

    arguments = (expert.astype(jnp.int32), live.astype(jnp.int32), rows, weights.astype(rows.dtype))
    grid = (width // tiles.columns, num_rows // tiles.rows)
    return _call(kernel, grid, (num_rows, width), rows.dtype, tiles, interpret, arguments)


def gpu_block_outer(
    rows: Array, others: Array, first: Array, owned: Array, block: int, *, interpret: bool = False
) -> Array:
    """Sum over the blocks of each expert of ``rowsᵀ · others``; operands must pass :func:`fits`.

    Args:
        rows: [M, D], aligned.
        others: [M, F], aligned.
        first: int32 [E], first block of each expert.
        owned: int32 [E], its number of blocks.
        block: rows of a block.
        interpret: run on any platform, slowly, for tests.

    Returns:
        [E, D, F] in the dtype of ``rows``, summed in float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    width, other_width, num_experts = rows.shape[-1], others.shape[-1], first.shape[0]
    tiles = tiles_of(width, other_width, block)
    assert tiles is not None
    steps_a_block = block // tiles.inner

    def kernel(first: Any, owned: Any, rows: Any, others: Any, out: Any) -> None:
        which, row, column = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        mine, columns = pl.ds(row * tiles.rows, tiles.rows), pl.ds(column * tiles.columns, tiles.columns)
        begin = triton.load(first.at[which]) * steps_a_block

        def step(k: Array, total: Array) -> Array:
            along = pl.ds((begin + k) * tiles.inner, tiles.inner)
            return total + _dot(triton.load(rows.at[along, mine]).T, triton.load(others.at[along, columns]))

        steps = triton.load(owned.at[which]) * steps_a_block
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tiles.rows, tiles.columns), jnp.float32))
        triton.store(out.at[which, mine, columns], total.astype(out.dtype))

    arguments = (first.astype(jnp.int32), owned.astype(jnp.int32), rows, others.astype(rows.dtype))
    grid = (num_experts, width // tiles.rows, other_width // tiles.columns)
    return _call(kernel, grid, (num_experts, width, other_width), rows.dtype, tiles, interpret, arguments)


def _dot(left: Array, right: Array) -> Array:
    """In float32 sums; float32 operands at the precision of ``jax.default_matmul_precision``."""
    return jnp.dot(left, right, preferred_element_type=jnp.float32)


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: Any,
    tiles: Tiles,
    interpret: bool,
    arguments: Sequence[Array],
) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    arguments = unify(*arguments)  # inside a manual shard_map the result varies as they do
    out = jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(arguments[0]).mat)
    parameters = triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
    call = pl.pallas_call(kernel, grid=grid, out_shape=out, compiler_params=parameters, interpret=interpret)
    return call(*arguments)
