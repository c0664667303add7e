"""The GPU kernels of grouped products, interpreted on the CPU, against the loops over blocks that they stand in for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.moe import grouped, grouped_gpu
from jaxrl_suite.testing import tolerance

E, R = 3, 300


def operands(block, width, other_width, dtype):
    """Aligned rows of three experts, the second without any, and what their products need."""
    keys = jax.random.split(jax.random.key(0), 4)
    groups = jnp.where(jax.random.bernoulli(keys[0], 0.3, (R,)), 0, 2)
    layout = grouped.align(groups, E, block=block)
    rows = layout.source.shape[0]
    x, weights, y = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys[1:], ((rows, width), (E, width, other_width), (rows, other_width)), strict=True)
    )
    return x, weights, y, layout


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("block", "width", "other_width"), [(32, 64, 48), (128, 256, 128)])
def test_kernels_equal_the_loops(block, width, other_width, dtype):
    x, weights, y, (_, _, expert, live) = operands(block, width, other_width, dtype)
    owned = jnp.sum((expert[:, None] == jnp.arange(E)) & live[:, None], axis=0, dtype=jnp.int32)
    first = grouped.exclusive_cumsum(owned)
    assert not bool(live.all()), "no block without rows is tried"
    pairs = (
        (grouped_gpu.gpu_block_matmul(x, weights, expert, live, False, interpret=True),
         grouped._walk_matmul(x, weights, expert, live, transposed=False)),
        (grouped_gpu.gpu_block_matmul(y, weights, expert, live, True, interpret=True),
         grouped._walk_matmul(y, weights, expert, live, transposed=True)),
        (grouped_gpu.gpu_block_outer(x, y, first, owned, block, interpret=True),
         grouped._walk_outer(x, y, first, owned, block=block)),
    )  # fmt: skip
    bound = tolerance("reference") if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps)
    for actual, expected in pairs:
        assert actual.dtype == dtype
        actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_allclose(actual, expected, atol=bound * np.abs(expected).max())


@pytest.mark.parametrize(
    ("rows", "weights", "num_blocks", "whether"),
    [
        (((256, 64), jnp.float32), (4, 64, 32), 2, True),
        (((256, 64), jnp.float64), (4, 64, 32), 2, False),  # no float64 on tensor cores
        (((256, 64), jnp.bfloat16), (4, 64, 20), 2, False),  # no tile divides 20
        (((16, 64), jnp.bfloat16), (4, 64, 32), 2, False),  # blocks of 8 rows
        (((2**17, 2**15), jnp.bfloat16), (4, 2**15, 32), 1024, False),  # offsets beyond 32 bits
    ],
)
def test_operands_that_the_kernels_take(rows, weights, num_blocks, whether):
    spec = jax.ShapeDtypeStruct(*rows)
    assert grouped_gpu.fits(spec, weights, weights[2], num_blocks) is whether


def test_only_programs_for_nvidia_gpus_hold_them():
    """A CPU program has no kernel of Pallas in it, at sizes at which a GPU program has."""
    x, weights, _, (_, _, expert, live) = operands(32, 64, 48, jnp.float32)
    traced = jax.jit(grouped.block_matmul).trace(x, weights, expert, live)
    assert "pallas_call" in str(traced.jaxpr)
    assert "triton" not in traced.lower().as_text()
