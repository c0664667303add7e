"""SwiGLU of rows in aligned blocks: every expert's rows walked once, forward and backward.

Three grouped products in a row read and write three arrays of all rows in between, and a loop over blocks copies the
matrix of an expert for each of its blocks. On a CPU that costs as much as half of the products. Here an outer loop
takes the matrices of an expert once and an inner one carries each of its chunks through all products while it lies in
the cache. Only the two products before the activation are kept for the backward pass; elsewhere than on a CPU the same
rule runs over the grouped products of :mod:`jaxrl_suite.moe.grouped`. A weight a row multiplies what stands between
activation and last product, so that its derivative needs no output.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_suite.moe.grouped import block_matmul, block_outer, blocks_of_experts
from jaxrl_suite.moe.variance import vary_like, zeros_like_varying
from jaxrl_suite.types import Array, Params

# Products over fewer rows wait for the matrix, over more gain nothing. What is left of an expert goes by halves: with
# many experts that is a third of all rows.
_CHUNK_ROWS = (128, 64, 32)
_Backward = tuple[Array, Array, Params]  # gradients by rows, by weights, and by the matrices of one expert


class LayerStack(NamedTuple):
    """Where a walk reads the matrices of a layer, instead of from a copy of them.

    Attributes:
        matrices: gate and up [L, E, D, F], down [L, E, F, D]; constants, in the dtype of rows.
        layer: int32 [].
    """

    matrices: Params
    layer: Array


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


def _grouped_backward(
    rows: Array,
    params: Params,
    weights: Array,
    gate: Array,
    up: Array,
    cotangent: Array,
    expert: Array,
    live: Array,
    _: LayerStack | None,
) -> tuple[Array, Params, Array]:
    """Gradients by rows, matrices and weights, by one grouped product after the other."""
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
    first: Array, number: Array, rows: tuple[int, int], step: Callable[[Array, int, Any], Any], carry: Any
) -> Any:
    """Folds ``step(first row, number of rows, carry)`` over an expert's blocks, large chunks before small ones.

    Args:
        first: block at which the expert begins.
        number: of its blocks.
        rows: in all, and of a block; static.
        step: of the fold.
        carry: its start.
    """
    total, block = rows
    done = number * 0
    for blocks in sorted({1, *(max(1, min(chunk, total) // block) for chunk in _CHUNK_ROWS)}, reverse=True):

        def advance(state: tuple[Array, Any], blocks: int = blocks) -> tuple[Array, Any]:
            done, carry = state
            return done + blocks, step((first + done) * block, blocks * block, carry)

        def more(state: tuple[Array, Any], blocks: int = blocks) -> Array:
            return state[0] + blocks <= number

        done, carry = jax.lax.while_loop(more, advance, (done, carry))
    return carry


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
    hidden_width, sizes = params["gate"].shape[2], (rows.shape[0], rows.shape[0] // expert.shape[0])
    stack, items = _items(params, stack, expert, live)

    def one(arrays: tuple, item: tuple[Array, Array, Array]) -> tuple[tuple, None]:
        index, first, number = item
        matrices = _matrices_of(stack, index)

        def step(begin: Array, count: int, arrays: tuple) -> tuple:
            x = _rows_at(rows, begin, count)
            gate, up = (_product(x, matrices[name], (1, 0)).astype(x.dtype) for name in ("gate", "up"))
            y = _product(weighted_hidden(gate, up, _rows_at(weights, begin, count)), matrices["down"], (1, 0))
            return tuple(_put(array, part, begin) for array, part in zip(arrays, (y, gate, up), strict=True))

        return _over_chunks(first, number, sizes, step, arrays), None

    widths = (rows.shape[1], hidden_width, hidden_width)
    arrays = tuple(zeros_like_varying((rows.shape[0], width), rows.dtype, rows) for width in widths)
    return jax.lax.scan(one, arrays, items)[0]


def _walk_backward(
    rows: Array,
    params: Params,
    weights: Array,
    gate: Array,
    up: Array,
    cotangent: Array,
    expert: Array,
    live: Array,
    stack: LayerStack | None,
) -> tuple[Array, Params, Array]:
    sizes = rows.shape[0], rows.shape[0] // expert.shape[0]
    stack, items = _items(params, stack, expert, live)
    wide = jnp.promote_types(rows.dtype, jnp.float32)

    def one(carry: _Backward, item: tuple[Array, Array, Array]) -> tuple[_Backward, Params]:
        index, first, number = item
        matrices = _matrices_of(stack, index)

        def step(begin: Array, count: int, carry: _Backward) -> _Backward:
            d_rows, d_weights, total = carry
            x, g, w, *before = (_rows_at(array, begin, count) for array in (rows, cotangent, weights, gate, up))
            hidden, pull = jax.vjp(_gated, *before)
            d_hidden = _product(g, matrices["down"], (1, 1)).astype(x.dtype)
            # As a product: XLA adds up rows on a CPU one number after the other, a twentieth of the layer's time.
            d_w = _product(d_hidden.astype(w.dtype) * hidden, jnp.ones((hidden.shape[1], 1), w.dtype), (1, 0))
            d_gate, d_up = pull(_weigh(d_hidden, w))
            d_x = _product(d_gate, matrices["gate"], (1, 1)) + _product(d_up, matrices["up"], (1, 1))
            pairs = {"gate": (x, d_gate), "up": (x, d_up), "down": (_weigh(hidden, w), g)}
            # The sums of the expert before lie in the cache: taking them for zero is cheaper than to write zeros.
            sums = {name: jnp.where(begin == first * sizes[1], 0, leaf) for name, leaf in total.items()}
            total = {name: sums[name] + _product(*pair, (0, 0)) for name, pair in pairs.items()}
            return _put(d_rows, d_x, begin), _put(d_weights, d_w, begin), total

        *by_row, total = _over_chunks(first, number, sizes, step, carry)
        own = {name: jnp.where(number > 0, leaf, 0).astype(rows.dtype) for name, leaf in total.items()}
        return (*by_row, total), own

    zeros = {name: zeros_like_varying(leaf.shape[1:], wide, rows) for name, leaf in params.items()}
    d_rows, d_weights = (zeros_like_varying(array.shape, array.dtype, rows) for array in (rows, weights))
    (d_rows, d_weights, _), d_params = jax.lax.scan(one, (d_rows, d_weights, zeros), items)
    return d_rows, d_params, d_weights


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
) -> tuple[Array, tuple]:
    y, gate, up = _forward(rows, params, weights, expert, live, stack)
    # In another shape than gate: of two stacks alike XLA fills one with zeros and copies it to make the other.
    up = up.reshape(expert.shape[0], -1, up.shape[1])
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    return y, (rows, params, weights, gate, up, expert, live, stack)


def _swiglu_backward(residuals: tuple, cotangent: Array) -> tuple:
    rows, params, weights, gate, up, expert, live, stack = residuals
    arrays = rows, params, weights, gate, up.reshape(gate.shape), cotangent
    d_rows, d_params, d_weights = _backward(*arrays, expert, live, stack)
    return d_rows, d_params, d_weights, None, None, None


block_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
