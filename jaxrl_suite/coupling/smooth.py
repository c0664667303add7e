"""Smooth couplings for training: exact marginals at every temperature, and a derivative that sees ties coming.

The greedy coupling jumps where two masses tie, and its derivative knows nothing of it. :func:`soft_coupling` lets every
step pair *all* rows with all columns, in proportion to powers of what is left: with remainders a and b,

    alpha = a^(1/tau) / sum a^(1/tau),   beta likewise,   t = min(min_i a_i / alpha_i, min_j b_j / beta_j),
    C += t alpha beta',   a -= t alpha,   b -= t beta.

Each step keeps all remainders non-negative and uses up at least one symbol (the largest of its side, for tau < 1), so
N + M - 1 steps reach a coupling whatever tau is: tau = 1 gives the independent one, tau -> 0 the greedy one.

:func:`sharpen_coupling` is mirror ascent on negative entropy: raise all cells to a power, return to the marginals
by Sinkhorn scaling, and again. It converges towards a vertex of the polytope.
"""

import functools

import jax
import jax.numpy as jnp

from jaxrl_suite.config import as_number, check, check_count
from jaxrl_suite.coupling.greedy import equal_mass, normalise
from jaxrl_suite.coupling.sparse import as_laws, check_law, is_law
from jaxrl_suite.types import Array


def soft_coupling(p: Array, q: Array, temperature: Array | float) -> Array:
    """A coupling between the independent (temperature 1) and the greedy one (temperature 0), smooth in the marginals.

    Continuous in both marginals and the temperature, ties included; differentiable almost everywhere, forward and
    reverse. O(N M) a step: for training on small alphabets.

    Args:
        p: [N], probabilities of the rows; zeros are absent symbols.
        q: [M], probabilities of the columns.
        temperature: [], in (0, 1].

    Returns:
        Joint law [N, M]. NaN inside jit if the marginals are no laws or the temperature is out of range.

    Raises:
        ValueError: a law is empty, negative, NaN or not normalised, or the temperature is not in (0, 1].

    >>> import jax.numpy as jnp
    >>> p, q = jnp.array([0.6, 0.4]), jnp.array([0.7, 0.3])
    >>> bool(jnp.allclose(soft_coupling(p, q, 1.0), p[:, None] * q[None, :], atol=1e-6))
    True
    >>> bool(jnp.allclose(soft_coupling(p, q, 0.01), jnp.array([[0.6, 0.0], [0.1, 0.3]]), atol=1e-5))
    True
    """
    p, q = as_laws(p=p, q=q)
    check_law("p", p)
    check_law("q", q)
    temperature = as_number("temperature", temperature, p.dtype, interval="(0, 1]")
    return _soft(p, q, temperature)


@jax.jit
def _soft(p: Array, q: Array, temperature: Array) -> Array:
    valid = equal_mass(p, q) & (temperature > 0) & (temperature <= 1)
    p, q = normalise(p, valid), normalise(q, valid)
    temperature = jnp.where(valid, temperature, jnp.ones_like(temperature))
    tiny = 4 * float(jnp.finfo(p.dtype).eps)  # remainders that are rounding

    def step(carry, _):
        joint, a, b = carry
        (alpha, room_a), (beta, room_b) = _spread(a, temperature), _spread(b, temperature)
        amount = jnp.minimum(room_a, room_b)
        # What sets the amount, the largest of its side, is used up exactly.
        a = _left(a, amount * alpha, (room_a <= amount) & (a == jnp.max(a)), tiny)
        b = _left(b, amount * beta, (room_b <= amount) & (b == jnp.max(b)), tiny)
        return (joint + amount * alpha[:, None] * beta[None, :], a, b), None

    start = (jnp.zeros((p.shape[0], q.shape[0]), p.dtype), p, q)
    (joint, _, _), _ = jax.lax.scan(step, start, length=p.shape[0] + q.shape[0] - 1)
    return jnp.where(valid, joint, jnp.nan)


