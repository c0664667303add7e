"""What cannot be is refused by name, and what rounding loses is said: line by line of "Bad input"."""

import importlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import reward_free as rf
from jaxrl_suite.envs import mixtures
from jaxrl_suite.mdp import linear_mixture, validate_mixture
from jaxrl_suite.reward_free import regression

# The explorer that is quickest to compile; what is asked of it here holds for all.
CONFIG = rf.ExplorerConfig(algorithm="ucrl_rfe", horizon=4, num_episodes=3, output="final", project=False)
TWO_FAMILIES = rf.ExplorerConfig(horizon=4, num_episodes=3)


def kernels():
    return np.random.default_rng(3).dirichlet(np.ones(4), (3, 4, 2))


THETA = np.array([0.2, 0.3, 0.5])


def test_validator_names_row_and_kernel(x64):
    """A row of a base kernel, the row of the mixture that it spoils, and the norm of the features."""
    good = validate_mixture(kernels(), THETA)
    assert good.valid and not good.faults and not good.base_faults
    assert not good.normalised and good.feature_norm > 1
    broken = kernels()
    broken[1, 2, 1, 0] += 0.1
    found = validate_mixture(broken, THETA)
    assert not found.valid
    assert [(f.kernel, f.state, f.action) for f in (*found.faults, *found.base_faults)] == [("theta", 2, 1), (1, 2, 1)]
    np.testing.assert_allclose([found.faults[0].total, found.base_faults[0].total], [1.03, 1.1])
    assert "theta[2, 1] sums to 1.03" in str(found) and "base kernel 1[2, 1] sums to 1.1" in str(found)
    with pytest.raises(ValueError, match=r"kernel\[2, 1\].*sums to 1\.03.*base kernel 1\[2, 1\] sums to 1\.1"):
        mixtures.from_kernels(broken, THETA)


def test_validator_of_worlds(x64):
    """Worlds of the package are normalised kernels; signed base measures are no fault; a wrong parameter is."""
    for world in (mixtures.from_kernels(kernels(), THETA), mixtures.lock(5, 2, 2), mixtures.riverswim()):
        report = validate_mixture(world)
        assert report.valid and report.normalised, str(report)
        assert report.feature_norm == pytest.approx(1.0)
    assert validate_mixture(mixtures.lock(5, 2, 2)).base_faults
    report = validate_mixture(world.replace(theta=1.1 * world.theta))
    assert {fault.kernel for fault in report.faults} == {"theta"} and len(report.faults) == 12
    assert "and 7 more rows" in str(report)
    with pytest.raises(ValueError, match=r"mdp: kernel\[0, 0\].*sums to 1\.1"):
        rf.explore(jax.random.key(0), world.replace(theta=1.1 * world.theta), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: mixtures.from_kernels(kernels()[:0], THETA[:0]), r"kernels=\(0, 4, 2, 4\)"),
        (lambda: mixtures.from_kernels(kernels(), THETA[:2]), r"theta=\(2,\): must be \[D\] = \[3\]"),
        (lambda: mixtures.from_kernels(kernels(), np.array([-1.0, 1.0, 1.0])), "smallest entry -0"),
        (lambda: mixtures.from_kernels(kernels()[[0, 0]], THETA[:2] * 2), "Drop that direction"),
        (lambda: mixtures.from_kernels(kernels(), THETA, start=7), r"start=7: must be a state in 0\.\.3"),
        (lambda: mixtures.hard_instance(1), "dimension=1"),
        (lambda: mixtures.lock(4, 2, 9), "num_rooms=9"),
        (lambda: rf.ExplorerConfig(num_episodes=0), "num_episodes=0: must be at least 1"),
        (lambda: rf.ExplorerConfig(horizon=-3), "horizon=-3"),
        (lambda: rf.reward_bank(mixtures.lock(4, 2, 2), jax.random.key(0), 0), "horizon=0"),
        (lambda: validate_mixture(kernels()), "theta=None"),
    ],
)
def test_sizes_and_kernels_that_cannot_be(x64, change, message):
    with pytest.raises(ValueError, match=message):
        change()


