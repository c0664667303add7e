"""Fitting the constants of the time model to measured rows.

Rows are few and many settings behind them unstated, so the fit is the most probable point under a prior: residuals
``log(predicted / measured) / 0.05`` and ``log(constant / prior) / width``. A constant that no row informs keeps its
prior. A *choice* is the other thing that people publish: a mapping that a search preferred. It adds
``max(0, log(time of the choice / time of an alternative)) / 0.01`` for every alternative that would have fitted.
Everything is float64 NumPy and deterministic.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.moe.cost_time import Constants, Counts, model_flops_utilisation, step_time
from jaxrl_suite.moe.hardware import Hardware

ROW_ERROR = 0.05  # what separates a model of a dozen constants from a measurement
CHOICE_ERROR = 0.01  # what a search by hand can tell apart
# What is known before any row: usual efficiencies of large products, of fused attention and of collectives on H100, and
# products of r rows bound by memory below peak / bandwidth ≈ 300 rows.
PRIOR = Constants()
PRIOR_WIDTH = Constants(
    node=0.2,
    network=0.2,
    gemm=0.15,
    attention=0.25,
    half_rows=0.7,
    half_width=0.7,
    memory=0.5,
    tp_exposed=0.5,
    cp_exposed=0.7,
    cp_merges=1.0,
    weights_hidden=0.4,
    gradients_exposed=0.7,
    interleave=0.4,
)
# Fractions cannot exceed their whole; rates stay a little below it.
UPPER = Constants(
    node=0.95,
    network=0.95,
    gemm=0.95,
    attention=0.95,
    half_rows=np.inf,
    half_width=np.inf,
    memory=0.95,
    tp_exposed=1.0,
    cp_exposed=1.0,
    cp_merges=np.inf,
    weights_hidden=1.0,
    gradients_exposed=1.0,
    interleave=np.inf,
)
# Fitted to the 87 numeric rows of tables 3, 4 and 5 of the paper and to the four mappings that its search preferred
# (experiments/cluster/paper_fit.py); a test fits them again and compares.
PAPER_CONSTANTS = Constants(
    node=0.670159,
    network=0.829404,
    gemm=0.787483,
    attention=0.508273,
    half_rows=301.275,
    half_width=617.86,
    memory=0.345852,
    tp_exposed=1.0,
    cp_exposed=0.373399,
    cp_merges=6.85859,
    weights_hidden=0.383845,
    gradients_exposed=0.531017,
    interleave=2.1454,
)


class Fit(NamedTuple):
    """Result of a fit.

    Attributes:
        constants: most probable constants.
        predicted: MFU of each row, fractions [num_rows].
        errors: relative errors |predicted / measured - 1| [num_rows].
        converged: whether the optimiser stopped at a minimum.
    """

    constants: Constants
    predicted: np.ndarray
    errors: np.ndarray
    converged: bool


def predict(counts: Counts, constants: Constants, hardware: Hardware) -> np.ndarray:
    """MFU of a table of rows, fractions [num_rows]."""
    return model_flops_utilisation(counts, step_time(counts, constants, hardware).total, hardware)


class Choice(NamedTuple):
    """A mapping that a search preferred to others.

    Attributes:
        label: what it is left out with, a model's name for instance.
        chosen: counts of the mapping.
        alternatives: counts of the others, arrays [num_alternatives].
    """

    label: str
    chosen: Counts
    alternatives: Counts


def fit(
    counts: Counts,
    measured: np.ndarray,
    hardware: Hardware,
    *,
    choices: Sequence[Choice] = (),
    prior: Constants = PRIOR,
    width: Constants = PRIOR_WIDTH,
) -> Fit:
    """The most probable constants, by least squares within bounds.

    Args:
        counts: table of rows, arrays [num_rows].
        measured: MFU of each row, fractions [num_rows].
        hardware: peaks.
        choices: mappings that a search preferred.
        prior: centre of each constant.
        width: standard deviation of the logarithm of each constant.

    Raises:
        ValueError: no rows, or an MFU that is not a fraction.
    """
    from scipy.optimize import least_squares  # slow to import, comes with jaxlib

    measured = np.asarray(measured, np.float64)
    check(measured.size > 0, argument="measured", value=measured.size, rule="at least one row is needed")
    wrong = measured[~((measured > 0) & (measured <= 1))]
    check(not wrong.size, argument="measured", value=wrong[:1].tolist(), rule="an MFU is a fraction in (0, 1]")
    centre, upper, scale = np.log(np.array(prior)), np.log(np.array(UPPER)), np.array(width)

    def residuals(logs: np.ndarray) -> np.ndarray:
        constants = Constants(*np.exp(logs))
        parts = [np.log(predict(counts, constants, hardware) / measured) / ROW_ERROR, (logs - centre) / scale]
        parts += [_regret(choice, constants, hardware) / CHOICE_ERROR for choice in choices]
        return np.concatenate(parts)

    start = np.minimum(centre, upper - 1e-3)
    found = least_squares(residuals, start, bounds=(-np.inf, upper), x_scale=scale, xtol=1e-8, ftol=1e-8)
    constants = Constants(*(float(value) for value in np.exp(found.x)))
    predicted = predict(counts, constants, hardware)
    return Fit(constants, predicted, np.abs(predicted / measured - 1), bool(found.success))


def _regret(choice: Choice, constants: Constants, hardware: Hardware) -> np.ndarray:
    """By how much each alternative is predicted to beat the choice, log ratio of times [num_alternatives]."""
    chosen = step_time(choice.chosen, constants, hardware).total
    return np.maximum(0.0, np.log(chosen / step_time(choice.alternatives, constants, hardware).total))


def leave_out(
    counts: Counts, measured: np.ndarray, labels: Sequence[str], hardware: Hardware, *, choices: Sequence[Choice] = ()
) -> tuple[np.ndarray, dict[str, Constants]]:
    """Predicts the rows of each label from a fit to the rows and choices of all other labels.

    Args:
        counts: table of rows, arrays [num_rows].
        measured: MFU of each row, fractions [num_rows].
        labels: what to leave out together, a model's name for instance [num_rows].
        hardware: peaks.
        choices: mappings that a search preferred.

    Returns:
        Predicted MFU [num_rows], and the constants that each label was predicted with.
    """
    labels_array, predicted = np.asarray(labels), np.zeros(len(labels))
    constants = {}
    for label in dict.fromkeys(labels):
        rest = labels_array != label
        others = [choice for choice in choices if choice.label != label]
        found = fit(select_rows(counts, rest), np.asarray(measured)[rest], hardware, choices=others)
        constants[label] = found.constants
        predicted[~rest] = predict(select_rows(counts, ~rest), found.constants, hardware)
    return predicted, constants


def select_rows(counts: Counts, rows: np.ndarray) -> Counts:
    """Some rows of a table, by mask or index."""
    return jax.tree.map(lambda values: values[rows], counts)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation; ties take their order of appearance."""
    first, second = (np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (a, b))
    return float(np.corrcoef(first, second)[0, 1])
