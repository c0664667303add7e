"""Iterative couplings and hidden text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from experiments.coupling import byte_model, steganography
from jaxrl_suite.coupling.integer import round_masses
from jaxrl_suite.coupling.iterative import fimec_symbol, fimec_text, symbol_law
from tests.reference.coupling_greedy import argmax_greedy, dense


def test_one_block_is_the_greedy_coupling(x64):
    """Property 23: one block, one symbol: p(symbol | value) is the row of the coupling, by exhausting the draws."""
    belief, law = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    joint = dense(argmax_greedy(belief, law), (4, 3))
    counts = round_masses(jnp.asarray(law), 1 << 20)
    keys = jax.random.split(jax.random.key(0), 400)
    draw = jax.jit(
        jax.vmap(
            lambda key, value: fimec_symbol(key, jnp.asarray(belief)[None], value[None], counts, 0, False, merge=False),
            in_axes=(0, None),
        )
    )
    for value in range(4):
        symbols, after, _ = draw(keys, jnp.int32(value))
        frequency = np.bincount(symbols, minlength=3) / 400
        given = joint[value] / joint[value].sum()
        assert np.abs(frequency - given).max() < 4 * 0.5 / 20 + 1e-9
        assert (frequency[given == 0] == 0).all()
        for symbol in np.unique(symbols):
            posterior = np.asarray(after)[np.asarray(symbols) == symbol][0, 0]
            np.testing.assert_allclose(posterior, joint[:, symbol] / joint[:, symbol].sum(), atol=1e-5)


def test_symbols_follow_their_law():
    """Property 19 for texts: without the message the next symbol has the model's law."""
    rng = np.random.default_rng(1)
    for rate in (1.0, np.inf):
        beliefs = jnp.asarray(rng.dirichlet(np.full(64, 0.3), size=3), jnp.float32)
        counts = round_masses(jnp.asarray(rng.dirichlet(np.ones(20)), jnp.float32), 1 << 30)
        law = symbol_law(beliefs, counts, rate=rate)
        np.testing.assert_allclose(law, np.asarray(counts) / 2**30, atol=1e-6)


@pytest.fixture(scope="module")
def characters():
    return jnp.asarray(byte_model.train(4)), byte_model.character_law()


@pytest.fixture(scope="module")
def write(characters):
    table, law = characters
    prompt = jnp.asarray([byte_model.encode("import ")])

    @functools.partial(jax.jit, static_argnames=("num_tokens",))
    def text(key, values, tokens=None, bias=0.0, num_tokens=48):
        rows = values.shape[0]
        prompts = jnp.broadcast_to(prompt, (rows, prompt.shape[1]))
        return fimec_text(
            key, law, table, prompts, jnp.ones(prompts.shape, bool), values,
            num_values=256, num_tokens=num_tokens, tokens=tokens, bias=bias,
        )  # fmt: skip

    return text


def test_messages_come_back(write):
    """Property 24: 500 random messages of two bytes, and the receiver's beliefs need the text alone."""
    values = jax.random.randint(jax.random.key(0), (500, 2), 0, 256)
    sent = write(jax.random.key(1), values)
    read = write(jax.random.key(7), jnp.zeros_like(values), sent.tokens)
    np.testing.assert_array_equal(read.values, sent.values)
    # A text with too little entropy for its message says so: its certainty stays low.
    certain = np.asarray(read.certainty) > 0.999
    np.testing.assert_array_equal(np.asarray(read.values)[certain], np.asarray(values)[certain])
    assert certain.mean() > 0.98


def test_framing():
    for message in (b"", b"\x00", bytes(range(256))):
        frame = steganography.make_frame(message, "key", b"12345678")
        assert len(frame) == len(message) + 16
        assert steganography.open_frame(frame, "key") == message
        with pytest.raises(steganography.HidingError, match="checksum"):
            steganography.open_frame(frame, "other key")
        with pytest.raises(steganography.HidingError, match="checksum"):
            steganography.open_frame(frame[:-1] + bytes([frame[-1] ^ 1]), "key")


def test_file_in_text_and_back(characters):
    """Hide, reveal; then a changed character, a wrong passphrase and a cut text are reported."""
    table, law = characters
    model = steganography.TextModel(law, table, byte_model.encode, byte_model.decode)
    text, account = steganography.hide(model, b"nine o'clock", "import ", "key", seed=1)
    message, _ = steganography.reveal(model, text, "import ", "key")
    assert message == b"nine o'clock"
    assert account.bits == 8 * 28
    # The text determines the message, so it is at least as surprising; beliefs are rounded to counts.
    assert 0.6 * account.surprisal_bits < account.bits <= account.surprisal_bits + 0.1
    assert account.coupling_kl < 1e-6
    changed = text[:20] + ("q" if text[20] != "q" else "z") + text[21:]
    for wrong in (changed, text[:-5], text + "x"):
        with pytest.raises(steganography.HidingError):
            steganography.reveal(model, wrong, "import ", "key")
    with pytest.raises(steganography.HidingError):
        steganography.reveal(model, text, "import ", "other")
    with pytest.raises(steganography.HidingError, match="does not fit"):
        steganography.hide(model, bytes(40), "import ", "key", max_tokens=10)


@functools.partial(jax.jit, static_argnames=("law", "rows", "num_tokens"))
def sample(key, table, law, rows, num_tokens):
    """The model's own text, by Gumbel draws."""
    prompt = jnp.broadcast_to(jnp.asarray(byte_model.encode("import "))[None], (rows, 7))

    def step(state, key):
        token = jax.random.categorical(key, law.logits(state))
        return law.step(table, state, token)[0], token

    start = law.init(table, prompt, jnp.ones(prompt.shape, bool))
    return jax.lax.scan(step, start, jax.random.split(key, num_tokens))[1].T


@pytest.mark.slow
def test_ten_thousand_messages(write, characters):
    """Issue: no decoding error; a chi-square test of pairs of characters accepts ours and rejects a biased embedder.

    python -m pytest -m slow tests/coupling/coupling_hiding_test.py
    """
    table, law = characters
    tokens, biased, own = [], [], []
    for batch in range(20):
        key = jax.random.key(batch)
        values = jax.random.randint(key, (500, 2), 0, 256)
        sent = write(jax.random.fold_in(key, 1), values)
        read = write(key, jnp.zeros_like(values), sent.tokens)
        certain = np.asarray(read.certainty) > 0.999
        np.testing.assert_array_equal(np.asarray(read.values)[certain], np.asarray(values)[certain])
        tokens.append(np.asarray(sent.tokens))
        biased.append(np.asarray(write(jax.random.fold_in(key, 2), values, bias=0.8).tokens))
        own.append(np.asarray(sample(jax.random.fold_in(key, 3), table, law, 500, 48)))
    counts = [
        np.bincount(np.concatenate(x).ravel(), minlength=byte_model.NUM_CHARACTERS) for x in (tokens, biased, own)
    ]
    common = counts[2] > 200
    accept = stats.chi2_contingency([counts[0][common], counts[2][common]]).pvalue
    reject = stats.chi2_contingency([counts[1][common], counts[2][common]]).pvalue
    assert accept > 1e-3
    assert reject < 1e-6
