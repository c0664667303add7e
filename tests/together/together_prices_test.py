"""A message at a price: the exact game without a growing program, and the best law of a price in text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.together import priced_policies as priced
from experiments.together.message_at_a_price import MessageAtAPriceConfig, gain_at_equal_reward
from jaxrl_suite import pareto
from jaxrl_suite.coupling.exact_games import enumerate_game
from jaxrl_suite.envs.rate_grid import RateGridConfig, rate_grid

SYMBOLS, LENGTH = 5, 6


@functools.cache
def table():
    logits = 1.5 * jax.random.normal(jax.random.key(0), (SYMBOLS * SYMBOLS, SYMBOLS))
    return jax.nn.log_softmax(logits, axis=-1)


def test_scan_is_the_enumeration():
    """Values and gradient of the library's growing tree."""
    grid = rate_grid(RateGridConfig(layout=("S.", ".G"), noise=0.0, horizon=2))
    successors = grid.mdp.successors[:, :, 0]
    logits = jax.random.normal(jax.random.key(1), (2, 4, 4))
    rest = (successors, grid.entry_reward, grid.terminal, grid.start)

    def total(game):
        return game.mean_reward + 0.3 * game.information + 0.1 * game.accuracy, game

    ours = jax.jit(jax.value_and_grad(
        lambda x: total(priced.enumerate_by_scan(jax.nn.softmax(x), *rest, num_messages=5)), has_aux=True
    ))  # fmt: skip
    theirs = jax.jit(
        jax.value_and_grad(lambda x: total(enumerate_game(jax.nn.softmax(x), *rest, 5, None)), has_aux=True)
    )
    (_, game), slope = ours(logits)
    (_, wanted), direction = theirs(logits)
    np.testing.assert_allclose(game, wanted, atol=1e-5)
    np.testing.assert_allclose(slope, direction, atol=1e-4)


def test_planned_law_is_the_best_of_its_price():
    """Its log-likelihood plus price times entropy is its soft value; at price 1 it is the model's own law, and no plain
    temperature has a larger sum."""
    start, quality = jnp.int32(3), jax.jit(priced.text_quality)
    for number in (0.4, 1.0, 1.7):
        price = jnp.float32(number)
        values = jax.jit(priced.values_ahead, static_argnums=2)(table(), price, LENGTH)
        likelihood, said = quality(table(), values, price, start)
        total = likelihood + price * said
        np.testing.assert_allclose(total, values[0, start] / LENGTH, atol=1e-5)
        for temperature in (0.3, number, 1.0, 2.0):
            plain = quality(table(), jnp.zeros_like(values), jnp.float32(temperature), start)
            assert float(plain[0] + price * plain[1]) <= float(total) + 1e-5
        if number == 1.0:
            np.testing.assert_allclose(values, 0, atol=1e-5)


def test_receiver_reads_what_was_sent():
    """The receiver's beliefs are the sender's; at the model's own law the bits said are at most the surprisal, and most
    of the entropy is used while blocks are left."""
    price, start = jnp.float32(1.0), jnp.int32(3)
    values = jnp.zeros((LENGTH + 1, SYMBOLS * SYMBOLS))
    messages = jax.random.randint(jax.random.key(2), (32, 8), 0, 4, jnp.int32)
    write = jax.jit(functools.partial(priced.write_texts, block_size=4))
    blank = jnp.zeros((32, LENGTH), jnp.int32)
    sent = write(jax.random.key(4), table(), values, price, start, messages, blank, jnp.array(False))
    read = write(jax.random.key(5), table(), values, price, start, 0 * messages, sent.texts, jnp.array(True))
    np.testing.assert_array_equal(sent.decoded, read.decoded)
    np.testing.assert_array_equal(sent.texts, read.texts)
    _, entropy = jax.jit(priced.text_quality)(table(), values, price, start)
    assert 0.6 * float(entropy) < float(jnp.mean(read.bits)) / LENGTH < 1.3 * float(entropy)


def test_front_is_what_nothing_beats():
    points = np.random.default_rng(1).uniform(size=(12, 2))
    np.testing.assert_array_equal(priced.front_of(points, (-1, -1)), pareto.non_dominated(jnp.asarray(points)))
    assert not priced.front_of(points, (2, 2)).any()


def test_gain_at_equal_reward():
    """By hand: the curve offers 1 bit at reward 0.5, and the point beyond its end does not count."""
    curve = np.array([[0.0, 2.0], [1.0, 0.0]])
    assert gain_at_equal_reward(np.array([[0.5, 1.25], [2.0, 9.0]]), curve) == pytest.approx(0.25)


def test_bad_input():
    for field, value in (("horizon", 7), ("prices", ()), ("text_prices", (0.0,)), ("num_messages", 1)):
        with pytest.raises(ValueError, match=f"{field}="):
            MessageAtAPriceConfig(**{field: value})
