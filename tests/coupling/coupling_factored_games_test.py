"""Coding games with messages of many blocks: round trips on a cart-pole, noise, and the base policy."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.coupling.factored_games import FactoredGame, play_factored
from jaxrl_suite.envs import code_cart

CART = code_cart.code_cart(code_cart.CodeCartConfig())
GAME = FactoredGame(code_cart.reset, code_cart.policy, code_cart.next_state, code_cart.failed)
OPTIONS = {"num_values": 16, "horizon": 80, "channel": jnp.eye(2)}  # a channel throughout: one compiled function
BLOCKS = jax.random.randint(jax.random.key(0), (32, 6), 0, 16)  # 24 bits each


# As users' programs are compiled (see conftest.py): only then are both sides seen to agree to the last bit.
EMITTERS = "xla_cpu_use_fusion_emitters"
AS_USERS = {EMITTERS: True} if EMITTERS in os.environ.get("XLA_FLAGS", "") else {}


@functools.partial(jax.jit, compiler_options=AS_USERS)
def play(key, blocks, replay=None):
    return play_factored(key, GAME, CART, blocks, replay=replay, **OPTIONS)


@pytest.fixture(scope="module")
def sent():
    return play(jax.random.key(1), BLOCKS)


def test_pushes_spell_the_message_while_the_pole_stays_up(sent):
    """Property 20: 24 bits come through where the policy has entropy to spare, and nearly every pole stays up."""
    lengths = np.asarray(sent.recording.lengths)
    assert (lengths == 80).mean() > 0.9
    ample = (np.asarray(sent.action_entropy) > 40) & (lengths == 80)
    assert ample.mean() > 0.8
    np.testing.assert_array_equal(np.asarray(sent.decoded)[ample], np.asarray(BLOCKS)[ample])
    uncertainty = np.asarray(sent.uncertainty)
    assert (uncertainty[:, 0] <= 24.001).all() and uncertainty[:, 0].mean() > 22.9
    assert (np.diff(uncertainty.mean(0)) <= 1e-3).all()


def test_receiver_needs_the_recording_alone(sent):
    """Property 20: replayed from states and actions by another key, without the message: bit for bit the same."""
    read = play(jax.random.key(5), jnp.zeros_like(BLOCKS), sent.recording)
    np.testing.assert_array_equal(read.guesses, sent.guesses)
    np.testing.assert_array_equal(read.uncertainty, sent.uncertainty)


def test_pushes_follow_the_policy(sent):
    """Property 19: (action - its probability) summed over all steps is noise of known variance, message unknown."""
    states, actions = sent.recording.states[:, :-1], np.asarray(sent.recording.actions)
    probs = np.asarray(jax.jit(jax.vmap(jax.vmap(lambda state: code_cart.policy(CART, state))))(states))[..., 1]
    alive = np.arange(80)[None] < np.asarray(sent.recording.lengths)[:, None]
    surprise = ((actions == 1) - probs)[alive].sum() / np.sqrt((probs * (1 - probs))[alive].sum())
    assert abs(surprise) < 4


def test_noise_is_corrected_for():
    """With one push in ten reversed most bits still come through, when beliefs know about it."""
    channel = jnp.array([[0.9, 0.1], [0.1, 0.9]])
    noisy = play_factored(jax.random.key(1), GAME, CART, BLOCKS, **{**OPTIONS, "channel": channel})
    alive = np.asarray(noisy.recording.lengths) == 80
    right = np.asarray(noisy.decoded == BLOCKS)[alive].mean()
    naive = play_factored(jax.random.key(1), GAME, CART, BLOCKS * 0, replay=noisy.recording, **OPTIONS)
    assert right > 0.8
    assert np.asarray(naive.decoded == BLOCKS)[alive].mean() < right - 0.3


def test_base_policy():
    """Cold it pushes against the lean and balances; hot it is a coin (property 22); a fallen pole ends the episode."""
    leaning = jnp.array([0.0, 0.0, 0.1, 0.2])
    assert float(code_cart.policy(CART.replace(temperature=0.01), leaning)[1]) > 0.99
    np.testing.assert_allclose(code_cart.policy(CART.replace(temperature=1e6), leaning), 0.5, atol=1e-3)
    assert bool(code_cart.failed(CART, jnp.array([0.0, 0.0, 0.22, 0.0])))
    assert not bool(code_cart.failed(CART, leaning))
    # By hand: from rest a push of 10 N gives the cart 9.7561 m/s^2 and the pole -14.634 rad/s^2, for 0.02 s.
    after = code_cart.step(CART, jnp.zeros(4), jnp.asarray(1))
    np.testing.assert_allclose(after, [0, 0.19512, 0, -0.29268], rtol=1e-4)


def test_bad_input():
    play = functools.partial(play_factored, jax.random.key(0), GAME, CART)
    for message, arguments, options in (
        ("blocks", (BLOCKS[0],), {}),
        ("rate", (BLOCKS, -1.0), {}),
        ("num_values", (BLOCKS,), {"num_values": 1}),
        ("horizon", (BLOCKS,), {"horizon": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            play(*arguments, **{**OPTIONS, **options})
    with pytest.raises(ValueError, match="force"):
        code_cart.CodeCartConfig(force=-1.0)
