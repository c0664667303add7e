import jax
import jax.numpy as jnp
import moocore
import numpy as np
import pytest

from jaxrl_suite import pareto


def test_igd_plus_equals_moocore(x64):
    rng = np.random.default_rng(0)
    points, front = rng.random((10, 3)), rng.random((7, 3)) + 0.3
    expected = moocore.igd_plus(points, ref=front, maximise=True)
    assert float(jax.jit(pareto.igd_plus)(points, front)) == pytest.approx(expected, rel=1e-12)
    padded = np.concatenate([points, np.full((2, 3), np.nan)])
    masked = pareto.igd_plus(padded, front, mask=np.arange(12) < 10)
    assert float(masked) == pytest.approx(expected, rel=1e-12)
    assert np.isinf(pareto.igd_plus(padded, front, mask=np.zeros(12, bool)))


def test_r2_converges_to_moocore(x64):
    """With ever finer weightings the mean approaches the exact integral in two dimensions."""
    points = np.random.default_rng(0).random((6, 2))
    share = (np.arange(4000) + 0.5) / 4000
    weights = np.stack([share, 1 - share], axis=1)
    expected = moocore.r2_exact(points, ref=np.ones(2) * 1.1, maximise=True)
    assert float(pareto.r2(points, weights, np.ones(2) * 1.1)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "indicator",
    [
        lambda points, mask: pareto.igd_plus(points, jnp.array([[1.0, 2.0]]), mask=mask),
        lambda points, mask: pareto.r2(points, jnp.array([[0.5, 0.5]]), jnp.full(2, 4.0), mask=mask),
    ],
    ids=["igd_plus", "r2"],
)
def test_nan_that_counts_is_an_error_or_nan(indicator):
    """NaN must not look like a distance of nothing, and masked rows reach no derivative."""
    points, mask = jnp.array([[0.5, 1.0], [jnp.nan, 2.0]]), jnp.array([True, False])
    with pytest.raises(ValueError, match=r"points\[1\].*must not be NaN"):
        indicator(points, mask | True)
    assert np.isnan(jax.jit(indicator)(points, mask | True))
    value, slope = jax.jit(jax.value_and_grad(indicator))(points, mask)
    assert float(value) == float(indicator(points[:1], mask[:1])) > 0
    assert np.isfinite(slope).all() and slope[0].any() and not slope[1].any()


def test_scalarisers_by_hand(x64):
    objectives, weights, ideal = jnp.array([0.5, 0.2]), jnp.array([0.25, 0.75]), jnp.ones(2)
    assert float(pareto.linear(objectives, weights)) == pytest.approx(0.275)
    assert float(pareto.tchebycheff(objectives, weights, ideal)) == pytest.approx(-0.6)
    assert float(pareto.tchebycheff(objectives, weights, ideal, augmentation=0.1)) == pytest.approx(-0.6 - 0.0725)
    smooth = pareto.smooth_tchebycheff(objectives, weights, ideal, temperature=0.1)
    assert float(smooth) == pytest.approx(-0.1 * np.log(np.exp(1.25) + np.exp(6.0)))
    direction = np.array([0.25, 0.75]) / np.sqrt(0.625)
    along = np.array([0.5, 0.8]) @ direction
    across = np.linalg.norm(np.array([0.5, 0.8]) - along * direction)
    assert float(pareto.boundary_intersection(objectives, weights, ideal)) == pytest.approx(-(along + 5 * across))
    on_ray = pareto.boundary_intersection(ideal - 0.4 * weights, weights, ideal)
    assert float(on_ray) == pytest.approx(-0.4 * np.sqrt(0.625))
    assert np.all(np.isfinite(jax.grad(pareto.boundary_intersection)(ideal - 0.4 * weights, weights, ideal)))


def test_tchebycheff_weights_are_the_gradient_of_the_smooth_scalariser(x64):
    """The rule's weights are the normalised gradient of the scalariser."""
    objectives, weights, ideal = jnp.array([0.5, 0.2, 0.9]), jnp.array([0.2, 0.5, 0.3]), jnp.ones(3)
    slope = jax.grad(pareto.smooth_tchebycheff)(objectives, weights, ideal, temperature=0.1)
    rule = pareto.tchebycheff_weights(weights, ideal, temperature=0.1)
    _, effective = rule.step(rule.init(), pareto.Signals(objectives=objectives))
    np.testing.assert_allclose(effective, slope / slope.sum(), rtol=1e-10)
