"""Bad input, entry by entry: an error where values are known, a flag in the output inside jit, never a wrong coupling.

Line by line of the issue: negative, non-normalised, NaN and empty marginals, negative rates and unequal masses here;
messages longer than their cover (low certainty inside jit, an error for files) and changed text in
`coupling_hiding_test.py`; a pool that overflows in `coupling_arimec_test.py`.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.coupling import (
    certified_coupling,
    coupling_bounds,
    coupling_bounds_multi,
    ebim_exact,
    ebim_greedy,
    ebim_path,
    ebim_refine,
    greedy_coupling,
    greedy_coupling_multi,
    integer_masses,
    mecb,
    partitions,
    polished_coupling,
    quantize_lpt,
    quantize_uniform,
    sharpen_coupling,
    soft_coupling,
)
from jaxrl_suite.coupling.exact_games import enumerate_game
from jaxrl_suite.coupling.factored_games import play_factored
from jaxrl_suite.coupling.games import CodingGame, play
from jaxrl_suite.coupling.iterative import fimec_text
from jaxrl_suite.types import SequenceLaw

GOOD = (0.5, 0.3, 0.2)
BAD = {
    "must not be negative": (0.7, -0.2, 0.5),
    "must not hold NaN": (0.5, float("nan"), 0.5),
    "must be one": (0.5, 0.3, 0.3),
}


def encoder(out):
    return out.information, out.entropy


# name -> (function of one law, what must be NaN in its output, or -1 where it holds counts)
LAWS = {
    "greedy_coupling, rows": (lambda p: greedy_coupling(p, jnp.array(GOOD)), lambda out: (out.weights, out.entropy)),
    "greedy_coupling, columns": (lambda q: greedy_coupling(jnp.array(GOOD), q, rule="best"), lambda out: out.weights),
    "greedy_coupling, zero": (lambda q: greedy_coupling(jnp.array(GOOD), q, rule="zero"), lambda out: out.weights),
    "greedy_coupling_multi": (
        lambda p: greedy_coupling_multi(jnp.stack([jnp.array(GOOD), p])),
        lambda out: (out.weights, out.entropy),
    ),
    "polished_coupling": (lambda p: polished_coupling(p, jnp.array(GOOD), rule="max"), lambda out: out.weights),
    "certified_coupling": (
        lambda p: certified_coupling(p, jnp.array(GOOD), rule="max"),
        lambda out: (out.coupling.weights, out.entropy, out.bound, out.gap),
    ),
    "soft_coupling": (lambda p: soft_coupling(p, jnp.array(GOOD), 0.5), lambda out: out),
    "sharpen_coupling": (lambda p: sharpen_coupling(p[:, None] * jnp.ones((1, 2)) / 2), lambda out: out),
    "integer_masses": (integer_masses, lambda out: out),
    "coupling_bounds": (lambda p: coupling_bounds(p, jnp.array(GOOD)), tuple),
    "coupling_bounds_multi": (lambda p: coupling_bounds_multi(jnp.stack([jnp.array(GOOD), p])), tuple),
    "ebim_path": (ebim_path, tuple),
    "ebim_greedy": (lambda p: ebim_greedy(p, 1.0), lambda out: (out.code, *encoder(out))),
    "ebim_refine": (lambda p: ebim_refine(p, 1.0), encoder),
    "ebim_exact": (lambda p: ebim_exact(p, 1.0), lambda out: (out.code, *encoder(out))),
    "quantize_uniform": (lambda p: quantize_uniform(p, 1.0), lambda out: (out.code, *encoder(out))),
    "quantize_lpt": (lambda p: quantize_lpt(p, 1.0), lambda out: (out.code, *encoder(out))),
    "mecb, source": (
        lambda p: mecb(p, jnp.array(GOOD), 1.0),
        lambda out: (*encoder(out.encoder), out.decoder.weights, out.information, out.upper),
    ),
    "mecb, target": (lambda q: mecb(jnp.array(GOOD), q, 1.0), lambda out: (out.decoder.weights, out.information)),
}


def assert_flagged(values):
    for leaf in jax.tree.leaves(values):
        leaf = np.asarray(leaf)
        wrong = leaf != -1 if np.issubdtype(leaf.dtype, np.integer) else ~np.isnan(leaf)
        assert not wrong.any(), leaf


@pytest.mark.parametrize("name", LAWS)
def test_a_marginal_that_is_no_law(name):
    function, outputs = LAWS[name]
    compiled = jax.jit(lambda p: outputs(function(p)))
    for message, law in BAD.items():
        with pytest.raises(ValueError, match=message):
            function(jnp.array(law))
        assert_flagged(compiled(jnp.array(law)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(compiled(jnp.array(GOOD))))


EMPTY = {
    "greedy_coupling": lambda p: greedy_coupling(p, jnp.array(GOOD)),
    "greedy_coupling, columns": lambda q: greedy_coupling(jnp.array(GOOD), q),
    "greedy_coupling_multi": lambda p: greedy_coupling_multi(p[None]),
    "polished_coupling": lambda p: polished_coupling(p, jnp.array(GOOD)),
    "certified_coupling": lambda p: certified_coupling(p, jnp.array(GOOD)),
    "soft_coupling": lambda p: soft_coupling(p, jnp.array(GOOD), 0.5),
    "integer_masses": integer_masses,
    "coupling_bounds": lambda p: coupling_bounds(p, jnp.array(GOOD)),
    "coupling_bounds_multi": lambda p: coupling_bounds_multi(p[None]),
    "ebim_path": ebim_path,
    "ebim_greedy": lambda p: ebim_greedy(p, 1.0),
    "ebim_refine": lambda p: ebim_refine(p, 1.0),
    "ebim_exact": lambda p: ebim_exact(p, 1.0),
    "quantize_uniform": lambda p: quantize_uniform(p, 1.0),
    "quantize_lpt": lambda p: quantize_lpt(p, 1.0),
    "mecb": lambda p: mecb(p, jnp.array(GOOD), 1.0),
    "mecb, target": lambda q: mecb(jnp.array(GOOD), q, 1.0),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_marginal(name):
    """An error inside jit as well: the shape is known there."""
    for call in (EMPTY[name], jax.jit(EMPTY[name])):
        with pytest.raises(ValueError, match="at least one symbol"):
            call(jnp.zeros((0,)))


RATES = {
    "ebim_greedy": ebim_greedy,
    "ebim_refine": ebim_refine,
    "ebim_exact": ebim_exact,
    "quantize_uniform": quantize_uniform,
    "quantize_lpt": quantize_lpt,
    "mecb": lambda p, rate: mecb(p, jnp.array(GOOD), rate),
}


@pytest.mark.parametrize("name", RATES)
def test_a_rate_below_zero(name):
    compiled = jax.jit(lambda rate: RATES[name](jnp.array(GOOD), rate).information)
    for rate in (-0.5, float("nan")):
        with pytest.raises(ValueError, match="rate"):
            RATES[name](jnp.array(GOOD), rate)
        assert_flagged(compiled(rate))


def test_counts_of_unequal_totals():
    first, second = jnp.array([3, 3, 1]), jnp.array([4, 4, 0])
    for function in (greedy_coupling, lambda p, q: greedy_coupling_multi(jnp.stack([p, q]))):
        with pytest.raises(ValueError, match="equal totals"):
            function(first, second)
        coupling = jax.jit(function)(first, second)
        assert not bool(coupling.valid)
        assert_flagged((coupling.weights, coupling.entropy))


def test_messages_and_rates_of_games_and_texts():
    """What cannot be a message is an error before anything is compiled."""
    game = CodingGame(jnp.full((2, 2), 0.5), lambda key, state, action: action, jnp.zeros(2), jnp.zeros(2, bool), 0)
    world = (jnp.full((1, 2, 2), 0.5), jnp.zeros((2, 2), jnp.int32), jnp.zeros(2), jnp.zeros(2, bool), 0)
    key, options = jax.random.key(0), {"num_messages": 4, "horizon": 2}
    pole = {"num_values": 4, "horizon": 2}
    text = (key, None, None, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
    for message, call in (
        ("messages", lambda: play(key, game, jnp.array([4]), 1.0, **options)),
        ("messages", lambda: play(key, game, jnp.array([-1]), 1.0, **options)),
        ("rate", lambda: play(key, game, jnp.array([0]), -1.0, **options)),
        ("encoder", lambda: play(key, game, jnp.array([0]), 1.0, encoder="huffman", **options)),
        ("rate", lambda: enumerate_game(*world, 4, -1.0)),
        ("num_messages", lambda: enumerate_game(*world, 0, None)),
        ("blocks", lambda: play_factored(key, None, None, jnp.array([[4]]), **pole)),
        ("blocks", lambda: play_factored(key, None, None, jnp.array([1]), **pole)),
        ("rate", lambda: play_factored(key, None, None, jnp.array([[1]]), -1.0, **pole)),
        ("values", lambda: fimec_text(*text, jnp.array([[4]]), num_values=4, num_tokens=1)),
        ("rate", lambda: fimec_text(*text, jnp.array([[1]]), num_values=4, num_tokens=1, rate=-1.0)),
        ("tokens", lambda: fimec_text(*text, jnp.array([[1]]), num_values=4, num_tokens=1, tokens=jnp.zeros((1, 2)))),
    ):
        with pytest.raises(ValueError, match=message):
            call()

    # Inside jit a value out of range is a flag, and the rows beside it are as they were. (ARIMEC: in its own file;
    # games: `test_every_message_of_512_arrives_on_the_paper_grid`.)
    even = SequenceLaw(lambda params, prompts, mask: params, lambda params, state, token: (state, state), lambda x: x)
    prompts, mask = jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1), bool)
    send = jax.jit(
        lambda values: fimec_text(
            key, even, jnp.zeros((3, 4)), prompts, mask, values, num_values=4, num_tokens=2, merge=False
        )
    )
    found = send(jnp.array([[4], [2], [-1]]))
    assert_flagged(jax.tree.map(lambda x: x[::2], found))
    assert found.values[1].tolist() == [2] and float(found.certainty[1]) > 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: greedy_coupling(p[None], p), "vmap"),
        (lambda p: greedy_coupling(p, p, rule="median"), "rule='median'"),
        (lambda p: greedy_coupling(p, p, kernel="fast"), "kernel='fast'"),
        (lambda p: mecb(p, p, 1.0, search="fast"), "search"),
        (lambda p: mecb(jnp.full((10,), 0.1), p, 1.0, search="exact"), "at most 9"),
        (lambda p: soft_coupling(p, p, 0.0), "temperature"),
        (lambda p: soft_coupling(p, p, float("nan")), "temperature"),
        (lambda p: sharpen_coupling(p), "joint"),
        (lambda p: sharpen_coupling(p[None], 1.0), "power"),
        (lambda p: integer_masses(p, total_bits=31), "total_bits"),
        (lambda p: ebim_refine(p, 0.5, jnp.zeros((3, 4), jnp.int32)), "bases"),
        (lambda p: polished_coupling(jnp.array([1, 1]), jnp.array([2])), "probabilities"),
        (lambda p: polished_coupling(p, p, max_pivots=-1), "max_pivots"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.array(GOOD))


P, Q = jnp.array(GOOD), jnp.array([0.6, 0.4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mecb(P, Q, "1"), "rate='1': must be a non-negative number of bits"),
        (lambda: mecb(P, Q, None), "rate=None: must be a non-negative number of bits"),
        (lambda: ebim_greedy(P, "x"), "rate='x': must be a non-negative number of bits"),
        (lambda: ebim_exact(P, None), "rate=None: must be a non-negative number of bits"),
        (lambda: quantize_lpt(P, "x"), "rate='x': must be a non-negative number of bits"),
        (lambda: greedy_coupling("x", Q), "p='x': must be an array of numbers"),
        (lambda: soft_coupling(P, None, 0.1), "q=None: must be an array of numbers"),
        (lambda: mecb(P, "x", 1.0), "p_y='x': must be an array of numbers"),
        (
            lambda: greedy_coupling_multi([[0.5], [0.5, 0.5]]),
            "marginals=[[0.5], [0.5, 0.5]]: must be an array of numbers",
        ),
        (lambda: greedy_coupling({"a": 1.0}, Q), "p={'a': 1.0}: must be an array of numbers"),
        (lambda: greedy_coupling(P, jnp.array([0.6, 0.4j])), "q='complex64': must be an array of numbers"),
        (lambda: greedy_coupling(P, jax.random.key(0)), "q='key<fry>': must be an array of numbers"),
        (lambda: greedy_coupling([0.5, float("nan"), 0.5], Q), "p[1]=nan: must not hold NaN"),
        (lambda: greedy_coupling([0.5, 0.6], Q), "must be one. Divide p by its sum, in float32 at least"),
        (lambda: mecb(P, Q, jnp.ones(2)), "rate=(2,): must be a single number. Use vmap for several"),
        (lambda: ebim_greedy(P, {}), "rate={}: must be a non-negative number of bits"),
        (lambda: soft_coupling(P, Q, "0.5"), "temperature='0.5': must be a number"),
        (lambda: sharpen_coupling(P[:, None] * Q, None), "power=None: must be a number"),
        (lambda: coupling_bounds_multi(jnp.ones((0, 3))), "marginals=(0, 3): must be [K, N] with at least one law"),
        (lambda: greedy_coupling_multi(jnp.ones((0, 3))), "marginals=(0, 3): must be [K, N] with at least one law"),
        (lambda: integer_masses(P, total_bits=3.0), "total_bits=3.0: must be a whole number in 1..30"),
        (lambda: integer_masses(P, total_bits=None), "total_bits=None: must be a whole number in 1..30"),
        (lambda: partitions(2.5), "size=2.5: must be a whole number in 1.."),
        (lambda: partitions("3"), "size='3': must be a whole number in 1.."),
        (lambda: polished_coupling(P, Q, max_pivots="4"), "max_pivots='4': must be a whole number of at least 0"),
        (lambda: polished_coupling(P, Q, max_pivots=4.5), "max_pivots=4.5: must be a whole number of at least 0"),
        (
            lambda: sharpen_coupling(P[:, None] * Q, num_powers=-1),
            "num_powers=-1: must be a whole number",
        ),
        (
            lambda: sharpen_coupling(P[:, None] * Q, num_scalings=2.5),
            "num_scalings=2.5: must be a whole number",
        ),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


COUNTS = jnp.array([3, 2])


@pytest.mark.parametrize(
    "call",
    [
        ebim_path,
        lambda p: ebim_greedy(p, 1.0),
        lambda p: ebim_refine(p, 1.0),
        lambda p: ebim_exact(p, 1.0),
        lambda p: quantize_uniform(p, 1.0),
        lambda p: quantize_lpt(p, 1.0),
        lambda p: soft_coupling(p, p, 0.5),
        lambda p: polished_coupling(p, p),
    ],
)
def test_counts_where_only_probabilities_make_sense(call):
    for function in (call, jax.jit(call)):
        with pytest.raises(ValueError, match="p='int32': must be probabilities, not counts"):
            function(COUNTS)


def test_counts_beyond_their_integers():
    """Their sum would turn over, and the coupling be all -1."""
    with pytest.raises(ValueError, match="sum of p=2147483648: counts must sum to at most 2147483647"):
        greedy_coupling(jnp.array([2**31 - 1, 1], jnp.int32), jnp.array([2**30, 2**30], jnp.int32))
    small = greedy_coupling(np.array([200, 100], np.uint8), np.array([150, 150], np.uint8))
    assert small.weights.tolist() == [150, 100, 50]
    counts = jnp.array([2, 1])  # known values inside jit stay known
    assert jax.jit(lambda: greedy_coupling(counts, counts).weights)().tolist() == [2, 1, 0]


def chain(**changed):
    """Three states in a row, the last one terminal."""
    policy = jnp.array([[0.5, 0.5], [0.3, 0.7], [0.0, 0.0]])  # nobody acts in the last state
    parts = {"policy": policy, "reward": [0.0, 0.0, 1.0], "terminal": [False, False, True], "start": 0}
    return CodingGame(next_state=lambda key, state, action: jnp.clip(state + 2 * action - 1, 0, 2), **parts)._replace(
        **changed
    )


def play_chain(game=None, messages=(0, 3), **changed):
    options = {"num_messages": 4, "horizon": 4, **changed}
    return play(jax.random.key(0), chain() if game is None else game, messages, 1.0, **options)


def test_a_game_of_lists():
    episodes = play_chain(messages=[0, 3])
    arrays = play_chain(chain(reward=jnp.array([0.0, 0.0, 1.0])), jnp.array([0, 3]))
    assert episodes.rewards.tolist() == arrays.rewards.tolist()
    again = play_chain(replay=episodes.trajectories)
    np.testing.assert_array_equal(again.decoded, episodes.decoded)


EXACT = {
    "policies": jnp.full((1, 2, 2), 0.5),
    "successors": jnp.array([[0, 1], [0, 1]]),
    "reward": jnp.zeros(2),
    "terminal": jnp.zeros(2, bool),
    "start": 0,
    "num_messages": 2,
    "rate": None,
}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: play_chain(chain(policy=chain().policy.at[1].mul(2))), "sum of policy[1]=2.0: must be one"),
        (lambda: play_chain(chain(policy=chain().policy.at[0, 1].set(-1))), "policy[0][1]=-1.0: must not be negative"),
        (lambda: play_chain(chain(policy=jnp.ones(2) / 2)), "policy=(2,): must be [S, A]"),
        (lambda: play_chain(chain(reward=[1.0])), "reward=(1,): must have one entry a state"),
        (lambda: play_chain(chain(terminal=[True])), "terminal=(1,): must have one entry a state"),
        (lambda: play_chain(chain(start=7)), "start=[7]: must be in 0..2"),
        (lambda: play_chain(chain(start=[0, 1])), "start=(2,): must be a single state"),
        (lambda: play_chain(chain(next_state=jnp.zeros((3, 2)))), "next_state='ArrayImpl': must be a function"),
        (lambda: play_chain(messages=[0.0, 1.5]), "messages='float32': must be whole numbers"),
        (lambda: play_chain(messages="hello"), "messages='hello': must be whole numbers"),
        (
            lambda: play_chain(messages=jnp.zeros((0,), int)),
            "messages=(0,): must be whole numbers, [E] with at least one",
        ),
        (lambda: play_chain(horizon=2.5), "horizon=2.5: must be a whole number of at least 1"),
        (lambda: play_chain(num_messages="4"), "num_messages='4': must be a whole number of at least 1"),
        (lambda: play_chain(num_lanes=0), "num_lanes=0: must be a whole number of at least 1"),
        (lambda: play_chain(replay=play_chain()), "replay='Episodes': must be Trajectories"),
        (
            lambda: enumerate_game(**{**EXACT, "policies": jnp.ones((1, 2, 2))}),
            "sum of policies[0, 0]=2.0: must be one",
        ),
        (lambda: enumerate_game(**{**EXACT, "policies": jnp.ones((2, 2)) / 2}), "policies=(2, 2): must be [H, S, A]"),
        (
            lambda: enumerate_game(**{**EXACT, "successors": jnp.full((2, 2), 2)}),
            "successors=[2, 2, 2, 2]: must be in 0..1",
        ),
        (
            lambda: enumerate_game(**{**EXACT, "successors": jnp.zeros((2, 3), int)}),
            "must be whole numbers of shape [S, A]",
        ),
        (lambda: enumerate_game(**{**EXACT, "reward": jnp.zeros(3)}), "reward=(3,): must have one entry a state"),
    ],
)
def test_games_that_do_not_fit(call, message):
    """Where JAX would read a table at its edge and go on."""
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
