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


def random_params(key, config):
    """Initial parameters with norms, biases and selection bias away from their trivial values."""
    leaves = lm.flatten(lm.init_params(key, config))
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    return lm.unflatten(
        {
            path: leaf + (0.2 * jax.random.normal(k, leaf.shape, leaf.dtype) if "norm" in path or "bias" in path else 0)
            for (path, leaf), k in zip(leaves.items(), keys)
        }
    )


def as_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_numpy_on_packed_and_padded_rows(name, key):
    """Property 20 (our side): logits equal the loop-by-loop oracle for every family's switches."""
    config = CONFIGS[name]
    params = random_params(key, config)
    tokens = jax.random.randint(jax.random.fold_in(key, 2), (2, 7), 0, config.vocab_size)
    segments = jnp.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2]], jnp.int32)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        actual = jax.jit(lambda p: lm.apply(p, tokens, config=config, segments=segments))(params)
    frequencies, factor = lm.rope_frequencies(config)
    positions = np.asarray(lm.sequence_positions(segments))
    for row in range(2):
        expected = lm_decoder.logits(
            as_float64(params), np.asarray(tokens[row]), config, frequencies, positions[row],
            np.asarray(segments[row]), factor,
        )  # fmt: skip
        real = np.asarray(segments[row]) > 0
        assert_close(np.asarray(actual[row])[real], expected[real].astype(np.float32), "reference", scale=3)


def test_packing_changes_nothing(key):
    """Two sequences in one row give the logits that each gives alone."""
    params = random_params(key, TINY)
    tokens = jax.random.randint(key, (1, 9), 0, TINY.vocab_size)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]], jnp.int32)
    packed = jax.jit(lambda p: lm.apply(p, tokens, config=TINY, segments=segments))(params)
    alone = jax.jit(lambda p: [lm.apply(p, part, config=TINY) for part in (tokens[:, :4], tokens[:, 4:])])(params)
    assert_close(packed, jnp.concatenate(alone, axis=1), "reference")


def test_default_hooks_are_called_at_the_four_places(key):
    """Hooks see the activations: doubling after_row equals doubling the row-split matrices."""
    params = random_params(key, TINY)
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
    params = random_params(key, config)
    tokens = jax.random.randint(key, (1, 6), 0, config.vocab_size)

    def gradient(remat):
        return jax.grad(lambda p: jnp.mean(jax.nn.logsumexp(lm.apply(p, tokens, config=config, remat=remat), axis=-1)))

    none, *others = jax.jit(lambda p: [gradient(remat)(p) for remat in ("none", "full", "dots", "elementwise")])(params)
    for other in others:
        assert_close(other, none, "same", scale=10)


def test_bfloat16_compute_keeps_float32_parameters_and_logits(key):
    config = TINY.replace(compute_dtype="bfloat16")
    params = lm.init_params(key, config)
    tokens = jnp.arange(6)[None]
    logits, expected = jax.jit(lambda p: [lm.apply(p, tokens, config=c) for c in (config, TINY)])(params)
    assert logits.dtype == jnp.float32
    assert params["layers"]["attention"]["query"].dtype == jnp.float32
    assert (logits != expected).any()
    np.testing.assert_allclose(logits, expected, atol=0.1)


def test_unknown_remat_policy_is_named():
    with pytest.raises(ValueError, match="remat='most'"):
        lm.apply(lm.init_params(jax.random.key(0), TINY), jnp.zeros((1, 2), jnp.int32), config=TINY, remat="most")


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
