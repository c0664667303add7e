import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm
from jaxrl_suite.testing import assert_close
from tests.reference import lm_decoder


def draw(key, batch=2, length=11, heads=4, kv_heads=2, width=4):
    keys = jax.random.split(key, 3)
    return (
        jax.random.normal(keys[0], (batch, length, heads, width)),
        jax.random.normal(keys[1], (batch, length, kv_heads, width)),
        jax.random.normal(keys[2], (batch, length, kv_heads, width)),
    )


SEGMENTS = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0]], jnp.int32)


BLOCKS = (4, 128)  # several blocks, and all in one


def naive(q, k, v, positions, segments, window=None):
    """Full score matrix, differentiated by JAX."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("bthc,bshc->bhts", q, k) / np.sqrt(q.shape[-1])
    distance = positions[:, :, None] - positions[:, None, :]
    seen = (distance >= 0) & (segments[:, :, None] == segments[:, None, :])
    if window is not None:
        seen &= distance < window
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshc->bthc", weights, v)


def test_blockwise_equals_numpy(key):
    q, k, v = draw(key)
    positions = lm.sequence_positions(SEGMENTS)
    cases = list(itertools.product(("looped", "batched"), (None, 3), BLOCKS))
    attend = lm.blockwise_attend
    outputs = jax.jit(
        lambda *a: [attend(*a, positions, SEGMENTS, window=w, layout=kind, block_size=b) for kind, w, b in cases]
    )(q, k, v)
    for (_, window, _), actual in zip(cases, outputs):
        for row in range(2):
            expected = lm_decoder.attention(
                *(np.asarray(x[row], np.float64) for x in (q, k, v)),
                np.asarray(positions[row]),
                np.asarray(SEGMENTS[row]),
                window,
            )
            assert_close(np.asarray(actual[row]), expected.astype(np.float32), "reference")


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("block_size", BLOCKS)
def test_gradient_equals_autodiff_of_the_full_matrix(window, block_size, key):
    q, k, v = draw(key)
    positions = lm.sequence_positions(SEGMENTS)
    weights = jax.random.normal(key, q.shape)

    def loss(attend, arrays):
        return jnp.sum(weights * attend(*arrays, positions, SEGMENTS, window=window))

    blockwise = functools.partial(lm.blockwise_attend, block_size=block_size)
    actual = jax.jit(jax.grad(functools.partial(loss, blockwise)))((q, k, v))
    assert_close(actual, jax.jit(jax.grad(functools.partial(loss, naive)))((q, k, v)), "reference")


@pytest.mark.parametrize("block_size", BLOCKS)
def test_derivative_transposes_again(block_size, key):
    """J (J^T 1) by one vjp and the transpose of its pullback, as influences take it."""
    q, k, v = draw(key, batch=1, length=9)
    positions, segments = jnp.arange(9)[None], jnp.ones((1, 9), jnp.int32)

    def influence(attend):
        output, pullback = jax.vjp(lambda *a: attend(*a, positions, segments).sum(axis=(0, 2, 3)), q, k, v)
        transpose = jax.linear_transpose(pullback, output)
        return transpose(pullback(jnp.ones_like(output)))[0]

    actual = jax.jit(lambda: influence(functools.partial(lm.blockwise_attend, block_size=block_size)))()
    assert_close(actual, jax.jit(lambda: influence(naive))(), "reference", scale=5)


@pytest.mark.parametrize("block_size", BLOCKS)
def test_parts_over_disjoint_keys_merge(block_size, key):
    """Attention to two halves of the keys, merged by the normalisers, is attention to all; also differentiated."""
    q, k, v = draw(key)
    positions = lm.sequence_positions(SEGMENTS)
    attend = functools.partial(lm.attention_with_normaliser, block_size=block_size)

    def merged(q, k, v):
        parts = [
            attend(q, k[:, cut], v[:, cut], positions, positions[:, cut], SEGMENTS, SEGMENTS[:, cut])
            for cut in (slice(0, 6), slice(6, None))
        ]
        whole = jnp.logaddexp(parts[0][1], parts[1][1])
        return sum(o * jnp.exp(n - whole)[..., None] for o, n in parts)

    direct = functools.partial(naive, positions=positions, segments=SEGMENTS)

    def both(function):
        loss = jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), argnums=(0, 1, 2))
        return jax.jit(lambda *a: (function(*a), loss(*a)))(q, k, v)

    assert_close(both(merged), both(direct), "reference")


@pytest.mark.parametrize(("window", "visited"), [(None, 6), (2, 3)])
def test_the_last_queries_of_a_sequence(window, visited, key):
    """Queries 5 to 10 in two blocks of 4, keys in three: later blocks, and those before the window, are skipped."""
    q, k, v = draw(key)
    positions = lm.sequence_positions(SEGMENTS)

    def attend(q, k, v):
        return lm.attention_with_normaliser(
            q[:, 5:], k, v, positions[:, 5:], positions, SEGMENTS[:, 5:], SEGMENTS,
            window=window, ordered=True, block_size=4,
        )[0]  # fmt: skip

    real = SEGMENTS[:, 5:, None, None] > 0
    whole = naive(q, k, v, positions, SEGMENTS, window)[:, 5:]
    assert_close(jnp.where(real, jax.jit(attend)(q, k, v), 0), jnp.where(real, whole, 0), "reference")
    assert f"length={visited}" in str(jax.make_jaxpr(attend)(q, k, v))


def test_memory_is_linear_in_the_length():
    """The compiled backward pass holds no array that grows with the square of the length."""

    def temporary_bytes(length):
        shapes = [jax.ShapeDtypeStruct((1, length, h, 8), jnp.float32) for h in (2, 1, 1)]
        positions = jnp.arange(length)[None]
        function = jax.grad(
            lambda q, k, v: lm.blockwise_attend(q, k, v, positions, None, layout="looped").sum(), argnums=(0, 1, 2)
        )
        return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(2048), temporary_bytes(8192)
    assert long < 6 * short
    assert long < 8192 * 8192  # a byte a score would already be more