def _spread(a: Array, temperature: Array) -> tuple[Array, Array]:
    """The shares alpha, and the amount ``min_i a_i / alpha_i = max(a) sum_i (a_i / max(a)) ** (1 / tau)``."""
    top = jnp.max(a)
    eps = jnp.finfo(a.dtype).eps
    positive = a > 4 * eps
    ratio = jnp.where(positive, a, jnp.ones_like(a)) / jnp.where(top > 0, top, jnp.ones_like(top))
    logs = jnp.log(ratio) / temperature
    # Shares that rounding would lose are none: their cells would have entropy slopes beyond all range.
    positive = positive & (logs > 2 * jnp.log(eps))
    powers = jnp.where(positive, jnp.exp(jnp.where(positive, logs, jnp.zeros_like(logs))), jnp.zeros_like(a))
    total = jnp.sum(powers)
    return powers / jnp.where(total > 0, total, jnp.ones_like(total)), top * total


def _left(a: Array, used: Array, exhausted: Array, tiny: float) -> Array:
    left = a - used
    return jnp.where(exhausted | (left <= tiny), jnp.zeros_like(a), left)


def sharpen_coupling(joint: Array, power: Array | float = 1.2, *, num_powers: int = 8, num_scalings: int = 50) -> Array:
    """Mirror ascent on negative entropy: ``C <- Sinkhorn(C ** power)``, with the marginals of ``joint``.

    Smooth in ``joint``; its entropy falls towards that of a vertex. The product of the marginals is a fixed point (its
    powers are products again), so start from :func:`soft_coupling` at a temperature below one.

    Args:
        joint: [N, M], a coupling.
        power: [], above 1; larger steps are bolder.
        num_powers: how often.
        num_scalings: row and column scalings after each power; the rows are met last, and the columns up to what the
            scalings leave, which falls geometrically.

    Returns:
        Joint law [N, M] with the same marginals; NaN inside jit if ``joint`` is no law or the power not above 1.

    Raises:
        ValueError: ``joint`` has not two axes, or is empty, negative, NaN or not normalised; the power is not above 1.
    """
    (joint,) = as_laws(joint=joint)
    check(
        joint.ndim == 2, argument="joint", value=joint.shape, rule="must have two axes", remedy="Use vmap for batches"
    )
    check_law("joint", joint.reshape(-1))
    power = as_number("power", power, joint.dtype, interval="(1, inf)")
    check_count(0, num_powers=num_powers, num_scalings=num_scalings)
    return _sharpen(joint, power, num_powers, num_scalings)


@functools.partial(jax.jit, static_argnames=("num_powers", "num_scalings"))
def _sharpen(joint: Array, power: Array, num_powers: int, num_scalings: int) -> Array:
    valid = is_law(joint.reshape(-1)) & (power > 1)
    rows, columns = jnp.sum(joint, axis=1), jnp.sum(joint, axis=0)
    floor = jnp.finfo(joint.dtype).tiny ** 0.5

    def over(target: Array, total: Array) -> Array:
        some = total > floor
        return jnp.where(some, target / jnp.where(some, total, jnp.ones_like(total)), jnp.zeros_like(total))

    def scale(joint: Array, _) -> tuple[Array, None]:
        joint = joint * over(columns, jnp.sum(joint, axis=0))[None, :]
        return joint * over(rows, jnp.sum(joint, axis=1))[:, None], None

    def sharpen(joint: Array, _) -> tuple[Array, None]:
        some = joint > floor
        raised = jnp.where(some, jnp.where(some, joint, jnp.ones_like(joint)) ** power, jnp.zeros_like(joint))
        return jax.lax.scan(scale, raised / jnp.sum(raised), length=num_scalings)[0], None

    sharp = jax.lax.scan(sharpen, joint, length=num_powers)[0]
    return jnp.where(valid, sharp, jnp.full_like(sharp, jnp.nan))
