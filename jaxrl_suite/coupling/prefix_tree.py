"""The posterior of an autoregressive message, as the part of its prefix tree that has mattered so far.

A message is a sequence of D symbols of an alphabet of V under any :class:`~jaxrl_suite.types.SequenceLaw`. Its prefixes
form a tree far too large to hold. But whatever was observed multiplied whole subtrees by numbers, so a node that was
never looked into still has the law of the model inside, and only its mass has changed. Held are the nodes that were
looked into (a fixed pool): prefix, masses of the children, and the model's state.

Each node v is a partition of the messages: the V subtrees of its children, and everything outside of v. With z the
mass of v, no partition below a child of mass z has more entropy than

    max over z' <= z of  h(z') + z' log2(V),

the child's own mass included, so a best-first search finds the partition of largest entropy and looks into few nodes.

References:
    Sokota et al. 2024, arXiv 2405.19540 (ARIMEC: prefix-tree partitions, lazy updates, pruned search).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.coupling.symbol_step import Partition
from jaxrl_suite.distributions import binary_entropy, entropy, entropy_terms
from jaxrl_suite.types import Array, SequenceLaw

_SLACK = 1e-6  # bits: a node that can be better by no more than this is not looked into


class PrefixTree(NamedTuple):
    """Pool of C nodes; node 0 is the root.

    Attributes:
        prefixes: int32 [C, D], symbols down to the node, then zeros.
        depths: int32 [C], length of the prefix; D for places not in use.
        masses: [C, V], posterior mass of each child's subtree.
        opened: bool [C, V], whether the child is a node of the pool.
        states: the law's state at each node, leaves [C, ...].
        count: int32 [], nodes in use.
        overflow: bool [], whether the pool was once too small for the best partition. The coupling stays secure and
            both sides agree, but it carries less.
    """

    prefixes: Array
    depths: Array
    masses: Array
    opened: Array
    states: Any
    count: Array
    overflow: Array


def prefix_tree(law: SequenceLaw, params: Any, prompt: Array, *, length: int, capacity: int) -> PrefixTree:
    """The prior: a root.

    Args:
        law: of the message.
        params: what it reads.
        prompt: int32 [P], what comes before the message; both sides know it.
        length: D, symbols of a message.
        capacity: C, nodes of the pool.

    Returns:
        Tree with one node.

    Raises:
        ValueError: a size that is not positive.
    """
    check(length > 0, argument="length", value=length, rule="must be positive")
    check(capacity > 0, argument="capacity", value=capacity, rule="must be positive")
    state = law.init(params, prompt[None], jnp.ones((1, prompt.shape[0]), bool))
    root = next_law(law.logits(state))
    states = jax.tree.map(lambda x: jnp.zeros((capacity, *jnp.shape(x)), jnp.result_type(x)).at[0].set(x), state)
    return PrefixTree(
        jnp.zeros((capacity, length), jnp.int32),
        jnp.full((capacity,), length, jnp.int32).at[0].set(0),
        jnp.zeros((capacity, root.shape[0]), root.dtype).at[0].set(root),
        jnp.zeros((capacity, root.shape[0]), bool),
        states,
        jnp.ones((), jnp.int32),
        jnp.zeros((), bool),
    )


def next_law(logits: Array) -> Array:
    """Probabilities [V] of ``logits [1, V]``, float32 at least."""
    return jax.nn.softmax(logits[0].astype(jnp.promote_types(logits.dtype, jnp.float32)))


def partition_entropies(tree: PrefixTree) -> Array:
    """Entropy in bits of the partition at each node, [C]; -1 for places not in use."""
    outside = jnp.maximum(1 - jnp.sum(tree.masses, axis=1), 0)
    values = entropy(tree.masses) + entropy_terms(outside)
    return jnp.where(jnp.arange(values.shape[0]) < tree.count, values, -jnp.ones_like(values))


def search_bound(mass: Array, num_symbols: int) -> Array:
    """Largest entropy in bits of a partition at or below a node of this mass."""
    largest = jnp.minimum(mass, num_symbols / (num_symbols + 1))
    return binary_entropy(largest) + largest * jnp.log2(jnp.asarray(num_symbols, mass.dtype))


def best_node(tree: PrefixTree, law: SequenceLaw, params: Any) -> tuple[PrefixTree, Array]:
    """The node whose partition has the largest entropy, and the tree with what had to be looked into."""
    num_symbols, length = tree.masses.shape[1], tree.prefixes.shape[1]

    def bounds(tree: PrefixTree) -> Array:
        inner = (tree.depths < length - 1)[:, None] & ~tree.opened & (tree.masses > 0)
        return jnp.where(inner, search_bound(tree.masses, num_symbols), -jnp.ones_like(tree.masses)).reshape(-1)

    def promising(tree: PrefixTree) -> Array:
        return jnp.max(bounds(tree)) > jnp.max(partition_entropies(tree)) + _SLACK

    def look(tree: PrefixTree) -> PrefixTree:
        where = jnp.argmax(bounds(tree)).astype(jnp.int32)
        return look_into(tree, where // num_symbols, where % num_symbols, law, params)

    room = tree.prefixes.shape[0]
    tree = jax.lax.while_loop(lambda tree: promising(tree) & (tree.count < room), look, tree)
    tree = tree._replace(overflow=tree.overflow | promising(tree))
    return tree, jnp.argmax(partition_entropies(tree)).astype(jnp.int32)


def look_into(tree: PrefixTree, node: Array, symbol: Array, law: SequenceLaw, params: Any) -> PrefixTree:
    """Adds a child to the pool; the law of its children is the model's."""
    state = jax.tree.map(lambda x: x[node], tree.states)
    state, logits = law.step(params, state, symbol[None])
    new, depth = tree.count, tree.depths[node]
    return tree._replace(
        prefixes=tree.prefixes.at[new].set(tree.prefixes[node].at[depth].set(symbol)),
        depths=tree.depths.at[new].set(depth + 1),
        masses=tree.masses.at[new].set(next_law(logits) * tree.masses[node, symbol]),
        opened=tree.opened.at[node, symbol].set(True),
        states=jax.tree.map(lambda pool, x: pool.at[new].set(x), tree.states, state),
        count=new + 1,
    )


