"""SwiGLU of rows in aligned blocks: every expert's rows walked once, forward and backward.

Three grouped products in a row read and write three arrays of all rows in between, and a loop over blocks copies the
matrix of an expert for each of its blocks. On a CPU that costs as much as half of the products. Here an outer loop
takes the matrices of an expert once and an inner one carries each of its chunks through all products while it lies in
the cache. Only the two products before the activation are kept for the backward pass; elsewhere than on a CPU the same
rule runs over the grouped products of :mod:`jaxrl_suite.moe.grouped`. A weight a row multiplies what stands between
activation and last product, so that its derivative needs no output.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_suite.moe.grouped import block_matmul, block_outer, blocks_of_experts
from jaxrl_suite.moe.variance import vary_like, zeros_like_varying
from jaxrl_suite.types import Array, Params

# Rows of a chunk: products over fewer wait for the matrix, over more gain nothing. Where experts have few rows on
# average, a chunk holds half as many again, so that most experts are one.
_CHUNK_ROWS, _FEW_ROWS = 128, 256
_Sums = tuple[Array, Array, Params]  # gradients by rows, by weights, and by the matrices of one expert


class LayerStack(NamedTuple):
    """Where a walk reads the matrices of a layer, instead of from a copy of them.

    Attributes:
        matrices: gate and up [L, E, D, F], down [L, E, F, D]; constants, in the dtype of rows.
        layer: int32 [].
    """

    matrices: Params
    layer: Array


class _Kept(NamedTuple):
    """What the backward pass reads: the arguments, and what stands before the activation, [M, F] each."""

    rows: Array
    params: Params
    weights: Array
    gate: Array
    up: Array
    expert: Array
    live: Array
    stack: LayerStack | None


@jax.custom_vjp
def block_swiglu(
    rows: Array, params: Params, weights: Array, expert: Array, live: Array, stack: LayerStack | None = None
) -> Array:
    """``(w silu(x gate) * (x up)) down`` of each block of aligned rows with the matrices of its expert.

    Zero for blocks without rows. Can be differentiated in reverse any number of times.

    Args:
        rows: [M, D], aligned; see :class:`jaxrl_suite.moe.grouped.Blocks`.
        params: gate and up [E, D, F], down [E, F, D], in the dtype of ``rows``.
        weights: [M, 1], w of each row.
        expert: int32 [M / block].
        live: bool [M / block].
        stack: what ``params`` is one layer of, in a loop over layers. Gradients belong to ``params``; on a CPU nobody
            reads their values then, so that XLA does not copy the layer out of the stack.

    Returns:
        [M, D], products accumulated in float32 at least.

    References:
        Shazeer (2020), arXiv 2002.05202, equation 6.
    """
    return _forward(rows, params, weights, expert, live, stack)[0]


def weighted_hidden(gate: Array, up: Array, weights: Array) -> Array:
    """``w silu(gate) * up`` in the dtype of ``gate``, weighted as wide as the weights are.

    Args:
        gate: [..., M, F].
        up: [..., M, F].
        weights: [..., M, 1].

    Returns:
        [..., M, F].
    """
    return _weigh(_gated(gate, up), weights)


def _gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


def _weigh(x: Array, weights: Array) -> Array:
    return (x * weights).astype(x.dtype)


def _grouped_forward(
    rows: Array, params: Params, weights: Array, expert: Array, live: Array, _: LayerStack | None
) -> tuple[Array, Array, Array]:
    """By one grouped product after the other: output, and what stands before the activation."""
    gate, up = (block_matmul(rows, params[name], expert, live) for name in ("gate", "up"))
    return block_matmul(weighted_hidden(gate, up, weights), params["down"], expert, live), gate, up


def _grouped_backward(kept: _Kept, cotangent: Array) -> tuple[Array, Params, Array]:
    """Gradients by rows, matrices and weights, by one grouped product after the other."""
    rows, params, weights, gate, up, expert, live, _ = kept
    hidden, pull = jax.vjp(weighted_hidden, gate, up, weights)
    d_gate, d_up, d_weights = pull(block_matmul(cotangent, params["down"], expert, live, True))
    d_rows = block_matmul(d_gate, params["gate"], expert, live, True)
    d_rows = d_rows + block_matmul(d_up, params["up"], expert, live, True)
    like = vary_like(jnp.zeros((params["gate"].shape[0], 0), rows.dtype), rows)
    pairs = {"gate": (rows, d_gate), "up": (rows, d_up), "down": (hidden, cotangent)}
    return d_rows, {name: block_outer(*pair, expert, live, like) for name, pair in pairs.items()}, d_weights


def _product(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    """Contraction of one axis of each matrix, in float32 at least."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=wide)


