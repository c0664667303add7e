import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm, moe
from jaxrl_suite.moe.policy import policy, to_decode
from jaxrl_suite.moe.verify import quick_compile

MODEL = lm.LanguageModelConfig(
    family="qwen2_moe",
    vocab_size=32,
    width=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    ffn_width=8,
    num_experts=4,
    experts_per_token=2,
    expert_width=8,
    shared_width=8,
    shared_gate=True,
    qkv_bias=True,
    router_normalize=False,
    tied_head=False,
    init_std=0.3,
)
CONFIG = moe.MoEConfig(model=MODEL, block_rows=8)


@functools.cache
def params():
    return jax.jit(lambda: lm.init_params(jax.random.key(0), MODEL), compiler_options=quick_compile())()


def quick(function):
    return jax.jit(function, compiler_options=quick_compile())


@pytest.mark.parametrize(
    "text", ["attention=tp4.cp2 experts=ep2.etp2.edp2", "attention=tp2.dp2 experts=ep2 pipeline=2"]
)
def test_log_probs_equal_one_device(text):
    """Packed rows of any number and length, raw softmax, gated shared expert, fewer key heads than tensor ranks."""
    tokens = jax.random.randint(jax.random.key(1), (3, 13), 0, 32)
    segments = jnp.array([[1] * 13, [1] * 6 + [2] * 7, [0] * 3 + [1] * 8 + [0] * 2])
    ours = quick(policy(CONFIG, moe.Folding.parse(text)).log_probs)(params(), tokens, segments)
    theirs = quick(lm.policy(lm.LanguageModel(MODEL)).log_probs)(params(), tokens, segments)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_generation_equals_one_device():
    """Decoding with a cache over tensor and expert ranks draws the same tokens as one device."""
    folding = moe.Folding.parse("attention=tp2.dp4 experts=ep2.etp2.edp2")
    prompts, mask = lm.left_pad([[1, 2, 3], [4, 5]])
    sampling = lm.Sampling(max_tokens=5)
    ids = jnp.arange(2)
    layout = to_decode(params(), CONFIG, folding)
    ours, theirs = (
        quick(lambda p, f=f: f(jax.random.key(2), p, prompts, mask, ids, sampling))(p)
        for f, p in (
            (policy(CONFIG, folding).generate, layout),
            (lm.policy(lm.LanguageModel(MODEL)).generate, params()),
        )
    )
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-5)


def test_gradients_of_log_probs_equal_one_device():
    """What a policy trainer differentiates: a weighted sum of log-probabilities."""
    folding = moe.Folding.parse("attention=tp2.dp2 experts=ep4")
    tokens = jax.random.randint(jax.random.key(3), (2, 8), 0, 32)
    weights = jax.random.normal(jax.random.key(4), (2, 8))
    one = lm.policy(lm.LanguageModel(MODEL)).log_probs
    many = policy(CONFIG, folding).log_probs
    ours, theirs = (
        quick(jax.grad(lambda p, f=f: jnp.sum(weights * f(p, tokens, None))))(params()) for f in (many, one)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
