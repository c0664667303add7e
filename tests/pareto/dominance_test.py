import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite.pareto import archive_insert, hypervolume, init_archive, non_dominated
from tests.reference import pareto_hypervolume as reference

insert = jax.jit(lambda archive, point, label: archive_insert(archive, point, label=label))


def test_non_dominated_equals_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(5):
        points = rng.integers(0, 4, (12, 3)).astype(np.float32)  # ties and duplicates on purpose
        np.testing.assert_array_equal(non_dominated(jnp.asarray(points)), reference.non_dominated(points))
    mask = np.arange(12) % 2 == 0
    expected = np.zeros(12, bool)
    expected[mask] = reference.non_dominated(points[mask])
    garbage = np.where(mask[:, None], points, np.nan)
    np.testing.assert_array_equal(non_dominated(jnp.asarray(garbage), jnp.asarray(mask)), expected)


def test_non_dominated_refuses_nan_that_counts():
    points = jnp.array([[1.0, 2.0], [jnp.nan, 5.0]])
    with pytest.raises(ValueError, match=r"points\[1\].*must not be NaN"):
        non_dominated(points)
    assert jax.jit(non_dominated)(points).tolist() == [True, False]


def test_a_point_with_nan_is_an_error_or_a_gain_of_nan_and_never_enters():
    archive, *_ = insert(init_archive(2, jnp.zeros(2)), jnp.array([1.0, 2.0]), 0)
    with pytest.raises(ValueError, match=r"point=.*must not be NaN"):
        archive_insert(archive, jnp.array([3.0, jnp.nan]))
    with pytest.raises(ValueError, match=r"point=\(3,\): must have shape \(2,\)"):
        archive_insert(archive, jnp.ones(3))
    same, gain, overflow = insert(archive, jnp.array([3.0, jnp.nan]), 1)
    assert np.isnan(gain) and not bool(overflow)
    jax.tree.map(np.testing.assert_array_equal, same, archive)
    with pytest.raises(ValueError, match=r"reference=.*must not be NaN"):
        init_archive(2, jnp.array([0.0, jnp.nan]))


def test_gains_telescope(x64):
    """Property 3: gains are not negative, zero for dominated and repeated points, and sum to the final volume."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 3)) + 0.5
    points[20:24] = points[:4]
    archive, total = init_archive(32, jnp.zeros(3)), 0.0
    for step, point in enumerate(points):
        covered = any(np.all(q >= point) for q in points[:step]) or not np.all(point > 0)
        archive, gain, overflow = insert(archive, point, step)
        assert float(gain) >= 0 and not bool(overflow)
        assert (float(gain) == 0) == covered
        total += float(gain)
    assert total == pytest.approx(float(hypervolume(points, np.zeros(3))), rel=1e-12)
    kept = np.asarray(archive.points[archive.mask])
    best = points[(points > 0).all(1)]
    best = np.unique(best[reference.non_dominated(best)], axis=0)
    np.testing.assert_array_equal(np.unique(kept, axis=0), best)
    labels = np.asarray(archive.labels[archive.mask])
    np.testing.assert_array_equal(points[labels], kept)
    assert not np.any(np.asarray(archive.points[~archive.mask]))


def test_overflow_drops_the_least_contributor():
    """A full archive never drops silently: the flag rises, the count too, and the smallest share leaves."""
    archive = init_archive(3, jnp.zeros(2))
    for step, point in enumerate([[4.0, 1.0], [3.0, 2.0], [1.0, 4.0]]):
        archive, _, overflow = insert(archive, jnp.array(point), step)
        assert not bool(overflow)
    archive, gain, overflow = insert(archive, jnp.array([2.9, 2.1]), 3)
    # It adds 0.1 x 1.9; with it in, the member (3, 2) alone covers 0.1 x 1, the least of all.
    assert float(gain) == pytest.approx(0.19, rel=1e-5)
    assert bool(overflow) and int(archive.num_evicted) == 1
    assert sorted(np.asarray(archive.labels).tolist()) == [0, 2, 3]


def test_a_dominating_point_clears_the_archive():
    archive = init_archive(3, jnp.zeros(2))
    for step, point in enumerate([[4.0, 1.0], [3.0, 2.0], [1.0, 4.0], [5.0, 5.0]]):
        archive, _, overflow = insert(archive, jnp.array(point), step)
    assert not bool(overflow)
    assert np.asarray(archive.labels).tolist().count(-1) == 2 and 3 in np.asarray(archive.labels)


def test_bad_capacity():
    with pytest.raises(ValueError, match="capacity=0: must be a whole number of at least 1"):
        init_archive(0, jnp.zeros(2))
