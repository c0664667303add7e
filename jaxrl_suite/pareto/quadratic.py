"""Small convex quadratic programs, a few variables each, with a fixed amount of work: what gradient aggregation solves.

Accelerated projected gradient steps find the active set, one linear system on it gives the last digits.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check, check_count
from jaxrl_suite.pareto.hypervolume import as_numbers
from jaxrl_suite.types import Array

_CONSTRAINTS = ("simplex", "at_least")


class QuadraticSolution(NamedTuple):
    """Solution of a quadratic program.

    Attributes:
        x: [K].
        residual: [], distance between x and the projection of ``x - gradient``, in units of the scaled problem.
    """

    x: Array
    residual: Array


def project_simplex(x: Array) -> Array:
    """Nearest point of the simplex.

    Args:
        x: [K].

    Returns:
        [K], not negative, sum one.

    References:
        Held, Wolfe and Crowder (1974); Duchi et al. (2008).

    >>> import jax.numpy as jnp
    >>> project_simplex(jnp.array([2.0, 0.0])).tolist()
    [1.0, 0.0]
    """
    x = as_numbers("x", x)
    check(x.ndim == 1 and x.size > 0, argument="x", value=x.shape, rule="must have shape [K]", remedy="vmap a batch")
    ordered = -jnp.sort(-x)
    count = jnp.arange(1, x.shape[0] + 1, dtype=x.dtype)
    shift = (jnp.cumsum(ordered) - 1) / count
    support = jnp.sum(ordered > shift)
    return jnp.maximum(x - shift[support - 1], 0)


def _system(matrix: Array, rhs: Array, free: Array, *, sums_to_one: bool, rest: Array) -> Array:
    """Solves the stationarity conditions on the free variables, the others held at ``rest``."""
    size = matrix.shape[0]
    both = free[:, None] & free[None, :]
    block = jnp.where(both, matrix, jnp.eye(size, dtype=matrix.dtype))
    held = jnp.where(free, 0, rest)
    target = jnp.where(free, rhs - matrix @ held, rest)
    ridge = jnp.where(free, 4 * jnp.finfo(matrix.dtype).eps, 0)
    block = block + jnp.diag(ridge)
    if not sums_to_one:
        return jnp.linalg.solve(block, target)
    border = free.astype(matrix.dtype)
    full = jnp.block([[block, border[:, None]], [border[None, :], jnp.zeros((1, 1), matrix.dtype)]])
    return jnp.linalg.solve(full, jnp.concatenate([target, jnp.ones((1,), matrix.dtype)]))[:size]


def solve_quadratic(
    matrix: Array,
    linear: Array,
    *,
    constraint: Literal["simplex", "at_least"] = "simplex",
    bound: Array | None = None,
    num_steps: int = 200,
) -> QuadraticSolution:
    """Minimises ``x' Q x / 2 + c' x`` over the simplex, or over ``x >= bound``.

    Args:
        matrix: Q, [K, K], symmetric, positive semidefinite.
        linear: c, [K].
        constraint: "simplex" or "at_least".
        bound: [K], for "at_least".
        num_steps: accelerated projected gradient steps before the last linear system.

    Returns:
        Solution and residual; the residual says how well it was solved.

    References:
        Beck and Teboulle (2009), FISTA; O'Donoghue and Candes (2015), adaptive restart.
    """
    check_count(1, num_steps=num_steps)
    rule = f"must be one of {', '.join(_CONSTRAINTS)}"
    check(constraint in _CONSTRAINTS, argument="constraint", value=constraint, rule=rule)
    size = matrix.shape[0]
    scale = jnp.maximum(jnp.maximum(jnp.trace(matrix), jnp.max(jnp.abs(linear))), jnp.finfo(matrix.dtype).tiny)
    matrix, linear = matrix / scale, linear / scale
    simplex = constraint == "simplex"
    lower = jnp.zeros_like(linear) if bound is None else bound

    def project(x: Array) -> Array:
        return project_simplex(x) if simplex else jnp.maximum(x, lower)

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        x, ahead, momentum = carry
        moved = project(ahead - (matrix @ ahead + linear))  # the trace bounds the largest eigenvalue: step 1
        restart = jnp.sum((ahead - moved) * (moved - x)) > 0
        momentum = jnp.where(restart, jnp.ones_like(momentum), momentum)
        following = (1 + jnp.sqrt(1 + 4 * momentum * momentum)) / 2
        factor = jnp.where(restart, 0, (momentum - 1) / following)
        return (moved, moved + factor * (moved - x), following), None

    def residual(x: Array) -> Array:
        return jnp.max(jnp.abs(x - project(x - (matrix @ x + linear))))

    start = jnp.full((size,), 1.0 / size, matrix.dtype) if simplex else lower
    (x, _, _), _ = jax.lax.scan(step, (start, start, jnp.ones((), matrix.dtype)), length=num_steps)
    tolerance = jnp.sqrt(jnp.finfo(matrix.dtype).eps)
    free = x - lower > tolerance
    polished = project(_system(matrix, -linear, free, sums_to_one=simplex, rest=lower))
    better = jnp.all(jnp.isfinite(polished)) & (residual(polished) < residual(x))
    x = jnp.where(better, polished, x)
    return QuadraticSolution(x, residual(x))
