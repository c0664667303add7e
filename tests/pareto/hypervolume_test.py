import jax
import jax.numpy as jnp
import moocore
import numpy as np
import pytest

from jaxrl_suite.envs.deep_sea_treasure import known_front
from jaxrl_suite.pareto import hypervolume, hypervolume_contributions, hypervolume_gradient, hypervolume_improvement
from tests.reference import pareto_hypervolume as reference

N = 16  # one shape a dimension, so that masks carry the variety of sizes
volume = jax.jit(lambda points, origin, mask: hypervolume(points, origin, mask=mask))
contributions = jax.jit(lambda points, origin, mask: hypervolume_contributions(points, origin, mask=mask))
slope = jax.jit(jax.grad(lambda points, origin, mask: hypervolume(points, origin, mask=mask)))


def cases(num_objectives, seed=0):
    """Random, tied, duplicate, dominated, masked, below the reference and empty sets."""
    rng = np.random.default_rng(seed)
    everything = np.ones(N, bool)
    random = rng.normal(size=(N, num_objectives)) + 0.8
    yield "random, some below", random, everything
    yield "tied", np.round(2 * random) / 2, everything
    yield "duplicates", np.repeat(random[: N // 2], 2, axis=0), everything
    sphere = np.abs(rng.normal(size=(N, num_objectives)))
    yield "front", sphere / np.linalg.norm(sphere, axis=1, keepdims=True), everything
    yield "one above all", np.concatenate([random[:-1], random.max(0)[None] + 0.1]), everything
    half = rng.random(N) < 0.5
    yield "masked", np.where(half[:, None], random, np.nan), half
    yield "all below", -np.abs(random), everything
    yield "on the reference", np.where(rng.random(random.shape) < 0.3, 0.0, np.abs(random)), everything
    yield "empty", random, ~everything


@pytest.mark.parametrize("num_objectives", [2, 3, 4, 5])
def test_equals_moocore(num_objectives, x64):
    """Property 1: equals moocore to 1e-12 in float64."""
    origin = np.zeros(num_objectives)
    for name, points, mask in cases(num_objectives):
        expected = moocore.hypervolume(points[mask], ref=origin, maximise=True) if mask.any() else 0.0
        assert float(volume(points, origin, mask)) == pytest.approx(expected, rel=1e-12, abs=1e-12), name
        if num_objectives == 3 and mask.all():
            shares = moocore.hv_contributions(points, ref=origin, maximise=True, ignore_dominated=False)
            np.testing.assert_allclose(contributions(points, origin, mask), shares, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("num_objectives", [2, 3])
def test_float32_equals_moocore(num_objectives):
    """Property 1: to 1e-6 relative in float32."""
    origin = np.zeros(num_objectives, np.float32)
    for name, points, mask in cases(num_objectives):
        points = points.astype(np.float32)
        expected = moocore.hypervolume(points[mask].astype(float), ref=origin, maximise=True) if mask.any() else 0.0
        assert float(volume(points, origin, mask)) == pytest.approx(expected, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("num_points", [1, 7, 64])
def test_other_sizes(num_points, x64):
    """Property 1 for sizes that are no power of two, and for 64."""
    points = np.random.default_rng(num_points).normal(size=(num_points, 3)) + 0.5
    expected = moocore.hypervolume(points, ref=np.zeros(3), maximise=True)
    assert float(jax.jit(hypervolume)(points, np.zeros(3))) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_equals_the_grid_of_cells(x64):
    """The slow NumPy oracle, written from the definition, agrees with moocore and with us; reference not zero."""
    points, origin = np.random.default_rng(3).normal(size=(6, 4)), -np.array([0.5, 1.0, 1.5, 0.7])
    expected = reference.hypervolume(points, origin)
    assert float(jax.jit(hypervolume)(points, origin)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_laws(num_objectives, x64):
    """Property 2: monotone, invariant to order, duplicates, dominated and masked rows; scales by the product."""
    rng = np.random.default_rng(0)
    points, origin = rng.random((N, num_objectives)), np.zeros(num_objectives)
    few, every = np.arange(N) < 10, np.ones(N, bool)
    base = float(volume(points, origin, few))
    assert float(volume(points, origin, every)) >= base
    permuted = np.concatenate([points[:10][rng.permutation(10)], points[10:]])
    assert float(volume(permuted, origin, few)) == pytest.approx(base, rel=1e-13)
    assert float(volume(np.concatenate([points[:10], points[:6]]), origin, every)) == pytest.approx(base, rel=1e-13)
    dominated = np.concatenate([points[:10], 0.9 * points[:6]])
    assert float(volume(dominated, origin, every)) == pytest.approx(base, rel=1e-13)
    assert float(volume(np.concatenate([points[:10], np.full((6, num_objectives), np.nan)]), origin, few)) == base
    scale = rng.random(num_objectives) + 0.5
    assert float(volume(points * scale, origin, few)) == pytest.approx(base * np.prod(scale), rel=1e-12)


def test_closed_forms(x64):
    """Property 4: deep-sea treasure and the sphere; the error of sampling shrinks like 1/n."""
    exact = jax.jit(hypervolume)
    for layout, origin, expected in (
        ("concave", (0, -25), 1155.0),
        ("concave", (0, -50), 4255.0),
        ("convex", (0, -25), 401.8),
        ("convex", (0, -50), 994.3),
    ):
        assert float(exact(known_front(layout), np.array(origin, float))) == pytest.approx(expected, rel=1e-12)
    ends = known_front("concave")[[0, -1]]
    assert float(exact(ends, np.array([0.0, -25.0]))) == 762.0
    discounted = known_front("concave", discount=0.99)
    assert float(exact(discounted, np.array([0.0, -50.0]))) == pytest.approx(3688.377, abs=5e-4)

    def error(num_points):
        angle = (np.arange(num_points) + 0.5) / num_points * np.pi / 2
        costs = np.stack([np.cos(angle), np.sin(angle)], 1)  # DTLZ2: minimised, reference 1
        return (1 - np.pi / 4) - float(exact(-costs, -np.ones(2)))

    assert 0 < error(400) < 0.6 * error(200) < 0.6 * 0.6 * error(100) < 0.01


@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_gradient_equals_differences_of_the_oracle(num_objectives, x64):
    """Property 5: equals finite differences; zero for dominated points."""
    rng = np.random.default_rng(1)
    points, origin = np.zeros((N, num_objectives)), np.zeros(num_objectives)
    points[:5] = rng.random((5, num_objectives)) + 0.2
    points[4] = 0.9 * points[0]
    gradient = np.asarray(slope(points, origin, np.arange(N) < 5))
    np.testing.assert_allclose(gradient[:5], reference.gradient(points[:5], origin), rtol=1e-6, atol=1e-8)
    assert np.all(gradient[4:] == 0)


def test_gradient_in_space_equals_differences_of_moocore(x64):
    """Property 5 for fronts that take several blocks of the walk, some points dominated, some below the reference."""
    points = np.random.default_rng(2).normal(size=(40, 3)) + 0.4
    points[:30] = np.abs(points[:30]) / np.linalg.norm(points[:30], axis=1, keepdims=True)
    expected, step = np.zeros_like(points), 1e-6
    for index in np.ndindex(points.shape):
        ends = []
        for sign in (1, -1):
            shifted = points.copy()
            shifted[index] += sign * step
            ends.append(moocore.hypervolume(shifted, ref=np.zeros(3), maximise=True))
        expected[index] = (ends[0] - ends[1]) / (2 * step)
    gradient = np.asarray(jax.jit(jax.grad(hypervolume))(points, np.zeros(3)))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-8)
    assert 0 < np.sum(np.all(gradient == 0, axis=1)) < 40


@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_facets_add_up_to_shadow_and_volume(num_objectives, x64):
    """A common shift along an axis grows the volume by the shadow on the other axes, a common scaling by the volume:
    at ties, duplicates and masks too, where facets are shared and differences do not apply."""
    origin = np.zeros(num_objectives)
    for name, points, mask in cases(num_objectives):
        gradient = np.asarray(slope(points, origin, mask))
        live = mask & (np.nan_to_num(points) > 0).all(1)
        assert np.all(gradient >= 0) and np.all(gradient[~live] == 0), name
        total = reference.hypervolume(points[live], origin) if num_objectives < 4 else volume(points, origin, mask)
        for axis in range(num_objectives):
            rest = np.delete(points[live], axis, 1)
            shadow = moocore.hypervolume(rest, ref=origin[1:], maximise=True) if live.any() else 0
            assert gradient[:, axis].sum() == pytest.approx(shadow, rel=1e-12, abs=1e-12), name
            assert gradient[live, axis] @ points[live, axis] == pytest.approx(float(total), rel=1e-12, abs=1e-12), name


def test_gradient_is_the_facet_in_two_dimensions(x64):
    """Property 5: dHV/dx_i = y_i - y_next and dHV/dy_i = x_i - x_previous, sorted by x."""
    points = np.array([[3.0, 1.0], [2.0, 2.0], [0.5, 4.0]])
    gradient = jax.grad(hypervolume)(points, np.zeros(2))
    np.testing.assert_allclose(gradient, [[1.0, 1.0], [1.0, 1.5], [2.0, 0.5]], atol=1e-14)
    for i in range(3):
        facets = hypervolume_gradient(points[i], np.delete(points, i, 0), np.zeros(2))
        np.testing.assert_allclose(facets, gradient[i], atol=1e-14)


def test_gradient_at_ties_is_a_subgradient(x64):
    """Two points that share a coordinate: one lies above the other, the facets add up to the joint one."""
    points = np.array([[1.0, 2.0, 5.0], [2.0, 1.0, 5.0]])
    gradient = np.asarray(jax.jit(jax.grad(hypervolume))(points, np.zeros(3)))
    assert sorted(gradient[:, 2]) == [1.0, 2.0]


def test_nan_that_counts_is_an_error_or_nan_and_never_a_smaller_volume():
    points = jnp.array([[3.0, 1.0], [jnp.nan, 2.0]])
    with pytest.raises(ValueError, match=r"points\[1\].*NaN.*mask="):
        hypervolume(points, jnp.zeros(2))
    volume = jax.jit(lambda points, mask: hypervolume(points, jnp.zeros(2), mask=mask))
    assert np.isnan(volume(points, jnp.array([True, True])))
    assert float(volume(points, jnp.array([True, False]))) == 3.0
    batch = jnp.stack([points, jnp.array([[3.0, 1.0], [1.0, 2.0]])])
    np.testing.assert_array_equal(jax.vmap(lambda p: hypervolume(p, jnp.zeros(2)))(batch), [np.nan, 4.0])


def test_nan_that_counts_reaches_the_derivative():
    """A weight rule that reads derivatives must not take those of the other points for the truth."""
    points = jnp.array([[3.0, 1.0], [jnp.nan, 2.0]])
    gradient = jax.jit(jax.grad(lambda p: hypervolume(p, jnp.zeros(2))))(points)
    assert np.isnan(gradient[0]).all()


IN_THE_SET = {
    "contributions": lambda points, mask: hypervolume_contributions(points, jnp.zeros(2), mask=mask),
    "improvement": lambda points, mask: hypervolume_improvement(jnp.full(2, 1.5), points, jnp.zeros(2), mask=mask),
    "gradient": lambda points, mask: hypervolume_gradient(jnp.full(2, 1.5), points, jnp.zeros(2), mask=mask),
}


@pytest.mark.parametrize("name", IN_THE_SET)
def test_nan_in_the_set_is_an_error_or_nan(name):
    function = IN_THE_SET[name]
    points, mask = jnp.array([[3.0, 1.0], [jnp.nan, 2.0], [1.0, 2.0]]), jnp.array([True, False, True])
    with pytest.raises(ValueError, match=r"points\[1\].*NaN.*mask="):
        function(points, mask | True)
    assert np.isnan(jax.jit(function)(points, mask | True)).all()
    expected = function(jnp.nan_to_num(points), mask)
    np.testing.assert_array_equal(function(points, mask), expected)
    np.testing.assert_array_equal(jax.jit(function)(points, mask), expected)
    assert np.isfinite(expected).all()


def test_masked_rows_contribute_nothing_beside_nan():
    points, mask = jnp.array([[3.0, 1.0], [jnp.nan, 2.0], [1.0, 2.0]]), jnp.array([True, True, False])
    shares = jax.jit(lambda points: hypervolume_contributions(points, jnp.zeros(2), mask=mask))(points)
    np.testing.assert_array_equal(shares, [np.nan, np.nan, 0.0])


@pytest.mark.parametrize("function", [hypervolume_improvement, hypervolume_gradient])
@pytest.mark.parametrize("number", [0, 1])
def test_nan_in_the_point_is_an_error_or_nan(function, number):
    points, point = jnp.ones((number, 2)), jnp.array([2.0, jnp.nan])
    with pytest.raises(ValueError, match=r"point=\[2.0, nan\]: must not be NaN"):
        function(point, points, jnp.zeros(2))
    assert np.isnan(jax.jit(function)(point, points, jnp.zeros(2))).all()


def test_nan_in_the_reference_is_an_error_or_nan():
    origin = jnp.array([0.0, jnp.nan])
    with pytest.raises(ValueError, match=r"reference=.*must not be NaN"):
        hypervolume(jnp.ones((2, 2)), origin)
    assert np.isnan(jax.jit(hypervolume)(jnp.ones((2, 2)), origin))


def test_masked_nan_reaches_no_derivative():
    points = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
    value, gradient = jax.value_and_grad(hypervolume)(points, jnp.zeros(2), mask=jnp.array([True, False]))
    assert float(value) == 2.0
    np.testing.assert_array_equal(gradient, [[2.0, 1.0], [0.0, 0.0]])


def test_official_goldens(x64):
    """Property 6: golden values of the official code; where that code raises, the gain is 0 as in moocore."""
    origin, front = jnp.array([0.33, -1930.0, 0.36]), jnp.array([[0.50, -1500.0, 0.50]])
    gain = jax.jit(lambda point: hypervolume_improvement(point, front, origin))
    assert float(gain(jnp.array([0.60, -1400.0, 0.55]))) == pytest.approx(16.955, rel=1e-12)
    for point in ((0.45, -1600.0, 0.45), (0.30, -1400.0, 0.60), (0.55, -1400.0, 0.30)):
        assert float(gain(jnp.array(point))) == 0.0
    empty = hypervolume_improvement(jnp.array([0.34, -1900.0, 0.40]), jnp.zeros((0, 3)), origin)
    assert float(empty) == pytest.approx(0.012, rel=1e-12)


def test_nested_vmap_is_one_batch(x64):
    """Property 7: vmap of vmap, with the reference shared, equals a loop; also of the gradient."""
    points, origin = np.random.default_rng(0).random((2, 3, 5, 3)), np.zeros(3)
    both = jax.jit(jax.vmap(jax.vmap(jax.value_and_grad(hypervolume), (0, None)), (0, None)))
    values, gradients = both(points, origin)
    single = jax.jit(jax.grad(hypervolume))
    for i, j in np.ndindex(2, 3):
        assert float(values[i, j]) == pytest.approx(reference.hypervolume(points[i, j], origin), rel=1e-12)
        np.testing.assert_allclose(gradients[i, j], single(points[i, j], origin), atol=1e-14)


def test_new_masks_do_not_trace_again():
    """Property 7: no new compilation when only the mask changes."""
    traces = []

    @jax.jit
    def counted(points, mask):
        traces.append(None)
        return hypervolume(points, jnp.zeros(2), mask=mask)

    counted(jnp.ones((3, 2)), jnp.array([True, False, True]))
    counted(jnp.ones((3, 2)), jnp.array([False, False, False]))
    assert len(traces) == 1


def test_integers_and_bad_shapes():
    assert float(hypervolume(jnp.array([[2, 3]]), jnp.array([0, 0]))) == 6.0
    with pytest.raises(ValueError, match=r"reference=\(3,\): must have shape \[K\]"):
        hypervolume(jnp.ones((4, 2)), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"points.*vmap a batch"):
        hypervolume(jnp.ones((2, 4, 2)), jnp.zeros(2))
    with pytest.raises(ValueError, match="mask"):
        hypervolume(jnp.ones((4, 2)), jnp.zeros(2), mask=jnp.ones(3, bool))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_narrow_floats_are_computed_wide_and_given_back(dtype, num_objectives):
    points = jax.random.uniform(jax.random.key(0), (8, num_objectives)).astype(dtype)
    origin = jnp.zeros(num_objectives, dtype)
    value, gradient = jax.value_and_grad(hypervolume)(points, origin)
    assert value.dtype == gradient.dtype == dtype
    exact, slope = jax.value_and_grad(hypervolume)(points.astype(jnp.float32), origin.astype(jnp.float32))
    assert value == exact.astype(dtype)  # one rounding, at the end
    np.testing.assert_array_equal(gradient, slope.astype(dtype))
