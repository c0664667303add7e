import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm
from jaxrl_suite.testing import assert_close
from jaxrl_suite.types import Parallel
from tests.reference import lm_decoder

TINY = lm.LanguageModelConfig(
    vocab_size=19, width=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=10, init_std=0.3
)
CONFIGS = {
    "llama": TINY,
    "qwen2_untied_mixed_window": TINY.replace(
        family="qwen2", qkv_bias=True, tied_head=False, sliding_window=3, first_window_layer=1
    ),
    "qwen3_yarn": TINY.replace(
        family="qwen3", qk_norm=True, rope_scaling="yarn", rope_factor=4.0, rope_original_length=32
    ),
    "mixtral_window": TINY.replace(family="mixtral", num_experts=5, expert_width=6, sliding_window=4),
    "qwen2_moe": TINY.replace(
        family="qwen2_moe",
        num_experts=4,
        experts_per_token=3,
        expert_width=6,
        shared_width=8,
        shared_gate=True,
        router_normalize=False,
        qkv_bias=True,
    ),
    "sigmoid_groups_bias": TINY.replace(
        family="mixtral",
        num_experts=6,
        expert_width=6,
        router_score="sigmoid",
        router_groups=3,
        router_top_groups=2,
        router_bias=True,
        router_scale=1.5,
    ),
}


def as_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_numpy_on_packed_and_padded_rows(name, key):
    """Property 20 (our side): logits equal the loop-by-loop oracle for every family's switches, and a sequence has the
    same ones alone, padded and packed with another."""
    config = CONFIGS[name]
    params = lm_decoder.parameters(config)
    tokens = jax.random.randint(key, (2, 7), 0, config.vocab_size)
    tokens = jnp.concatenate(
        [tokens, jnp.roll(tokens[1:], 2, axis=1)]
    )  # the last row begins with the end of the second
    segments = jnp.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 2, 2], [1, 1, 0, 0, 0, 0, 0]], jnp.int32)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        actual = np.asarray(jax.jit(lambda p: lm.apply(p, tokens, config=config, segments=segments))(params))
    frequencies, factor = lm.rope_frequencies(config)
    positions = np.asarray(lm.sequence_positions(segments))
    for row in range(2):
        expected = lm_decoder.logits(
            as_float64(params), np.asarray(tokens[row]), config, frequencies, positions[row],
            np.asarray(segments[row]), factor,
        )  # fmt: skip
        real = np.asarray(segments[row]) > 0
        assert_close(actual[row][real], expected[real].astype(np.float32), "reference", scale=3)
    assert_close(actual[2, :2], actual[1, 5:], "reference")


def test_default_hooks_are_called_at_the_four_places(key):
    """Hooks see the activations: doubling after_row equals doubling the row-split matrices."""
    params = lm_decoder.parameters(TINY)
    tokens = jax.random.randint(key, (1, 5), 0, TINY.vocab_size)
    doubled = jax.tree.map(lambda leaf: leaf, params)
    doubled["layers"]["attention"]["output"] = 2 * params["layers"]["attention"]["output"]
    doubled["layers"]["feed_forward"]["down"] = 2 * params["layers"]["feed_forward"]["down"]
    hooks = Parallel(after_row=lambda x: 2 * x)
    hooked = jax.jit(lambda p: lm.apply(p, tokens, config=TINY, parallel=hooks))(params)
    plain = jax.jit(lambda p: lm.apply(p, tokens, config=TINY))(doubled)
    assert_close(hooked, plain, "same", scale=10)


def test_remat_changes_no_gradient(key):
    config = TINY.replace(num_layers=1)
    params = lm_decoder.parameters(config)
    tokens = jax.random.randint(key, (1, 6), 0, config.vocab_size)

    def gradient(remat):
        return jax.grad(lambda p: jnp.sum(jnp.sin(lm.forward(p, tokens, config=config, remat=remat)[0])))

    none, *others = jax.jit(lambda p: [gradient(remat)(p) for remat in ("none", "full", "dots", "elementwise")])(params)
    for other in others:
        assert_close(other, none, "same", scale=10)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    config = TINY.replace(compute_dtype="bfloat16")
    params = lm_decoder.parameters(config)
    tokens = jnp.arange(6)[None]
    logits, expected = jax.jit(lambda p: [lm.apply(p, tokens, config=c) for c in (config, TINY)])(params)
    assert logits.dtype == jnp.float32
    assert params["layers"]["attention"]["query"].dtype == jnp.float32
    assert (logits != expected).any()
    np.testing.assert_allclose(logits, expected, atol=0.1)


def test_float64_is_float64_throughout(x64):
    """Nothing of the program is narrower, and the derivative equals central differences within 1e-6."""
    config = CONFIGS["qwen2_moe"].replace(
        num_layers=1, param_dtype="float64", qk_norm=True, rope_scaling="yarn", rope_factor=4.0, rope_original_length=32
    )
    params = lm_decoder.parameters(config, dtype=np.float64)
    tokens = jnp.array([[1, 5, 2, 7, 3]], jnp.int32)
    batch = lm.SupervisedBatch(tokens, jnp.ones(tokens.shape))

    def losses(params):
        return lm.log_probs(params, tokens, config=config).sum() + lm.supervised_loss(params, batch, config=config)

    def along(step):  # on a line through the parameters
        return losses(jax.tree.map(lambda leaf, d: leaf + step * d, params, direction))

    direction = lm_decoder.parameters(config, seed=1, dtype=np.float64)
    program = jax.jit(jax.value_and_grad(along))
    assert "f32[" not in str(jax.make_jaxpr(program)(0.0))
    _, slope = program(0.0)
    h = 1e-4  # two pairs of points, so that the error is of fourth order
    far, near = (program(2 * h)[0] - program(-2 * h)[0]) / (4 * h), (program(h)[0] - program(-h)[0]) / (2 * h)
    np.testing.assert_allclose(slope, (4 * near - far) / 3, rtol=1e-8)


def test_unknown_remat_policy_is_named():
    with pytest.raises(ValueError, match="remat='most'"):
        lm.apply(lm_decoder.parameters(TINY), jnp.zeros((1, 2), jnp.int32), config=TINY, remat="most")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3: must divide num_heads=4"),
        ({"head_dim": 5}, "head_dim=5: must be even"),
        ({"num_experts": 2, "experts_per_token": 3}, "experts_per_token=3: must be between 1 and num_experts=2"),
        ({"num_experts": 4, "experts_per_token": 3, "router_groups": 2}, "at most 2"),
        ({"rope_factor": 0.5}, "rope_factor=0.5: must be at least 1"),
    ],
)
def test_bad_configuration_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)
