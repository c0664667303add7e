"""The parameter table: path and shape of every array of a decoder, and their initial values."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check_key
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.types import Array, Params, PRNGKey

Shape = tuple[int, ...]


def parameter_shapes(config: LanguageModelConfig) -> dict[str, Shape]:
    """Path -> shape of every parameter, in the order in which a token meets them.

    Everything under ``layers/`` is stacked over the L layers. Matrices map their leading (input) axes to their
    trailing (output) axes; the two vocabulary tables are [V, D]. See the package docstring for the table in words.

    >>> parameter_shapes(LanguageModelConfig())["layers/attention/query"]
    (2, 64, 4, 16)
    """
    L, D, C, V = config.num_layers, config.width, config.head_dim, config.vocab_size
    q, k = config.num_heads, config.num_kv_heads
    shapes: dict[str, Shape] = {
        "embed/table": (V, D),
        "layers/attention_norm/scale": (L, D),
        "layers/attention/query": (L, D, q, C),
        "layers/attention/key": (L, D, k, C),
        "layers/attention/value": (L, D, k, C),
        "layers/attention/output": (L, q, C, D),
    }
    if config.qkv_bias:
        shapes |= {f"layers/attention/{name}_bias": (L, n, C) for name, n in (("query", q), ("key", k), ("value", k))}
    if config.qk_norm:
        shapes |= {"layers/attention/query_norm": (L, C), "layers/attention/key_norm": (L, C)}
    shapes["layers/feed_forward_norm/scale"] = (L, D)
    shapes |= {f"layers/feed_forward/{name}": shape for name, shape in _feed_forward_shapes(config).items()}
    shapes["final_norm/scale"] = (D,)
    if not config.tied_head:
        shapes["head/table"] = (V, D)
    return shapes


def _feed_forward_shapes(config: LanguageModelConfig) -> dict[str, Shape]:
    L, D, E = config.num_layers, config.width, config.num_experts
    if not E:
        F = config.ffn_width
        return {"gate": (L, D, F), "up": (L, D, F), "down": (L, F, D)}
    F, S = config.routed_width, config.shared_width
    shapes: dict[str, Shape] = {"router": (L, D, E)}
    if config.router_bias:
        shapes["router_bias"] = (L, E)
    shapes |= {"experts/gate": (L, E, D, F), "experts/up": (L, E, D, F), "experts/down": (L, E, F, D)}
    if S:
        shapes |= {"shared/gate": (L, D, S), "shared/up": (L, D, S), "shared/down": (L, S, D)}
        if config.shared_gate:
            shapes["shared_gate"] = (L, D)
    return shapes


def parameter_dtype(path: str, config: LanguageModelConfig) -> jnp.dtype:
    """Dtype of a new parameter; the selection bias of the router stays in the router's precision."""
    return jnp.dtype(config.router_dtype if path.endswith("router_bias") else config.param_dtype)


def num_parameters(config: LanguageModelConfig) -> int:
    """Number of scalars in the parameters.

    >>> from jaxrl_suite.lm.config import named_config
    >>> num_parameters(named_config("smollm2-135m"))
    134515008
    """
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def init_params(key: PRNGKey, config: LanguageModelConfig) -> Params:
    """Initial parameters: matrices normal with ``config.init_std``, norm scales one, biases zero.

    Each array's key is folded with a hash of its path, so that adding an array changes no other.

    Args:
        key: consumed.
        config: shape of the model.

    Returns:
        Nested dict with the paths and shapes of :func:`parameter_shapes`.
    """
    check_key(key)
    return unflatten(
        {
            path: _init(jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF), path, shape, config)
            for path, shape in parameter_shapes(config).items()
        }
    )


def _init(key: PRNGKey, path: str, shape: Shape, config: LanguageModelConfig) -> Array:
    dtype = parameter_dtype(path, config)
    if path.endswith(("scale", "query_norm", "key_norm")):
        return jnp.ones(shape, dtype)
    if path.endswith("_bias"):
        return jnp.zeros(shape, dtype)
    return jax.random.normal(key, shape, dtype) * jnp.asarray(config.init_std, dtype)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a/b": leaf}, in the order of insertion.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    leaves: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{name}/")
        else:
            leaves[prefix + name] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`flatten`.

    >>> unflatten({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params
