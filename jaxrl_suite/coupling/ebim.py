"""Entropy-bounded information maximisation: the most informative code of a source at a bounded code entropy.

Given X with law p and a rate R in bits, EBIM asks for  max I(X; T)  subject to  H(T) <= R.  For a function T = g(X) the
information *is* the entropy H(T), and R bounds it. Algorithm 1 of the paper visits a chain of maps from the
identity to the constant: with masses sorted, p_1 >= ... >= p_n,

    L_0 = identity;   S_i = L_{i-1} with its two smallest masses merged;   L_i = L_{i-1} with its two largest merged,

and returns the first whose entropy is at most R. Here without a loop: with P_k = p_1 + ... + p_k, the tail
F_k = sum over j > k of f(p_j), and f(u) = -u log2 u,

    H(L_i) = f(P_{i+1}) + F_{i+1},
    H(S_i) = H(L_{i-1}) - f(p_{n-1}) - f(p_n) + f(p_{n-1} + p_n)   for i <= n-2,     H(S_{n-1}) = 0,

one sort, two cumulative sums and a comparison. The gap R - I is at most h(p_2) (theorem 2).

A code is named by a symbol: the label of x is the index of the largest symbol of its block, so singletons are named
by themselves, and the code law has the length of p. Nothing is scattered, and permuting the source permutes the code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.coupling.greedy import normalise
from jaxrl_suite.coupling.sorting import sorted_masses
from jaxrl_suite.coupling.sparse import as_laws, as_rate, check_law, check_rate, is_law
from jaxrl_suite.distributions import entropy, entropy_terms
from jaxrl_suite.types import Array


class Encoder(NamedTuple):
    """A deterministic map from symbols to codes.

    Attributes:
        labels: int32 [N], the code of each symbol; codes are named by the index of a symbol, so they lie in 0..N-1.
        code: [N], probability of each code; zero for names not in use.
        information: [], I(X; T) in bits.
        entropy: [], H(T) in bits; equal to the information since the map is deterministic. NaN, as the information,
            if the source was no law or the rate negative.
    """

    labels: Array
    code: Array
    information: Array
    entropy: Array


class EbimPath(NamedTuple):
    """The maps that the greedy solver passes, in the order L_0, S_1, L_1, ..., S_{N-1}, L_{N-1}.

    Attributes:
        entropies: [2N - 1], bits, non-increasing; what symbols of mass zero add at the end are zeros.
        sorted_masses: [N], the source sorted in descending order.
        block_masses: [N], P_1..P_N, mass of the giant block of L_0..L_{N-1}.
    """

    entropies: Array
    sorted_masses: Array
    block_masses: Array


def rate_slack(dtype: jnp.dtype) -> float:
    """By how much H(T) may exceed the rate: rounding of an entropy, in bits."""
    return 1e-12 if jnp.finfo(dtype).bits == 64 else 1e-6


def ebim_path(p: Array) -> EbimPath:
    """Entropies of all maps of algorithm 1, in closed form; O(N log N) work, O(log N) depth.

    Args:
        p: [N], probabilities; symbols of mass zero are absent.

    Returns:
        Path in bits, differentiable in ``p``; NaN inside jit if ``p`` is no law.

    Raises:
        ValueError: ``p`` is empty, negative, NaN or not normalised.

    References:
        Ebrahimi, Chen, Khisti 2024, arXiv 2410.21666, algorithm 1 and the proof of theorem 2.

    >>> [round(float(h), 4) for h in ebim_path(jnp.array([0.4, 0.3, 0.2, 0.1])).entropies]
    [1.8464, 1.571, 1.1568, 0.8813, 0.469, 0.0, 0.0]
    """
    (p,) = as_laws(p=p)
    check_law("p", p)
    return _path(p)


@jax.jit
def _path(p: Array) -> EbimPath:
    valid = is_law(p)
    masses = jnp.sort(normalise(p, valid), descending=True)
    path = EbimPath(path_entropies(masses), masses, jnp.cumsum(masses))
    return jax.tree.map(lambda x: jnp.where(valid, x, jnp.full_like(x, jnp.nan)), path)


def path_entropies(masses: Array) -> Array:
    """Entropies of the path ``[2N - 1]`` of descending ``masses [N]``."""
    size = masses.shape[0]
    terms = entropy_terms(masses)
    tail = jnp.cumsum(terms[::-1])[::-1] - terms  # F_k, summed from the small end
    blocks = jnp.minimum(jnp.cumsum(masses), 1)
    giant = entropy_terms(blocks) + tail
    count = jnp.sum(masses > 0)
    giant = jnp.where(jnp.arange(size) >= count - 1, jnp.zeros_like(giant), giant)
    last, second = masses[count - 1], masses[jnp.maximum(count - 2, 0)]
    loss = entropy_terms(last) + entropy_terms(second) - entropy_terms(last + second)
    split = giant[:-1] - loss
    split = jnp.where(jnp.arange(size - 1) >= count - 2, jnp.zeros_like(split), jnp.maximum(split, 0))
    return jnp.concatenate([giant[:1], jnp.stack([split, giant[1:]], axis=1).reshape(-1)])


def ebim_greedy(p: Array, rate: Array | float) -> Encoder:
    """The first map of the path whose entropy fits the rate.

    ``rate - information`` is at most ``h(p_2)``, p_2 the second largest mass, and zero or better at
    ``rate >= H(X)``, where the map is the identity. Differentiable in ``p`` through the code law; labels are
    piecewise constant, and the derivative with respect to the rate is zero almost everywhere.

    Args:
        p: [N], probabilities; symbols of mass zero are absent (and named by themselves).
        rate: [], bits, non-negative.

    Returns:
        Encoder with ``entropy <= rate`` up to a slack of 1e-6 bit (1e-12 in float64).

    Raises:
        ValueError: ``p`` is empty, negative, NaN or not normalised, or the rate is negative.

    References:
        Ebrahimi, Chen, Khisti 2024, arXiv 2410.21666, algorithm 1.

    >>> encoder = ebim_greedy(jnp.array([0.4, 0.3, 0.2, 0.1]), 1.0)
    >>> encoder.labels.tolist(), round(float(encoder.information), 4)
    ([0, 0, 2, 2], 0.8813)
    """
    (p,) = as_laws(p=p)
    rate = as_rate(rate, p.dtype)
    check_law("p", p)
    check_rate(rate)
    return _greedy(p, rate)


@jax.jit
def _greedy(p: Array, rate: Array) -> Encoder:
    valid = is_law(p) & (rate >= 0)
    p = normalise(p, valid)
    labels, code = code_at_rate(p, rate)
    information = entropy(code)
    information = jnp.where(information > 0, information, jnp.zeros_like(information))  # a block of mass 1 + rounding
    information = jnp.where(valid, information, jnp.full((), jnp.nan, p.dtype))
    return Encoder(labels, jnp.where(valid, code, jnp.full_like(code, jnp.nan)), information, information)


def code_at_rate(p: Array, rate: Array) -> tuple[Array, Array]:
    """Labels int32 [N] and code law [N] of the greedy map, for a valid ``p [N]`` and ``rate []``."""
    search = jax.lax.stop_gradient(p)
    ranked = sorted_masses(search)
    position = jnp.argmax(path_entropies(ranked) <= rate + rate_slack(p.dtype))
    return code_of_step(p, search, ranked, position)


def code_of_step(p: Array, search: Array, ranked: Array, position: Array) -> tuple[Array, Array]:
    """Labels and code law of the map at a position of the path.

    Ranks are never materialised: thresholds and counts of ties pick the blocks.

    Args:
        p: [N], source, for the code law.
        search: [N], its values without derivative, which the choice reads.
        ranked: [N], ``search`` in descending order.
        position: int [], index in 0..2N-2: odd ones are the maps S_i, even ones the maps L_i.
    """
    size = p.shape[0]
    step, is_split = (position + 1) // 2, position % 2 == 1
    index = jnp.arange(size, dtype=jnp.int32)
    giant_size = jnp.where(is_split, step, step + 1)
    in_giant = _is_top(search, ranked, giant_size)
    count = jnp.sum(search > 0)
    in_pair = (search > 0) & ~_is_top(search, ranked, count - 2) & is_split
    # In S_{n-1} the two smallest of what is left are the giant block and the last symbol.
    in_giant = in_giant | (is_split & (step >= count - 1) & (search > 0))
    in_pair = in_pair & ~in_giant
    labels = index
    code = p
    for block in (in_giant, in_pair):
        mass = jnp.sum(jnp.where(block, p, jnp.zeros_like(p)))
        top = jnp.max(jnp.where(block, search, jnp.full_like(search, -1)))
        name = jnp.min(jnp.where(block & (search == top), index, size))
        labels = jnp.where(block, name, labels)
        code = jnp.where(block, jnp.where(index == name, mass, jnp.zeros_like(p)), code)
    return labels, code


def _is_top(masses: Array, ranked: Array, number: Array) -> Array:
    """bool [N], whether a symbol is among the ``number`` largest, ties to the smallest index."""
    threshold = ranked[jnp.clip(number - 1, 0, masses.shape[0] - 1)]
    above, tied = masses > threshold, masses == threshold
    room = number - jnp.sum(above)
    return (number > 0) & (above | (tied & (jnp.cumsum(tied) <= room)))
