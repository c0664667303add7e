import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm
from jaxrl_suite.testing import assert_close
from tests.reference import lm_decoder

CONFIG = lm.LanguageModelConfig(
    vocab_size=23, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=24, init_std=0.4,
    sliding_window=4, qkv_bias=True,
)  # fmt: skip
SPARSE = CONFIG.replace(num_experts=4, expert_width=8, shared_width=8, shared_gate=True, sliding_window=None)
PROMPTS, MASK = lm.left_pad([[3, 4, 5, 6], [7, 8], [1, 2, 9]], length=5)
IDS = np.array([[0, 0], [0, 1], [5, 0]])
SAMPLING = lm.Sampling(max_tokens=8, stop_tokens=(13, 12), temperature=1.2, pad_token=22)


@functools.cache
def setup(config=CONFIG):
    return lm.LanguageModel(config), lm_decoder.parameters(config, seed=3)


def run(prompts=PROMPTS, mask=MASK, row_ids=IDS, **options):
    model, params = setup()
    return lm.generate(
        jax.random.key(1), model, params, prompts, mask, row_ids=row_ids, **{"sampling": SAMPLING} | options
    )


@functools.cache
def base():
    return run()


def rows_equal(actual, expected):
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.mask, expected.mask)
    np.testing.assert_allclose(actual.log_probs, expected.log_probs, atol=2e-5)


def test_permuting_padding_and_splitting_the_batch_changes_no_row():
    order = np.array([2, 0, 1])
    permuted = run(PROMPTS[order], MASK[order], IDS[order])
    rows_equal(permuted, jax.tree.map(lambda x: x[order], base()))
    wider = np.pad(PROMPTS, ((0, 0), (3, 0))), np.pad(MASK, ((0, 0), (3, 0)))
    for cut in (slice(0, 1), slice(2, 3)):  # each row in a batch of its own, with more padding
        alone = run(wider[0][cut], wider[1][cut], IDS[cut])
        rows_equal(alone, jax.tree.map(lambda x, cut=cut: x[cut], base()))


def test_sample_number_changes_the_row():
    row = int(np.asarray(base().mask).sum(axis=1).argmax())  # a row that does not end at once
    prompts, mask = np.repeat(PROMPTS[row : row + 1], 3, 0), np.repeat(MASK[row : row + 1], 3, 0)
    ids = np.stack([IDS[row], IDS[row] + np.array([0, 7]), IDS[row]])
    out = run(prompts, mask, ids)
    assert out.tokens[0].tolist() == out.tokens[2].tolist() == base().tokens[row].tolist()
    assert out.tokens[0].tolist() != out.tokens[1].tolist()


def test_mask_ends_with_the_stop_token_and_padding_follows():
    out = base()
    for tokens, mask in zip(np.asarray(out.tokens), np.asarray(out.mask)):
        stops = np.flatnonzero(np.isin(tokens, SAMPLING.stop_tokens))
        length = stops[0] + 1 if len(stops) else len(tokens)
        assert mask.tolist() == [t < length for t in range(len(tokens))]
        assert (tokens[length:] == SAMPLING.pad_token).all()
    lengths = np.asarray(out.mask).sum(axis=1)
    assert lengths.min() < lengths.max() == SAMPLING.max_tokens  # the example holds a row that ends early, and another


def test_stream_draws_the_tokens_of_generate():
    model, params = setup()
    for row, prompt in enumerate(([3, 4, 5, 6], [7, 8], [1, 2, 9])):
        ids = tuple(IDS[row])
        streamed = list(lm.stream(jax.random.key(1), model, params, prompt, sampling=SAMPLING, row_id=ids, pad_to=8))
        assert streamed == np.asarray(base().tokens[row])[np.asarray(base().mask[row])].tolist()


