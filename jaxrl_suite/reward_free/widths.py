"""Which function of the next state is a regression least sure about? Maximal widths ``max_f |phi_f(s, a)|``."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_suite.mdp import LinearMixtureMDP
from jaxrl_suite.reward_free.regression import safe_root
from jaxrl_suite.types import Array

MAX_ENUMERATED = 10  # successor lists up to this length are searched over all 2^N vertices
_SIGN_STEPS = 6


class Widest(NamedTuple):
    """The widest functions.

    Attributes:
        functions: [S, A, N], values at the listed successors, 0 or 1.
        widths: [S, A], ``|phi_f|`` in the norm of the inverse gram matrix.
    """

    functions: Array
    widths: Array


def widest_functions(mdp: LinearMixtureMDP, inverse: Array) -> Widest:
    """``argmax`` over f into [0, 1] of ``|phi_f(s, a)|_inverse``, for every state and action.

    The maximum of a norm over a cube is at a vertex: exact by enumeration for lists of at most ten successors. For
    longer lists the iteration ``f <- 1[gradient of |phi_f|^2 > 0]`` climbs to a local one, a lower bound.

    Args:
        mdp: model; features only.
        inverse: [D, D], inverse gram matrix.

    Returns:
        Functions and widths.
    """
    products = jnp.einsum("sajd,de,sake->sajk", mdp.features, inverse, mdp.features, precision="highest")
    width = mdp.features.shape[2]
    if width <= MAX_ENUMERATED:
        vertices = jnp.asarray(_vertices(width), products.dtype)
        squares = jnp.einsum("vj,sajk,vk->sav", vertices, products, vertices, precision="highest")
        best = jnp.argmax(squares, axis=-1)
        return Widest(vertices[best], safe_root(jnp.max(squares, axis=-1)))
    functions = jnp.asarray(jnp.diagonal(products, axis1=-2, axis2=-1) > 0, products.dtype)
    sign = jnp.sum(products, axis=-1) >= 0
    functions = functions * sign
    for _ in range(_SIGN_STEPS):
        functions = jnp.asarray(jnp.einsum("sajk,sak->saj", products, functions) > 0, products.dtype)
    squares = jnp.einsum("saj,sajk,sak->sa", functions, products, functions, precision="highest")
    return Widest(functions, safe_root(squares))


def width_bound(mdp: LinearMixtureMDP, inverse: Array, *, centred: bool) -> Array:
    """An upper bound on the maximal widths, exact for lists of at most ten successors; what certificates need.

    Args:
        mdp: model; features only.
        inverse: [D, D].
        centred: functions into [-1/2, 1/2] instead of [0, 1]: enough where both kernels have rows that sum to 1,
            since a constant then cancels.

    Returns:
        [S, A].
    """
    width = mdp.features.shape[2]
    root = jnp.linalg.cholesky(inverse)  # |x|_inverse = |root' x|
    images = jnp.einsum("sajd,de->saje", mdp.features, root, precision="highest")
    if width <= MAX_ENUMERATED:
        vertices = jnp.asarray(_vertices(width) - (0.5 if centred else 0.0), images.dtype)
        sums = jnp.einsum("vj,saje->save", vertices, images, precision="highest")
        return jnp.sqrt(jnp.max(jnp.sum(sums * sums, axis=-1), axis=-1))
    if centred:
        reach = 0.5 * jnp.sum(jnp.abs(images), axis=2)
    else:
        reach = jnp.maximum(jnp.sum(jnp.maximum(images, 0), axis=2), jnp.sum(jnp.maximum(-images, 0), axis=2))
    return jnp.sqrt(jnp.sum(reach * reach, axis=-1))


def _vertices(width: int) -> np.ndarray:
    return ((np.arange(2**width)[:, None] >> np.arange(width)) & 1).astype(float)
