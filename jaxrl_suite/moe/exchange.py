"""All-to-all with sizes known only at run time: the ragged exchange, where the backend has it, and its emulation.

``jax.lax.ragged_all_to_all`` moves only real bytes but does not run on XLA:CPU. :func:`emulated_ragged_all_to_all`
takes the same offsets, reads every peer's operand by an all-gather and picks rows by index, so that the metadata can be
tested on any machine.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.moe.grouped import exclusive_cumsum
from jaxrl_suite.moe.variance import axis_index
from jaxrl_suite.types import Array


class Offsets(NamedTuple):
    """Arguments of one ragged exchange, int32 [EP] each, as ``jax.lax.ragged_all_to_all`` defines them.

    Attributes:
        input_offsets: first row of the operand that goes to each peer.
        send_sizes: rows sent to each peer.
        output_offsets: row of the peer's output where they land.
        recv_sizes: rows received from each peer.
    """

    input_offsets: Array
    send_sizes: Array
    output_offsets: Array
    recv_sizes: Array

    def reversed(self, axes: tuple[str, ...]) -> "Offsets":
        """Offsets of the exchange that takes every row back to where it came from."""
        landed = exclusive_cumsum(self.recv_sizes)
        return Offsets(landed, self.recv_sizes, exchange_vector(self.input_offsets, axes), self.send_sizes)


def exchange_vector(vector: Array, axes: tuple[str, ...]) -> Array:
    """All-to-all of one entry (or row) a peer: entry j of rank i becomes entry i of rank j."""
    return jax.lax.all_to_all(vector, axes, 0, 0, tiled=True)


def ragged_offsets(counts: Array, axes: tuple[str, ...]) -> tuple[Offsets, Array]:
    """Offsets of the dispatch from the rows that this rank has for each peer and each of the peer's experts.

    Args:
        counts: int32 [EP, E / EP].
        axes: atoms of the expert axis.

    Returns:
        The offsets, and received counts int32 [EP, E / EP]: rows from each source for each local expert.
    """
    everyone = jax.lax.all_gather(counts, axes)  # [source, destination, local expert]
    sizes = jnp.sum(everyone, axis=-1, dtype=counts.dtype)
    me = axis_index(axes)
    send = sizes[me]
    return Offsets(exclusive_cumsum(send), send, exclusive_cumsum(sizes, axis=0)[me], sizes[:, me]), everyone[:, me]


def emulated_ragged_all_to_all(operand: Array, num_out: int, offsets: Offsets, axes: tuple[str, ...]) -> Array:
    """What ``ragged_all_to_all`` returns, by an all-gather and a gather; rows that nobody writes are zero.

    Args:
        operand: [N, D].
        num_out: rows of the output.
        offsets: of this exchange.
        axes: atoms of the expert axis.

    Returns:
        [num_out, D].
    """
    num_in = operand.shape[0]
    everyone = jax.lax.all_gather(operand, axes).reshape(-1, operand.shape[-1])
    starts = exchange_vector(offsets.input_offsets, axes)  # where my rows begin in each peer's operand
    lands = exchange_vector(offsets.output_offsets, axes)  # where each peer writes into my output
    row = jnp.arange(num_out, dtype=jnp.int32)
    inside = (row >= lands[:, None]) & (row < (lands + offsets.recv_sizes)[:, None])  # [peer, row]
    peer = jnp.argmax(inside, axis=0).astype(jnp.int32)
    index = peer * num_in + starts[peer] + row - lands[peer]
    return everyone.at[jnp.where(inside.any(axis=0), index, everyone.shape[0])].get(mode="fill", fill_value=0)


def ragged_all_to_all(operand: Array, num_out: int, offsets: Offsets, axes: tuple[str, ...]) -> Array:
    """``jax.lax.ragged_all_to_all`` into a buffer of zeros; TPU and GPU only."""
    output = jnp.zeros_like(operand, shape=(num_out, operand.shape[-1]))
    sizes = (offsets.input_offsets, offsets.send_sizes, offsets.output_offsets, offsets.recv_sizes)
    return jax.lax.ragged_all_to_all(operand, output, *sizes, axis_name=axes)
