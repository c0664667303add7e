"""Lower bounds on the joint entropy of every coupling, in bits.

With the masses of each marginal sorted, and u the cumulative mass:

max_entropy        max_k H(p_k).
majorization       entropy of the meet: partial sums of the descending masses, the least over marginals, differenced.
profile            integral over u in [0, 1] of -log2 min_k s_k(u), where s_k(u) is the size of the state of
                   marginal k at cumulative mass u, masses ascending.
majorize_profile   entropy of the most concentrated masses whose profile stays under min_k s_k: from c = 1 down to 0,
                   the next state is v(c) = min over vertices (x, y) of max(y, c - x), then c <- c - v. Vertices are
                   (cumulative mass, size) of the states of all marginals, and (0, 0). The best of the four.

They are ordered  max_entropy <= majorization, profile <= majorize_profile <= optimum.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.coupling.sparse import as_laws, check_law, is_law
from jaxrl_suite.distributions import entropy, entropy_terms
from jaxrl_suite.types import Array


class CouplingBounds(NamedTuple):
    """Lower bounds on the joint entropy of any coupling of given marginals, each [] in bits.

    Attributes:
        max_entropy: largest entropy of a marginal.
        majorization: entropy of the greatest lower bound of the marginals in the majorization order.
        profile: integral of the information profile.
        majorize_profile: the strongest.
    """

    max_entropy: Array
    majorization: Array
    profile: Array
    majorize_profile: Array


def coupling_bounds(p: Array, q: Array) -> CouplingBounds:
    """Four lower bounds on the entropy of every coupling of two marginals.

    Args:
        p: [N], probabilities; symbols of mass zero are absent.
        q: [M], probabilities.

    Returns:
        Bounds in bits, differentiable almost everywhere; NaN inside jit if an argument is no law.

    Raises:
        ValueError: wrong rank, empty, negative, NaN or not normalised.

    References:
        Cicalese, Gargano, Vaccaro 2019, arXiv 1712.10254 (majorization); Compton, Katz, Qi, Greenewald, Kocaoglu 2023
        (profile, majorize-profile); Shkel and Yadav 2023, arXiv 2305.05745 (information spectrum).

    >>> bounds = coupling_bounds(jnp.array([0.5, 0.4, 0.1]), jnp.array([0.6, 0.2, 0.2]))
    >>> [round(float(bound), 4) for bound in bounds[1:]]
    [1.4855, 1.661, 1.761]
    """
    p, q = as_laws(counts=True, p=p, q=q)
    check_law("p", p)
    check_law("q", q)
    return _bounds((p, q))


def coupling_bounds_multi(marginals: Array) -> CouplingBounds:
    """As :func:`coupling_bounds` for K marginals ``[K, N]`` (short ones padded by zeros).

    Raises:
        ValueError: wrong rank, or a row is no law.
    """
    (marginals,) = as_laws(counts=True, marginals=marginals)
    fits = marginals.ndim == 2 and marginals.shape[0] > 0
    check(fits, argument="marginals", value=marginals.shape, rule="must be [K, N] with at least one law")
    for k, row in enumerate(marginals):
        check_law(f"marginals[{k}]", row)
    return _bounds(tuple(marginals))


@jax.jit
def _bounds(laws: tuple[Array, ...]) -> CouplingBounds:
    valid = functools.reduce(jnp.logical_and, [is_law(p) for p in laws])
    laws = tuple(p / jnp.sum(p) for p in laws)
    ascending = tuple(jnp.sort(p) for p in laws)
    bounds = CouplingBounds(
        max_entropy=functools.reduce(jnp.maximum, [entropy(p) for p in laws]),
        majorization=_majorization(ascending),
        profile=_profile(ascending),
        majorize_profile=_majorize_profile(ascending),
    )
    return jax.tree.map(lambda bound: jnp.where(valid, bound, jnp.full_like(bound, jnp.nan)), bounds)


def _majorization(ascending: tuple[Array, ...]) -> Array:
    size = max(p.shape[0] for p in ascending)
    sums = [jnp.cumsum(jnp.pad(p[::-1], (0, size - p.shape[0]))) for p in ascending]
    meet = functools.reduce(jnp.minimum, sums)
    return entropy(jnp.maximum(jnp.diff(meet, prepend=jnp.zeros((1,), meet.dtype)), 0))


def _profile(ascending: tuple[Array, ...]) -> Array:
    sums = [jnp.cumsum(p) for p in ascending]
    ends = jnp.sort(jnp.concatenate(sums))
    starts = jnp.concatenate([jnp.zeros((1,), ends.dtype), ends[:-1]])
    middle = (starts + ends) / 2
    sizes = []
    for p, total in zip(ascending, sums, strict=True):
        at = jnp.minimum(jnp.searchsorted(jax.lax.stop_gradient(total), jax.lax.stop_gradient(middle)), p.shape[0] - 1)
        sizes.append(p[at])
    size = functools.reduce(jnp.minimum, sizes)
    width = ends - starts
    # width * -log2(size), written with the guarded entropy term; empty intervals may sit on absent symbols.
    inside = (width > 0) & (size > 0)
    safe = jnp.where(inside, size, jnp.ones_like(size))
    return jnp.sum(jnp.where(inside, width * entropy_terms(safe) / safe, jnp.zeros_like(width)))


def _majorize_profile(ascending: tuple[Array, ...]) -> Array:
    zero = jnp.zeros((1,), ascending[0].dtype)
    x = jnp.concatenate([zero, *[jnp.cumsum(p) for p in ascending]])
    y = jnp.concatenate([zero, *ascending])

    def step(left: Array, _) -> tuple[Array, Array]:
        state = jnp.clip(jnp.min(jnp.maximum(y, left - x)), 0, left)
        return left - state, state

    # Each state of the bound ends in a state of a marginal or at a vertex, hence the length. What rounding leaves
    # is counted as one state more: merging only lowers the entropy, so the bound stays a bound.
    left, states = jax.lax.scan(step, jnp.ones((), x.dtype), length=x.shape[0])
    return entropy(states) + entropy_terms(left)
