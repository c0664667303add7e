"""131,072 tokens through the default attention, for real: python -m pytest -m slow -n0 tests/lm/lm_long_test.py -s."""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm
from tests.reference import lm_decoder

pytestmark = pytest.mark.slow
LENGTH = 131_072


def timed(function, *arguments):
    """Result, seconds of the run, compiled temporaries and growth of this process's peak, both in bytes."""
    compiled = jax.jit(function).lower(*arguments).compile()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    out = jax.block_until_ready(compiled(*arguments))
    seconds = time.perf_counter() - began
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return out, seconds, compiled.memory_analysis().temp_size_in_bytes, growth


def test_attention_and_its_gradient_in_linear_memory(key):
    """Three rows and the gradients of their sum equal the full softmax; the scores alone would take 69 GB a head."""
    width, rows = 16, np.array([0, 70_001, LENGTH - 1])
    q, k, v = (jax.random.normal(jax.random.fold_in(key, i), (1, LENGTH, h, width)) for i, h in enumerate((2, 1, 1)))
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]

    def loss(q, k, v):
        out = lm.blockwise_attend(q, k, v, positions, None)[0, rows]
        return out.sum(), out

    (gradient, out), seconds, temporary, growth = timed(jax.grad(loss, (0, 1, 2), has_aux=True), q, k, v)
    print(f"\nattention, gradient: {seconds:.0f} s, {temporary / 1e6:.0f} MB temporaries, peak + {growth / 1e6:.0f} MB")
    q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
    dk, dv = np.zeros_like(k), np.zeros_like(v)
    for place, row in enumerate(rows):
        for head in range(2):
            weights = lm_decoder.softmax(k[: row + 1, 0] @ q[row, head] / 4)
            expected = weights @ v[: row + 1, 0]
            np.testing.assert_allclose(out[place, head], expected, atol=1e-5)
            d_scores = weights * (v[: row + 1, 0].sum(axis=-1) - expected.sum())
            np.testing.assert_allclose(gradient[0][0, row, head], d_scores @ k[: row + 1, 0] / 4, atol=1e-5)
            dk[: row + 1, 0] += np.outer(d_scores, q[row, head]) / 4
            dv[: row + 1, 0] += weights[:, None]
    np.testing.assert_allclose(gradient[1][0], dk, atol=1e-5)
    np.testing.assert_allclose(gradient[2][0], dv, atol=1e-5)
    assert temporary < 50 * q.nbytes
    assert growth < 100 * q.nbytes


def test_supervised_loss_of_a_tiny_model_in_linear_memory():
    """Embedding, one layer, chunked head and the gradients of all: finite, and memory of a few dozen activations."""
    config = lm.LanguageModelConfig(
        vocab_size=259, width=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffn_width=64, rope_theta=1e6
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (1, LENGTH)), jnp.int32)
    batch = lm.SupervisedBatch(tokens, jnp.ones((1, LENGTH)))

    def loss(params):
        return lm.supervised_loss(params, batch, config=config)

    (value, gradient), seconds, temporary, growth = timed(jax.value_and_grad(loss), lm_decoder.parameters(config))
    print(f"\nmodel, gradient: {seconds:.0f} s, {temporary / 1e6:.0f} MB temporaries, peak + {growth / 1e6:.0f} MB")
    assert abs(float(value) - np.log(259)) < 0.1  # a new model knows nothing of random bytes
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert temporary < 100 * LENGTH * config.width * 4
    assert growth < 150 * LENGTH * config.width * 4
