"""Couplings with a certificate, and the polish of greedy couplings by pivots.

The cells of a coupling at a vertex of the transportation polytope form a spanning tree of the N + M symbols (or a
forest). Greedy elimination roots it: the symbol that step t uses up hangs by edge t on its partner. With u[v] in
{-1, 0, 1}^L the signed edges between symbol v and its root, +1 where the lower end of the edge is a row and -1 where
it is a column,

    weights = u^T (p, -q),          cycle(i, j) = u[column j] - u[row i].

Putting mass x into a cell (i, j) outside the tree changes the weights by x cycle(i, j); x is the least weight with -1
there, and that edge leaves the tree. A pivot evaluates the entropy after every such exchange at once, takes the best,
and updates u by an outer product. A tree that no single exchange improves need not be optimal: couplings of the rule
"max" never improved in our tests, those of the rule "zero" do.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check_count
from jaxrl_suite.coupling.bounds import coupling_bounds
from jaxrl_suite.coupling.greedy import (
    Rule,
    equal_mass,
    greedy_coupling,
    kernels_of,
    lower_entropy,
    normalise,
    poison,
    solve,
)
from jaxrl_suite.coupling.sparse import SparseCoupling, as_laws, check_law
from jaxrl_suite.coupling.tape import COLUMN, IDLE, Tape
from jaxrl_suite.distributions import entropy, entropy_terms
from jaxrl_suite.types import Array


class CertifiedCoupling(NamedTuple):
    """A coupling and how far from optimal it can be.

    Attributes:
        coupling: the joint law.
        entropy: [], its joint entropy in bits.
        bound: [], majorize-profile lower bound on the joint entropy of every coupling, bits.
        gap: [], ``entropy - bound``, non-negative: the optimum is at most this far below.
    """

    coupling: SparseCoupling
    entropy: Array
    bound: Array
    gap: Array


def certified_coupling(p: Array, q: Array, *, rule: Rule = "best", polish: bool = False) -> CertifiedCoupling:
    """A coupling with a certificate: its entropy, a lower bound on all, and the gap.

    Args:
        p: [N], probabilities of the rows.
        q: [M], probabilities of the columns.
        rule: rule of the greedy coupling.
        polish: whether pivots improve it, see :func:`polished_coupling`.

    Raises:
        ValueError: as :func:`greedy_coupling`.

    >>> certificate = certified_coupling(jnp.array([0.5, 0.4, 0.1]), jnp.array([0.6, 0.2, 0.2]))
    >>> round(float(certificate.entropy), 3), round(float(certificate.gap), 3)
    (1.761, 0.0)
    """
    coupling = polished_coupling(p, q, rule=rule) if polish else greedy_coupling(p, q, rule=rule)
    bound = coupling_bounds(p, q).majorize_profile
    return CertifiedCoupling(coupling, coupling.entropy, bound, jnp.maximum(coupling.entropy - bound, 0))


def polished_coupling(p: Array, q: Array, *, rule: Rule = "best", max_pivots: int | None = None) -> SparseCoupling:
    """A greedy coupling improved by pivots until no single exchange lowers the entropy.

    A pivot costs O(N M (N + M)): meant for alphabets up to about 64 by 64. With the rule "best" both greedy
    couplings are improved, and the lower one is returned. The weights of the final tree are linear in the
    marginals, which is also the derivative.

    Args:
        p: [N], probabilities of the rows.
        q: [M], probabilities of the columns.
        rule: where to start.
        max_pivots: limit; 4 (N + M) by default.

    Returns:
        Coupling with L = N + M - 1, never of higher entropy than the greedy one.

    Raises:
        ValueError: as :func:`greedy_coupling`; or the masses are integers.
    """
    p, q = as_laws(p=p, q=q)
    check_law("p", p)
    check_law("q", q)
    limit = 4 * (p.shape[0] + q.shape[0]) if max_pivots is None else max_pivots
    check_count(0, max_pivots=limit)
    return _polished(p, q, rule, limit)


@functools.partial(jax.jit, static_argnames=("rule", "max_pivots"))
def _polished(p: Array, q: Array, rule: Rule, max_pivots: int) -> SparseCoupling:
    valid = equal_mass(p, q)
    p, q = normalise(p, valid), normalise(q, valid)
    couplings = []
    for kernel in kernels_of(rule, p.shape[0], q.shape[0]):
        tape, weights = solve(kernel, jax.lax.stop_gradient(p), jax.lax.stop_gradient(q))
        couplings.append(_pivot_until_local_optimum(tape, weights, p, q, max_pivots))
    best = couplings[0] if len(couplings) == 1 else lower_entropy(*couplings)
    return best._replace(weights=poison(best.weights, valid))


class _Tree(NamedTuple):
    cells: Array  # int32 [L, 2]
    weights: Array  # [L]
    paths: Array  # [N + M, L], the u of the module's docstring
    entropy: Array
    better: Array  # bool, whether the last pivot improved
    pivots: Array


def _pivot_until_local_optimum(tape: Tape, weights: Array, p: Array, q: Array, max_pivots: int) -> SparseCoupling:
    num_rows = p.shape[0]
    paths, roots = _root(tape, num_rows, q.shape[0], weights.dtype)
    same_tree = roots[:num_rows, None] == roots[None, num_rows:]

    def pivot(tree: _Tree) -> _Tree:
        cycles = tree.paths[None, num_rows:] - tree.paths[:num_rows, None]  # [N, M, L]
        room = jnp.where(cycles < 0, tree.weights[None, None, :], jnp.inf)
        mass = jnp.min(room, axis=-1)
        mass = jnp.where(same_tree & jnp.isfinite(mass), mass, jnp.zeros_like(mass))
        changed = jnp.maximum(tree.weights[None, None, :] + mass[..., None] * cycles, 0)
        entropies = entropy(changed) + entropy_terms(mass)
        chosen = jnp.argmin(entropies)
        row, column = chosen // q.shape[0], chosen % q.shape[0]
        better = entropies[row, column] < tree.entropy - 64 * jnp.finfo(p.dtype).eps
        cycle = cycles[row, column]
        leaving = jnp.argmin(room[row, column])
        slot = jax.lax.iota(jnp.int32, cycle.shape[0]) == leaving
        through = tree.paths[:, leaving]
        paths = jnp.where(slot[None, :], through[:, None], tree.paths + through[:, None] * cycle[None, :])
        cell = jnp.stack([row, column]).astype(jnp.int32)
        pivoted = _Tree(
            jnp.where(slot[:, None], cell[None, :], tree.cells),
            jnp.where(slot, mass[row, column], changed[row, column]),
            paths,
            entropies[row, column],
            better,
            tree.pivots + 1,
        )
        kept = tree._replace(better=better, pivots=tree.pivots + 1)
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), pivoted, kept)

    start = _Tree(tape.indices, weights, paths, entropy(weights), jnp.array(True), jnp.zeros((), jnp.int32))
    tree = jax.lax.while_loop(lambda tree: tree.better & (tree.pivots < max_pivots), pivot, start)
    solved = jnp.einsum("vl,v->l", tree.paths, jnp.concatenate([p, -q]), precision="highest")
    return SparseCoupling(tree.cells, jnp.maximum(solved, 0))


def _root(tape: Tape, num_rows: int, num_columns: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Signed paths ``[N + M, L]`` and the root of each symbol, int32 [N + M]; the last step is nearest to the root."""
    size, length = num_rows + num_columns, tape.sides.shape[0]
    edge_index = jax.lax.iota(jnp.int32, length)

    def hang(carry: tuple[Array, Array], step: tuple[Array, Array, Array]):
        paths, roots = carry
        cell, side, edge = step
        row, column = cell[0], cell[1] + num_rows
        is_column = side == COLUMN
        child, parent = jnp.where(is_column, column, row), jnp.where(is_column, row, column)
        sign = jnp.where(is_column, -1, 1).astype(dtype)
        path = paths[parent] + jnp.where(edge_index == edge, sign, jnp.zeros_like(sign))
        alive = side != IDLE
        paths = paths.at[child].set(jnp.where(alive, path, paths[child]))
        return (paths, roots.at[child].set(jnp.where(alive, roots[parent], roots[child]))), None

    start = (jnp.zeros((size, length), dtype), jax.lax.iota(jnp.int32, size))
    return jax.lax.scan(hang, start, (tape.indices, tape.sides, edge_index), reverse=True)[0]
