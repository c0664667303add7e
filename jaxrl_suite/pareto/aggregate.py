"""Directions that improve several objectives at once, from the Gram matrix of their gradients alone.

Every rule maps ``G_ij = <g_i, g_j>`` to coefficients ``a`` of the combined gradient ``sum_i a_i g_i``. Nothing here
sees a gradient, so the cost does not depend on the number of parameters.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_suite.config import as_array, as_number, check, check_count, check_key
from jaxrl_suite.pareto.hypervolume import as_numbers
from jaxrl_suite.pareto.quadratic import solve_quadratic
from jaxrl_suite.types import Array, PRNGKey

Aggregator = Literal["sum", "mgda", "pcgrad", "cagrad", "nash_mtl", "imtl_g", "aligned_mtl", "upgrad"]


def _safe_sqrt(x: Array) -> Array:
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def mgda(gram: Array) -> Array:
    """Shortest vector in the convex hull of the gradients: ``argmin over the simplex of a' G a``.

    Zero direction exactly at Pareto-stationary points; otherwise every objective improves at least by its squared
    length.

    Args:
        gram: [K, K].

    Returns:
        [K], on the simplex.

    References:
        Desideri (2012); Sener and Koltun (2018), arXiv 1810.04650.

    >>> import jax.numpy as jnp
    >>> [round(float(x), 5) for x in mgda(jnp.diag(jnp.array([1.0, 3.0])))]
    [0.75, 0.25]
    """
    return solve_quadratic(gram, jnp.zeros_like(gram[0])).x


def pcgrad(gram: Array, *, order: Array | None = None, key: PRNGKey | None = None) -> Array:
    """Gradient surgery: each gradient loses its part against every conflicting other; then the sum.

    Args:
        gram: [K, K].
        order: int [K], the order in which the others are visited, each once; 0..K-1 by default.
        key: draws one order for each gradient instead; consumed.

    Returns:
        [K].

    Raises:
        ValueError: an order of another length, or one that leaves an objective out, where it is known.

    References:
        Yu et al. (2020), arXiv 2001.06782, algorithm 1.
    """
    size = gram.shape[0]
    first = jnp.arange(size, dtype=jnp.int32) if order is None else _as_order(order, size)
    orders = jnp.broadcast_to(first, (size, size))
    if key is not None:
        check_key(key)
        orders = jax.vmap(lambda k: jax.random.permutation(k, first))(jax.random.split(key, size))

    def surgery(own: Array, order: Array) -> Array:
        def remove(coefficients: Array, other: Array) -> tuple[Array, None]:
            inner = coefficients @ gram[other]
            square = gram[other, other]
            part = jnp.where((inner < 0) & (other != own) & (square > 0), inner / jnp.where(square > 0, square, 1), 0)
            return coefficients.at[other].add(-part), None

        start = (jnp.arange(size, dtype=own.dtype) == own).astype(gram.dtype)
        return jax.lax.scan(remove, start, order)[0]

    return jnp.sum(jax.vmap(surgery)(jnp.arange(size, dtype=jnp.int32), orders), axis=0)


def _as_order(order: Array, size: int) -> Array:
    """An order of so many objectives as int32."""
    array, rule = as_array("order", order), f"must hold each of 0..{size - 1} once"
    whole = jnp.issubdtype(array.dtype, jnp.integer) and array.shape == (size,)
    check(whole, argument="order", value=f"{array.dtype}{list(array.shape)}", rule=rule)
    if not isinstance(array, jax.core.Tracer):
        check(sorted(array.tolist()) == list(range(size)), argument="order", value=array.tolist(), rule=rule)
    return array.astype(jnp.int32)


def cagrad(gram: Array, *, radius: Array | float = 0.5, num_rounds: int = 40) -> Array:
    """Conflict-averse direction: the best worst-case improvement within a ball around the mean gradient.

    ``max over |d - g_0| <= c |g_0| of min_i <g_i, d>`` through its dual, ``min over the simplex of <g_w, g_0> + c |g_0|
    |g_w|``. With ``|x| = min over t of (x^2 / t + t) / 2`` it is a quadratic program for every length t, and
    convex in t: bisection.

    Args:
        gram: [K, K].
        radius: c >= 0; 0 gives the mean gradient, large values approach MGDA.
        num_rounds: halvings of the interval of log-lengths.

    Returns:
        [K].

    References:
        Liu et al. (2021), arXiv 2110.14048, algorithm 1.
    """
    check_count(1, num_rounds=num_rounds)
    radius = as_number("radius", radius, gram.dtype, interval="[0, inf]")
    size = gram.shape[0]
    mean = jnp.full((size,), 1.0 / size, gram.dtype)
    to_mean = gram @ mean
    reach = radius * _safe_sqrt(mean @ to_mean)
    info = jnp.finfo(gram.dtype)
    longest = 0.5 * jnp.log(jnp.maximum(jnp.max(jnp.diagonal(gram)), info.tiny))

    def solve(log_length: Array) -> tuple[Array, Array]:
        """Minimiser for the parabola that touches the norm at a length, and its own length."""
        weights = solve_quadratic(gram * (reach * jnp.exp(-log_length)), to_mean, num_steps=100).x
        return weights, 0.5 * jnp.log(jnp.maximum(weights @ gram @ weights, info.tiny))

    def bisect(bounds: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bounds
        middle = (low + high) / 2
        longer = solve(middle)[1] > middle
        return (jnp.where(longer, middle, low), jnp.where(longer, high, middle)), None

    start = (longest + jnp.log(info.eps), longest)
    (low, high), _ = jax.lax.scan(bisect, start, length=num_rounds)
    weights, log_length = solve((low + high) / 2)
    factor = jnp.where(reach > 0, reach * jnp.exp(-log_length), 0)
    return mean + factor * weights


def nash_mtl(gram: Array, *, num_steps: int = 50) -> Array:
    """Nash bargaining solution: ``a > 0`` with ``G a = 1 / a``, by damped Newton steps on ``a' G a / 2 - sum log a``.

    Args:
        gram: [K, K]; a relative ridge of 1e-7 (float32) or 1e-14 keeps it definite.
        num_steps: Newton steps.

    Returns:
        [K], positive.

    References:
        Navon et al. (2022), arXiv 2202.01017, claim 3.1.
    """
    check_count(1, num_steps=num_steps)
    size = gram.shape[0]
    scale = jnp.maximum(jnp.trace(gram) / size, jnp.finfo(gram.dtype).tiny)
    matrix = gram / scale + jnp.finfo(gram.dtype).eps * jnp.eye(size, dtype=gram.dtype)

    def newton(a: Array, _: None) -> tuple[Array, None]:
        # The Newton system in relative changes: well conditioned also far from the solution.
        slope = matrix @ a - 1 / a
        hessian = a[:, None] * matrix * a[None, :] + jnp.eye(size, dtype=gram.dtype)
        change = jnp.linalg.solve(hessian, a * slope)
        decrement = _safe_sqrt(jnp.sum(change * (a * slope)))
        damping = jnp.where(decrement > 0.25, 1 / (1 + decrement), jnp.ones_like(decrement))
        return a * (1 - damping * change), None

    start = 1 / jnp.sqrt(jnp.diagonal(matrix))
    a, _ = jax.lax.scan(newton, start, length=num_steps)
    return a / jnp.sqrt(scale)


def imtl_g(gram: Array) -> Array:
    """Coefficients that sum to one and give the same projection on every unit gradient.

    Args:
        gram: [K, K], not singular.

    Returns:
        [K], sum one; may be negative.

    References:
        Liu et al. (2021), "Towards impartial multi-task learning", ICLR, equation 6.
    """
    norms = _safe_sqrt(jnp.diagonal(gram))
    raw = jnp.linalg.lstsq(gram, norms)[0]
    total = jnp.sum(raw)
    return raw / jnp.where(total == 0, 1, total)


def aligned_mtl(gram: Array, *, weights: Array | None = None) -> Array:
    """Gradients rotated to be orthogonal and equally long (the shortest principal length), then weighted.

    Args:
        gram: [K, K].
        weights: [K], preference; uniform by default.

    Returns:
        [K].

    References:
        Senushkin et al. (2023), arXiv 2305.19000, section 4.
    """
    size = gram.shape[0]
    given = jnp.full((size,), 1.0 / size, gram.dtype) if weights is None else weights
    preference = as_numbers("weights", given, (size,), dtype=gram.dtype)
    values, vectors = jnp.linalg.eigh(gram)
    threshold = jnp.max(values) * size * jnp.finfo(gram.dtype).eps
    live = values > threshold
    smallest = jnp.min(jnp.where(live, values, jnp.inf))
    factors = jnp.where(live, jnp.sqrt(jnp.where(jnp.isfinite(smallest), smallest, 0) / jnp.where(live, values, 1)), 0)
    return vectors @ (factors * (vectors.T @ preference))


def upgrad(gram: Array, *, weights: Array | None = None) -> Array:
    """Each gradient projected on the cone of directions that harm no objective, then weighted.

    Args:
        gram: [K, K].
        weights: [K], preference; uniform by default.

    Returns:
        [K].

    References:
        Quinton and Rey (2024), arXiv 2406.16232, proposition 1 and definition of UPGrad.
    """
    size = gram.shape[0]
    given = jnp.full((size,), 1.0 / size, gram.dtype) if weights is None else weights
    preference = as_numbers("weights", given, (size,), dtype=gram.dtype)

    def project(bound: Array) -> Array:
        return solve_quadratic(gram, jnp.zeros_like(bound), constraint="at_least", bound=bound).x

    return preference @ jax.vmap(project)(jnp.eye(size, dtype=gram.dtype))


_RULES: dict[str, Callable[..., Array]] = {
    "sum": lambda gram: jnp.ones_like(gram[0]),
    "mgda": mgda,
    "pcgrad": pcgrad,
    "cagrad": cagrad,
    "nash_mtl": nash_mtl,
    "imtl_g": imtl_g,
    "aligned_mtl": aligned_mtl,
    "upgrad": upgrad,
}
AGGREGATORS = tuple(_RULES)


def aggregate(gram: Array, rule: Aggregator | Callable[[Array], Array] = "upgrad") -> Array:
    """Coefficients of the combined gradient by a rule's name, or by a function of your own.

    Args:
        gram: [K, K], inner products of the gradients.
        rule: one of ``AGGREGATORS``, or ``rule(gram) -> [K]``.

    Returns:
        [K]; NaN throughout if the matrix holds NaN.

    Raises:
        ValueError: the matrix is no array of numbers, not square, or the rule is unknown.

    >>> import jax.numpy as jnp
    >>> aggregate(jnp.eye(2), "sum").tolist()
    [1.0, 1.0]
    """
    gram = as_numbers("gram", gram)
    gram = gram.astype(jnp.promote_types(gram.dtype, jnp.float32))
    square = gram.ndim == 2 and gram.shape[0] == gram.shape[1] > 0
    check(square, argument="gram", value=gram.shape, rule="must have shape [K, K]")
    check_rule(rule)
    coefficients = rule(gram) if callable(rule) else _RULES[rule](gram)
    # A rule that compares would take NaN for something small, and come out finite.
    return jnp.where(jnp.any(jnp.isnan(gram)), jnp.nan, coefficients)


def check_rule(rule: Aggregator | Callable[[Array], Array]) -> None:
    """Refuses what is neither a rule's name nor a function.

    Raises:
        ValueError: the rule is unknown.
    """
    known = callable(rule) or (isinstance(rule, str) and rule in _RULES)
    check(known, argument="rule", value=rule, rule="unknown rule", remedy=f"Rules: {', '.join(_RULES)}")
