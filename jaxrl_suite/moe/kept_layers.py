"""Layers of a stage that run forward now and backward later: what is needed until then lies in a ring of slots.

A scan over layers that is differentiated as a whole hands out one stack of what it kept, which has to be copied into
the ring and out of it, and one stack of gradients, which has to be added to their sum. Here each layer is
differentiated by itself: it writes what it keeps to its own place in the ring, reads it there, and adds its gradients
to the sum, so that of one layer alone anything stands beside ring and sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.moe.variance import vary
from jaxrl_suite.types import Array, Params

Layer = Callable[[Array, Params], tuple[Array, Any]]


class Recipe(NamedTuple):
    """How the pullback of a layer is put together again; static.

    Attributes:
        tree: structure of the pullback.
        at_hand: of each leaf, its index among the leaves that are at hand; None for those that are kept.
    """

    tree: Any
    at_hand: tuple[int | None, ...]


class Ring(NamedTuple):
    """What waits for backward passes.

    Attributes:
        kept: arrays [slots, L of this stage, ...] that pullbacks need.
        sums: the second output of the layers, leaves [slots, L of this stage, ...], as floats.
    """

    kept: list[Array]
    sums: Any


def take_apart(pullback: Any, at_hand: Any) -> tuple[list[Array], Recipe]:
    """What a pullback holds besides arrays that will be at hand when it is used.

    Args:
        pullback: of ``jax.vjp``, a pytree.
        at_hand: pytree of arrays, found by identity: weights among the arguments of the function, what it closes over.

    Returns:
        The arrays to keep, and how to make the pullback of them.
    """
    leaves, tree = jax.tree.flatten(pullback)
    place = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves(at_hand))}
    recipe = Recipe(tree, tuple(place.get(id(leaf)) for leaf in leaves))
    return [leaf for leaf, index in zip(leaves, recipe.at_hand) if index is None], recipe


def put_together(recipe: Recipe, kept: list[Array], at_hand: Any) -> Any:
    """The pullback again, see :func:`take_apart`."""
    rest, known = iter(kept), jax.tree.leaves(at_hand)
    return jax.tree.unflatten(recipe.tree, [next(rest) if i is None else known[i] for i in recipe.at_hand])


def empty_ring(
    layer: Layer, layers: Params, x: Array, at_hand: Any, *, slots: int, mesh: tuple[str, ...]
) -> tuple[Ring, Recipe]:
    """A ring for the layers of a stage, and the recipe of their pullbacks; nothing runs.

    Args:
        layer: one layer.
        layers: stacked parameters.
        x: activations that enter, for their type.
        at_hand: what the layer closes over and need not be kept.
        slots: passes that wait at most.
        mesh: axes along which all of it varies.
    """
    recipes: list[Recipe] = []

    def one() -> Any:
        _, kept, sums, recipe = _run(layer, x, jax.tree.map(lambda leaf: leaf[0], layers), at_hand)
        recipes.append(recipe)
        return kept, sums

    number = jax.tree.leaves(layers)[0].shape[0]
    kept, sums = jax.tree.map(
        lambda leaf: vary(jnp.zeros((slots, number, *leaf.shape), leaf.dtype), mesh), jax.eval_shape(one)
    )
    return Ring(kept, sums), recipes[0]


def forward_layers(
    layer: Layer, layers: Params, x: Array, at_hand: Any, *, ring: Ring, slot: Array
) -> tuple[Array, Ring]:
    """Runs the layers and fills a slot of the ring: ``(x, ring)``."""

    def one(carry: tuple[Array, Ring], item: tuple[Params, Array]) -> tuple[tuple[Array, Ring], None]:
        x, ring = carry
        params, index = item
        x, kept, sums, _ = _run(layer, x, params, at_hand)
        return (x, jax.tree.map(lambda whole, part: _put(whole, part, slot, index), ring, Ring(kept, sums))), None

    return jax.lax.scan(one, (x, ring), (layers, _indices(layers)))[0]


def backward_layers(
    recipe: Recipe,
    layers: Params,
    cotangents: tuple[Array, Any],
    at_hand: Any,
    *,
    ring: Ring,
    slot: Array,
    gradients: Params,
    valid: Array,
) -> tuple[Array, Params]:
    """The backward pass of what lies in a slot.

    Args:
        recipe: of :func:`empty_ring`.
        layers: stacked parameters.
        cotangents: of the activations that left the last layer, and of ``ring.sums`` in this slot.
        at_hand: as in :func:`forward_layers`, of the same pass.
        ring: of :func:`forward_layers`.
        slot: to read.
        gradients: their sum so far, stacked as the parameters, in any dtype.
        valid: whether the gradients count.

    Returns:
        Cotangent of the activations that entered, and the sum.
    """

    def one(carry: tuple[Array, Params], item: tuple[Params, Any, Array]) -> tuple[tuple[Array, Params], None]:
        d_x, total = carry
        params, d_sums, index = item
        kept = [_get(whole, slot, index) for whole in ring.kept]
        d_x, d_params = put_together(recipe, kept, (params, at_hand))((d_x, d_sums))

        def add(total: Array, part: Array) -> Array:
            part = _get(total, index) + jnp.where(valid, part, 0).astype(total.dtype)
            return _put(total, part, index)

        return (d_x, jax.tree.map(add, total, d_params)), None

    d_x, d_sums = cotangents
    return jax.lax.scan(one, (d_x, gradients), (layers, d_sums, _indices(layers)), reverse=True)[0]


def _run(layer: Layer, x: Array, params: Params, at_hand: Any) -> tuple[Array, list[Array], Any, Recipe]:
    """Output, what to keep, sums as floats (integers have no cotangent), and how to use what is kept."""

    def floating(x: Array, params: Params) -> tuple[Array, Any]:
        y, sums = layer(x, params)
        return y, jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), sums)

    (y, sums), pullback = jax.vjp(floating, x, params)
    kept, recipe = take_apart(pullback, (params, at_hand))
    return y, kept, sums, recipe


def _indices(layers: Params) -> Array:
    return jnp.arange(jax.tree.leaves(layers)[0].shape[0], dtype=jnp.int32)


def _get(whole: Array, *places: Array) -> Array:
    starts = (*places, *(0 for _ in whole.shape[len(places) :]))
    sizes = (*(1 for _ in places), *whole.shape[len(places) :])
    return jax.lax.dynamic_slice(whole, starts, sizes).reshape(whole.shape[len(places) :])


def _put(whole: Array, part: Array, *places: Array) -> Array:
    starts = (*places, *(0 for _ in part.shape))
    return jax.lax.dynamic_update_slice(whole, part.reshape((1,) * len(places) + part.shape), starts)
