"""Samples that share a prompt: read once, they draw and score as rows of their own do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm
from jaxrl_suite.testing import assert_close
from tests.reference import lm_decoder

CONFIG = lm.LanguageModelConfig(
    vocab_size=23, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=24, init_std=0.4,
    sliding_window=4, first_window_layer=1,
)  # fmt: skip
GROUP, START = 3, 5
PROMPTS, MASK = (np.repeat(x, GROUP, axis=0) for x in lm.left_pad([[3, 4, 5, 6, 1], [7, 8]]))
IDS = np.stack([np.arange(6) // GROUP, np.arange(6) % GROUP], axis=1)


def rows(key, length):
    """Tokens and segments [6, START + length]: prompts of two lengths, and completions that end early."""
    rest = np.asarray(jax.random.randint(key, (6, length), 0, 23))
    ends = np.array([length, 1, max(1, length - 2), length, length, 0])
    mask = np.concatenate([MASK, np.arange(length)[None] < ends[:, None]], axis=1)
    return np.concatenate([PROMPTS, rest], axis=1), mask.astype(np.int32)


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (7, {}),
        (1, {}),
        (7, {"sliding_window": None}),
        (7, {"first_window_layer": 9}),
        (7, {"first_window_layer": 0, "num_experts": 4, "expert_width": 8, "shared_width": 8, "shared_gate": True}),
    ],
)
def test_scores_and_gradient_are_those_of_separate_rows(length, options, key, x64):
    """Windows in some layers, in none (two ways) and in all; experts; a single token a sample."""
    config = CONFIG.replace(**options)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), lm_decoder.parameters(config, seed=3))
    tokens, segments = rows(key, length)
    weights = jax.random.normal(key, (6, length), jnp.float64)

    def graded(group):
        def score(params):
            return lm.weighted_log_probs(
                params, tokens, segments, weights, config=config, start=START, temperature=0.8, group=group
            )

        return jax.value_and_grad(score, has_aux=True)(params)

    actual, expected = jax.jit(lambda: (graded(GROUP), graded(1)))()
    assert_close(actual, expected, "reference")
    assert float(jnp.abs(actual[0][1]).sum()) > 0


def test_a_prompt_is_read_once():
    """The body's products take 2 prompts of 5 tokens and 6 samples of 6, not 6 rows of 12."""
    params = lm_decoder.parameters(CONFIG, seed=3)
    tokens, segments = rows(jax.random.key(0), 7)
    text = {
        group: str(jax.make_jaxpr(
            lambda p, group=group: lm.weighted_log_probs(
                p, tokens, segments, jnp.ones((6, 7)), config=CONFIG, start=START, group=group
            )
        )(params))
        for group in (1, GROUP)
    }  # fmt: skip
    assert "f32[46,24]" in text[GROUP] and "f32[72,24]" not in text[GROUP]
    assert "f32[72,24]" in text[1]


@pytest.mark.parametrize("unrolled", [True, False])
def test_samples_are_those_of_separate_rows(unrolled, x64):
    model = lm.LanguageModel(CONFIG)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), lm_decoder.parameters(CONFIG, seed=3))
    sampling = lm.Sampling(max_tokens=6, stop_tokens=(13, 12), temperature=1.2)

    def draw(group):
        return lm.generate(
            jax.random.key(1), model, params, PROMPTS, MASK, row_ids=IDS, sampling=sampling, unrolled=unrolled,
            group=group,
        )  # fmt: skip

    actual, expected = draw(GROUP), draw(1)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.mask, expected.mask)
    np.testing.assert_allclose(actual.log_probs, expected.log_probs, atol=1e-12)
    assert len({tuple(row) for row in np.asarray(actual.tokens)}) > 2  # samples of a prompt differ


def test_groups_that_do_not_fit_are_refused():
    model, params = lm.LanguageModel(CONFIG), lm_decoder.parameters(CONFIG, seed=3)
    early, sampling = lm.early_gradient(model), lm.Sampling(max_tokens=2)

    def draw(group, prompts=PROMPTS):
        early.generate(jax.random.key(1), params, prompts, MASK, IDS, sampling, group=group)

    for group in (4, 0):
        with pytest.raises(ValueError, match="must divide the 6 rows"):
            draw(group)
    with pytest.raises(ValueError, match="equal prompts"):
        draw(2)
    tokens, segments = rows(jax.random.key(0), 3)
    for start, group, message in ((0, 3, "start"), (START, 4, "group")):
        with pytest.raises(ValueError, match=message):
            early.weighted_log_probs(params, tokens, segments, jnp.ones((6, 8 - start)), start=start, group=group)