def test_scan_form_agrees_and_its_gradient_is_teacher_forcing():
    """The stacked scan form draws what the unrolled while form draws, reports what scoring the finished rows gives
    (the ratio is one), and the gradient of its log-probabilities is that of scoring."""
    model, params = setup()

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def drawn(params):
        out = lm.generate(
            jax.random.key(1), model, params, PROMPTS, MASK, row_ids=IDS, sampling=SAMPLING, loop="scan", unrolled=False
        )
        return out.log_probs.sum(), out

    (_, out), gradient = drawn(params)
    rows_equal(out, base())
    tokens = np.concatenate([PROMPTS, out.tokens], axis=1)
    segments = np.concatenate([MASK, out.mask], axis=1).astype(np.int32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def scored(params):
        scores = lm.token_log_probs(model, params, tokens, segments, temperature=SAMPLING.temperature)
        scores = jnp.where(out.mask, scores[:, PROMPTS.shape[1] :], 0)
        return scores.sum(), scores

    (_, scores), expected = scored(params)
    assert_close(out.log_probs, scores, "reference", scale=3)
    assert_close(gradient, expected, "reference", scale=30)


@pytest.mark.parametrize("stops", [SAMPLING.stop_tokens, tuple(range(23))])
def test_kept_laws_give_the_gradient_without_logits(stops, x64):
    """Prompts of different lengths, rows that end early, and steps that nobody takes; in float64, against chunks."""
    model, params = setup()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    sampling = SAMPLING.replace(stop_tokens=stops)
    early = lm.early_gradient(model, temperature=sampling.temperature)
    out, laws = early.generate(jax.random.key(1), params, PROMPTS, MASK, IDS, sampling)
    assert laws.powers.shape == (8, 3, 23)
    written = np.asarray(laws.total > 0).all(axis=1)
    assert written.sum() == (1 if len(stops) == 23 else 8)
    rows_equal(out, lm.policy(model).generate(jax.random.key(1), params, PROMPTS, MASK, IDS, sampling))
    tokens = np.concatenate([PROMPTS, out.tokens], axis=1)
    segments = np.concatenate([MASK, out.mask], axis=1).astype(np.int32)
    weights = jax.random.normal(jax.random.key(2), out.tokens.shape)

    @jax.jit
    def graded(params, laws):
        def score(params):
            return early.weighted_log_probs(params, tokens, segments, weights, start=PROMPTS.shape[1], laws=laws)

        return jax.value_and_grad(score, has_aux=True)(params)

    (total, scores), gradient = graded(params, laws)
    (chunked_total, chunked_scores), chunked = graded(params, None)
    np.testing.assert_allclose(total, chunked_total, rtol=1e-12)
    np.testing.assert_allclose(scores, chunked_scores, atol=1e-12)
    np.testing.assert_allclose(scores, out.log_probs, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradient, chunked)
    value = early.weighted_log_probs(params, tokens, segments, weights, start=PROMPTS.shape[1], laws=laws)[0]
    np.testing.assert_allclose(value, total, rtol=1e-12)  # the form that is not differentiated


def test_laws_are_written_over_those_of_an_earlier_rollout(x64):
    """Same tokens, same gradient, though steps that nobody takes keep the old powers; laws that do not fit stay."""
    model, params = setup()
    early = lm.early_gradient(model, temperature=SAMPLING.temperature)
    ending = SAMPLING.replace(stop_tokens=tuple(range(23)))  # every row ends at its first token

    def rolled(sampling, **options):
        return early.generate(jax.random.key(1), params, PROMPTS, MASK, IDS, sampling, **options)

    def gradient(out, laws):
        tokens, real = (np.concatenate(pair, axis=1) for pair in ((PROMPTS, out.tokens), (MASK, out.mask)))

        def score(params):
            options = {"start": PROMPTS.shape[1], "laws": laws}
            return early.weighted_log_probs(params, tokens, real.astype(np.int32), out.log_probs, **options)[0]

        return jax.jit(jax.grad(score))(params)

    (_, before), (expected, fresh) = rolled(SAMPLING), rolled(ending)
    actual, laws = rolled(ending, spare=before)
    assert before.powers.is_deleted()
    rows_equal(actual, expected)
    assert (np.asarray(laws.powers)[1:] > 0).any() and (np.asarray(fresh.powers)[1:] == 0).all()
    np.testing.assert_array_equal(laws.total, fresh.total)
    jax.tree.map(np.testing.assert_array_equal, gradient(actual, laws), gradient(expected, fresh))
    rolled(ending.replace(max_tokens=4), spare=laws)
    assert not laws.powers.is_deleted()


def test_laws_are_kept_only_where_they_fit_and_are_the_policy_s():
    model, params = setup()

    def kept(sampling=SAMPLING, keep_bytes=8 * 3 * 23 * 4):
        early = lm.early_gradient(model, temperature=1.2, keep_bytes=keep_bytes)
        out, laws = jax.eval_shape(lambda p: early.generate(jax.random.key(1), p, PROMPTS, MASK, IDS, sampling), params)
        assert out.tokens.shape == (3, 8)
        return laws is not None

    assert kept()
    assert not kept(keep_bytes=8 * 3 * 23 * 4 - 1)
    for change in ({"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"greedy": True}):
        assert not kept(SAMPLING.replace(**change))


def test_greedy_is_the_argmax_of_the_full_forward_pass():
    model, params = setup()
    sampling = lm.Sampling(max_tokens=6, greedy=True)
    out = run(PROMPTS[:1, 1:], MASK[:1, 1:], IDS[:1], sampling=sampling)
    tokens = np.concatenate([PROMPTS[:1, 1:], out.tokens], axis=1)
    logits = jax.jit(lambda p: model.apply({"params": p}, tokens))(params)
    np.testing.assert_array_equal(logits[:, 3:-1].argmax(axis=-1), out.tokens)
    assert (np.asarray(out.log_probs) == 0).all()


@pytest.mark.parametrize(
    "config", [CONFIG.replace(first_window_layer=1), SPARSE.replace(num_layers=1)], ids=["mixed_windows", "sparse"]
)
def test_sequence_law_steps_equal_the_forward_pass(config):
    model, params = setup(config)
    law = lm.sequence_law(model, max_tokens=4)
    state = jax.jit(law.init)(params, PROMPTS, MASK)
    step = jax.jit(law.step)
    tokens = PROMPTS
    for t in range(3):
        new = np.array([t, t + 5, 2], np.int32)
        state, logits = step(params, state, new)
        tokens = np.concatenate([tokens, new[:, None]], axis=1)
    segments = np.pad(MASK, ((0, 0), (0, 3)), constant_values=True).astype(np.int32)
    expected = jax.jit(lambda p: lm.apply(p, tokens, config=config, segments=segments)[:, -1])(params)
    assert_close(logits, expected, "reference", scale=3)
    assert_close(law.logits(state), logits, "exact")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": MASK[:, ::-1]}, "padded on the left"),
        ({"mask": MASK[:, :3]}, "mask=.*must have shape"),
        ({"row_ids": np.arange(2)}, "row_ids=.*must have shape"),
        ({"prompts": PROMPTS + 20}, "below the vocabulary of 23"),
    ],
)
def test_bad_prompts_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        run(**change)


def test_streams_refuse_what_generation_refuses(key):
    model, params = setup(CONFIG)
    for prompt, message in (([400], "below the vocabulary of 23"), ([], "every prompt needs a token")):
        with pytest.raises(ValueError, match=message):
            next(lm.stream(key, model, params, prompt, sampling=lm.Sampling(max_tokens=2)))
