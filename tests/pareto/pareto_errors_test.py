"""Arguments of the wrong kind are one clear line before anything is computed: name, value and rule."""

import re

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