def _branches(tree: PrefixTree, prefix: Array, depth: Array) -> tuple[Array, Array]:
    """Which nodes lie above a prefix (bool [C]), and their child on the way to it (int32 [C])."""
    agree = jnp.cumprod((tree.prefixes == prefix[None]).astype(jnp.int32), axis=1)
    common = jnp.sum(agree, axis=1)
    above = (tree.depths < depth) & (common >= tree.depths)
    return above, prefix[jnp.minimum(tree.depths, prefix.shape[0] - 1)]


def partition_at(tree: PrefixTree, node: Array, message: Array) -> Partition:
    """Subtrees of the node's children, and what is outside of it: V + 1 blocks."""
    prefix, depth = tree.prefixes[node], tree.depths[node]
    above, branch = _branches(tree, prefix, depth)
    symbols = jnp.arange(tree.masses.shape[1], dtype=jnp.int32)
    beside = above[:, None] & (symbols[None] != branch[:, None])
    # Summed from its parts: 1 - mass would be rounding where the node has nearly all of the mass.
    outside = jnp.sum(jnp.where(beside, tree.masses, 0))
    masses = jnp.concatenate([tree.masses[node], outside[None]])
    masses = masses / jnp.sum(masses)
    here = jnp.all((message == prefix) | (jnp.arange(prefix.shape[0]) >= depth))
    truth = jnp.where(here, message[depth], symbols.shape[0]).astype(jnp.int32)
    return Partition(masses, truth, entropy(masses), node)


def condition_tree(tree: PrefixTree, node: Array, factors: Array) -> PrefixTree:
    """Multiplies the blocks of a node's partition by ``factors [V + 1]`` and normalises.

    A node below the partition's is multiplied by the factor of the child that it is under; all others by that of the
    outside, and then the nodes above take up the new sums, from the bottom to the root.
    """
    prefix, depth = tree.prefixes[node], tree.depths[node]
    num_symbols, length = tree.masses.shape[1], tree.prefixes.shape[1]
    agree = (tree.prefixes == prefix[None]) | (jnp.arange(length)[None] >= depth)
    below = jnp.all(agree, axis=1) & (tree.depths > depth) & (tree.depths < length)
    child = tree.prefixes[:, jnp.minimum(depth, length - 1)]
    factor = jnp.where(below, factors[child], factors[num_symbols])[:, None]
    is_node = jnp.arange(tree.depths.shape[0]) == node
    masses = tree.masses * jnp.where(is_node[:, None], factors[None, :num_symbols], factor)
    above, _ = _branches(tree, prefix, depth)

    def climb(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        masses, total = carry
        level = depth - 1 - step
        parent = jnp.argmax(above & (tree.depths == level))
        masses = masses.at[parent, prefix[level]].set(total)
        return masses, jnp.sum(masses[parent])

    masses, total = jax.lax.fori_loop(0, depth, climb, (masses, jnp.sum(masses[node])))
    return tree._replace(masses=masses / total)


class Decoded(NamedTuple):
    """A message read from a tree.

    Attributes:
        message: int32 [D].
        mass: [], its posterior mass.
    """

    message: Array
    mass: Array


def read_message(tree: PrefixTree, law: SequenceLaw, params: Any, given: Array | None = None) -> Decoded:
    """Descends from the root to the heavier child each time, or along ``given [D]``, for its posterior mass."""
    length = tree.prefixes.shape[1]

    def descend(carry, level):
        state, prefix, inside, here, law_here = carry
        # ``inside``: mass of the prefix; ``here``: its node, or -1 below the pool, where the law is the model's.
        masses = jnp.where(here >= 0, tree.masses[here], inside * law_here)
        symbol = jnp.argmax(masses).astype(jnp.int32) if given is None else given[level]
        prefix = prefix.at[level].set(symbol)
        found = (tree.depths == level + 1) & jnp.all(tree.prefixes == prefix[None], axis=1)
        below = jnp.where(jnp.any(found) & (level + 1 < length), jnp.argmax(found), -1).astype(jnp.int32)
        state, logits = law.step(params, state, symbol[None])
        return (state, prefix, masses[symbol], below, next_law(logits)), None

    state = jax.tree.map(lambda x: x[0], tree.states)
    root = jnp.zeros((), jnp.int32)
    start = (state, jnp.zeros_like(tree.prefixes[0]), jnp.ones((), tree.masses.dtype), root, tree.masses[0])
    (_, message, mass, _, _), _ = jax.lax.scan(descend, start, jnp.arange(length))
    return Decoded(message, mass)
