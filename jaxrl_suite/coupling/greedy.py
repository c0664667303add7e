"""Greedy minimum entropy coupling of two marginals."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.coupling.kernels import Kernel, Steps, plain_kernel, small_kernel, zero_kernel
from jaxrl_suite.coupling.rank_rounds import large_kernel
from jaxrl_suite.coupling.sparse import SparseCoupling, as_laws, check_law, is_concrete, is_law
from jaxrl_suite.coupling.tape import COLUMN, IDLE, ROW, Tape, weights_of_tape
from jaxrl_suite.types import Array

Rule = Literal["max", "zero", "best"]
KernelName = Literal["auto", "plain", "small", "large"]

_RULES = ("max", "zero", "best")


def greedy_coupling(p: Array, q: Array, *, rule: Rule = "max", kernel: KernelName = "auto") -> SparseCoupling:
    """A joint law of low entropy with the given marginals.

    Repeats N + M - 1 times: pick a row and a column, give their cell the smaller of the two masses left, take it from
    both. ``"max"`` picks the largest row and the largest column and is within ``log2(e)/e = 0.53`` bit of the optimum
    (the problem itself is NP-hard); ``"zero"`` picks the pair of least difference; ``"best"`` runs both
    and keeps the lower entropy. Ties go to the smallest index. The cells form a forest.

    Probabilities are divided by their sum first, so that the derivative is defined in every direction: it is the
    derivative along mass-preserving directions, by a tape of integers (see :mod:`jaxrl_suite.coupling.tape`),
    forward and reverse. Symbols of mass zero are absent. Integer masses (counts of equal total) give integer weights
    and exact marginals, the same on every device.

    Args:
        p: [N], probabilities of the rows, or counts.
        q: [M], probabilities of the columns, or counts of the same total.
        rule: how a step picks its pair.
        kernel: how the rule "max" is compiled; "auto" chooses by shape. All kernels return the same coupling.

    Returns:
        Coupling with K = 2 and L = N + M - 1. Inside jit, marginals that are no laws of equal mass give NaN weights
        (``valid`` is false).

    Raises:
        ValueError: wrong rank, empty, negative, NaN or not normalised, unequal totals of counts, unknown option.

    References:
        Kocaoglu, Dimakis, Vishwanath, Hassibi 2017, arXiv 1611.04035, algorithm 1 (the rule "max"); Ebrahimi, Chen,
        Khisti 2024, arXiv 2410.21666, algorithms 6 and 7; Compton, Katz, Qi, Greenewald, Kocaoglu 2023, the bound.

    >>> coupling = greedy_coupling(jnp.array([0.5, 0.5]), jnp.array([0.75, 0.25]))
    >>> coupling.indices.tolist(), coupling.weights.tolist()
    ([[0, 0], [1, 0], [1, 1]], [0.5, 0.25, 0.25])
    """
    check(
        kernel in ("auto", *_KERNELS),
        argument="kernel",
        value=kernel,
        rule=f"must be auto or one of {', '.join(_KERNELS)}",
    )
    p, q = as_laws(counts=True, p=p, q=q)
    check_law("p", p)
    check_law("q", q)
    if jnp.issubdtype(p.dtype, jnp.integer):
        _check_equal_totals(p, q)
    return _greedy_coupling(p, q, rule, kernel)


def _check_equal_totals(p: Array, q: Array) -> None:
    if is_concrete(p, q):
        # By NumPy: inside jit JAX would trace even a sum of known values.
        totals = int(np.asarray(p).sum()), int(np.asarray(q).sum())
        check(totals[0] == totals[1], argument="sums of p and q", value=totals, rule="counts must have equal totals")


def _choose(num_rows: int, num_columns: int) -> str:
    small, large = sorted((num_rows, num_columns))
    if 8 * small <= large:
        return "small"
    return "large" if small >= 512 else "plain"


def _small(p: Array, q: Array) -> Steps:
    if p.shape[0] >= q.shape[0]:
        return small_kernel(p, q)
    steps = small_kernel(q, p)
    swapped = jnp.where(steps.side == IDLE, IDLE, ROW + COLUMN - steps.side)
    return Steps(steps.column, steps.row, swapped, steps.weight)


_KERNELS: dict[str, Kernel] = {"plain": plain_kernel, "small": _small, "large": large_kernel}


def equal_mass(p: Array, q: Array) -> Array:
    """bool [], whether both are laws and, as counts, have equal totals."""
    both = is_law(p) & is_law(q)
    return both & (jnp.asarray(p).sum() == jnp.asarray(q).sum()) if jnp.issubdtype(p.dtype, jnp.integer) else both


def normalise(p: Array, valid: Array) -> Array:
    """``p`` divided by its sum, counts as they are; zeros if it is no law, so that kernels stay defined."""
    zero = jnp.zeros_like(p)
    if jnp.issubdtype(p.dtype, jnp.integer):
        return jnp.where(valid, p, zero)
    clean = jnp.where(valid & (p > 0), p, zero)
    return clean / jnp.where(valid, jnp.sum(clean), jnp.ones((), p.dtype))


def solve(kernel: Kernel, p: Array, q: Array) -> tuple[Tape, Array]:
    """Tape and weights ``[L]`` of a kernel on one pair, the weights with the derivative of the tape."""
    search_p, search_q = jax.lax.stop_gradient((p, q))
    steps = jax.tree.map(lambda x: x[:, 0], kernel(search_p[:, None], search_q[:, None]))
    tape = Tape(jnp.stack([steps.row, steps.column], axis=1), steps.side)
    if jnp.issubdtype(p.dtype, jnp.integer):
        return tape, steps.weight
    return tape, weights_of_tape(tape, steps.weight, (p, q))


def kernels_of(rule: Rule, num_rows: int, num_columns: int, kernel: str = "auto") -> list[Kernel]:
    """The kernels that a rule runs.

    Raises:
        ValueError: unknown rule.
    """
    check(rule in _RULES, argument="rule", value=rule, rule=f"must be one of {', '.join(_RULES)}")
    largest = _KERNELS[_choose(num_rows, num_columns) if kernel == "auto" else kernel]
    return {"max": [largest], "zero": [zero_kernel], "best": [largest, zero_kernel]}[rule]


@functools.partial(jax.jit, static_argnames=("rule", "kernel"))
def _greedy_coupling(p: Array, q: Array, rule: Rule, kernel: str) -> SparseCoupling:
    valid = equal_mass(p, q)
    p, q = normalise(p, valid), normalise(q, valid)
    found = [solve(k, p, q) for k in kernels_of(rule, p.shape[0], q.shape[0], kernel)]
    couplings = [SparseCoupling(tape.indices, weights) for tape, weights in found]
    best = couplings[0] if len(couplings) == 1 else lower_entropy(*couplings)
    return best._replace(weights=poison(best.weights, valid))


def lower_entropy(first: SparseCoupling, second: SparseCoupling) -> SparseCoupling:
    """The coupling of lower entropy; both have the same number of entries.

    The first unless the second is clearly lower: the same cells in another order differ by rounding, and the choice
    must not flicker.
    """
    first_entropy = first.entropy
    better = second.entropy < first_entropy - 32 * jnp.finfo(first_entropy.dtype).eps
    return jax.tree.map(lambda a, b: jnp.where(better, b, a), first, second)


def poison(weights: Array, valid: Array) -> Array:
    """``weights``, or the mark of an invalid coupling: NaN, or -1 for integers."""
    bad = -1 if jnp.issubdtype(weights.dtype, jnp.integer) else jnp.nan
    return jnp.where(valid, weights, jnp.full_like(weights, bad))
