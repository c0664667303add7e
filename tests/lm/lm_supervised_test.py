import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_suite import lm
from jaxrl_suite.testing import assert_close
from tests.reference import lm_decoder

CONFIG = lm.LanguageModelConfig(
    vocab_size=19, width=12, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=10, init_std=0.3
)
SPARSE = CONFIG.replace(family="mixtral", num_experts=4, expert_width=6)


def make_batch(key):
    """Four rows whose real tokens are spread unevenly over micro-batches."""
    tokens = jax.random.randint(key, (4, 8), 0, 19)
    weights = jnp.ones((4, 8)).at[0, :6].set(0).at[2, 3:].set(0)
    segments = jnp.ones((4, 8), jnp.int32).at[1, :3].set(0).at[3, 4:].set(2)
    return lm.SupervisedBatch(tokens, weights, segments)


def test_loss_is_the_weighted_mean_over_tokens_and_accumulation_does_not_change_the_step(key):
    """Micro-batches with different numbers of tokens share one divisor."""
    params, batch = lm_decoder.parameters(CONFIG), make_batch(key)
    optimizer = optax.sgd(0.5)
    step = functools.partial(lm.supervised_step, config=CONFIG, optimizer=optimizer)
    state = lm.init_supervised(params, optimizer)
    whole, parts, log_probs = jax.jit(
        lambda s: (
            step(s, batch), step(s, batch, accumulate=4),
            lm.log_probs(s.params, batch.tokens, batch.segments, config=CONFIG),
        )
    )(state)  # fmt: skip
    assert_close(parts, whole, "reference")
    first = np.array([[1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], [1] + 7 * [0], [1, 0, 0, 0, 1, 0, 0, 0]])
    weights = np.asarray(batch.weights) * (1 - first)
    expected = -(np.asarray(log_probs) * weights).sum() / weights.sum()
    np.testing.assert_allclose(whole[1]["loss/nats_per_token"], expected, rtol=1e-5)


def test_loss_is_a_mean_whatever_the_scale_of_the_weights(key):
    """Weights that sum to less than one are weights like any other; without any the loss is zero."""
    params, batch = lm_decoder.parameters(CONFIG), make_batch(key)
    loss = jax.jit(lambda w: lm.supervised_loss(params, batch._replace(weights=w), config=CONFIG))
    np.testing.assert_allclose(loss(1e-3 * batch.weights), loss(batch.weights), rtol=1e-5)
    assert float(loss(0 * batch.weights)) == 0


def test_learning_a_fixed_text():
    """Fifty steps bring the loss on a repeated text far below the uniform law."""
    tokens = jnp.tile(jnp.array([1, 5, 2, 9, 7, 3, 3, 8], jnp.int32), (4, 4))
    batch = lm.SupervisedBatch(tokens, jnp.ones(tokens.shape))
    optimizer = optax.adamw(1e-2)
    params = lm_decoder.parameters(CONFIG.replace(init_std=0.1))

    @jax.jit
    def run(params):
        step = functools.partial(lm.supervised_step, config=CONFIG, optimizer=optimizer)
        return jax.lax.scan(lambda s, _: step(s, batch), lm.init_supervised(params, optimizer), None, length=50)[1]

    losses = run(params)["loss/nats_per_token"]
    assert losses[0] > 0.9 * np.log(19)
    assert losses[-1] < 0.2


LORA = lm.LoraConfig(rank=2, alpha=3.0, patterns=("layers/attention/*", "layers/feed_forward/*", "embed/table"))


@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["dense", "sparse"])
def test_lora_in_place_equals_lora_merged_and_starts_at_zero(config, key):
    params = lm_decoder.parameters(config)
    lora = jax.jit(lambda p: lm.init_lora(key, p, LORA))(params)
    assert lora["layers/attention/output"]["a"].shape == (1, 4, 4, 2)
    apply = jax.jit(lambda p: lm.apply(p, jnp.arange(7)[None], config=config))
    assert_close(apply(lm.apply_lora(params, lora, LORA)), apply(params), "same")
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1), lora)
    actual = apply(lm.apply_lora(params, moved, LORA))
    merged = jax.jit(lambda p, m: lm.merge_lora(p, m, LORA))(params, moved)
    assert_close(actual, apply(merged), "reference", scale=3)
    assert np.abs(np.asarray(actual - apply(params))).max() > 0.01


def test_lora_step_moves_the_differences_only_and_lowers_the_loss(key):
    params, batch = lm_decoder.parameters(CONFIG), make_batch(key)
    optimizer = optax.adam(1e-2)
    lora = jax.jit(lambda p: lm.init_lora(key, p, LORA))(params)
    step = jax.jit(functools.partial(lm.supervised_step, config=CONFIG, optimizer=optimizer, base=params, lora=LORA))
    state = jax.jit(lambda t: lm.init_supervised(t, optimizer))(lora)
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss/nats_per_token"]))
    assert state.params.keys() == lora.keys()
    assert losses[-1] < losses[0]
    loss = jax.jit(lambda d: lm.supervised_loss(lm.merge_lora(params, d, LORA), batch, config=CONFIG))(state.params)
    np.testing.assert_allclose(loss, step(state, batch)[1]["loss/nats_per_token"], rtol=1e-4)


def test_bad_arguments_are_named(key):
    params, batch = lm_decoder.parameters(CONFIG), make_batch(key)
    state = lm.init_supervised(params, optax.sgd(0.1))
    with pytest.raises(ValueError, match="accumulate=3: must divide the 4 rows"):
        lm.supervised_step(state, batch, config=CONFIG, optimizer=optax.sgd(0.1), accumulate=3)
    with pytest.raises(ValueError, match="'layers/nothing/\\*': matches no matrix"):
        lm.init_lora(key, params, lm.LoraConfig(patterns=("layers/nothing/*",)))
    with pytest.raises(ValueError, match="text=3: holds fewer tokens than one row of 4"):
        lm.text_rows([1, 2, 3], 4)
