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
    law = distributions.categorical(logits=logits)
    one = jax.vmap(lambda k: jax.tree.map(lambda x: x[0], distributions.draw_token(k[None], logits[None])))
    draws, log_probs = (np.asarray(x) for x in jax.jit(one)(jax.random.split(key, 20_000)))
    probs = np.asarray(law.probs, np.float64)
    assert not np.any(draws == size // 2)
    np.testing.assert_allclose(log_probs, np.asarray(jax.nn.log_softmax(logits))[draws], atol=1e-5)
    cells = np.minimum((np.cumsum(probs / probs.sum()) * 7).astype(int), 6)
    counts, mass = np.bincount(cells[draws], minlength=7), np.bincount(cells, probs, minlength=7)
    used = mass > 0
    statistic = np.sum((counts - 20_000 * mass)[used] ** 2 / (20_000 * mass[used]))
    assert statistic < 27.9  # 99.99 % point of chi-square with 6 degrees of freedom: 27.86


def test_draw_token_rows_depend_on_their_own_key_alone(key):
    keys, logits = jax.random.split(key, 5), jax.random.normal(key, (5, 40))
    drawn = distributions.draw_token(keys, logits)
    order = jnp.array([3, 0, 4, 1, 2])
    assert_close(distributions.draw_token(keys[order], logits[order]), tuple(part[order] for part in drawn))


def test_draw_token_of_a_point_mass(key):
    logits = jnp.full((50, 1000), -jnp.inf).at[:, 613].set(0.0)
    drawn, log_probs = distributions.draw_token(jax.random.split(key, 50), logits)
    assert set(np.asarray(drawn).tolist()) == {613}
    np.testing.assert_allclose(log_probs, 0.0, atol=1e-6)


def test_nothing_without_mass_is_drawn():
    """Running sums taken in parallel rise up to rounding only: uniforms at which they seem to rise at an empty entry,
    and the largest uniform there is."""
    generator = np.random.default_rng(0)
    mass = generator.uniform(size=(300, 64)) * (generator.uniform(size=(300, 64)) < 0.6)
    mass = jnp.asarray(mass.astype(np.float32))
    sums = np.asarray(jax.jit(lambda x: jnp.cumsum(x, axis=-1))(mass))
    shares = sums / sums[:, -1:]
    steps = np.float32(2.0**-24) * np.arange(-4, 5, dtype=np.float32)
    uniforms = np.clip(shares[:, :, None] + steps, 0, np.float32(1 - 2.0**-24)).astype(np.float32).reshape(300, -1)
    index = jax.jit(jax.vmap(jax.vmap(distributions.invert_cdf, (None, 0))))(mass, uniforms)
    assert float(jnp.min(jnp.take_along_axis(mass, index, axis=1))) > 0
