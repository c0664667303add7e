"""Greedy couplings of two marginals: values, laws, rules, kernels, derivative, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.coupling import coupling_bounds, greedy_coupling
from tests.reference import coupling_greedy as oracle
from tests.reference.coupling_bounds import majorization
from tests.reference.coupling_exact import exact_entropies, exact_entropy_by_search

_PROFILE_GAP = math.log2(math.e) / math.e


def random_laws(seed, batch, *sizes, concentration=1.0):
    rng = np.random.default_rng(seed)
    return tuple(rng.dirichlet(np.full(size, concentration), size=batch) for size in sizes)


def solve(p, q, rule="max", kernel="auto"):
    shape = (p.shape[-1], q.shape[-1])
    couple = jax.vmap(lambda p, q: greedy_coupling(p, q, rule=rule, kernel=kernel))
    coupling = jax.jit(couple)(p, q)
    return coupling, np.asarray(jax.vmap(lambda c: c.dense(shape))(coupling))


def test_worked_example():
    """By hand: 0.5 and 0.6 leave 0.1; 0.4 and 0.2 leave 0.2; 0.2 and 0.2; 0.1 and 0.1."""
    coupling = greedy_coupling(jnp.array([0.5, 0.4, 0.1]), jnp.array([0.6, 0.2, 0.2]))
    expected = [[0.5, 0, 0], [0, 0.2, 0.2], [0.1, 0, 0]]
    np.testing.assert_allclose(coupling.dense((3, 3)), expected, atol=1e-7)
    assert float(coupling.entropy) == pytest.approx(1.7610, abs=1e-4)
    assert bool(coupling.valid)


@pytest.mark.parametrize("sizes", [(6, 5), (4, 48)])
@pytest.mark.parametrize("rule", ["max", "zero"])
def test_agrees_with_the_oracle(sizes, rule, x64):
    """Property 8: cell by cell the coupling of a NumPy loop, on marginals without ties."""
    p, q = random_laws(1, 60, *sizes)
    loop = {"max": oracle.argmax_greedy, "zero": oracle.zero_greedy}[rule]
    expected = np.stack([oracle.dense(loop(a, b), sizes) for a, b in zip(p, q)])
    _, joint = solve(p, q, rule)
    np.testing.assert_allclose(joint, expected, atol=1e-14)


def test_heap_oracle_agrees_with_the_loop_oracle():
    p, q = random_laws(2, 30, 40, 7)
    for a, b in zip(p, q):
        heap, loop = oracle.heap_greedy(a, b), oracle.argmax_greedy(a, b)
        np.testing.assert_allclose(oracle.dense(heap, (40, 7)), oracle.dense(loop, (40, 7)), atol=1e-14)


@pytest.mark.parametrize(("sizes", "bound"), [((6, 5), 1e-6), ((4, 48), 1e-6)])
def test_marginals_and_support_in_float32(sizes, bound):
    """Properties 1, 2 and 3: marginals, mass, support, forest."""
    p, q = (x.astype(np.float32) for x in random_laws(3, 60, *sizes))
    for rule in ("max", "best"):
        coupling, joint = solve(p, q, rule)
        assert np.abs(joint.sum(2) - p).max() < bound
        assert np.abs(joint.sum(1) - q).max() < bound
        assert joint.min() >= 0
        assert ((joint > 0).sum((1, 2)) <= sum(sizes) - 1).all()
        assert bool(jnp.all(coupling.valid))
        assert all(is_forest(cells) for cells in joint)


def is_forest(joint):
    """Union-find over the symbols of both sides: no cell closes a cycle."""
    parent = list(range(sum(joint.shape)))

    def root(node):
        while parent[node] != node:
            node = parent[node]
        return node

    for i, j in zip(*np.nonzero(joint)):
        a, b = root(i), root(joint.shape[0] + j)
        if a == b:
            return False
        parent[a] = b
    return True


def test_marginals_in_float64_and_no_residue(x64):
    """Properties 1 and 2: 1e-12, and no cell that is rounding: 0.3 - 0.1 - 0.1 against 0.1."""
    p, q = random_laws(4, 60, 6, 5)
    _, joint = solve(p, q)
    assert np.abs(joint.sum(2) - p).max() < 1e-14
    for p, q in [
        (np.full(10, 0.1), np.array([0.3, 0.3, 0.4])),
        (np.full(1000, 0.001), np.array([1.0])),
        (np.full(49, 1 / 49), np.full(7, 1 / 7)),
    ]:
        coupling = greedy_coupling(p, q)
        weights = np.asarray(coupling.weights)
        assert weights[weights > 0].min() > 1e-12
        assert np.abs(coupling.dense((len(p), len(q))).sum(0) - q).max() < 1e-12


@pytest.mark.parametrize("rule", ["max", "zero", "best"])
def test_easy_families_are_solved(rule, x64):
    """Property 6: equal marginals, uniform against uniform, a point mass."""
    p = np.array([0.1, 0.25, 0.3, 0.35])
    assert float(greedy_coupling(p, p[::-1], rule=rule).entropy) == pytest.approx(oracle.entropy(p))
    uniform = greedy_coupling(np.full(12, 1 / 12), np.full(4, 0.25), rule=rule)
    assert float(uniform.entropy) == pytest.approx(math.log2(12))
    point = greedy_coupling(p, np.array([0.0, 1.0]), rule=rule)
    assert float(point.entropy) == pytest.approx(oracle.entropy(p))


def test_against_the_optimum(x64):
    """Properties 4, 5 and 7: order of the bounds, guarantees, exact in at least 75 % of small pairs."""
    rng = np.random.default_rng(5)
    p, q = np.zeros((300, 4)), np.zeros((300, 4))
    for row in range(300):
        n, m = rng.integers(2, 5, size=2)
        p[row, :n], q[row, :m] = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))
    optimum = exact_entropies(p, q)
    entropies = {rule: np.asarray(solve(p, q, rule)[0].entropy) for rule in ("max", "zero", "best")}
    bounds = [np.asarray(bound) for bound in jax.jit(jax.vmap(coupling_bounds))(p, q)]
    highest, meet, profile, strongest = bounds
    for low, high in [(highest, meet), (highest, profile), (meet, strongest), (profile, strongest)]:
        assert (low <= high + 1e-9).all()
    assert (strongest <= optimum + 1e-9).all()
    for value in entropies.values():
        assert (value >= optimum - 1e-9).all()
    assert (entropies["max"] <= profile + _PROFILE_GAP + 1e-9).all()
    assert (entropies["max"] <= meet + math.log2(math.e)).all()
    assert (np.abs(entropies["max"] - optimum) < 1e-9).mean() >= 0.75
    assert (entropies["max"] - optimum).mean() <= 0.02
    assert (entropies["best"] <= np.minimum(entropies["max"], entropies["zero"]) + 1e-12).all()
    assert (entropies["best"] < entropies["max"] - 1e-9).any()


def test_exact_oracles_agree():
    p, q = random_laws(6, 15, 4, 3)
    expected = [exact_entropy_by_search(a, b) for a, b in zip(p, q)]
    np.testing.assert_allclose(exact_entropies(p, q), expected, atol=1e-10)


def test_guarantee_on_larger_pairs(x64):
    """Property 5: the profile bound on 64 symbols, and the majorization bound of the oracle."""
    p, q = random_laws(7, 20, 40, 40, concentration=0.3)
    entropies = np.asarray(solve(p, q)[0].entropy)
    bounds = jax.jit(jax.vmap(coupling_bounds))(p, q)
    assert (entropies <= np.asarray(bounds.profile) + _PROFILE_GAP).all()
    assert (entropies <= [majorization(a, b) + math.log2(math.e) for a, b in zip(p, q)]).all()


@pytest.mark.parametrize("sizes", [(4, 48), (48, 4)])
def test_kernels_agree_bit_for_bit(sizes):
    """Property 9: the small-alphabet kernel returns what the plain one does, cells in the same order."""
    p, q = (x.astype(np.float32) for x in random_laws(8, 60, *sizes))
    plain, small = solve(p, q, kernel="plain")[0], solve(p, q, kernel="small")[0]
    np.testing.assert_array_equal(plain.indices, small.indices)
    np.testing.assert_array_equal(plain.weights, small.weights)


def test_batches_padding_permutation_and_transposition(x64):
    """Property 10: nested vmap equals a loop; zeros change nothing; symbols may be permuted and sides swapped."""
    p, q = random_laws(9, 4, 6, 5)
    nested = jax.jit(jax.vmap(jax.vmap(greedy_coupling)))(p.reshape(2, 2, 6), q.reshape(2, 2, 5))
    for row, (a, b) in enumerate(zip(p, q)):
        single = greedy_coupling(a, b)
        np.testing.assert_array_equal(single.indices, nested.indices.reshape(4, -1, 2)[row])
        joint = np.asarray(single.dense((6, 5)))
        padded = greedy_coupling(np.append(a, [0.0, 0.0]), np.insert(b, 2, 0.0)).dense((8, 6))
        np.testing.assert_allclose(np.delete(padded[:6], 2, axis=1), joint, atol=1e-15)
        order = np.random.default_rng(row).permutation(6)
        np.testing.assert_allclose(greedy_coupling(a[order], b).dense((6, 5)), joint[order], atol=1e-15)
        np.testing.assert_allclose(greedy_coupling(b, a).dense((5, 6)), joint.T, atol=1e-15)
    half_mapped = jax.vmap(greedy_coupling, in_axes=(None, 0))(p[0], q)
    np.testing.assert_array_equal(half_mapped.indices[0], greedy_coupling(p[0], q[0]).indices)


def test_integer_masses_are_exact():
    """Property 1: counts give counts; both marginals are met exactly."""
    rng = np.random.default_rng(10)
    p, q = rng.multinomial(1 << 30, rng.dirichlet(np.ones(6))), rng.multinomial(1 << 30, rng.dirichlet(np.ones(5)))
    coupling = greedy_coupling(jnp.array(p, jnp.int32), jnp.array(q, jnp.int32))
    joint = np.asarray(coupling.dense((6, 5)))
    assert joint.dtype == np.int32
    np.testing.assert_array_equal(joint.sum(1), p)
    np.testing.assert_array_equal(joint.sum(0), q)
    assert float(coupling.entropy) == pytest.approx(oracle.entropy(joint / (1 << 30)), abs=1e-5)


@pytest.mark.parametrize("sizes", [(4, 3), (2, 16)])
def test_entropy_gradient(sizes, x64):
    """Property 11: the gradient of the joint entropy, which is scale-free, equals central differences."""
    p, q = (x[0] for x in random_laws(12, 1, *sizes, concentration=5.0))
    value = jax.jit(lambda p, q: greedy_coupling(p, q).entropy)
    gradients = jax.grad(value, argnums=(0, 1))(p, q)
    rng = np.random.default_rng(13)
    for _ in range(3):
        dp, dq = rng.normal(size=sizes[0]) * p, rng.normal(size=sizes[1]) * q
        dp, dq = dp - p * dp.sum(), dq - q * dq.sum()
        numeric = (value(p + 1e-6 * dp, q + 1e-6 * dq) - value(p - 1e-6 * dp, q - 1e-6 * dq)) / 2e-6
        assert float(gradients[0] @ dp + gradients[1] @ dq) == pytest.approx(float(numeric), rel=1e-5)
    # Scale-free: the gradient has no component along the masses themselves.
    assert abs(float(gradients[0] @ p)) < 1e-12


def test_gradient_has_no_nan_at_zero_mass():
    """Property 11: absent symbols have a finite gradient."""
    p, q = jnp.array([0.5, 0.0, 0.5]), jnp.array([0.7, 0.3, 0.0])
    for rule in ("max", "best"):
        gradients = jax.grad(lambda p, q, r=rule: greedy_coupling(p, q, rule=r).entropy, argnums=(0, 1))(p, q)
        assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        ([0.5, -0.1, 0.6], "negative"),
        ([0.5, 0.4], "sum of p"),
        ([0.5, float("nan")], "NaN"),
        ([], "at least one symbol"),
        ([[0.5, 0.5]], "vmap"),
    ],
)
def test_bad_marginals_are_errors(p, message):
    with pytest.raises(ValueError, match=message):
        greedy_coupling(jnp.array(p), jnp.array([0.5, 0.5]))


def test_bad_marginals_are_flagged_inside_jit():
    couple = jax.jit(greedy_coupling)
    for bad in ([0.5, -0.1, 0.6], [0.5, 0.4, 0.0], [0.5, jnp.nan, 0.5]):
        coupling = couple(jnp.array(bad), jnp.array([0.5, 0.5]))
        assert not bool(coupling.valid)
        assert bool(jnp.all(jnp.isnan(coupling.weights)))
    counts = couple(jnp.array([3, 3, 1]), jnp.array([4, 4]))
    assert not bool(counts.valid)
    with pytest.raises(ValueError, match="equal totals"):
        greedy_coupling(jnp.array([3, 3]), jnp.array([4, 4]))
    with pytest.raises(ValueError, match="rule='median'"):
        greedy_coupling(jnp.array([1.0]), jnp.array([1.0]), rule="median")
