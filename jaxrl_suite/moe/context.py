"""Context parallelism: attention of sequences whose tokens lie on several ranks.

Two kernels behind the decoder's ``attend`` seam. *All-gather* brings all keys and values to every rank: one collective,
and with grouped queries only Hk / Hq of the activation bytes. *Ring* passes keys and values around and merges partial
results by their normalisers, so that no rank ever holds a whole sequence.

In zig-zag order rank r owns chunks r and 2·CP-1-r. Against keys of another rank it then always has exactly two visible
pairs of chunks out of four: its later chunk sees the other's earlier chunk, and either its earlier chunk sees that too
(the other rank is lower) or its later chunk sees the other's later one (the other rank is higher). The ring computes
just these two, so each rank does the same work in each step.

References:
    Liu et al. (2023), Ring Attention, arXiv:2310.01889; Dubey et al. (2024), arXiv:2407.21783, section 3.3.2
    (all-gather, zig-zag order).
"""

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_suite.lm.attention import attention_with_normaliser, blockwise_attend
from jaxrl_suite.moe.config import MoEConfig
from jaxrl_suite.moe.variance import axis_index, axis_size, unify
from jaxrl_suite.types import Array, Attend


def make_attend(config: MoEConfig, axes: tuple[str, ...]) -> Attend:
    """The attention slot for a folding: the decoder's own on one context rank, else all-gather or ring.

    Args:
        config: read for the kernel, the order and the window.
        axes: atoms of cp.
    """
    window = config.model.sliding_window
    if not axes:
        kernel: Attend = functools.partial(_unified_attend, window=window)
    elif config.context == "all_gather":
        kernel = functools.partial(all_gather_attend, axes=axes, window=window)
    else:
        kernel = functools.partial(ring_attend, axes=axes, zigzag=config.zigzag, window=window)

    def attend(q: Array, k: Array, v: Array, positions: Array, segments: Array | None) -> Array:
        # Named before they are cut up: each part of a ring would else keep queries of its own.
        q, k, v = (checkpoint_name(part, "held") for part in (q, k, v))
        return kernel(q, k, v, positions, segments)

    return attend


def _unified_attend(
    q: Array, k: Array, v: Array, positions: Array, segments: Array | None, *, window: int | None
) -> Array:
    segments = jnp.ones_like(positions) if segments is None else segments
    q, k, v, positions, segments = unify(q, k, v, positions, segments)
    return blockwise_attend(q, k, v, positions, segments, window=window)


def all_gather_attend(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segments: Array | None,
    *,
    axes: tuple[str, ...],
    window: int | None = None,
) -> Array:
    """Queries of this rank against the gathered keys of all.

    Args:
        q: [B, T, Hq, C], T tokens of this rank in any order.
        k: [B, T, Hk, C].
        v: [B, T, Hk, C].
        positions: int32 [B, T], positions within the segment.
        segments: int32 [B, T] or None for one segment.
        axes: atoms of cp.
        window: sliding window, in tokens.
    """
    segments = jnp.ones_like(positions) if segments is None else segments
    q, k, v, positions, segments = unify(q, k, v, positions, segments)
    everyone = [jax.lax.all_gather(part, axes, axis=1, tiled=True) for part in (k, v, positions, segments)]
    keys, values, key_positions, key_segments = checkpoint_name(everyone, "held")
    return attention_with_normaliser(q, keys, values, positions, key_positions, segments, key_segments, window=window)[
        0
    ]


def ring_attend(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segments: Array | None,
    *,
    axes: tuple[str, ...],
    zigzag: bool = True,
    window: int | None = None,
) -> Array:
    """Keys and values travel around the ring; partial results are merged by their normalisers.

    Args: as for :func:`all_gather_attend`; ``zigzag`` says that tokens lie in zig-zag order, which halves the work.
    """
    segments = jnp.ones_like(positions) if segments is None else segments
    q, k, v, positions, segments = unify(q, k, v, positions, segments)
    ranks, me = axis_size(axes), axis_index(axes)
    attend = functools.partial(attention_with_normaliser, window=window)
    held = (k, v, positions, segments)
    parts = [attend(q, k, v, positions, positions, segments, segments, ordered=True)]
    ring = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
    for step in range(1, ranks):
        held = checkpoint_name(jax.lax.ppermute(held, axes, ring), "held")
        if zigzag:
            parts.append(_zigzag_step(attend, q, positions, segments, held, me >= step))
        else:
            parts.append(attend(q, held[0], held[1], positions, held[2], segments, held[3]))
    return merge_parts(parts).astype(q.dtype)


def _zigzag_step(attend, q: Array, positions: Array, segments: Array, held: tuple, from_lower: Array) -> tuple:
    """The two visible pairs of chunks against the keys of another rank; ``from_lower``: that rank comes before us."""
    half = q.shape[1] // 2
    queries = [[part[:, :half], part[:, half:]] for part in (q, positions, segments)]
    keys = [[part[:, :half], part[:, half:]] for part in held]

    def pick(pair: list[Array], later: Array) -> Array:
        return jnp.where(later, pair[1], pair[0])

    def run(query: list[Array], key: list[Array]) -> tuple[Array, Array]:
        return attend(query[0], key[0], key[1], query[1], key[2], query[2], key[3])

    always = run([part[1] for part in queries], [part[0] for part in keys])
    higher = ~from_lower
    other = run([pick(part, higher) for part in queries], [pick(part, higher) for part in keys])
    hidden = (jnp.zeros_like(other[0]), jnp.full_like(other[1], -1e30))
    early = [jnp.where(from_lower, o, h) for o, h in zip(other, hidden)]
    late = merge([always, tuple(jnp.where(from_lower, h, o) for o, h in zip(other, hidden))])
    return tuple(jnp.concatenate([e, l], axis=1) for e, l in zip(early, late))


def merge(parts: Sequence[tuple[Array, ...]]) -> tuple[Array, Array]:
    """Merges attention over disjoint keys: outputs [B, T, H, C] and log-normalisers [B, T, H] of each part."""
    normaliser = functools.reduce(jnp.logaddexp, [n for _, n in parts])
    wide = normaliser.dtype
    output = cast(Array, sum(o.astype(wide) * jnp.exp(n - normaliser)[..., None] for o, n in parts))
    return output, normaliser


def merge_parts(parts: list[tuple[Array, Array]]) -> Array:
    """The merged output alone."""
    return merge(parts)[0]
