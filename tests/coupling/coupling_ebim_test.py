"""The entropy-bounded encoder: closed form against the sequential algorithm, laws, gap, all partitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.coupling import ebim_greedy, ebim_path
from jaxrl_suite.distributions import binary_entropy
from tests.reference import coupling_ebim as oracle
from tests.reference.coupling_greedy import entropy

_RATES = np.array([0.0, 0.2, 0.7, 1.0, 1.3, 1.9, 2.5, 9.0])


def sources():
    rng = np.random.default_rng(0)
    rows = []
    for size in (1, 2, 3, 5, 7):
        for concentration in (0.3, 1.0, 3.0):
            for _ in range(4):
                row = np.zeros(7)
                row[rng.permutation(7)[:size]] = rng.dirichlet(np.full(size, concentration))
                rows.append(row)
    rows += [np.full(7, 1 / 7), np.array([0.25, 0.25, 0.25, 0.25, 0, 0, 0]), np.array([0, 0.5, 0.5, 0, 0, 0, 0])]
    return np.stack(rows)


def encode(p, rates=_RATES):
    return jax.jit(jax.vmap(jax.vmap(ebim_greedy, in_axes=(None, 0)), in_axes=(0, None)))(p, rates)


def test_paper_example():
    """Property 13: the seven entropies of [0.4, 0.3, 0.2, 0.1]."""
    path = ebim_path(jnp.array([0.3, 0.1, 0.4, 0.2]))
    expected = [1.8464, 1.5710, 1.1568, 0.8813, 0.4690, 0.0, 0.0]
    np.testing.assert_allclose(path.entropies, expected, atol=5e-5)
    np.testing.assert_allclose(path.block_masses, [0.4, 0.7, 0.9, 1.0], atol=1e-6)


def test_closed_form_equals_the_sequential_algorithm(x64):
    """Property 13: same entropies, and at every rate the same partition up to ties."""
    p = sources()
    paths = jax.jit(jax.vmap(ebim_path))(p)
    encoders = encode(p)
    for row, law in enumerate(p):
        expected = [value for value, _ in oracle.sequential_path(law)]
        found = np.asarray(paths.entropies[row])
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-12)
        assert (found[len(expected) :] == 0).all()
        assert (np.diff(found) <= 1e-12).all()
        for column, rate in enumerate(_RATES):
            value, blocks = oracle.sequential_ebim(law, rate)
            assert float(encoders.information[row, column]) == pytest.approx(value, abs=1e-12)
            labels = np.asarray(encoders.labels[row, column])
            masses = sorted(sum(law[i] for i in block) for block in blocks)
            by_label = np.bincount(labels, weights=law, minlength=7)
            np.testing.assert_allclose(sorted(by_label[by_label > 0]), masses, atol=1e-12)
            np.testing.assert_allclose(by_label, encoders.code[row, column], atol=1e-15)


def test_laws_of_the_encoder(x64):
    """Properties 12 and 14: rate kept, information equals entropy, gap, identity, constant, monotone in the rate."""
    p = sources()
    encoders = encode(p)
    entropies = np.array([entropy(law) for law in p])
    second = np.sort(p, axis=1)[:, -2]
    information = np.asarray(encoders.information)
    assert (information <= _RATES + 1e-12).all()
    gap = np.minimum(_RATES, entropies[:, None]) - information
    assert (gap <= np.asarray(binary_entropy(second))[:, None] + 1e-9).all()
    np.testing.assert_allclose(information[:, -1], entropies, atol=1e-12)
    np.testing.assert_array_equal(encoders.labels[:, -1], np.broadcast_to(np.arange(7), p.shape))
    assert (information[:, 0] == 0).all()
    assert (np.diff(information, axis=1) >= 0).all()
    np.testing.assert_allclose(encoders.code.sum(-1), 1.0, atol=1e-12)


def test_information_is_a_step_function_of_the_rate(x64):
    """Property 14: right-continuous, constant between the values of the path."""
    p = sources()[30]
    path = np.unique(np.asarray(ebim_path(p).entropies))
    at, below = encode(p[None], path)[2][0], encode(p[None], path[1:] - 1e-9)[2][0]
    np.testing.assert_allclose(at, path, atol=1e-12)
    np.testing.assert_allclose(below, path[:-1], atol=1e-12)


def test_best_partition_is_no_worse():
    """Property 16: Bell numbers, and the best of all partitions is at least the greedy map."""
    assert [len(oracle.partitions(n)) for n in range(1, 9)] == [1, 2, 5, 15, 52, 203, 877, 4140]
    for law in sources()[-15:-3:3]:
        values = oracle.partition_entropies(law)
        for rate in (0.5, 1.0, 1.5):
            found = oracle.sequential_ebim(law, rate)[0]
            assert found <= values[values <= rate + 1e-12].max() + 1e-12


def test_permuting_the_source_permutes_the_code(x64):
    """Property 10: labels are names of symbols, so they move with them."""
    p = sources()[29]
    order = np.random.default_rng(1).permutation(7)
    first, second = ebim_greedy(p, 1.2), ebim_greedy(p[order], 1.2)
    np.testing.assert_allclose(second.code, first.code[order], atol=1e-15)
    np.testing.assert_array_equal(order[np.asarray(second.labels)], np.asarray(first.labels)[order])


def test_float32_keeps_the_rate():
    p = sources().astype(np.float32)
    encoders = encode(p, _RATES.astype(np.float32))
    assert (np.asarray(encoders.entropy) <= _RATES + 2e-6).all()
