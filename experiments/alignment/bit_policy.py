"""Policies that emit T bits, for TiedBits: one shared logit, or one logit a prefix; everything about them is exact."""

import jax
import jax.numpy as jnp

from jaxrl_suite.envs import tied_bits
from jaxrl_suite.types import Array, Generation, Params, Policy, PRNGKey


class BitSampling:
    """Stands in for a sampling configuration: bits end by their number, no token stops them."""

    stop_tokens: tuple[int, ...] = ()


def bit_policy(num_bits: int, *, autoregressive: bool) -> Policy:
    """A policy over bit sequences; parameters ``{"theta": [1]}``, or ``[2^T - 1]`` with one logit a prefix.

    Prompts are one token that tells nothing.

    Args:
        num_bits: T.
        autoregressive: whether the policy sees its prefix.
    """

    def logits(params: Params, bits: Array) -> Array:
        """Logit of a one at each of the T places, given the bits before it."""
        if not autoregressive:
            return jnp.broadcast_to(params["theta"][0], bits.shape)
        prefix, columns = jnp.zeros_like(bits[:, 0]), []
        for t in range(num_bits):
            columns.append(params["theta"][2**t - 1 + prefix])
            prefix = 2 * prefix + bits[:, t]
        return jnp.stack(columns, axis=1)

    def scores(params: Params, bits: Array) -> Array:
        return jax.nn.log_sigmoid(jnp.where(bits == 1, 1.0, -1.0) * logits(params, bits))

    def log_probs(params: Params, tokens: Array, segments: Array | None = None, *, start: int = 0) -> Array:
        del segments
        return jnp.pad(scores(params, tokens[:, 1:]), ((0, 0), (1, 0)))[:, start:]

    def generate(
        key: PRNGKey, params: Params, prompts: Array, mask: Array, row_ids: Array, sampling: BitSampling
    ) -> Generation:
        del mask, sampling
        keys = jax.vmap(lambda ids: jax.random.fold_in(jax.random.fold_in(key, ids[0]), ids[1]))(row_ids)
        uniforms = jax.vmap(lambda k: jax.random.uniform(k, (num_bits,)))(keys)
        bits = jnp.zeros(uniforms.shape, jnp.int32)
        for t in range(num_bits):  # a bit's logit reads only the bits before it
            drawn = uniforms[:, t] < jax.nn.sigmoid(logits(params, bits)[:, t])
            bits = bits.at[:, t].set(drawn.astype(jnp.int32))
        return Generation(bits, scores(params, bits), jnp.ones((prompts.shape[0], num_bits), bool))

    return Policy(log_probs, generate)


def exact_objectives(theta: Array, num_bits: int, *, autoregressive: bool) -> Array:
    """Expected rewards [2] of "all ones" and "all zeros"."""
    return tied_bits.autoregressive_objectives(theta) if autoregressive else tied_bits.objectives(theta[0], num_bits)