def test_whole_numbers_become_floats():
    features = np.zeros((1, 1, 1, 1), int) + 1
    world = linear_mixture(features, np.zeros((1, 1, 1), int), np.array([1]))
    assert jnp.issubdtype(world.features.dtype, jnp.floating) and world.norm_bound.dtype == world.features.dtype


def test_files_that_are_no_worlds(tmp_path):
    text, objects = tmp_path / "world.txt", tmp_path / "objects.npz"
    text.write_text("kernels")
    np.savez(objects, kernels=kernels().astype(object), theta=THETA)
    for path in (text, objects):
        with pytest.raises(ValueError, match=r"must be an \.npz of number arrays"):
            mixtures.from_tables(path)


@pytest.fixture(scope="module")
def float32_run():
    """One compiled explorer in float32; finished with its statistics as they are, and scaled beyond its precision."""
    with jax.enable_x64(False):
        world = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, mixtures.from_kernels(kernels(), THETA)
        )

        @jax.jit
        def run(key, scale):
            hparams = rf.HParams()
            state = rf.init_explorer(key, world, CONFIG, hparams)
            state, history = rf.advance(world, CONFIG, hparams, state, jnp.int32(0), CONFIG.num_episodes)
            statistics = jax.tree.map(lambda x: scale * x, state.inner.statistics)
            state = state._replace(inner=state.inner._replace(statistics=statistics))
            return rf.finish(world, CONFIG, state, history)

        return world, [run(jax.random.key(0), jnp.float32(scale)) for scale in (1.0, 1e14)]


def test_plans_for_rewards_outside_the_class_are_refused_or_flagged(float32_run):
    """The path is named; inside jit the plan is flagged, by the longest path and not by its value."""
    _, (found, _) = float32_run
    rewards = jnp.zeros((2, 4, 4, 2), jnp.float32).at[1, :, :, 0].set(0.3)
    with pytest.raises(
        ValueError, match=r"rewards\[1\]: the path of \(state, action\) pairs .* collects 1\.2, above 1"
    ):
        rf.plan(found, rewards)
    with pytest.raises(ValueError, match=r"\(0, 3, 2, 1\)\]=nan"):
        rf.plan(found, rewards.at[0, 3, 2, 1].set(jnp.nan))
    with pytest.raises(ValueError, match=r"policy=\(2, 3, 4\)"):
        rf.suboptimality(float32_run[0], jnp.zeros((2, 3, 4), int), rewards)
    # To stay in state 0 collects 1.2 and is unlikely, so that the value says nothing; the path does. Other rewards:
    # negative where the run starts, and negative where it cannot be at the first step.
    hidden, low = rewards.at[0, :, 0].set(0.3)[0], rewards.at[0, 0, 0, 0].set(-0.1)[0]
    unreached = rewards.at[0, 0, 1, 0].set(-0.1)[0]
    planned = jax.jit(lambda r: rf.plan(found, r))(jnp.concatenate([rewards, jnp.stack([hidden, low, unreached])]))
    assert planned.outside.tolist() == [False, True, True, True, False]
    assert 0.0 < float(planned.values[2]) < 0.9
    with pytest.raises(ValueError, match=r"collects 1\.2, above 1"):
        rf.plan(found, hidden[None])
    assert rf.plan(found, rewards[:1]).outside.tolist() == [False]


def test_float32_warns_before_and_flags_after(float32_run):
    """Sums of 1e14 leave nothing of a float32 regression: the flag says so; a short run is harmless."""
    world, (fine, lost) = float32_run
    assert fine.model.dtype == jnp.float32
    assert bool(fine.precise) and float(fine.rounding) < 1e-3
    assert not bool(lost.precise)
    long = TWO_FAMILIES.replace(horizon=1024, num_episodes=1000)
    # Warnings are errors here, so that the run ends where it warns: before anything is traced.
    with warnings.catch_warnings(), jax.enable_x64(False):
        warnings.simplefilter("error")
        with pytest.raises(rf.PrecisionWarning, match="H=1024, K=1000: rounding may move"):
            rf.explore(jax.random.key(0), world, long)
        with pytest.raises(rf.PrecisionWarning, match="num_moments=9"):
            rf.explore(jax.random.key(0), world, CONFIG.replace(num_moments=9))
    with warnings.catch_warnings(), jax.enable_x64(True):
        warnings.simplefilter("error")
        exact = mixtures.from_kernels(kernels(), THETA)
        jax.eval_shape(lambda key: rf.explore(key, exact, long), jax.random.key(0))


