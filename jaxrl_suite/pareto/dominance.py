"""Who dominates whom, and an archive of fixed capacity that keeps the best set seen so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check, check_count
from jaxrl_suite.pareto.hypervolume import as_numbers, check_known, hypervolume_contributions, hypervolume_improvement
from jaxrl_suite.types import Array


def dominates(a: Array, b: Array) -> Array:
    """Whether ``a`` is at least as good as ``b`` everywhere and better somewhere; larger is better.

    Args:
        a: [..., K].
        b: [..., K], broadcast against ``a``.

    Returns:
        bool [...].

    >>> import jax.numpy as jnp
    >>> bool(dominates(jnp.array([2.0, 1.0]), jnp.array([1.0, 1.0])))
    True
    """
    a, b = as_numbers("a", a), as_numbers("b", b)
    return jnp.all(a >= b, axis=-1) & jnp.any(a > b, axis=-1)


def non_dominated(points: Array, mask: Array | None = None) -> Array:
    """The Pareto front of a set: points that no other point dominates. Equal points do not dominate each other.

    Args:
        points: [N, K], larger is better.
        mask: bool [N], rows that count; the others are neither members nor dominators and may hold NaN.

    Returns:
        bool [N]; a row that holds NaN is on no front.

    Raises:
        ValueError: another shape, or a row that counts holds NaN (where values are known: not inside jit).

    >>> import jax.numpy as jnp
    >>> non_dominated(jnp.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])).tolist()
    [True, True, False]
    """
    points = as_numbers("points", points)
    check(points.ndim == 2, argument="points", value=points.shape, rule="must have shape [N, K]", remedy="vmap a batch")
    check_known("points", points, mask)
    keep = ~jnp.any(jnp.isnan(points), axis=1)
    if mask is not None:
        keep = keep & mask
    beaten = dominates(points[None, :, :], points[:, None, :]) & keep[None, :]
    return keep & ~jnp.any(beaten, axis=1)


class Archive(NamedTuple):
    """A set of mutually non-dominated points in a buffer of fixed capacity.

    Attributes:
        points: [C, K], objective values, larger is better; rows that are not in use are zero.
        mask: bool [C], rows in use.
        labels: int32 [C], what the caller said about each point (a step, say); -1 where not in use.
        reference: [K], points that are not above it everywhere are never kept.
        num_evicted: int32 [], how many non-dominated points had to go for want of room.
    """

    points: Array
    mask: Array
    labels: Array
    reference: Array
    num_evicted: Array


def init_archive(capacity: int, reference: Array) -> Archive:
    """An empty archive.

    Args:
        capacity: how many points it holds.
        reference: [K], reference point of the hypervolume, in the units of the objectives.

    Raises:
        ValueError: the capacity is not positive, or the reference is not a vector or holds NaN.
    """
    check_count(1, capacity=capacity)
    reference = as_numbers("reference", reference)
    check(reference.ndim == 1, argument="reference", value=reference.shape, rule="must have shape [K]")
    check_known("reference", reference)
    return Archive(
        points=jnp.zeros((capacity, reference.shape[0]), reference.dtype),
        mask=jnp.zeros(capacity, bool),
        labels=jnp.full(capacity, -1, jnp.int32),
        reference=reference,
        num_evicted=jnp.zeros((), jnp.int32),
    )


def archive_insert(archive: Archive, point: Array, *, label: Array | int = 0) -> tuple[Archive, Array, Array]:
    """Offers a point to the archive.

    The point enters if it lies above the reference and no member is at least as good everywhere; members that it
    dominates leave. If there is no room left, whoever adds least to the hypervolume leaves and the flag is raised.
    Without overflow the gains add up to the hypervolume of the archive.

    Args:
        archive: the archive.
        point: [K].
        label: int [], kept beside the point.

    Returns:
        The archive, the gain ``HV(P + p) - HV(P) >= 0`` before any eviction, and the overflow flag bool []. A point
        that holds NaN leaves the archive as it is, and the gain is NaN.

    Raises:
        ValueError: the point is not as long as the reference, or holds NaN (where values are known: not inside jit).

    References:
        Lu et al. (2025), arXiv 2509.11452, the buffer of hypervolume guidance; Knowles et al. (2003) for eviction by
        the least contribution.

    >>> import jax.numpy as jnp
    >>> archive = init_archive(4, jnp.zeros(2))
    >>> archive, gain, overflow = archive_insert(archive, jnp.array([2.0, 3.0]))
    >>> float(gain), bool(overflow)
    (6.0, False)
    """
    point = as_numbers("point", point, dtype=archive.points.dtype)
    shape = archive.reference.shape
    check(point.shape == shape, argument="point", value=point.shape, rule=f"must have shape {shape}, as the reference")
    check_known("point", point)
    return _insert(archive, point, label)


@jax.jit
def _insert(archive: Archive, point: Array, label: Array | int) -> tuple[Archive, Array, Array]:
    covered = jnp.any(jnp.all(archive.points >= point[None, :], axis=1) & archive.mask)
    enters = jnp.all(point > archive.reference) & ~covered
    gain = hypervolume_improvement(point, archive.points, archive.reference, mask=archive.mask)
    stays = archive.mask & ~(enters & dominates(point[None, :], archive.points))
    points = jnp.concatenate([archive.points, point[None, :]])
    labels = jnp.concatenate([archive.labels, jnp.asarray(label, jnp.int32)[None]])
    mask = jnp.concatenate([stays, enters[None]])
    overflow = jnp.all(mask)
    # Contributions cost N volumes, and nobody asks for them while there is room.
    loser = jax.lax.cond(
        overflow,
        lambda rows: jnp.argmin(hypervolume_contributions(rows, archive.reference)).astype(jnp.int32),
        lambda rows: jnp.zeros((), jnp.int32),
        points,
    )
    # One row goes in any case: the least contributor if all rows are taken, else the first that is free.
    leaves = jnp.where(overflow, loser, jnp.argmin(mask))
    last = points.shape[0] - 1
    order = jnp.arange(last)
    source = jnp.where(order == leaves, last, order)
    mask = mask[source] & ~((source == last) & (leaves == last))
    updated = Archive(
        points=jnp.where(mask[:, None], points[source], jnp.zeros_like(points[:1])),
        mask=mask,
        labels=jnp.where(mask, labels[source], -1),
        reference=archive.reference,
        num_evicted=archive.num_evicted + overflow.astype(jnp.int32),
    )
    return updated, gain, overflow
