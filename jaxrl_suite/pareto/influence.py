"""Influence of objectives on each other: row sums of their gradients' Gram matrix, at the price of one gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import as_number
from jaxrl_suite.types import Array


class Linearisation(NamedTuple):
    """Objectives at one point and what can be asked about their gradients g_i.

    Attributes:
        values: [K], the objectives.
        influence: [K], ``I_i = <g_i, sum_j g_j>`` over the chosen parameters.
        pullback: ``pullback(weights [K]) -> sum_i weights_i g_i``, a pytree like the parameters (all of them).
        total: ``sum_i g_i``, a pytree like the parameters (all of them).
    """

    values: Array
    influence: Array
    pullback: Callable[[Array], Any]
    total: Any


def select(tree: Any, predicate: Callable[[str], bool] | None) -> Any:
    """Sets the leaves whose path does not satisfy ``predicate`` to zero; paths read like ``blocks/attention/q``."""
    if predicate is None:
        return tree

    def keep(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf if predicate(path_name(path)) else jnp.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(keep, tree)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as text, parts joined by slashes."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)


def linearise(
    objectives: Callable[[Any], Array], params: Any, *, subset: Callable[[str], bool] | None = None
) -> Linearisation:
    """Evaluates the objectives once and linearises them there.

    ``I = J (J^T 1)``: one pullback of ones gives ``J^T 1``, and the transpose of that same pullback is the
    multiplication by J. The cost does not depend on K, no K gradients are ever stored, and no forward mode is used, so
    that objectives with a ``custom_vjp`` inside work too. Zeroing ``J^T 1`` outside a subset of the parameters equals
    restricting every gradient to it.

    Differs: the official code takes K backward passes and clips each gradient, see ``gram_influence``.

    Args:
        objectives: ``objectives(params) -> [K]``.
        params: pytree of float arrays.
        subset: ``subset(path) -> bool``, which leaves count in the influence; all by default.

    Returns:
        Values, influence, pullback and the sum of the gradients.

    References:
        Lu et al. (2025), arXiv 2509.11452, gradient-based weight optimisation.
    """
    values, pullback = jax.vjp(objectives, params)
    (total,) = pullback(jnp.ones_like(values))
    influences = push_forward(pullback, values)(select(total, subset))
    return Linearisation(values, influences, lambda weights: pullback(weights)[0], total)


def push_forward(pullback: Callable[[Array], tuple[Any]], values: Array) -> Callable[[Any], Array]:
    """Multiplication by the Jacobian from the multiplication by its transpose, without forward mode.

    A pullback is linear, so its own pullback is its transpose. ``jax.linear_transpose`` would say the same, but refuses
    functions whose backward pass calls a ``custom_vjp`` (the dispatcher of tokens to experts does, and so do products
    of blocks with the matrix of an expert); reverse mode knows their rules.

    Args:
        pullback: as ``jax.vjp`` returns it for a function of one argument.
        values: what that function returned, for shape and dtype.

    Returns:
        ``push(direction) -> J direction``, shaped like ``values``, for a direction like the argument.
    """
    transpose = jax.vjp(lambda slope: pullback(slope)[0], jnp.zeros_like(values))[1]
    return lambda direction: transpose(direction)[0]


def influence(objectives: Callable[[Any], Array], params: Any, *, subset: Callable[[str], bool] | None = None) -> Array:
    """First-order gain of the sum of the objectives from a step along each: ``I_i = sum_j <g_i, g_j>``.

    See :func:`linearise`, which returns the rest as well.

    Args:
        objectives: ``objectives(params) -> [K]``.
        params: pytree of float arrays.
        subset: ``subset(path) -> bool``, which leaves count; all by default.

    Returns:
        [K].

    >>> import jax.numpy as jnp
    >>> influence(lambda x: jnp.array([[1.0, 0.0], [1.0, 2.0]]) @ x, jnp.zeros(2)).tolist()
    [2.0, 6.0]
    """
    return linearise(objectives, params, subset=subset).influence


def gram(
    objectives: Callable[[Any], Array],
    params: Any,
    *,
    subset: Callable[[str], bool] | None = None,
) -> tuple[Array, Array]:
    """Gram matrix of the gradients of K objectives, and their squared norms over all parameters.

    K pullbacks of one forward pass, one after another; no two gradients of all parameters are kept longer than needed
    for their inner products.

    Args:
        objectives: ``objectives(params) -> [K]``.
        params: pytree of float arrays.
        subset: ``subset(path) -> bool``, which leaves count in the Gram matrix; all by default.

    Returns:
        Gram matrix [K, K] over the subset, squared norms [K] over all parameters.
    """
    values, pullback = jax.vjp(objectives, params)
    gradients = jax.lax.map(lambda row: pullback(row)[0], jnp.eye(values.shape[0], dtype=values.dtype))
    return gram_of(gradients if subset is None else select(gradients, subset)), squared_norms(gradients)


def gram_of(stacked: Any) -> Array:
    """Gram matrix [K, K] of gradients stacked along the first axis of every leaf, in float32 at least."""
    rows = [leaf.reshape(leaf.shape[0], -1) for leaf in map(_wide, jax.tree.leaves(stacked))]
    return jnp.asarray(sum(jnp.matmul(part, part.T, precision="highest") for part in rows))


def squared_norms(stacked: Any) -> Array:
    """Squared norms [K] of gradients stacked along the first axis of every leaf, in float32 at least."""
    leaves = map(_wide, jax.tree.leaves(stacked))
    return jnp.asarray(sum(jnp.sum(leaf * leaf, axis=tuple(range(1, leaf.ndim))) for leaf in leaves))


def _wide(leaf: Array) -> Array:
    """Squares of float16 overflow from 256 on, sums of bfloat16 have three digits."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def gram_influence(
    matrix: Array, *, squared_norms: Array | None = None, clip_norm: float | Array | None = None
) -> Array:
    """Influence from a Gram matrix, with the official code's clipping of every gradient on request (D5).

    Args:
        matrix: [K, K].
        squared_norms: [K], squared norms over all parameters; the diagonal by default.
        clip_norm: largest norm of one gradient; the official code clips at 1.0 over all parameters before it restricts
            to the chosen layers. None leaves the gradients alone.

    Returns:
        [K], ``I_i = sum_j c_i c_j G_ij`` with ``c_i = min(1, clip_norm / |g_i|)``.

    Raises:
        ValueError: ``clip_norm`` is no single number, or not positive where it is known.

    >>> import jax.numpy as jnp
    >>> gram_influence(jnp.array([[4.0, 0.0], [0.0, 1.0]]), clip_norm=1.0).tolist()
    [1.0, 1.0]
    """
    if clip_norm is None:
        return jnp.sum(matrix, axis=1)
    longest = as_number("clip_norm", clip_norm, matrix.dtype, interval="(0, inf]")
    squares = jnp.diagonal(matrix) if squared_norms is None else squared_norms
    norms = jnp.sqrt(jnp.maximum(squares, jnp.finfo(matrix.dtype).tiny))
    factors = jnp.minimum(1.0, longest / norms)
    return factors * (matrix @ factors)
