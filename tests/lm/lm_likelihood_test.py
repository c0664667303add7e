import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm
from jaxrl_suite.testing import assert_close
from tests.reference import lm_decoder

CONFIG = lm.LanguageModelConfig(
    vocab_size=19, width=12, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, ffn_width=10, init_std=0.3
)
SEGMENTS = jnp.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 0]], jnp.int32)


def by_full_logits(params, tokens, segments):
    logits = lm.apply(params, tokens, config=CONFIG, segments=segments)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.pad(jnp.where(same, picked, 0.0), ((0, 0), (1, 0)))


def test_chunked_log_probs_and_gradients_equal_full_logits(key):
    """Whole and in chunks; the first token of a segment and padding score zero."""
    params = lm_decoder.parameters(CONFIG)
    tokens = jax.random.randint(key, (2, 7), 0, 19)
    weights = jax.random.normal(key, (2, 7))
    forms = [lambda p: by_full_logits(p, tokens, SEGMENTS)]
    for chunk in (None, 3):
        forms.append(lambda p, c=chunk: lm.log_probs(p, tokens, SEGMENTS, config=CONFIG, chunk=c))

    def value(form):
        def total(params):
            scores = form(params)
            return jnp.sum(weights * scores), scores

        return jax.value_and_grad(total, has_aux=True)

    expected, *others = jax.jit(lambda p: [value(form)(p) for form in forms])(params)
    for actual in others:
        assert_close(actual, expected, "reference")
    zero = np.array([[1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 1]], bool)
    np.testing.assert_array_equal(np.asarray(others[0][0][1]) == 0, zero)


def test_scores_from_a_token_on_are_the_end_of_all_scores(key):
    """A prompt is read and not scored: values and gradients are those of the slice; the table meets fewer rows."""
    params = lm_decoder.parameters(CONFIG)
    tokens = jax.random.randint(key, (2, 7), 0, 19)
    weights = jax.random.normal(key, (2, 3))

    def late(p):
        return lm.log_probs(p, tokens, SEGMENTS, config=CONFIG, start=4)

    def cut(p):
        return lm.log_probs(p, tokens, SEGMENTS, config=CONFIG)[:, 4:]

    def graded(form):
        return jax.value_and_grad(lambda p: jnp.sum(weights * form(p)))

    actual, expected = jax.jit(lambda p: (graded(late)(p), graded(cut)(p)))(params)
    assert_close(actual, expected, "reference")
    assert "f32[6,19]" in str(jax.make_jaxpr(late)(params)) and "f32[14,19]" not in str(jax.make_jaxpr(late)(params))
    with pytest.raises(ValueError, match="start"):
        lm.log_probs(params, tokens, config=CONFIG, start=7)


def test_logits_of_all_tokens_never_exist():
    """No array of the compiled gradient holds tokens times vocabulary."""
    config = CONFIG.replace(vocab_size=5000)
    params = jax.eval_shape(lambda k: lm.init_params(k, config), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    gradient = jax.grad(lambda p, t: lm.log_probs(p, t, config=config, chunk=64).sum())
    temporary = jax.jit(gradient).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 512 * 5000 * 4 / 2


def test_weighted_sum_with_early_gradient_equals_autodiff(key):
    h, table = jax.random.normal(key, (11, 6)), jax.random.normal(jax.random.fold_in(key, 1), (17, 6))
    tokens = jax.random.randint(key, (11,), 0, 17)
    weights = jax.random.uniform(key, (11,))

    def plain(h, table, weights):
        return jnp.sum(weights * jnp.take_along_axis(jax.nn.log_softmax(h @ table.T), tokens[:, None], 1)[:, 0])

    def early(h, table, weights):
        return lm.weighted_log_prob(h, table, tokens, weights, chunk=4)

    expected = jax.value_and_grad(lambda *a: 3 * plain(*a), argnums=(0, 1, 2))(h, table, weights)
    actual = jax.jit(jax.value_and_grad(lambda *a: 3 * early(*a), argnums=(0, 1, 2)))(h, table, weights)
    assert_close(actual, expected, "reference")
    assert_close(early(h, table, weights), plain(h, table, weights), "reference")


def test_weighted_scores_of_a_model_equal_autodiff(key):
    """Segments, a start, a temperature and a chunk that does not divide the rows."""
    params = lm_decoder.parameters(CONFIG)
    tokens = jax.random.randint(key, (2, 7), 0, 19)
    weights = jax.random.normal(key, (2, 5))
    options = {"config": CONFIG, "temperature": 0.7, "chunk": 4, "start": 2}

    def plain(params):
        scores = lm.log_probs(params, tokens, SEGMENTS, **options)
        return jnp.sum(weights * scores), scores

    def early(params):
        return lm.weighted_log_probs(params, tokens, SEGMENTS, weights, **options)

    graded = [jax.jit(jax.value_and_grad(form, has_aux=True))(params) for form in (early, plain)]
    assert_close(*graded, "reference")
    assert_close(early(params), plain(params), "reference")


def test_gradient_in_float16_is_scaled_before_it_is_rounded():
    """The sum over 20,000 tokens is beyond float16, their mean is not."""
    h, table = jnp.full((20_000, 2), 8.0, jnp.float16), jnp.zeros((2, 2), jnp.float16)
    tokens, weights = jnp.zeros(20_000, jnp.int32), jnp.ones(20_000)
    gradient = jax.jit(jax.grad(lambda t: lm.weighted_log_prob(h, t, tokens, weights, chunk=5_000) / 20_000))(table)
    np.testing.assert_allclose(gradient, [[4.0, 4.0], [-4.0, -4.0]], rtol=1e-3)


@pytest.mark.parametrize("chunk", [None, 4])
def test_gradient_on_the_way_in_bfloat16(key, chunk):
    """With one chunk XLA's CPU compiler left narrow products that it cannot run: whole values are read here."""
    h, table = (jax.random.normal(jax.random.fold_in(key, n), (n, 6)).astype(jnp.bfloat16) for n in (11, 17))
    tokens, weights = jax.random.randint(key, (11,), 0, 17), jax.random.uniform(key, (11,))

    def graded(h, table):
        early = jax.value_and_grad(lambda *a: lm.weighted_log_prob(*a, tokens, weights, chunk=chunk), argnums=(0, 1))
        return jax.tree.map(np.asarray, jax.jit(early)(h, table))

    value, gradients = graded(h, table)
    expected, others = graded(h.astype(jnp.float32), table.astype(jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-2)
    for ours, theirs in zip(gradients, others, strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=3e-2 * np.abs(theirs).max())
