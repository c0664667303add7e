"""Stochastic encoders next to deterministic ones (theorem 3 of the paper).

At a deterministic map g with H(g) = R_g, moving mass from one cell of the joint p(x, t) to another column of the same
row is the best small change, and the curves can be followed to the next deterministic map. With f(u) = -u log2 u:

*Right curve* (more rate). x minimises p(x) / p_T(g(x)) among columns of at least two symbols; mass e of x moves to a
new column. With q = p(x), c = p_T(g(x)):
    H(e) = R_g + f(c - e) + f(e) - f(c),      I(e) = R_g + f(c - e) - f(c) - f(q - e) + f(q).
*Left curve* (less rate). s and b are the smallest and largest column sums, x the smallest symbol of s; mass e of x
moves to b. With q = p(x):
    H(e) = R_g + f(s - e) - f(s) + f(b + e) - f(b),      I(e) = H(e) - f(q - e) - f(e) + f(q).

Both reach a deterministic map again at e = q. Given a rate, e is found by bisection; one Newton step with a frozen
slope then gives it the derivative of the implicit function theorem. That the upper envelope of these curves over all
maps is the optimum is a conjecture of the paper.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.coupling.ebim import code_of_step, path_entropies, rate_slack
from jaxrl_suite.coupling.greedy import normalise
from jaxrl_suite.coupling.partitions import code_of_labels
from jaxrl_suite.coupling.sorting import sorted_masses
from jaxrl_suite.coupling.sparse import as_laws, as_rate, check_law, check_rate, is_law
from jaxrl_suite.distributions import entropy, entropy_terms
from jaxrl_suite.types import Array


class StochasticEncoder(NamedTuple):
    """A deterministic map of which one symbol is sent to a second code with some probability.

    Attributes:
        labels: int32 [N], code of each symbol, in 0..N-1.
        symbol: int32 [], the symbol that is split.
        target: int32 [], its second code, in 0..N; N is the new one.
        amount: [], mass of the symbol that goes to the second code.
        information: [], I(X; T) in bits; NaN if the source was no law or the rate negative.
        entropy: [], H(T) in bits.
    """

    labels: Array
    symbol: Array
    target: Array
    amount: Array
    information: Array
    entropy: Array

    def joint(self, p: Array) -> Array:
        """Joint law ``[N, N + 1]`` of symbol and code for the source ``p [N]`` that it was made for."""
        rows = jnp.arange(p.shape[0])
        joint = jnp.zeros((p.shape[0], p.shape[0] + 1), p.dtype).at[rows, self.labels].add(p)
        amount = self.amount.astype(p.dtype)
        joint = joint.at[self.symbol, self.labels[self.symbol]].add(-amount)
        return joint.at[self.symbol, self.target].add(amount)


def ebim_refine(p: Array, rate: Array | float, bases: Array | None = None) -> StochasticEncoder:
    """The best encoder on the curves of theorem 3 through given deterministic maps.

    Args:
        p: [N], probabilities; symbols of mass zero are absent.
        rate: [], bits.
        bases: int32 [num_bases, N], labels in 0..N-1 of the maps; by default the two maps of the greedy path just below
            and above the rate. With all :func:`partitions` the information is continuous in the rate, and equals the
            optimum wherever that is known.

    Returns:
        Encoder with ``entropy <= rate`` and at least the information of every base that fits. Differentiable in ``p``
        and, between deterministic maps, in the rate.

    Raises:
        ValueError: ``p`` is empty, negative, NaN or not normalised, the rate is negative, or the bases have the wrong
            shape.

    References:
        Ebrahimi, Chen, Khisti 2024, arXiv 2410.21666, theorem 3.

    >>> round(float(ebim_refine(jnp.array([0.7, 0.2, 0.1]), 0.8).information), 3)  # ebim_greedy gives 0.469
    0.701
    """
    (p,) = as_laws(p=p)
    rate = as_rate(rate, p.dtype)
    check_law("p", p)
    check_rate(rate)
    if bases is not None:
        fits = bases.ndim == 2 and bases.shape[1] == p.shape[0]
        check(fits, argument="bases", value=bases.shape, rule=f"must be [num_bases, {p.shape[0]}]")
        bases = jnp.asarray(bases, jnp.int32)
    return _refine(p, rate, bases)


@jax.jit
def _refine(p: Array, rate: Array, bases: Array | None) -> StochasticEncoder:
    valid = is_law(p) & (rate >= 0)
    p = normalise(p, valid)
    bases = _neighbours(jax.lax.stop_gradient(p), rate) if bases is None else bases
    curves = jax.vmap(lambda labels: _on_curves(p, labels, rate))(bases)
    every = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), curves)
    chosen = jnp.argmax(jax.lax.stop_gradient(every.information))
    best = jax.tree.map(lambda x: x[chosen], every)
    nan = jnp.full((), jnp.nan, p.dtype)
    information, height = (jnp.where(valid, jnp.maximum(x, 0), nan) for x in (best.information, best.entropy))
    return best._replace(information=information, entropy=height)


def _neighbours(p: Array, rate: Array) -> Array:
    """Labels ``[2, N]`` of the first map of the path that fits the rate, and of the one before it."""
    ranked = sorted_masses(p)
    below = jnp.argmax(path_entropies(ranked) <= rate + rate_slack(p.dtype))
    labels = [code_of_step(p, p, ranked, position)[0] for position in (below, jnp.maximum(below - 1, 0))]
    return jnp.stack(labels)


def _on_curves(p: Array, labels: Array, rate: Array) -> StochasticEncoder:
    """The map itself, its right and its left curve at the rate, stacked; information -1 where it does not apply."""
    code = code_of_labels(p, labels)
    height = entropy(code)
    present = p > 0
    column = code[labels]
    size = p.shape[0]
    members = jnp.sum((labels[:, None] == labels[None, :]) & present[None, :], axis=1)
    shared = present & (members > 1)
    splitting = jnp.argmin(jnp.where(shared, p / jnp.where(present, column, 1), jnp.inf)).astype(jnp.int32)
    q, c = p[splitting], column[splitting]
    f = entropy_terms
    right = _solve(
        lambda e: height + f(c - e) + f(e) - f(c),
        lambda e: height + f(c - e) - f(c) - f(q - e) + f(q),
        q,
        rate,
        rising=True,
    )
    right_ok = jnp.any(shared) & (height <= rate)

    smallest = jnp.argmin(jnp.where(code > 0, code, jnp.inf))
    largest = jnp.argmax(code).astype(jnp.int32)
    moving = jnp.argmin(jnp.where(present & (labels == smallest), p, jnp.inf)).astype(jnp.int32)
    s, b, r = code[smallest], code[largest], p[moving]

    def lower(e: Array) -> Array:
        return height + f(s - e) - f(s) + f(b + e) - f(b)

    left = _solve(lower, lambda e: lower(e) - f(r - e) - f(e) + f(r), r, rate, rising=False)
    left_ok = (height > rate) & (left[2] <= rate + rate_slack(p.dtype)) & (largest != smallest)

    zero, none = jnp.zeros((), p.dtype), jnp.full((), -1, p.dtype)
    itself_ok = height <= rate + rate_slack(p.dtype)
    options = [
        (splitting, jnp.int32(size), zero, height, height, itself_ok),
        (splitting, jnp.int32(size), *right, right_ok),
        (moving, largest, *left, left_ok),
    ]
    stack = [
        StochasticEncoder(labels, symbol, target, amount, jnp.where(ok, information, none), entropy_)
        for symbol, target, amount, information, entropy_, ok in options
    ]
    return jax.tree.map(lambda *x: jnp.stack(x), *stack)


def _solve(height, information, limit: Array, rate: Array, *, rising: bool) -> tuple[Array, Array, Array]:
    """Amount in [0, limit] whose entropy is the rate (or as near as it gets): amount, information, entropy."""
    frozen_limit, frozen_rate = jax.lax.stop_gradient((limit, rate))

    def frozen_height(e: Array) -> Array:
        return jax.lax.stop_gradient(height(e))

    def halve(interval: tuple[Array, Array], _) -> tuple[tuple[Array, Array], None]:
        low, high = interval
        middle = (low + high) / 2
        further = (frozen_height(middle) <= frozen_rate) == rising  # the crossing lies above the middle
        return (jnp.where(further, middle, low), jnp.where(further, high, middle)), None

    (low, high), _ = jax.lax.scan(halve, (jnp.zeros_like(frozen_limit), frozen_limit), length=60)
    # The end of the interval with less entropy, so that the rate is kept; the whole curve if it never gets there.
    reaches = (frozen_height(frozen_limit) > frozen_rate) == rising
    found = jax.lax.stop_gradient(jnp.where(reaches, low if rising else high, frozen_limit))
    inside = reaches & (found > 0) & (found < frozen_limit)
    slope = jax.lax.stop_gradient(jax.grad(height)(found))
    slope = jnp.where(inside & (jnp.abs(slope) > 1e-6), slope, jnp.inf)
    # Value unchanged, derivative of the implicit function: d e = (d R - dH(e)) / H'(e).
    change = (rate - height(found)) / slope
    amount = jnp.where(inside, found + change - jax.lax.stop_gradient(change), jnp.where(reaches, found, limit))
    return amount, information(amount), height(amount)