def test_rounding_bound_covers_what_float32_loses(x64):
    """The same weighted samples, summed and solved in both precisions: their distance is below the bound."""
    generator = np.random.default_rng(0)
    features = np.concatenate([np.ones((20_000, 1)), generator.normal(size=(20_000, 3)) * [0.5, 0.05, 0.005]], axis=1)
    weights, theta = generator.uniform(1, 1000, 20_000), np.array([1.0, -0.5, 0.3, 0.2])
    targets = features @ theta + generator.normal(size=20_000)
    fits = []
    for dtype in (jnp.float64, jnp.float32):
        x, y, w = (jnp.asarray(part, dtype) for part in (features, targets, weights))
        empty = regression.init_statistics((), jnp.asarray(1.0, dtype), jnp.zeros(4, dtype))

        @jax.jit
        def total(statistics, *samples):
            def add(statistics, chunk):
                return regression.add_samples(statistics, *chunk), None

            statistics, _ = jax.lax.scan(add, statistics, samples)
            return regression.fit(statistics).theta, statistics.gram

        fits.append(total(empty, *(part.reshape(100, 200, *part.shape[1:]) for part in (x, y, w))))
    (exact, gram), (rounded, gram32) = fits
    gap = np.asarray(exact - rounded)
    error, bound = float(np.sqrt(gap @ np.asarray(gram) @ gap)), float(rf.rounding_error(gram32, rounded))
    assert error <= bound <= 1e5 * error


def test_failed_factorisations_are_flagged(float32_run):
    """A covariance that is not positive definite: no silent NaN, the certificate says 1."""
    _, (found, _) = float32_run
    ruined = found._replace(estimate=found.estimate._replace(gram=-found.estimate.gram), finite=jnp.array(False))
    world, hparams = float32_run[0], rf.HParams()
    with jax.enable_x64(False):
        assert float(jax.jit(lambda e: rf.certificate(world, CONFIG, hparams, e).bound)(ruined)) == 1.0
        with pytest.raises(ValueError, match="Pass the configuration of the exploration"):
            rf.certificate(world, TWO_FAMILIES, hparams, found)


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        (rf.HParams(ridge_scale=0.0), r"HParams\.ridge_scale=0\.0: must be positive"),
        (rf.HParams(delta=1.5), r"HParams\.delta=1\.5: must be in \(0, 1\)"),
        (rf.HParams(radius_scale=float("nan")), r"HParams\.radius_scale"),
    ],
)
def test_hyperparameters_that_cannot_be(hparams, message):
    with pytest.raises(ValueError, match=message):
        rf.explore(jax.random.key(0), mixtures.lock(4, 2, 2), CONFIG, hparams)


@pytest.mark.parametrize(
    ("study", "argument"), [("ablations", "variants"), ("baselines", "explorers"), ("certificates", "worlds")]
)
def test_studies_refuse_names_that_they_do_not_have(study, argument):
    configuration = importlib.import_module(f"experiments.reward_free.{study}").STUDY.config
    with pytest.raises(ValueError, match=f"{argument}=\\['nothing'\\]: must be among"):
        configuration(**{argument: ("nothing",)})


def test_rewards_of_numpy_are_planned_for_without_a_warning():
    """NumPy's float64 and lists, as people write their own rewards; warnings are errors here."""
    world = mixtures.lock(4, 2, 2)
    found = jax.jit(lambda key: rf.explore(key, world, CONFIG))(jax.random.key(0))
    own = np.zeros((1, 4, 4, 2))
    own[:, -1, 3] = 1.0
    expected = rf.plan(found, jnp.asarray(own, jnp.float32)).actions
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rewards in (own, own.tolist()):
            np.testing.assert_array_equal(rf.plan(found, rewards).actions, expected)
