import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import distributions


def test_masked_statistics_ignore_what_is_masked_even_nan(key):
    x = np.array(jax.random.normal(key, (4, 6)))
    mask = np.array(jax.random.bernoulli(key, 0.6, (4, 6)))
    dirty = jnp.asarray(np.where(mask, x, np.nan))
    assert float(distributions.masked_mean(dirty, mask)) == pytest.approx(x[mask].mean(), abs=1e-6)
    variance = distributions.masked_variance(dirty, mask, unbiased=True)
    assert float(variance) == pytest.approx(x[mask].var(ddof=1), abs=1e-6)
    white = np.asarray(distributions.masked_whiten(dirty, mask))
    assert white[mask].mean() == pytest.approx(0, abs=1e-6) and white[mask].std(ddof=1) == pytest.approx(1, abs=1e-5)
    assert np.all(white[~mask] == 0)


def test_empty_masks_give_zero():
    x, mask = jnp.ones(3), jnp.zeros(3, bool)
    assert float(distributions.masked_mean(x, mask)) == 0 and float(distributions.masked_variance(x, mask)) == 0
