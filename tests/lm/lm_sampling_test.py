import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import lm
from jaxrl_suite.testing import assert_close


def law_by_sorting(logits, sampling):
    """One row, by sorting: NumPy oracle of the truncations."""
    z = np.asarray(logits, np.float64) / sampling.temperature
    if sampling.top_k:
        z = np.where(z >= np.sort(z)[::-1][sampling.top_k - 1], z, -np.inf)
    p = np.exp(z - z.max())
    p /= p.sum()
    if sampling.top_p < 1:
        order = np.sort(p)[::-1]
        threshold = order[np.searchsorted(np.cumsum(order), sampling.top_p)]
        p = np.where(p >= threshold, p, 0)
    p = np.where(p >= sampling.min_p * p.max(), p, 0)
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.1, "temperature": 1.7},
    ],
)
def test_law_equals_sorting(options, key):
    sampling = lm.Sampling(**options)
    logits = 2 * jax.random.normal(key, (6, 50))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        law = jax.nn.softmax(jax.jit(lambda x: lm.sampling_logits(x, sampling))(logits), axis=-1)
    for row in range(6):
        assert_close(np.asarray(law[row]), law_by_sorting(logits[row], sampling).astype(np.float32), "reference")


def test_ties_with_the_last_kept_token_are_kept():
    law = lm.sampling_logits(jnp.array([3.0, 1.0, 1.0, 0.0]), lm.Sampling(top_k=2))
    assert jnp.isfinite(law).tolist() == [True, True, True, False]


def test_greedy_law_is_a_point_mass():
    law = lm.sampling_logits(jnp.array([[1.0, 4.0, 4.0]]), lm.Sampling(greedy=True))
    assert jax.nn.softmax(law).tolist() == [[0.0, 1.0, 0.0]]


def test_draws_follow_the_law_and_report_it(key):
    """Chi-square of 20,000 draws over 29 tokens, some impossible; a wrong law of the same size is rejected."""
    logits = jax.random.normal(key, (29,)).at[jnp.array([0, 13, 28])].set(-jnp.inf)
    n = 20_000
    keys = jax.random.split(jax.random.fold_in(key, 1), n)
    tokens, log_probs = jax.jit(lm.draw)(keys, jnp.broadcast_to(logits, (n, 29)))
    law = np.asarray(jax.nn.softmax(logits), np.float64)
    counts = np.bincount(tokens, minlength=29)
    assert (counts[law == 0] == 0).all()
    assert_close(log_probs, jax.nn.log_softmax(logits)[tokens], "reference")

    def chi_square(p):
        real = p > 0
        return (((counts - n * p) ** 2)[real] / (n * p[real])).sum()

    assert chi_square(law) < 52.6  # 25 degrees of freedom, one in a thousand
    wrong = law**0.9 / (law**0.9).sum()
    assert chi_square(wrong) > 52.6


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"max_tokens": 0}])
def test_bad_sampling_is_named(options):
    with pytest.raises(ValueError, match=f"Sampling.{next(iter(options))}"):
        lm.Sampling(**options)
