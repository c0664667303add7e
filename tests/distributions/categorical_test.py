import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import distributions
from jaxrl_suite.testing import assert_close


def test_the_door_gives_distrax(key):
    import distrax

    law = distributions.categorical(logits=jnp.zeros(4))
    assert isinstance(law, distrax.Categorical)
    assert isinstance(distributions.greedy(jnp.array([0.0, 1.0])), distrax.Distribution)
    assert float(distributions.epsilon_greedy(jnp.array([0.0, 1.0]), 0.2).prob(1)) == pytest.approx(0.9)
    assert float(law.entropy()) == pytest.approx(np.log(4))
    with pytest.raises(ValueError, match="exactly one of logits and probs"):
        distributions.categorical(logits=jnp.zeros(2), probs=jnp.ones(2) / 2)


def test_softmax_policy_sweeps_its_temperature():
    preferences = jnp.array([0.0, 1.0])
    probs = jax.vmap(lambda t: distributions.softmax_policy(preferences, t).probs)(jnp.array([0.5, 1.0]))
    assert_close(probs[:, 1], jax.nn.sigmoid(jnp.array([2.0, 1.0])), "reference")


@pytest.mark.parametrize("size", [7, 300, 49152])
def test_draw_token_follows_the_law_of_distrax(key, size):
    """Chi-square of 20,000 draws, grouped into 7 cells of about equal mass, against the exact probabilities."""
    logits = 2.0 * jax.random.normal(jax.random.fold_in(key, size), (size,))
    logits = logits.at[size // 2].set(-jnp.inf)
    draws = jax.jit(jax.vmap(distributions.draw_token, (0, None)))(jax.random.split(key, 20_000), logits)
    probs = np.asarray(distributions.categorical(logits=logits).probs, np.float64)
    assert not np.any(np.asarray(draws) == size // 2)
    cells = np.minimum((np.cumsum(probs / probs.sum()) * 7).astype(int), 6)
    counts, mass = np.bincount(cells[np.asarray(draws)], minlength=7), np.bincount(cells, probs, minlength=7)
    used = mass > 0
    statistic = np.sum((counts - 20_000 * mass)[used] ** 2 / (20_000 * mass[used]))
    assert statistic < 27.9  # 99.99 % point of chi-square with 6 degrees of freedom: 27.86


def test_draw_token_rows_depend_on_their_own_key_alone(key):
    keys, logits = jax.random.split(key, 5), jax.random.normal(key, (5, 40))
    drawn = distributions.draw_token(keys, logits, block=8)
    single = jnp.stack([distributions.draw_token(keys[i], logits[i], block=8) for i in range(5)])
    assert_close(drawn, single)
    order = jnp.array([3, 0, 4, 1, 2])
    assert_close(distributions.draw_token(keys[order], logits[order], block=8), drawn[order])


def test_draw_token_of_a_point_mass(key):
    logits = jnp.full(1000, -jnp.inf).at[613].set(0.0)
    drawn = jax.vmap(distributions.draw_token, (0, None))(jax.random.split(key, 50), logits)
    assert set(np.asarray(drawn).tolist()) == {613}
