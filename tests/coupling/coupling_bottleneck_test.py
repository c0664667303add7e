"""The bottleneck: laws of the chain, special cases, order of the searches."""

import jax
import numpy as np
import pytest

from jaxrl_suite.coupling import greedy_coupling, mecb
from jaxrl_suite.distributions import entropy, mutual_information

_SEARCHES = ("paper", "decoder_aware", "exact")


@pytest.fixture(scope="module")
def solved():
    """Twenty random cases of 5 and 4 symbols by each search, in float64."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    p_x, p_y = rng.dirichlet(np.ones(5), size=20), rng.dirichlet(np.ones(4), size=20)
    rates = rng.uniform(0.2, 2.2, size=20)
    rates[:2] = [0.0, 9.0]
    found = {}
    for search in _SEARCHES:
        solve = jax.jit(jax.vmap(lambda x, y, r, s=search: mecb(x, y, r, search=s)))
        found[search] = solve(p_x, p_y, rates)
    joints = {s: jax.vmap(lambda b, x: b.joint(x))(found[s], p_x) for s in _SEARCHES}
    yield p_x, p_y, rates, found, {s: np.asarray(j) for s, j in joints.items()}
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("search", _SEARCHES)
def test_laws_of_the_chain(solved, search):
    """Properties 17 and 18: marginals, rate, information of the joint, lemma 1, data processing, upper bound."""
    p_x, p_y, rates, found, joints = solved
    bottleneck, joint = found[search], joints[search]
    np.testing.assert_allclose(joint.sum(2), p_x, atol=1e-12)
    np.testing.assert_allclose(joint.sum(1), p_y, atol=1e-12)
    assert (np.asarray(bottleneck.encoder.entropy) <= rates + 1e-9).all()
    information = np.asarray(bottleneck.information)
    np.testing.assert_allclose(mutual_information(joint), information, atol=1e-9)
    decoder = jax.vmap(lambda c: c.dense((5, 4)))(bottleneck.decoder)
    through_decoder = np.asarray(mutual_information(decoder))
    np.testing.assert_allclose(through_decoder, information, atol=1e-9)  # I(X; Y) = I(T; Y)
    encoder = np.asarray(bottleneck.encoder.information)
    assert (information >= encoder + through_decoder - rates - 1e-9).all()
    assert (information <= np.minimum(encoder, through_decoder) + 1e-9).all()
    assert (information <= np.asarray(bottleneck.upper) + 1e-9).all()


def test_searches_are_ordered(solved):
    """Property 18: exact >= decoder-aware >= the paper's pipeline, and the difference is large."""
    *_, found, _ = solved
    paper, aware, exact = (np.asarray(found[s].information) for s in _SEARCHES)
    assert (exact >= aware - 1e-9).all()
    assert (aware >= paper - 1e-9).all()
    assert (aware - paper).mean() >= 0.8 * (exact - paper).mean() > 0.02


def test_special_cases(solved):
    """Property 18: rate 0 makes X and Y independent; a large rate is minimum entropy coupling."""
    p_x, p_y, _, found, joints = solved
    for search in _SEARCHES:
        assert float(found[search].information[0]) == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(joints[search][0], np.outer(p_x[0], p_y[0]), atol=1e-12)
    coupling = greedy_coupling(p_x[1], p_y[1])
    expected = float(entropy(p_x[1]) + entropy(p_y[1]) - coupling.entropy)
    assert float(found["paper"].information[1]) == pytest.approx(expected, abs=1e-9)


def test_lemma_1_on_random_chains(x64):
    """Property 17: I(X;Y) = I(X;T) + I(T;Y) - I(T;X,Y) on random Markov chains X - T - Y."""
    rng = np.random.default_rng(1)
    p_x, encoder, decoder = (
        rng.dirichlet(np.ones(4)),
        rng.dirichlet(np.ones(3), size=4),
        rng.dirichlet(np.ones(5), size=3),
    )
    full = p_x[:, None, None] * encoder[:, :, None] * decoder[None]
    information = {
        "xy": mutual_information(full.sum(1)),
        "xt": mutual_information(full.sum(2)),
        "ty": mutual_information(full.sum(0)),
        "t_xy": mutual_information(full.transpose(1, 0, 2).reshape(3, -1)),
    }
    expected = information["xt"] + information["ty"] - information["t_xy"]
    assert float(information["xy"]) == pytest.approx(float(expected), abs=1e-12)