def _over_chunks(
    first: Array, number: Array, sizes: tuple[int, int], step: Callable[[Array, int, bool, Any], Any], carry: Any
) -> Any:
    """Folds ``step(first row, number of rows, whether these are the first, carry)`` over an expert's blocks.

    What does not fill a chunk comes first and in one piece: there is a loop for each size that it can have, of which
    one runs, once. (Conditionals would copy the carry.)

    Args:
        first: block at which the expert begins.
        number: of its blocks.
        sizes: see :func:`_sizes`.
        step: of the fold.
        carry: its start.
    """
    block, most = sizes
    piece = jnp.where(number > 0, (number - 1) % most + 1, 0)

    def advance(blocks: int, is_first: bool, state: tuple[Array, Any]) -> tuple[Array, Any]:
        done, carry = state
        return done + blocks, step((first + done) * block, blocks * block, is_first, carry)

    state = number * 0, carry
    for blocks in range(1, most + 1):

        def fits(state: tuple[Array, Any], blocks: int = blocks) -> Array:
            return (state[0] == 0) & (piece == blocks)

        state = jax.lax.while_loop(fits, functools.partial(advance, blocks, True), state)
    return jax.lax.while_loop(lambda state: state[0] < number, functools.partial(advance, most, False), state)[1]


def _sizes(rows: Array, expert: Array, num_experts: int) -> tuple[int, int]:
    """Rows of a block, and blocks of a chunk."""
    total, block = rows.shape[0], rows.shape[0] // expert.shape[0]
    average = total // num_experts
    chunk = _CHUNK_ROWS if average >= _FEW_ROWS else max(_CHUNK_ROWS // 2, min(_CHUNK_ROWS * 3 // 2, average * 3 // 2))
    return block, max(1, min(chunk, total) // block)


def _rows_at(array: Array, begin: Array, count: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, begin, count)


def _put(array: Array, rows: Array, begin: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows.astype(array.dtype), begin, 0)


def _items(params: Params, stack: LayerStack | None, expert: Array, live: Array) -> tuple[LayerStack, tuple]:
    """Where matrices lie, and what a walk goes over: number, first block and blocks of each expert."""
    num_experts = params["gate"].shape[0]
    if stack is None:
        stack = LayerStack(jax.tree.map(lambda leaf: leaf[None], params), jnp.int32(0))
    return stack, (jnp.arange(num_experts, dtype=jnp.int32), *blocks_of_experts(expert, live, num_experts))


def _matrices_of(stack: LayerStack, index: Array) -> Params:
    """Those of one expert."""

    zero = jnp.zeros_like(index)  # all of one dtype, whatever that of Python's numbers

    def take(leaf: Array) -> Array:
        return jax.lax.dynamic_slice(leaf, (stack.layer, index, zero, zero), (1, 1, *leaf.shape[2:]))[0, 0]

    return jax.tree.map(take, stack.matrices)


def _walk_forward(
    rows: Array, params: Params, weights: Array, expert: Array, live: Array, stack: LayerStack | None
) -> tuple[Array, Array, Array]:
    num_experts, _, hidden_width = params["gate"].shape
    sizes = _sizes(rows, expert, num_experts)
    stack, items = _items(params, stack, expert, live)

    def one(arrays: tuple, item: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        index, first, number = item
        matrices = _matrices_of(stack, index)

        def step(begin: Array, count: int, _: bool, arrays: tuple) -> tuple:
            x = _rows_at(rows, begin, count)
            gate, up = (_product(x, matrices[name], (1, 0)).astype(x.dtype) for name in ("gate", "up"))
            y = _product(weighted_hidden(gate, up, _rows_at(weights, begin, count)), matrices["down"], (1, 0))
            return tuple(_put(array, part, begin) for array, part in zip(arrays, (y, gate, up), strict=True))

        return _over_chunks(first, number, sizes, step, arrays), None

    widths = (rows.shape[1], hidden_width, hidden_width)
    arrays = tuple(zeros_like_varying((rows.shape[0], width), rows.dtype, rows) for width in widths)
    return jax.lax.scan(one, arrays, items)[0]


def _walk_backward(kept: _Kept, cotangent: Array) -> tuple[Array, Params, Array]:
    rows, params, weights, gate, up, expert, live, stack = kept
    sizes = _sizes(rows, expert, params["gate"].shape[0])
    stack, items = _items(params, stack, expert, live)
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    # The gradient of down takes a quarter less time as [D, F]; an expert needs many rows to pay for turning it around.
    turned = rows.shape[0] // params["gate"].shape[0] >= 2 * _FEW_ROWS

    def one(carry: _Sums, item: tuple[Array, Array, Array]) -> tuple[_Sums, Params]:
        index, first, number = item
        matrices = _matrices_of(stack, index)

        def step(begin: Array, count: int, is_first: bool, carry: _Sums) -> _Sums:
            d_rows, d_weights, total = carry
            x, g, w, *before = (_rows_at(array, begin, count) for array in (rows, cotangent, weights, gate, up))
            hidden, pull = jax.vjp(_gated, *before)
            d_hidden = _product(g, matrices["down"], (1, 1)).astype(x.dtype)
            # As a product: XLA adds up rows on a CPU one number after the other, a twentieth of the layer's time.
            d_w = _product(d_hidden.astype(w.dtype) * hidden, jnp.ones((hidden.shape[1], 1), w.dtype), (1, 0))
            d_gate, d_up = pull(_weigh(d_hidden, w))
            d_x = _product(d_gate, matrices["gate"], (1, 1)) + _product(d_up, matrices["up"], (1, 1))
            h = _weigh(hidden, w)
            pairs = {"gate": (x, d_gate), "up": (x, d_up), "down": (g, h) if turned else (h, g)}
            products = {name: _product(*pair, (0, 0)) for name, pair in pairs.items()}
            total = products if is_first else jax.tree.map(jnp.add, total, products)
            return _put(d_rows, d_x, begin), _put(d_weights, d_w, begin), total

        *by_row, total = _over_chunks(first, number, sizes, step, carry)
        own = total | {"down": total["down"].T} if turned else total
        own = {name: jnp.where(number > 0, leaf, 0).astype(rows.dtype) for name, leaf in own.items()}
        own["up"] = own["up"].reshape(-1)  # in another shape than gate, see _swiglu_forward
        return (*by_row, total), own

    shapes = {name: leaf.shape[1:] for name, leaf in params.items()}
    shapes["down"] = shapes["gate"] if turned else shapes["down"]
    zeros = {name: zeros_like_varying(shape, wide, rows) for name, shape in shapes.items()}
    d_rows, d_weights = (zeros_like_varying(array.shape, array.dtype, rows) for array in (rows, weights))
    (d_rows, d_weights, _), d_params = jax.lax.scan(one, (d_rows, d_weights, zeros), items)
    return d_rows, d_params | {"up": d_params["up"].reshape(params["up"].shape)}, d_weights


def _on_cpu(walk: Callable[..., Any], grouped: Callable[..., Any]) -> Callable[..., Any]:
    """``walk`` on a CPU, ``grouped`` elsewhere; differentiated as ``grouped``: loops of unknown length cannot be."""

    @jax.custom_vjp
    def function(*arguments: Any) -> Any:
        return jax.lax.platform_dependent(*arguments, cpu=walk, default=grouped)

    def backward(arguments: tuple, cotangents: Any) -> Any:
        return jax.vjp(grouped, *arguments)[1](cotangents)

    function.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return function


_forward = _on_cpu(_walk_forward, _grouped_forward)
_backward = _on_cpu(_walk_backward, _grouped_backward)


def _swiglu_forward(
    rows: Array, params: Params, weights: Array, expert: Array, live: Array, stack: LayerStack | None
) -> tuple[Array, _Kept]:
    y, gate, up = _forward(rows, params, weights, expert, live, stack)
    # In another shape than gate: of two stacks alike XLA fills one with zeros and copies it to make the other.
    up = up.reshape(expert.shape[0], -1, up.shape[1])
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    return y, _Kept(rows, params, weights, gate, up, expert, live, stack)


def _swiglu_backward(kept: _Kept, cotangent: Array) -> tuple:
    d_rows, d_params, d_weights = _backward(kept._replace(up=kept.up.reshape(kept.gate.shape)), cotangent)
    return d_rows, d_params, d_weights, None, None, None


block_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
