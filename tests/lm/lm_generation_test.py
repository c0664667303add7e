import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm
from jaxrl_suite.testing import assert_close

CONFIG = lm.LanguageModelConfig(
    vocab_size=23, width=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=24, init_std=0.4,
    sliding_window=4, first_window_layer=1, qkv_bias=True,
)  # fmt: skip
SPARSE = CONFIG.replace(num_experts=4, expert_width=8, shared_width=8, shared_gate=True, sliding_window=None)
PROMPTS, MASK = lm.left_pad([[3, 4, 5, 6], [7, 8], [1, 2, 9]], length=5)
IDS = np.array([[0, 0], [0, 1], [5, 0]])
SAMPLING = lm.Sampling(max_tokens=8, stop_tokens=(11, 12), temperature=1.2, top_p=0.95, pad_token=22)


@functools.cache
def setup(config=CONFIG):
    model = lm.LanguageModel(config)
    return model, lm.init_params(jax.random.key(3), config)


@functools.cache
def base():
    model, params = setup()
    return lm.generate(jax.random.key(1), model, params, PROMPTS, MASK, row_ids=IDS, sampling=SAMPLING)


def rows_equal(actual, expected):
    np.testing.assert_array_equal(actual.tokens, expected.tokens)
    np.testing.assert_array_equal(actual.mask, expected.mask)
    np.testing.assert_allclose(actual.log_probs, expected.log_probs, atol=2e-5)


def test_permuting_padding_and_splitting_the_batch_changes_no_row():
    model, params = setup()
    order = np.array([2, 0, 1])
    wider = np.pad(PROMPTS, ((0, 0), (3, 0))), np.pad(MASK, ((0, 0), (3, 0)))
    run = functools.partial(lm.generate, jax.random.key(1), model, params, sampling=SAMPLING)
    expected = base()
    permuted = run(PROMPTS[order], MASK[order], row_ids=IDS[order])
    rows_equal(permuted, jax.tree.map(lambda x: x[order], expected))
    rows_equal(run(*wider, row_ids=IDS), expected)
    rows_equal(run(PROMPTS[1:2], MASK[1:2], row_ids=IDS[1:2]), jax.tree.map(lambda x: x[1:2], expected))


def test_sample_number_changes_the_row():
    model, params = setup()
    row = int(np.asarray(base().mask).sum(axis=1).argmax())  # a row that does not end at once
    prompts, mask = np.repeat(PROMPTS[row : row + 1], 3, 0), np.repeat(MASK[row : row + 1], 3, 0)
    ids = np.stack([IDS[row], IDS[row] + np.array([0, 7]), IDS[row]])
    out = lm.generate(jax.random.key(1), model, params, prompts, mask, row_ids=ids, sampling=SAMPLING)
    assert out.tokens[0].tolist() == out.tokens[2].tolist() == base().tokens[row].tolist()
    assert out.tokens[0].tolist() != out.tokens[1].tolist()


@pytest.mark.parametrize("options", [{"loop": "scan"}, {"unrolled": False}])
def test_forms_of_the_loop_agree(options):
    model, params = setup()
    out = lm.generate(jax.random.key(1), model, params, PROMPTS, MASK, row_ids=IDS, sampling=SAMPLING, **options)
    rows_equal(out, base())


def test_mask_ends_with_the_stop_token_and_padding_follows():
    out = base()
    for tokens, mask in zip(np.asarray(out.tokens), np.asarray(out.mask)):
        stops = np.flatnonzero(np.isin(tokens, SAMPLING.stop_tokens))
        length = stops[0] + 1 if len(stops) else len(tokens)
        assert mask.tolist() == [t < length for t in range(len(tokens))]
        assert (tokens[length:] == SAMPLING.pad_token).all()
    assert not np.asarray(out.mask).all()  # the example does contain a row that ends early


@pytest.mark.parametrize("config", [CONFIG, SPARSE], ids=["dense", "sparse"])
def test_log_probs_equal_teacher_forcing_of_the_sampling_law(config):
    """What generate reports is what token_log_probs computes from the finished rows: the ratio is one."""
    model, params = setup(config)
    sampling = lm.Sampling(max_tokens=6, temperature=0.7)
    out = lm.generate(jax.random.key(4), model, params, PROMPTS, MASK, row_ids=IDS, sampling=sampling)
    tokens = np.concatenate([PROMPTS, out.tokens], axis=1)
    segments = np.concatenate([MASK, out.mask], axis=1).astype(np.int32)
    forced = lm.token_log_probs(model, params, jnp.asarray(tokens), jnp.asarray(segments), temperature=0.7)
    assert_close(out.log_probs, forced[:, PROMPTS.shape[1] :], "reference", scale=3)


def test_greedy_is_the_argmax_of_the_full_forward_pass():
    model, params = setup()
    sampling = lm.Sampling(max_tokens=5, greedy=True)
    out = lm.generate(
        jax.random.key(0), model, params, PROMPTS[:1, 1:], MASK[:1, 1:], row_ids=IDS[:1], sampling=sampling
    )
    tokens = PROMPTS[:1, 1:]
    for step in range(5):
        best = int(model.apply({"params": params}, jnp.asarray(tokens))[0, -1].argmax())
        assert best == int(out.tokens[0, step])
        tokens = np.concatenate([tokens, [[best]]], axis=1)
    assert (np.asarray(out.log_probs) == 0).all()


def test_scan_form_is_differentiable_and_its_gradient_is_teacher_forcing():
    """The gradient of the log-probabilities of the drawn tokens equals that of scoring them afterwards."""
    model, params = setup()
    sampling = lm.Sampling(max_tokens=4)

    def drawn(params):
        out = lm.generate(
            jax.random.key(4), model, params, PROMPTS, MASK, row_ids=IDS, sampling=sampling, loop="scan", unrolled=False
        )
        return out.log_probs.sum(), out

    (_, out), gradient = jax.value_and_grad(drawn, has_aux=True)(params)
    tokens = jnp.concatenate([PROMPTS, out.tokens], axis=1)
    segments = jnp.concatenate([MASK, out.mask], axis=1).astype(jnp.int32)
    forced = jax.jit(jax.grad(lambda p: lm.token_log_probs(model, p, tokens, segments)[:, PROMPTS.shape[1] :].sum()))(
        params
    )
    assert_close(gradient, forced, "reference", scale=20)


def test_sequence_law_steps_equal_the_forward_pass():
    model, params = setup()
    law = lm.sequence_law(model, max_tokens=4)
    state = jax.jit(law.init)(params, PROMPTS, MASK)
    step = jax.jit(law.step)
    tokens = PROMPTS
    for t in range(3):
        new = np.array([t, t + 5, 2], np.int32)
        state, logits = step(params, state, new)
        tokens = np.concatenate([tokens, new[:, None]], axis=1)
    segments = np.pad(MASK, ((0, 0), (0, 3)), constant_values=True).astype(np.int32)
    expected = lm.apply(params, jnp.asarray(tokens), config=model.config, segments=jnp.asarray(segments))[:, -1]
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
    model, params = setup()
    arguments = {"prompts": PROMPTS, "mask": MASK, "row_ids": IDS} | change
    with pytest.raises(ValueError, match=message):
        lm.generate(jax.random.key(0), model, params, **arguments, sampling=SAMPLING)
