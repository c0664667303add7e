"""Atomic axes: one fine mesh on which two different parallel layouts are both plain runs of axes.

Attention splits the ranks of a pipeline stage into (dp, cp, tp), experts split the same ranks into (edp, ep, etp),
major to minor. Write the cumulative products of each view, innermost first: 1, TP, TP·CP, TP·CP·DP and 1, ETP, ETP·EP,
ETP·EP·EDP. When the merged, sorted list is a chain of divisors its ratios are the *atoms*: each logical axis of either
view is a run of consecutive atoms, so that one mesh serves both layouts and no array ever changes mesh.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Atoms(NamedTuple):
    """Common refinement of two factorisations.

    Attributes:
        names: atom names, major to minor (``a0`` is the innermost, its neighbours are closest on the network).
        sizes: their sizes, each at least 2.
        roles: logical axis -> tuple of atom names, major to minor; empty for an axis of size 1.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    roles: dict[str, tuple[str, ...]]


def boundaries(degrees: Sequence[int]) -> list[int]:
    """Cumulative products of degrees given innermost first, starting at 1.

    >>> boundaries([2, 2, 2])
    [1, 2, 4, 8]
    """
    products = [1]
    for degree in degrees:
        products.append(products[-1] * degree)
    return products


def refine(*views: Mapping[str, int]) -> Atoms | None:
    """Common refinement of views of the same ranks.

    Args:
        views: each an ordered mapping from axis name to degree, innermost axis first; the products must agree.

    Returns:
        The atoms, or None if one boundary does not divide the next, in which case no mesh serves the views.

    >>> refine({"tp": 4, "dp": 4}, {"etp": 2, "ep": 8}).sizes
    (4, 2, 2)
    >>> refine({"tp": 2, "cp": 3}, {"etp": 3, "ep": 2}) is None
    True
    """
    cuts = sorted({cut for view in views for cut in boundaries(list(view.values()))})
    if any(outer % inner for inner, outer in pairwise(cuts)):
        return None
    sizes = [outer // inner for inner, outer in pairwise(cuts)]
    roles = {}
    for view in views:
        edges = boundaries(list(view.values()))
        for name, low, high in zip(view, edges, edges[1:]):
            inside = [index for index, cut in enumerate(cuts[:-1]) if low <= cut < high]
            roles[name] = tuple(f"a{index}" for index in reversed(inside))
    names = tuple(f"a{index}" for index in reversed(range(len(sizes))))
    return Atoms(names, tuple(reversed(sizes)), roles)


def digits(rank: int, degrees: Sequence[int]) -> tuple[int, ...]:
    """Digits of a rank in a mixed radix, degrees and digits both innermost first.

    >>> digits(5, [2, 2, 2])
    (1, 0, 1)
    """
    result = []
    for degree in degrees:
        rank, digit = divmod(rank, degree)
        result.append(digit)
    return tuple(result)


def groups_of(axis: int, degrees: Sequence[int]) -> list[list[int]]:
    """Groups of ranks that agree on every digit except one.

    Args:
        axis: position of the free digit in ``degrees``.
        degrees: innermost first.

    >>> groups_of(1, [2, 2])
    [[0, 2], [1, 3]]
    """
    stride = math.prod(degrees[:axis])
    starts = [rank for rank in range(math.prod(degrees)) if digits(rank, degrees)[axis] == 0]
    return [[start + stride * step for step in range(degrees[axis])] for start in starts]


def ordered_factorisations(number: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write a number as an ordered product.

    >>> len(ordered_factorisations(8, 3))
    10
    """
    if parts == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return [(d, *rest) for d in divisors for rest in ordered_factorisations(number // d, parts - 1)]
