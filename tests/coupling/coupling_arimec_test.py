"""ARIMEC: small trees by enumeration, and against FIMEC where the two meet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.coupling.arimec import arimec_symbol, arimec_text
from jaxrl_suite.coupling.integer import round_masses
from jaxrl_suite.coupling.iterative import fimec_symbol
from jaxrl_suite.coupling.prefix_tree import (
    best_node,
    condition_tree,
    partition_at,
    partition_entropies,
    prefix_tree,
    read_message,
    search_bound,
)
from jaxrl_suite.types import SequenceLaw

LENGTH, SYMBOLS, TOKENS, TEXT = 3, 3, 3, 3  # messages of 27, texts of 27


def table_law(size):
    """Symbols given the one before: ``params [V + 1, V]`` logits, row V at the start."""

    def init(params, prompts, mask):
        del mask
        return jnp.broadcast_to(params[size], (prompts.shape[0], size))

    def step(params, state, token):
        return params[token], params[token]

    return SequenceLaw(init, step, lambda state: state)


LAW = table_law(3)
PROMPT = jnp.zeros((1,), jnp.int32)
EVERY = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3).astype(np.int32)


def tables(seed):
    """Logits of messages and texts, random; with no seed a message that says little at an even text."""
    if seed is None:
        message, text = np.tile([0.97, 0.02, 0.01], (4, 1)), np.full((4, 3), 1 / 3)
        message[3] = 0.75, 0.15, 0.1
    else:
        message, text = np.random.default_rng(seed).dirichlet(np.full(3, 0.8), size=(2, 4))
    return jnp.asarray(np.log(message), jnp.float32), jnp.asarray(np.log(text), jnp.float32)


def prior(table):
    probs = np.exp(np.asarray(table, float))
    probs /= probs.sum(1, keepdims=True)
    return probs[3, EVERY[:, 0]] * probs[EVERY[:, 0], EVERY[:, 1]] * probs[EVERY[:, 1], EVERY[:, 2]]


@functools.partial(jax.jit, static_argnames="merge")
def joint_law(message_table, text_table, merge):
    """p(text | message), and the receiver's p(message | text), for every text and message: [27, 27] each."""

    def one(message, text):
        tree = prefix_tree(LAW, message_table, PROMPT, length=LENGTH, capacity=16)

        def step(carry, entry):
            tree, likelihood = carry
            before, symbol = entry
            counts = round_masses(jax.nn.softmax(text_table[before]), 1 << 30)
            _, tree, factor = arimec_symbol(
                jax.random.key(0), tree, message, counts, symbol, True, law=LAW, params=message_table, merge=merge
            )
            return (tree, likelihood * factor), None

        before = jnp.concatenate([jnp.array([3]), text[:-1]])
        (tree, likelihood), _ = jax.lax.scan(step, (tree, jnp.ones(())), (before, text))
        return likelihood, read_message(tree, LAW, message_table, message).mass, tree.overflow

    texts, messages = jnp.asarray(EVERY), jnp.asarray(EVERY)
    return jax.vmap(lambda m: jax.vmap(lambda t: one(m, t))(texts))(messages)


def test_bayes_by_enumeration():
    """Property 23: p(y|x) p(x) = p(x|y) p(y) over all 27 x 27 pairs; rows are laws; merging lowers joint entropy."""
    for seed in (0, None):
        entropies = []
        for merge in (False, True):
            message_table, text_table = tables(seed)
            found = joint_law(message_table, text_table, merge)
            likelihood, posterior, overflow = (np.asarray(x, float) for x in found)
            p_x, p_y = prior(message_table), prior(text_table)
            joint = likelihood * p_x[:, None]
            np.testing.assert_allclose(likelihood.sum(1), 1, atol=1e-5)
            np.testing.assert_allclose(joint.sum(0), p_y, atol=1e-5)  # property 19: the text follows its law
            np.testing.assert_allclose(joint, posterior * p_y[None], atol=1e-5)
            assert not overflow.any()
            positive = joint[joint > 0]
            entropies.append(-(positive * np.log2(positive)).sum())
            independent = -(p_x * np.log2(p_x)).sum() - (p_y * np.log2(p_y)).sum()
            assert entropies[-1] < independent - 1.0
        assert entropies[1] <= entropies[0] + 1e-4
    # Two symbols of the even text fit into the likely first symbol of the message: which one, says more of the next.
    assert entropies[1] < entropies[0] - 0.01


