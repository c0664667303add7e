"""Arguments of the wrong kind are one clear line before anything is computed: name, value and rule."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_suite import pareto

HALF = jnp.full(2, 0.5)
WHOLE = "must be a whole number of at least 1"
NUMBERS = "must be an array of numbers"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pareto.init_archive(16.0, HALF), f"capacity=16.0: {WHOLE}"),
        (lambda: pareto.init_archive("4", HALF), f"capacity='4': {WHOLE}"),
        (lambda: pareto.init_archive(None, HALF), f"capacity=None: {WHOLE}"),
        (
            lambda: pareto.hypervolume_gain_weights(HALF, capacity=-1),
            f"capacity=-1: {WHOLE}",
        ),
        (
            lambda: pareto.hypervolume_gradient_weights(HALF, HALF, capacity=4.5),
            f"capacity=4.5: {WHOLE}",
        ),
        (lambda: pareto.influence_weights(HALF, 0.1, interval=1.5), f"interval=1.5: {WHOLE}"),
        (lambda: pareto.influence_weights(HALF, 0.1, interval=None), f"interval=None: {WHOLE}"),
        (lambda: pareto.multi_objective("2", "mgda"), f"num_objectives='2': {WHOLE}"),
        (lambda: pareto.multi_objective(0, "mgda"), f"num_objectives=0: {WHOLE}"),
        (lambda: pareto.cagrad(jnp.eye(2), num_rounds=2.5), f"num_rounds=2.5: {WHOLE}"),
        (lambda: pareto.nash_mtl(jnp.eye(2), num_steps=-3), f"num_steps=-3: {WHOLE}"),
        (lambda: pareto.solve_quadratic(jnp.eye(2), HALF, num_steps=None), f"num_steps=None: {WHOLE}"),
        (lambda: pareto.fixed_weights("equal"), f"weights='equal': {NUMBERS}"),
        (lambda: pareto.saw_weights(None), f"weights=None: {NUMBERS}"),
        (lambda: pareto.fixed_weights(0.5), "weights=(): must have shape [K]"),
        (lambda: pareto.fixed_weights([0.5, float("nan")]), "weights=[0.5, nan]: must be non-negative and sum to one"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_whole_numbers_of_numpy_count():
    assert pareto.init_archive(np.int64(3), HALF).points.shape == (3, 2)


NAN = float("nan")
STEP = "must be finite and not negative"
SETTINGS = {
    "influence_weights rate": (lambda x: pareto.influence_weights(HALF, x), STEP, (NAN, -1.0, float("inf"))),
    "influence_weights max_log_step": (
        lambda x: pareto.influence_weights(HALF, 0.1, max_log_step=x),
        "must be positive",
        (NAN, 0.0),
    ),
    "influence_weights floor": (
        lambda x: pareto.influence_weights(HALF, 0.1, floor=x),
        "must lie in [0, 1 / K]",
        (NAN, -0.1, 0.6),
    ),
    "tchebycheff_weights temperature": (
        lambda x: pareto.tchebycheff_weights(HALF, HALF, temperature=x),
        "must be positive",
        (NAN, 0.0, -1.0),
    ),
    "hypervolume_gradient_weights mixing": (
        lambda x: pareto.hypervolume_gradient_weights(HALF, HALF, mixing=x),
        "must lie in [0, 1]",
        (NAN, 1.5),
    ),
    "saw_weights decay": (lambda x: pareto.saw_weights(HALF, decay=x), "must lie in [0, 1)", (NAN, 1.0)),
    "ctwa_weights rate": (lambda x: pareto.ctwa_weights(HALF, x, targets=HALF), STEP, (NAN, -1.0)),
    "ctwa_weights decay": (
        lambda x: pareto.ctwa_weights(HALF, 0.1, targets=HALF, decay=x),
        "must lie in [0, 1)",
        (NAN, 1.0),
    ),
    "lagrangian_weights rate": (lambda x: pareto.lagrangian_weights(HALF, HALF, x), STEP, (NAN, -1.0)),
    "lagrangian_weights max_multiplier": (
        lambda x: pareto.lagrangian_weights(HALF, HALF, 0.1, max_multiplier=x),
        "must be positive",
        (NAN, 0.0),
    ),
    "famo_weights rate": (lambda x: pareto.famo_weights(HALF, HALF, rate=x), STEP, (NAN, -1.0)),
    "famo_weights decay": (lambda x: pareto.famo_weights(HALF, HALF, decay=x), STEP, (NAN, -1.0)),
    "multi_objective clip_norm": (
        lambda x: pareto.multi_objective(2, "mgda", clip_norm=x),
        "must be positive",
        (NAN, 0.0, -1.0),
    ),
    "cagrad radius": (lambda x: pareto.cagrad(jnp.eye(2), radius=x), "must not be negative", (NAN, -1.0)),
    "tchebycheff augmentation": (
        lambda x: pareto.tchebycheff(HALF, HALF, HALF, augmentation=x),
        "must not be negative",
        (NAN, -1.0),
    ),
    "smooth_tchebycheff temperature": (
        lambda x: pareto.smooth_tchebycheff(HALF, HALF, HALF, temperature=x),
        "must be positive",
        (NAN, 0.0),
    ),
    "boundary_intersection penalty": (
        lambda x: pareto.boundary_intersection(HALF, HALF, HALF, penalty=x),
        "must not be negative",
        (NAN, -1.0),
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_numbers(name):
    """Refused by value where it is known, by kind always; traced settings pass, so that a run can be vmapped over."""
    call, rule, wrong = SETTINGS[name]
    argument = name.split()[-1]
    for value in wrong:
        with pytest.raises(ValueError, match=re.escape(f"{argument}={value}: {rule}")):
            call(value)
    with pytest.raises(ValueError, match=f"{argument}='0.5': must be a number"):
        call("0.5")
    with pytest.raises(ValueError, match=re.escape(f"{argument}=(2,): must be a single number")):
        call([0.1, 0.2])
    call(np.float32(0.25))

    def traced(value):
        call(value)
        return value

    if argument != "floor":
        assert np.isnan(jax.jit(traced)(NAN))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: pareto.tchebycheff_weights(HALF, x, temperature=0.1), "ideal"),
        (lambda x: pareto.hypervolume_gain_weights(HALF, reference=x), "reference"),
        (lambda x: pareto.hypervolume_gain_weights(HALF, scale=x), "scale"),
        (lambda x: pareto.hypervolume_gradient_weights(HALF, x), "reference"),
        (lambda x: pareto.ctwa_weights(HALF, 0.1, targets=x), "targets"),
        (lambda x: pareto.lagrangian_weights(HALF, x, 0.1), "thresholds"),
        (lambda x: pareto.famo_weights(HALF, x), "ideal"),
        (lambda x: pareto.linear(HALF, x), "weights"),
        (lambda x: pareto.tchebycheff(HALF, HALF, x), "ideal"),
        (lambda x: pareto.smooth_tchebycheff(HALF, HALF, x), "ideal"),
        (lambda x: pareto.boundary_intersection(HALF, x, HALF), "weights"),
        (lambda x: pareto.hypervolume_gradient(x, jnp.ones((3, 2)), HALF), "point"),
        (lambda x: pareto.hypervolume_improvement(x, jnp.ones((3, 2)), HALF), "point"),
        (lambda x: pareto.r2(jnp.ones((3, 2)), HALF[None], x), "ideal"),
    ],
)
def test_vectors_of_one_number_an_objective(call, message):
    """A number, a batch or another K would be broadcast to weights of another meaning; NaN would be silent."""
    for wrong, shown in ((0.5, "()"), (jnp.ones((4, 2)), "(4, 2)"), (jnp.ones(1), "(1,)")):
        with pytest.raises(ValueError, match=re.escape(f"{message}={shown}: must have shape")):
            call(wrong)
    with pytest.raises(ValueError, match=f"{message}='ab': {NUMBERS}"):
        call("ab")
    call([0.75, 0.5])
    with pytest.raises(ValueError, match=message):
        call([NAN, 0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pareto.linear(jnp.ones((4, 2)), HALF), "objectives=(4, 2): must have shape [K]. vmap a batch"),
        (lambda: pareto.linear([NAN, 1.0], HALF), "objectives=[nan, 1.0]: must not be NaN"),
        (lambda: pareto.scheduled_weights(HALF), "schedule='ArrayImpl': must be a function of the step"),
        (lambda: pareto.hypervolume_gradient_weights(HALF, HALF, front=HALF), "front=(2,): must have shape [N, K]"),
        (lambda: pareto.hypervolume_gradient_weights(HALF, HALF, front=[[NAN, 1.0]]), "front[0]=[nan, 1.0]"),
        (
            lambda: pareto.hypervolume_gradient(HALF, jnp.ones((2, 3)), HALF),
            "reference=(2,): must have shape [K]",
        ),
        (
            lambda: pareto.lagrangian_weights(HALF, [float("inf"), 0.0], 0.1),
            "thresholds=[inf, 0.0]: must be finite",
        ),
        (lambda: pareto.famo_weights([1.0, 0.0], HALF), "must all be positive: what has no weight never gets any"),
        (lambda: pareto.multi_objective(2, "best"), "rule='best': unknown rule. Rules: sum, mgda"),
        (lambda: pareto.multi_objective(2, None), "rule=None: unknown rule"),
        (lambda: pareto.aggregate("x"), f"gram='x': {NUMBERS}"),
        (lambda: pareto.aggregate(jnp.zeros((0, 0))), "gram=(0, 0): must have shape [K, K]"),
        (lambda: pareto.aggregate(jnp.eye(2), ["mgda"]), "rule=['mgda']: unknown rule"),
        (lambda: pareto.upgrad(jnp.eye(2), weights=jnp.ones(3)), "weights=(3,): must have shape (2,)"),
        (lambda: pareto.aligned_mtl(jnp.eye(2), weights=jnp.ones(3)), "weights=(3,): must have shape (2,)"),
        (lambda: pareto.pcgrad(jnp.eye(2), key=0), "key=0: must be a random key"),
        (lambda: pareto.pcgrad(jnp.eye(2), order=[0, 0]), "order=[0, 0]: must hold each of 0..1 once"),
        (lambda: pareto.pcgrad(jnp.eye(2), order=[0, 1, 2]), "order='int32[3]': must hold each of 0..1 once"),
        (lambda: pareto.influence_step(HALF, HALF, -1.0), "rate=-1.0: must be finite and not negative"),
        (lambda: pareto.influence_step(HALF, HALF, 1.0, max_log_step=0.0), "max_log_step=0.0: must be positive"),
        (lambda: pareto.gram_influence(jnp.eye(2), clip_norm=0.0), "clip_norm=0.0: must be positive"),
        (
            lambda: pareto.solve_quadratic(jnp.eye(2), HALF, constraint="box"),
            "constraint='box': must be one of",
        ),
        (lambda: pareto.project_simplex(jnp.ones((1, 2))), "x=(1, 2): must have shape [K]. vmap a batch"),
        (lambda: pareto.hypervolume([[1.0], [1.0, 2.0]], HALF), f"points=[[1.0], [1.0, 2.0]]: {NUMBERS}"),
        (lambda: pareto.hypervolume(jnp.ones((1, 2)) * 1j, HALF), f"points='complex64': {NUMBERS}"),
        (lambda: pareto.hypervolume_weights_population([[NAN, 1.0]], HALF), "points[0]=[nan, 1.0]: must not be NaN"),
        (lambda: pareto.non_dominated(HALF), "points=(2,): must have shape [N, K]"),
        (lambda: pareto.dominates("a", HALF), f"a='a': {NUMBERS}"),
        (lambda: pareto.archive_insert(pareto.init_archive(2, HALF), "a"), f"point='a': {NUMBERS}"),
        (lambda: pareto.igd_plus(jnp.ones((2, 3, 2)), jnp.ones((2, 2))), "points=(2, 3, 2): must have two axes"),
        (lambda: pareto.igd_plus(jnp.ones((2, 2)), jnp.ones((0, 2))), "front=(0, 2): must have rows, at least one"),
        (lambda: pareto.r2(jnp.ones((2, 3)), HALF[None], jnp.ones(3)), "weights=(1, 2): must have rows"),
    ],
)
def test_arrays_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_lists_and_whole_numbers_are_numbers():
    """Whole numbers become floats: a temperature in their dtype would be 0."""
    points = [[1, 3], [3, 1]]
    assert float(pareto.hypervolume(points, [0, 0])) == 5
    assert pareto.non_dominated(points).tolist() == [True, True]
    assert pareto.hypervolume_weights_population(points, [0, 0]).tolist() == [[2.0, 1.0], [1.0, 2.0]]
    floats = jnp.array([1.0, 2.0]), HALF, jnp.array([3.0, 3.0])
    smooth = pareto.smooth_tchebycheff(jnp.array([1, 2]), HALF, jnp.array([3, 3]))
    assert float(smooth) == float(pareto.smooth_tchebycheff(*floats))
    assert jnp.issubdtype(pareto.fixed_weights([1, 0]).init().dtype, jnp.floating)
    rule = pareto.tchebycheff_weights([1, 0], [1, 1], temperature=0.1)
    assert rule.step(rule.init(), pareto.Signals(objectives=HALF))[1].tolist() == [1.0, 0.0]
    for name in pareto.AGGREGATORS:
        for gram in ([[1, 0], [0, 1]], jnp.eye(2, dtype=jnp.float16)):
            np.testing.assert_array_equal(pareto.aggregate(gram, name), pareto.aggregate(jnp.eye(2), name))


@pytest.mark.parametrize("name", pareto.AGGREGATORS)
def test_a_gram_matrix_with_nan_shows(name):
    assert np.isnan(pareto.aggregate(jnp.array([[NAN, 0.0], [0.0, 1.0]]), name)).all()


def test_no_points_are_infinitely_far():
    none = jnp.zeros((0, 2))
    assert float(pareto.igd_plus(none, jnp.ones((1, 2)))) == np.inf
    assert float(pareto.r2(none, HALF[None], jnp.ones(2))) == np.inf


def test_rules_are_built_inside_jit_from_known_and_from_traced_values():
    """What is checked by value must not become an operation of the program around it."""
    lists = (
        lambda w: pareto.lagrangian_weights(w, HALF, rate=0.1),
        lambda w: pareto.hypervolume_gain_weights(w, scale=HALF, capacity=4),
        lambda w: pareto.famo_weights(w, HALF),
        lambda w: pareto.tchebycheff_weights(w, HALF, temperature=0.1),
        lambda w: pareto.influence_weights(w, 0.1, max_log_step=1.0),
    )
    for build in lists:
        known = jax.jit(lambda build=build: build(HALF).init())()
        traced = jax.jit(lambda w, build=build: build(w).init())(HALF)
        jax.tree.map(np.testing.assert_array_equal, known, traced)
