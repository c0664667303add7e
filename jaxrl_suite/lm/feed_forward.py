"""Feed-forward slots of a block: SwiGLU, and the dropless mixture of experts on one device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.layers import project, vary_like, wide
from jaxrl_suite.lm.routing import route
from jaxrl_suite.types import Array, FeedForward, Parallel, Params, Routing


class RouterOutput(NamedTuple):
    """What a sparse layer reports: balancing losses read it.

    Attributes:
        routing: experts and weights of each token.
        logits: [T, E], router outputs in the router's precision.
    """

    routing: Routing
    logits: Array


def swiglu(params: Params, x: Array, *, accumulate: str = "float32") -> Array:
    """``(silu(x gate) * (x up)) down``.

    Args:
        params: gate and up [D, F], down [F, D].
        x: [..., D].
        accumulate: lowest dtype of the sums.

    Returns:
        [..., D].

    References:
        Shazeer (2020), arXiv 2002.05202, equation 6.
    """
    if "gate_up" in params:  # one matrix for both, see decode_params
        gate, up = jnp.split(project(x, params["gate_up"], accumulate=accumulate), 2, axis=-1)
    else:
        gate, up = (project(x, params[name], accumulate=accumulate) for name in ("gate", "up"))
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    return project(jax.nn.silu(gate) * up, params["down"], accumulate=accumulate)


def dense_feed_forward(config: LanguageModelConfig, parallel: Parallel = Parallel()) -> FeedForward:  # noqa: B008
    """The feed-forward slot of a dense model: ``(params, x [B, T, D]) -> (y [B, T, D], ())``.

    ``gate`` and ``up`` may be column shards and ``down`` the matching row shard: the hooks gather before and sum after.
    """

    def feed_forward(params: Params, x: Array) -> tuple[Array, tuple[()]]:
        y = swiglu(params, parallel.before_column(x), accumulate=config.accumulate_dtype)
        return parallel.after_row(y), ()

    return feed_forward


def router_logits(params: Params, x: Array, config: LanguageModelConfig) -> Array:
    """Router outputs of tokens ``x [T, D]``: [T, E] in the router's precision."""
    dtype = wide(x.dtype, config.router_dtype)
    return project(x.astype(dtype), params["router"].astype(dtype))


def shared_expert(
    params: Params,
    x: Array,
    config: LanguageModelConfig,
    parallel: Parallel = Parallel(),  # noqa: B008
) -> Array:
    """The expert that every token visits, times its sigmoid gate if it has one: [..., D] -> [..., D]."""
    y = parallel.after_row(swiglu(params["shared"], parallel.before_column(x), accumulate=config.accumulate_dtype))
    if "shared_gate" in params:
        y = y * jax.nn.sigmoid(project(x, params["shared_gate"][:, None], accumulate=config.accumulate_dtype))
    return y


def sparse_feed_forward(config: LanguageModelConfig) -> FeedForward:
    """The feed-forward slot of a mixture of experts on one device, dropless: the oracle of ``moe``.

    ``y = sum_e weight_e * expert_e(x) + gate * shared(x)``; no token is dropped and the work of the expert matrices
    is proportional to the tokens: copies are sorted by expert, each expert's rows are padded to whole blocks, and a
    scan multiplies one block at a time with the matrices of its expert.

    Returns:
        ``(params, x [B, T, D]) -> (y [B, T, D], RouterOutput)``, tokens flattened row by row.
    """

    def feed_forward(params: Params, x: Array) -> tuple[Array, RouterOutput]:
        tokens = x.reshape(-1, x.shape[-1])
        logits = router_logits(params, tokens, config)
        routing = route(logits, config, params.get("router_bias"))
        y = _experts(params["experts"], tokens, routing, config.accumulate_dtype)
        if "shared" in params:
            y = y + shared_expert(params, tokens, config)
        return y.reshape(x.shape), RouterOutput(routing, logits)

    return feed_forward


def default_feed_forward(config: LanguageModelConfig, parallel: Parallel = Parallel()) -> FeedForward:  # noqa: B008
    """The one-device feed-forward of a configuration, sparse if it has experts."""
    return sparse_feed_forward(config) if config.num_experts else dense_feed_forward(config, parallel)


def _experts(params: Params, x: Array, routing: Routing, accumulate: str) -> Array:
    """Weighted sum over the chosen experts of each token: x [T, D] -> [T, D]."""
    num_tokens, k = routing.experts.shape
    num_experts = params["gate"].shape[0]
    block = _block_rows(num_tokens * k, num_experts)
    slots, owners = _block_layout(routing.experts.reshape(-1), num_experts, block)
    # Row num_tokens is a row of zeros, for the slots that pad an expert to whole blocks.
    padded = jnp.concatenate([x, jnp.zeros_like(x[:1])])
    copies = jnp.where(slots < num_tokens * k, slots // k, num_tokens)
    rows = padded[copies].reshape(-1, block, x.shape[-1])

    def step(carry: Array, block_input: tuple[Array, Array]) -> tuple[Array, Array]:
        owner, block_rows = block_input
        expert = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, owner, keepdims=False), params)
        return carry, swiglu(expert, block_rows, accumulate=accumulate)

    _, outputs = jax.lax.scan(step, vary_like(jnp.zeros((), x.dtype), rows, *jax.tree.leaves(params)), (owners, rows))
    weights = jnp.pad(routing.weights.reshape(-1).astype(x.dtype), (0, 1))
    outputs = outputs.reshape(-1, x.shape[-1]) * weights[jnp.minimum(slots, num_tokens * k)][:, None]
    return jnp.zeros_like(padded).at[copies].add(outputs)[:num_tokens]


def _block_rows(copies: int, num_experts: int) -> int:
    # Blocks near an even share waste little on padding; more than 256 rows no longer help the product.
    share = max(1, copies // num_experts)
    return min(256, 1 << (share.bit_length() - 1))


def _block_layout(experts: Array, num_experts: int, block: int) -> tuple[Array, Array]:
    """Places token copies into blocks that each belong to one expert.

    Args:
        experts: int32 [N], expert of each copy.
        num_experts: E.
        block: rows of a block.

    Returns:
        slots int32 [num_blocks * block]: the copy in each row, N or more where the row is padding;
        owners int32 [num_blocks]: the expert of each block.
    """
    copies = experts.shape[0]
    num_blocks = (copies + min(num_experts, copies) * (block - 1)) // block
    counts = jnp.zeros((num_experts,), jnp.int32).at[experts].add(1)
    block_ends = jnp.cumsum((counts + block - 1) // block)
    owners = jnp.minimum(
        jnp.searchsorted(block_ends, jnp.arange(num_blocks, dtype=jnp.int32), side="right"), num_experts - 1
    ).astype(jnp.int32)
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    row_starts = jnp.cumsum(counts) - counts
    padded_starts = (block_ends - (counts + block - 1) // block) * block
    sorted_experts = experts[order]
    places = padded_starts[sorted_experts] + jnp.arange(copies, dtype=jnp.int32) - row_starts[sorted_experts]
    slots = jnp.full((num_blocks * block,), copies, jnp.int32).at[places].set(order)
    return slots, owners