def test_depth_one_is_fimec():
    """Property 23: with one symbol a message is one block, and both iterations are the coupling of a pair."""
    message_table, text_table = tables(5)
    counts = round_masses(jax.nn.softmax(text_table[3]), 1 << 20)
    belief = jax.nn.softmax(message_table[3])
    tree = prefix_tree(LAW, message_table, PROMPT, length=1, capacity=2)

    @jax.jit
    def both(key, value):
        symbol, after, likelihood = arimec_symbol(
            key, tree, value[None], counts, 0, False, law=LAW, params=message_table, merge=False
        )
        return (symbol, after.masses[0], likelihood), fimec_symbol(
            key, belief[None], value[None], counts, 0, False, merge=False
        )

    for value in range(3):
        for seed in range(4):
            ours, theirs = both(jax.random.key(seed), jnp.int32(value))
            assert int(ours[0]) == int(theirs.symbol)
            np.testing.assert_allclose(ours[1], theirs.posterior[0], atol=2e-6)
            np.testing.assert_allclose(ours[2], theirs.likelihood, atol=2e-6)


@jax.jit
def message_masses(tree, message_table):
    return jax.vmap(lambda message: read_message(tree, LAW, message_table, message).mass)(jnp.asarray(EVERY))


@jax.jit
def search(tree, message_table):
    tree, node = best_node(tree, LAW, message_table)
    partitions = jax.vmap(lambda message: partition_at(tree, node, message))(jnp.asarray(EVERY))
    return tree, node, partition_entropies(tree)[node], partitions


def brute_force(tree, message_table):
    """Entropies of the partitions at all 13 inner nodes, from the posterior masses of all 27 messages."""
    mass = np.asarray(message_masses(tree, message_table), float)
    found = []
    for depth in range(3):
        for prefix in {tuple(m[:depth]) for m in EVERY}:
            inside = (EVERY[:, :depth] == prefix).all(1)
            blocks = np.array([mass[inside & (EVERY[:, depth] == s)].sum() for s in range(3)] + [mass[~inside].sum()])
            found.append(-(blocks[blocks > 0] * np.log2(blocks[blocks > 0])).sum())
    return mass, max(found)


def test_search_finds_the_best_partition():
    """The search agrees with all partitions; conditioning multiplies the masses of messages; masses stay consistent."""
    message_table, _ = tables(7)
    condition = jax.jit(condition_tree)
    tree = prefix_tree(LAW, message_table, PROMPT, length=LENGTH, capacity=16)
    rng = np.random.default_rng(0)
    for _ in range(4):
        before, best = brute_force(tree, message_table)
        tree, node, value, partitions = search(tree, message_table)
        assert float(value) == pytest.approx(best, abs=1e-4)
        np.testing.assert_allclose(partitions.entropy, best, atol=1e-4)
        # The block of each message, and the posterior by Bayes' rule.
        blocks = np.asarray(partitions.truth)
        factors = rng.uniform(0.2, 2.0, size=4)
        expected = before * factors[blocks]
        tree = condition(tree, node, jnp.asarray(factors, jnp.float32))
        after, _ = brute_force(tree, message_table)
        np.testing.assert_allclose(after, expected / expected.sum(), atol=1e-5)


