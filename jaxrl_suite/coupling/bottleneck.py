"""Minimum entropy coupling with a bottleneck: X -> T -> Y with given laws of X and Y and H(T) at most a rate.

The paper encodes without looking at Y: T by :func:`ebim_greedy`, Y by a coupling of T and Y, with
``I(X; Y) >= I(X; T) + I(T; Y) - R``. For a deterministic map T = g(X), Y sees X only through T, so I(X; Y) = I(T; Y),
and the problem over such maps is: which partition with H(g) <= R couples best with Y? The other searches solve that.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.coupling.bounds import coupling_bounds
from jaxrl_suite.coupling.ebim import Encoder, code_at_rate, code_of_step, rate_slack
from jaxrl_suite.coupling.greedy import greedy_coupling, normalise
from jaxrl_suite.coupling.partitions import LARGEST_ALPHABET, code_of_labels, encoder_of_labels, partitions
from jaxrl_suite.coupling.quantizers import lpt_labels
from jaxrl_suite.coupling.sorting import sorted_masses
from jaxrl_suite.coupling.sparse import SparseCoupling, as_laws, as_rate, check_law, check_rate, is_law
from jaxrl_suite.distributions import entropy
from jaxrl_suite.types import Array

Search = Literal["paper", "decoder_aware", "exact"]

_SEARCHES = ("paper", "decoder_aware", "exact")


class Bottleneck(NamedTuple):
    """A chain X -> T -> Y.

    Attributes:
        encoder: deterministic map from X to T.
        decoder: coupling of T and Y, ``dense((N, M))``; the channel is its rows divided by ``encoder.code``.
        information: [], I(X; Y) in bits; NaN if an argument was no law or the rate negative.
        upper: [], bits no chain can exceed: ``min(rate, H(X) + H(Y) - majorize-profile bound)``.
    """

    encoder: Encoder
    decoder: SparseCoupling
    information: Array
    upper: Array

    def joint(self, p_x: Array) -> Array:
        """Joint law ``[N, M]`` of X and Y; M is read off the decoder, L = N + M - 1."""
        size = p_x.shape[0]
        decoder = self.decoder.dense((size, self.decoder.weights.shape[-1] + 1 - size))
        code = self.encoder.code
        channel = decoder / jnp.where(code > 0, code, jnp.ones_like(code))[:, None]
        return p_x[:, None] * channel[self.encoder.labels]


def mecb(p_x: Array, p_y: Array, rate: Array | float, *, search: Search = "paper") -> Bottleneck:
    """Minimum entropy coupling with a bottleneck: maximises I(X; Y) over chains X -> T -> Y with H(T) <= rate.

    ``"paper"``: the bounded encoder, then a greedy coupling (rule "max"). ``"decoder_aware"``: starts from maps of the
    greedy path, bin packings and a packing into the masses of Y, and improves the best of them by moving a symbol,
    exchanging two, or merging two codes, whichever raises I(T; Y) most, until nothing does. ``"exact"``: all
    partitions, N at most 9. The last two couple by the rule "best", so that exact >= decoder_aware >= paper.

    Args:
        p_x: [N], probabilities of X.
        p_y: [M], probabilities of Y.
        rate: [], bits.
        search: how the encoder is found.

    Returns:
        Bottleneck, differentiable in both laws through the final encoder and decoder.

    Raises:
        ValueError: a law is empty, negative, NaN or not normalised, the rate is negative, the search is unknown, or
            the exact search is asked for more than 9 symbols.

    References:
        Ebrahimi, Chen, Khisti 2024, arXiv 2410.21666, lemma 1 and section 3.

    >>> p_x, p_y = jnp.array([0.4, 0.3, 0.2, 0.1]), jnp.array([0.5, 0.5])
    >>> [round(float(mecb(p_x, p_y, 1.0, search=s).information), 3) for s in ("paper", "exact")]
    [0.396, 1.0]
    """
    check(search in _SEARCHES, argument="search", value=search, rule=f"must be one of {', '.join(_SEARCHES)}")
    p_x, p_y = as_laws(p_x=p_x, p_y=p_y)
    rate = as_rate(rate, p_x.dtype)
    check_law("p_x", p_x)
    check_law("p_y", p_y)
    check_rate(rate)
    if search == "exact":
        size, rule = p_x.shape[0], f"the exact search takes at most {LARGEST_ALPHABET} symbols"
        check(size <= LARGEST_ALPHABET, argument="p_x", value=size, rule=rule, remedy='Use search="decoder_aware"')
    return _mecb(p_x, p_y, rate, search)


@functools.partial(jax.jit, static_argnames="search")
def _mecb(p_x: Array, p_y: Array, rate: Array, search: Search) -> Bottleneck:
    valid = is_law(p_x) & is_law(p_y) & (rate >= 0)
    p_x, p_y = normalise(p_x, valid), normalise(p_y, valid)
    safe_x, safe_y = (jnp.where(valid, p, jnp.full_like(p, 1 / p.shape[0])) for p in (p_x, p_y))
    labels = _LABELS[search](*jax.lax.stop_gradient((safe_x, safe_y, rate)))
    encoder = encoder_of_labels(safe_x, labels, valid)
    code = code_of_labels(safe_x, labels)
    decoder = greedy_coupling(code, safe_y, rule="max" if search == "paper" else "best")
    nan = jnp.full((), jnp.nan, p_x.dtype)
    decoder = decoder._replace(weights=jnp.where(valid, decoder.weights, nan))
    information = jnp.maximum(entropy(code) + entropy(safe_y) - decoder.entropy, 0)
    bound = entropy(safe_x) + entropy(safe_y) - coupling_bounds(safe_x, safe_y).majorize_profile
    return Bottleneck(encoder, decoder, information, jnp.where(valid, jnp.minimum(rate, bound), nan))


def _information(code: Array, p_y: Array) -> Array:
    """I(T; Y) of the better greedy coupling."""
    return entropy(code) + entropy(p_y) - greedy_coupling(code, p_y, rule="best").entropy


def _paper_labels(p_x: Array, p_y: Array, rate: Array) -> Array:
    del p_y
    return code_at_rate(p_x, rate)[0]


def _exact_labels(p_x: Array, p_y: Array, rate: Array) -> Array:
    candidates = jnp.asarray(partitions(p_x.shape[0]))
    codes = jax.vmap(lambda labels: code_of_labels(p_x, labels))(candidates)
    return candidates[jnp.argmax(_values(codes, p_y, rate))]


def _values(codes: Array, p_y: Array, rate: Array) -> Array:
    """Information of each code law ``[C, N]``, -1 where its entropy exceeds the rate."""
    fits = entropy(codes) <= rate + rate_slack(codes.dtype)
    values = jax.vmap(lambda code: _information(code, p_y))(codes)
    return jnp.where(fits, values, -1)


def _decoder_aware_labels(p_x: Array, p_y: Array, rate: Array, num_starts: int = 4) -> Array:
    starts = _starting_labels(p_x, p_y, rate)
    codes = jax.vmap(lambda labels: code_of_labels(p_x, labels))(starts)
    values, chosen = jax.lax.top_k(_values(codes, p_y, rate), min(num_starts, starts.shape[0]))
    climb = functools.partial(_climb, p_x=p_x, p_y=p_y, rate=rate)
    labels, values = jax.vmap(climb)(starts[chosen], codes[chosen], values)
    return labels[jnp.argmax(values)]


def _starting_labels(p_x: Array, p_y: Array, rate: Array) -> Array:
    """Candidates, int32 [C, N]: the greedy map at the rate, other maps of the path, packings, packing into Y."""
    size = p_x.shape[0]
    ranked = sorted_masses(p_x)
    positions = jnp.arange(0, 2 * size - 1, max(1, (2 * size - 1) // 32))
    path = jax.vmap(lambda position: code_of_step(p_x, p_x, ranked, position)[0])(positions)
    counts = jnp.unique(
        jnp.round(jnp.geomspace(1, size, min(size, 16))).astype(jnp.int32), size=min(size, 16), fill_value=1
    )
    packed = jax.vmap(lambda count: lpt_labels(p_x, count))(counts)
    return jnp.concatenate([_paper_labels(p_x, p_y, rate)[None], path, packed, _packed_into(p_x, p_y)[None]])


def _packed_into(p_x: Array, p_y: Array) -> Array:
    """Symbols in descending order, each to the symbol of Y with the most room left; at most N codes."""
    order = jnp.argsort(-p_x, stable=True)
    room = jnp.sort(p_y, descending=True)[: p_x.shape[0]]

    def put(room: Array, mass: Array) -> tuple[Array, Array]:
        code = jnp.argmax(room).astype(jnp.int32)
        return room.at[code].add(-mass), code

    _, codes = jax.lax.scan(put, room, p_x[order])
    return jnp.zeros_like(codes).at[order].set(codes)


def _climb(labels: Array, code: Array, value: Array, *, p_x: Array, p_y: Array, rate: Array) -> tuple[Array, Array]:
    """Best improvement over moves, exchanges and merges, until there is none."""
    size = p_x.shape[0]
    names = jnp.arange(size, dtype=jnp.int32)
    first, second = (grid.reshape(-1) for grid in jnp.meshgrid(names, names, indexing="ij"))

    def unit(name: Array) -> Array:
        return (name[:, None] == names[None, :]).astype(p_x.dtype)

    def neighbours(labels: Array, code: Array) -> Array:
        x, y = first, second
        move = p_x[x][:, None] * (unit(y) - unit(labels[x]))  # x goes to code y
        exchange = (p_x[x] - p_x[y])[:, None] * (unit(labels[y]) - unit(labels[x]))  # x and y change places
        merge = code[x][:, None] * (unit(y) - unit(x))  # code x joins code y
        return jnp.maximum(code[None, :] + jnp.concatenate([move, exchange, merge]), 0)

    def apply(labels: Array, chosen: Array) -> Array:
        kind, pair = chosen // (size * size), chosen % (size * size)
        x, y = first[pair], second[pair]
        moved = labels.at[x].set(y)
        exchanged = labels.at[x].set(labels[y]).at[y].set(labels[x])
        merged = jnp.where(labels == x, y, labels)
        return jnp.where(kind == 0, moved, jnp.where(kind == 1, exchanged, merged))

    def step(state):
        labels, code, value, _, count = state
        values = _values(neighbours(labels, code), p_y, rate)
        chosen = jnp.argmax(values)
        better = values[chosen] > value + 64 * jnp.finfo(p_x.dtype).eps
        labels = jnp.where(better, apply(labels, chosen), labels)
        value = jnp.where(better, values[chosen], value)
        return labels, code_of_labels(p_x, labels), value, better, count + 1

    start = (labels, code, value, jnp.array(True), jnp.zeros((), jnp.int32))
    labels, _, value, _, _ = jax.lax.while_loop(lambda s: s[3] & (s[4] < 8 * size), step, start)
    return labels, value


_LABELS = {"paper": _paper_labels, "decoder_aware": _decoder_aware_labels, "exact": _exact_labels}
