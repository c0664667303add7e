"""Decoding one token at a time: the cache of keys and values, prefill, step, and the layout of fast decoding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.lm.attention import blockwise_attend
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.decoder import block_with_state, embed, head, layer_groups, num_layers
from jaxrl_suite.lm.feed_forward import default_feed_forward
from jaxrl_suite.lm.layers import row_major, wide
from jaxrl_suite.lm.rope import rope_tables
from jaxrl_suite.types import Array, FeedForward, Params, SequenceLaw


class DecodeParams(NamedTuple):
    """Parameters ready for fast decoding, made by :func:`decode_params`.

    Attributes:
        params: the ordinary parameters; embedding, head and prefill read them.
        layers: one dict a layer, matrices output by output, query/key/value and gate/up joined.
    """

    params: Params
    layers: tuple[Params, ...]


class DecodeState(NamedTuple):
    """State of a batch of continuations.

    Attributes:
        keys: per layer [B, Hk, S, C], or stacked [L, B, Hk, S, C]; slot s holds the s-th column of the batch. What a
            head reads lies in one piece: with the heads inside, XLA turns the whole cache around in every step.
        values: same shape as keys.
        start: int32 [B], first column that is not padding.
        length: int32 [], columns filled so far.
        logits: [B, V], of the next token.
        rotation: cosine and sine of every position, [S, C / 2] each. Read rather than computed in a step: XLA would
            take them anew for every head of every layer.
    """

    keys: Any
    values: Any
    start: Array
    length: Array
    logits: Array
    rotation: tuple[Array, Array]


def decode_params(params: Params, config: LanguageModelConfig) -> DecodeParams:
    """Splits the stacked layers and stores matrices output by output, in the dtype of activations.

    Decoding is bound by reading the weights; a list of layers in this layout is read about twice as fast on a CPU as
    slices of a stack. It costs one copy of the weights, so that callers who decode often do it once.
    """
    dtype = config.activation_dtype(params["embed"]["table"].dtype)

    def matrix(kernel: Array, num_inputs: int = 1) -> Any:
        return row_major(kernel.astype(dtype), num_inputs=num_inputs)

    def layer(index: int) -> Params:
        one = jax.tree.map(lambda leaf: leaf[index], params["layers"])
        attention, feed_forward = dict(one["attention"]), dict(one["feed_forward"])
        parts = [attention.pop(name) for name in ("query", "key", "value")]
        attention["query_key_value"] = matrix(jnp.concatenate(parts, axis=1))
        attention["output"] = matrix(attention["output"], 2)
        if "query_bias" in attention:
            biases = [attention.pop(f"{name}_bias") for name in ("query", "key", "value")]
            attention["query_key_value_bias"] = jnp.concatenate(biases)
        if "gate" in feed_forward:
            joined = jnp.concatenate([feed_forward.pop("gate"), feed_forward.pop("up")], axis=1)
            feed_forward["gate_up"], feed_forward["down"] = matrix(joined), matrix(feed_forward["down"])
        return one | {"attention": attention, "feed_forward": feed_forward}

    return DecodeParams(params, tuple(layer(index) for index in range(num_layers(params))))


def prefill(
    params: Params | DecodeParams,
    prompts: Array,
    mask: Array,
    *,
    config: LanguageModelConfig,
    capacity: int,
    feed_forward: FeedForward | None = None,
) -> DecodeState:
    """Runs the prompts through the model and fills the cache.

    Args:
        params: ordinary parameters (the cache is stacked, steps scan over layers), or :func:`decode_params` of them
            (the cache is a tuple, steps are unrolled: faster on CPU, slower to compile).
        prompts: int32 [B, P], padded on the left.
        mask: bool [B, P], false at padding.
        config: conventions of the model.
        capacity: S, columns of the cache; at least P plus the tokens to come.
        feed_forward: slot of the blocks.

    Returns:
        State whose logits belong to the first new token.
    """
    whole = params.params if isinstance(params, DecodeParams) else params
    length = prompts.shape[1]
    start = jnp.where(mask.any(axis=1), jnp.argmax(mask, axis=1), length).astype(jnp.int32)
    positions = jnp.maximum(jnp.arange(length, dtype=jnp.int32)[None] - start[:, None], 0)
    segments = mask.astype(jnp.int32)
    room = ((0, 0), (0, 0), (0, capacity - length), (0, 0))
    feed_forward = default_feed_forward(config) if feed_forward is None else feed_forward

    def layer(x: Array, layer_params: Params, window: int | None) -> tuple[Array, tuple[Array, Array]]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            kept = jnp.pad(k.swapaxes(1, 2), room), jnp.pad(v.swapaxes(1, 2), room)
            return blockwise_attend(q, k, v, positions, segments, window=window), kept

        x, _, kept = block_with_state(
            layer_params, x, positions, config=config, feed_forward=feed_forward, attend=attend
        )
        return x, kept

    x = embed(whole, prompts, config=config)
    caches = []
    for first, last, window in layer_groups(config, num_layers(whole)):
        stack = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], whole["layers"])
        x, kept = jax.lax.scan(lambda x, p, w=window: layer(x, p, w), x, stack)
        caches.append(kept)
    keys, values = caches[0] if len(caches) == 1 else jax.tree.map(lambda *c: jnp.concatenate(c), *caches)
    if isinstance(params, DecodeParams):
        keys, values = tuple(keys), tuple(values)
    logits = head(whole, x[:, -1:], config=config)[:, 0]
    rotation = rope_tables(jnp.arange(capacity, dtype=jnp.int32), config, wide(x.dtype))
    return DecodeState(keys, values, start, jnp.asarray(length, jnp.int32), logits, rotation)


def decode_step(
    params: Params | DecodeParams,
    state: DecodeState,
    tokens: Array,
    *,
    config: LanguageModelConfig,
    feed_forward: FeedForward | None = None,
) -> DecodeState:
    """Appends one token a row and computes the logits of the next.

    Args:
        params: what :func:`prefill` got.
        state: the batch so far; ``state.length`` must be below the capacity (beyond it the last column is replaced).
        tokens: int32 [B].
        config: conventions of the model.
        feed_forward: slot of the blocks.

    Returns:
        The state one token later.
    """
    whole = params.params if isinstance(params, DecodeParams) else params
    positions = (state.length - state.start)[:, None]
    cos, sin = (jnp.take(table, positions, axis=0, mode="clip") for table in state.rotation)
    feed_forward = default_feed_forward(config) if feed_forward is None else feed_forward

    def layer(x: Array, layer_params: Params, keys: Array, values: Array, window: Any) -> tuple[Array, Any]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            new_keys = jax.lax.dynamic_update_slice_in_dim(keys, k.swapaxes(1, 2), state.length, axis=2)
            new_values = jax.lax.dynamic_update_slice_in_dim(values, v.swapaxes(1, 2), state.length, axis=2)
            return _attend_to_cache(q, new_keys, new_values, state, window), (new_keys, new_values)

        x, _, kept = block_with_state(
            layer_params, x, positions, config=config, feed_forward=feed_forward, attend=attend, rotation=(cos, sin)
        )
        return x, kept

    x = embed(whole, tokens[:, None], config=config)
    if isinstance(params, DecodeParams):
        kept = []
        for one, keys, values, window in zip(
            params.layers, state.keys, state.values, config.layer_windows, strict=True
        ):
            x, cache = layer(x, one, keys, values, window)
            kept.append(cache)
        keys, values = (tuple(part) for part in zip(*kept))
    else:
        windows = jnp.asarray([window or jnp.iinfo(jnp.int32).max for window in config.layer_windows], jnp.int32)
        window = None if config.sliding_window is None else windows
        x, (keys, values) = jax.lax.scan(
            lambda x, item: layer(x, *item), x, (whole["layers"], state.keys, state.values, window)
        )
    logits = head(whole, x, config=config)[:, 0]
    return state._replace(keys=keys, values=values, length=state.length + 1, logits=logits)


def _attend_to_cache(q: Array, keys: Array, values: Array, state: DecodeState, window: Any) -> Array:
    """q [B, 1, Hq, C] against the filled slots [start, length] of keys and values [B, Hk, S, C]."""
    batch, _, num_heads, width = q.shape
    num_kv_heads = keys.shape[1]
    dtype = wide(q.dtype)
    q = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, width)
    scores = jnp.einsum("bhgc,bhsc->bhgs", q, keys, preferred_element_type=dtype) * jnp.asarray(width**-0.5, dtype)
    slots = jnp.arange(keys.shape[2], dtype=jnp.int32)[None]
    visible = (slots >= state.start[:, None]) & (slots <= state.length)
    if window is not None:
        visible &= state.length - slots < window
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, jnp.asarray(-1e30, dtype)), axis=-1)
    y = jnp.einsum("bhgs,bhsc->bhgc", weights.astype(q.dtype), values, preferred_element_type=dtype)
    return y.astype(q.dtype).reshape(batch, 1, num_heads, width)


def repeat_state(state: DecodeState, size: int) -> DecodeState:
    """Every row of a state ``size`` times in a row, for samples that share a prompt: B rows become B * size."""
    axis = 0 if isinstance(state.keys, tuple) else 1
    keys, values = jax.tree.map(lambda x: jnp.repeat(x, size, axis=axis), (state.keys, state.values))
    start, logits = (jnp.repeat(x, size, axis=0) for x in (state.start, state.logits))
    return state._replace(keys=keys, values=values, start=start, logits=logits)


def decoder_law(
    config: LanguageModelConfig, *, max_tokens: int, feed_forward: FeedForward | None = None, group: int = 1
) -> SequenceLaw:
    """The law of continuations of at most ``max_tokens`` tokens.

    ``init`` and ``step`` take ordinary parameters or :func:`decode_params` of them. With a ``group``, prompts come in
    runs of so many equal rows, and ``init`` reads each once.
    """

    def init(params: Params, prompts: Array, mask: Array) -> DecodeState:
        capacity = prompts.shape[1] + max_tokens
        state = prefill(
            params, prompts[::group], mask[::group], config=config, capacity=capacity, feed_forward=feed_forward
        )
        return state if group == 1 else repeat_state(state, group)

    def step(params: Params, state: DecodeState, tokens: Array) -> tuple[DecodeState, Array]:
        state = decode_step(params, state, tokens, config=config, feed_forward=feed_forward)
        return state, state.logits

    return SequenceLaw(init, step, lambda state: state.logits)