def test_bound_of_the_search():
    """No partition below a child has more entropy than the bound of its mass; it grows with the mass."""
    masses = jnp.linspace(0.0, 1.0, 101)
    bound = np.asarray(search_bound(masses, 3))
    assert (np.diff(bound) >= -1e-6).all()
    assert bound[-1] == pytest.approx(2.0, abs=1e-6)  # four equal blocks
    uniform = -(1 - masses) * np.log2(np.maximum(1 - masses, 1e-30)) - masses * np.log2(np.maximum(masses / 3, 1e-30))
    assert (np.asarray(uniform) <= bound + 1e-5).all()


def test_full_pool_is_flagged():
    """A pool without room says so and takes the best that it holds; with room the search looks into the heavy child."""
    table = jnp.zeros((4, 3))
    tree = prefix_tree(LAW, table, PROMPT, length=LENGTH, capacity=16)
    tree = tree._replace(masses=tree.masses.at[0].set(jnp.array([0.98, 0.01, 0.01])))
    full, node, _, _ = search(tree._replace(count=jnp.asarray(16)), table)
    assert bool(full.overflow) and int(node) == 0
    found, node, _, _ = search(tree, table)
    assert not bool(found.overflow)
    assert found.prefixes[node].tolist() == [0, 0, 0] and int(found.depths[node]) == 1
    np.testing.assert_allclose(found.masses[node], 0.98 / 3, rtol=1e-5)


def test_messages_come_back():
    """Round trip against another law: what the receiver is sure of is right, and a likely message costs less."""
    message_table, text_table = tables(1)
    rng = np.random.default_rng(3)
    p = prior(message_table)
    messages = jnp.asarray(EVERY[rng.choice(27, size=64, p=p / p.sum())])
    prompts = jnp.zeros((64, 1), jnp.int32)

    options = {"message_law": LAW, "message_params": message_table, "message_prompt": PROMPT, "capacity": 16}
    arguments = (LAW, text_table, prompts, jnp.ones_like(prompts, bool))
    sent = arimec_text(jax.random.key(2), *arguments, messages, num_tokens=24, **options)
    read = arimec_text(jax.random.key(9), *arguments, messages * 0, num_tokens=24, tokens=sent.tokens, **options)
    np.testing.assert_array_equal(read.messages, sent.messages)
    np.testing.assert_array_equal(read.certainty, sent.certainty)
    certain = np.asarray(read.certainty) > 0.999
    np.testing.assert_array_equal(np.asarray(read.messages)[certain], np.asarray(messages)[certain])
    assert certain.mean() > 0.9
    for wrong, match in (
        ({"num_tokens": 0}, "num_tokens"),
        ({"tokens": sent.tokens[:3]}, "tokens"),
        ({"rate": -1.0}, "rate"),
        ({"messages": messages.at[7, 2].set(SYMBOLS)}, r"messages=\[3\]: must be in 0\.\.2"),
        ({"messages": messages.at[0, 0].set(-1)}, r"messages=\[-1\]"),
    ):
        with pytest.raises(ValueError, match=match):
            arimec_text(jax.random.key(0), *arguments, **{"messages": messages, "num_tokens": 24, **wrong}, **options)
    with pytest.raises(ValueError, match="messages"):
        arimec_text(jax.random.key(0), *arguments, messages[:3], num_tokens=2, **options)

    # Inside jit a message out of range is a flag, and the other rows are what they were.
    @jax.jit
    def send(messages):
        return arimec_text(jax.random.key(2), *arguments, messages, num_tokens=24, **options)

    flagged = send(messages.at[7, 2].set(SYMBOLS).at[9, 0].set(-1))
    wrong = np.isin(np.arange(64), (7, 9))
    np.testing.assert_array_equal(np.isnan(flagged.certainty), wrong)
    assert (np.asarray(flagged.tokens)[wrong] == -1).all() and (np.asarray(flagged.messages)[wrong] == -1).all()
    np.testing.assert_array_equal(np.asarray(flagged.tokens)[~wrong], np.asarray(sent.tokens)[~wrong])
    np.testing.assert_array_equal(np.asarray(flagged.messages)[~wrong], np.asarray(sent.messages)[~wrong])
