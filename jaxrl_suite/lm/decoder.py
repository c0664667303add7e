"""The decoder: embed, block, head, and their composition by a scan over layers.

Pure functions over a dict of arrays. They read every size from the arrays that they get (heads from the query matrix,
vocabulary from the table), so that they run on whole arrays and on shards alike; what must be communicated goes
through the hooks of ``Parallel``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxrl_suite.config import check
from jaxrl_suite.lm.attention import blockwise_attend
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.feed_forward import default_feed_forward
from jaxrl_suite.lm.layers import project, rms_norm, wide
from jaxrl_suite.lm.rope import rope_tables, rotate
from jaxrl_suite.types import Array, Attend, FeedForward, Parallel, Params

IDENTITY = Parallel()
# What the backward pass of a block cannot recompute without a product; all else is elementwise.
SAVED_NAMES = ("query", "key", "value", "attention", "normaliser", "residual", "gate", "up")
# Attention that also hands something on, such as the keys and values of a cache: (q, k, v) -> (output, state).
AttendWithState = Callable[[Array, Array, Array], tuple[Array, Any]]


def embed(params: Params, tokens: Array, *, config: LanguageModelConfig, parallel: Parallel = IDENTITY) -> Array:
    """Rows of the embedding table, in the dtype of activations.

    Args:
        params: the whole parameter dict; ``embed/table`` [V, D] is read.
        tokens: int32 [B, T].
        config: read for its dtypes.
        parallel: ``parallel.embedding`` looks up, and may communicate.

    Returns:
        [B, T, D].
    """
    table = params["embed"]["table"]
    return parallel.embedding(table, tokens).astype(config.activation_dtype(table.dtype))


def queries_keys_values(
    params: Params,
    x: Array,
    positions: Array,
    *,
    config: LanguageModelConfig,
    rotation: tuple[Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """Projections of normalised activations, with bias, head norm and rotation.

    Args:
        params: the ``attention`` dict of one layer.
        x: [B, T, D], after the norm and ``parallel.before_column``.
        positions: int32 [B, T].
        config: read for the rotation and the norm.
        rotation: :func:`rope_tables` of the positions, where the caller has them.

    Returns:
        q [B, T, Hq, C], k and v [B, T, Hk, C].
    """

    def heads(name: str) -> Array:
        y = project(x, params[name], accumulate=config.accumulate_dtype)
        if f"{name}_bias" in params:
            y = y + params[f"{name}_bias"].astype(y.dtype)[None, None]
        return y

    if "query_key_value" in params:  # one matrix for all three, see decode_params
        y = heads("query_key_value")
        num_kv_heads = (y.shape[2] - params["output"].kernel.shape[1] // y.shape[3]) // 2
        q, k, v = jnp.split(y, [y.shape[2] - 2 * num_kv_heads, y.shape[2] - num_kv_heads], axis=2)
    else:
        q, k, v = heads("query"), heads("key"), heads("value")
    if "query_norm" in params:
        q = rms_norm(q, params["query_norm"], config.norm_eps)
        k = rms_norm(k, params["key_norm"], config.norm_eps)
    cos, sin = rope_tables(positions, config, wide(x.dtype)) if rotation is None else rotation
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def block_with_state(
    params: Params,
    x: Array,
    positions: Array,
    *,
    config: LanguageModelConfig,
    feed_forward: FeedForward,
    attend: AttendWithState,
    parallel: Parallel = IDENTITY,
    rotation: tuple[Array, Array] | None = None,
) -> tuple[Array, Any, Any]:
    """:func:`block` with an attention that returns a state beside its output, for caches.

    ``rotation`` is that of :func:`queries_keys_values`.

    Returns:
        ``(x [B, T, D], aux, state)``.
    """
    attention = params["attention"]
    h = rms_norm(x, params["attention_norm"]["scale"], config.norm_eps)
    q, k, v = queries_keys_values(attention, parallel.before_column(h), positions, config=config, rotation=rotation)
    y, state = attend(q, k, v)
    y = parallel.after_row(project(y, attention["output"], num_inputs=2, accumulate=config.accumulate_dtype))
    x = checkpoint_name(x + y, "residual")
    h = rms_norm(x, params["feed_forward_norm"]["scale"], config.norm_eps)
    y, aux = feed_forward(params["feed_forward"], h)
    return x + y, aux, state


def block(
    params: Params,
    x: Array,
    positions: Array,
    segments: Array | None,
    *,
    config: LanguageModelConfig,
    feed_forward: FeedForward | None = None,
    attend: Attend | None = None,
    parallel: Parallel = IDENTITY,
) -> tuple[Array, Any]:
    """One layer: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    Args:
        params: one layer of ``params["layers"]``, without the leading axis; whole matrices, or column shards of
            query, key, value (heads) and the matching row shard of output.
        x: [B, T, D]; under sequence parallelism T is this device's share.
        positions: int32 [B, T'] of the tokens that ``parallel.before_column`` returns.
        segments: int32 [B, T'], 0 is padding; None for one segment without padding.
        config: read for conventions (norm, rotation, dtypes), never for sizes.
        feed_forward: ``(params, normalised x) -> (y, aux)``; one device's by default. It calls the hooks itself.
        attend: ``(q, k, v, positions, segments) -> [B, T', Hq, C]``; :func:`blockwise_attend` by default.
        parallel: hooks around the attention's projections.

    Returns:
        ``(x [B, T, D], aux)``.
    """
    feed_forward = default_feed_forward(config, parallel) if feed_forward is None else feed_forward
    attend = functools.partial(blockwise_attend, window=config.sliding_window) if attend is None else attend
    x, aux, _ = block_with_state(
        params,
        x,
        positions,
        config=config,
        feed_forward=feed_forward,
        attend=lambda q, k, v: (attend(q, k, v, positions, segments), ()),
        parallel=parallel,
    )
    return x, aux


def head(params: Params, x: Array, *, config: LanguageModelConfig, parallel: Parallel = IDENTITY) -> Array:
    """Final norm and output table.

    Args:
        params: the whole parameter dict; ``final_norm/scale`` and ``head/table`` (or ``embed/table``) [V, D] are read.
        x: [B, T, D].
        config: read for the norm.
        parallel: ``before_column`` gathers what a vocabulary shard of the table needs.

    Returns:
        logits [B, T, V] (this device's share of V) in float32 at least.
    """
    return logits_of(head_table(params), parallel.before_column(final_norm(params, x, config=config)), config=config)


def final_norm(params: Params, x: Array, *, config: LanguageModelConfig) -> Array:
    """The norm before the head: [..., D] -> [..., D]."""
    return rms_norm(x, params["final_norm"]["scale"], config.norm_eps)


def head_table(params: Params) -> Array:
    """The output table [V, D]: the head's own, or the embedding's where they are tied."""
    return params["head"]["table"] if "head" in params else params["embed"]["table"]


def logits_of(table: Array, h: Array, *, config: LanguageModelConfig) -> Array:
    """Normalised activations [..., D] times the output table [V, D]: logits [..., V] in float32 at least."""
    rows = h.reshape(-1, h.shape[-1])
    logits = jax.lax.dot_general(
        rows,
        table.astype(h.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=wide(h.dtype, config.accumulate_dtype),
    )
    return logits.reshape(*h.shape[:-1], table.shape[0])


def sequence_positions(segments: Array) -> Array:
    """Position of every token within its run of equal segment numbers: int32 [B, T], starting at 0.

    >>> sequence_positions(jnp.array([[0, 0, 1, 1, 1, 2]]))
    Array([[0, 1, 0, 1, 2, 0]], dtype=int32)
    """
    steps = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return steps - jax.lax.cummax(jnp.where(starts, steps, 0), axis=1)


def forward(
    params: Params,
    tokens: Array,
    *,
    config: LanguageModelConfig,
    positions: Array | None = None,
    segments: Array | None = None,
    feed_forward: FeedForward | None = None,
    attend: Attend | None = None,
    parallel: Parallel = IDENTITY,
    remat: str | None = None,
) -> tuple[Array, Any]:
    """All blocks, by a scan over layers, so that compile time does not grow with depth.

    Args:
        params: see the parameter table of the package.
        tokens: int32 [B, T].
        config: conventions of the model.
        positions: int32 [B, T]; by default counted within each segment.
        segments: int32 [B, T], packed sequences have different numbers, 0 is padding (left or right).
        feed_forward: see :func:`block`.
        attend: see :func:`block`; with mixed windows (``first_window_layer``) it also gets ``window=``.
        parallel: see :func:`block`.
        remat: what the backward pass recomputes: "none", "full" (all but block inputs), "dots" (all but products
            without batch axes) or "elementwise" (all but :data:`SAVED_NAMES`); the configuration's by default.

    Returns:
        ``(x [B, T, D], aux)``: the residual stream before the final norm; aux with a leading axis L.
    """
    if positions is None:
        steps = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        positions = steps if segments is None else sequence_positions(segments)
    feed_forward = default_feed_forward(config, parallel) if feed_forward is None else feed_forward

    def layer(x: Array, params: Params, window: int | None) -> tuple[Array, Any]:
        chosen = functools.partial(blockwise_attend if attend is None else attend, window=window)
        return block(
            params,
            x,
            positions,
            segments,
            config=config,
            feed_forward=feed_forward,
            attend=chosen if attend is None or mixed_windows(config) else attend,
            parallel=parallel,
        )

    x = embed(params, tokens, config=config, parallel=parallel)
    auxes = []
    for start, stop, window in layer_groups(config, num_layers(params)):
        stack = params["layers"] if len(auxes) == 0 and stop == num_layers(params) else _slice(params, start, stop)
        body = rematerialised(functools.partial(layer, window=window), config.remat if remat is None else remat)
        x, aux = jax.lax.scan(body, x, stack)
        auxes.append(aux)
    return x, auxes[0] if len(auxes) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *auxes)


def apply(params: Params, tokens: Array, *, config: LanguageModelConfig, **options: Any) -> Array:
    """Logits of every position: :func:`forward`, then :func:`head`.

    Args:
        params: see the parameter table of the package.
        tokens: int32 [B, T].
        config: conventions of the model.
        **options: as for :func:`forward`.

    Returns:
        [B, T, V].
    """
    x, _ = forward(params, tokens, config=config, **options)
    return head(params, x, config=config, parallel=options.get("parallel", IDENTITY))


def num_layers(params: Params) -> int:
    """Number of stacked layers in a parameter dict (a pipeline stage holds fewer than the model)."""
    return params["layers"]["attention_norm"]["scale"].shape[0]


def mixed_windows(config: LanguageModelConfig) -> bool:
    """Whether some layers have a sliding window and others not."""
    return len(set(config.layer_windows)) > 1


def layer_groups(config: LanguageModelConfig, count: int) -> list[tuple[int, int, int | None]]:
    """Runs of layers with the same window: ``(start, stop, window)``; each run is one scan.

    >>> layer_groups(LanguageModelConfig(num_layers=4, sliding_window=8, first_window_layer=3), 4)
    [(0, 3, None), (3, 4, 8)]
    """
    border = min(config.first_window_layer, count) if config.sliding_window is not None else 0
    runs = [(0, border, None), (border, count, config.sliding_window)]
    return [run for run in runs if run[1] > run[0]]


def _slice(params: Params, start: int, stop: int) -> Params:
    return jax.tree.map(lambda leaf: leaf[start:stop], params["layers"])


def rematerialised(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """``jax.checkpoint`` by the name of a policy.

    Raises:
        ValueError: unknown policy.
    """
    policies = {
        "none": None,
        "full": None,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "elementwise": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    }
    check(policy in policies, argument="remat", value=policy, rule=f"must be {', '.join(policies)}")
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=policies[policy], prevent_cse=False)
