"""Low-rank adaptation of any matrix, chosen by a pattern on its path."""

import dataclasses
import fnmatch
import math
import zlib

import jax
import jax.numpy as jnp

from jaxrl_suite.config import Config, check, field
from jaxrl_suite.lm.layers import LowRank
from jaxrl_suite.lm.parameters import flatten, unflatten
from jaxrl_suite.types import Array, Params, PRNGKey

# Matrices that a block multiplies by `project`, where a difference of low rank need not be added to the matrix.
_PROJECTED = ("attention/query", "attention/key", "attention/value", "attention/output", "/gate", "/up", "/down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
    """Which matrices get a low-rank difference, and how large it is."""

    rank: int = field(8, help="R, rank of the difference")
    alpha: float = field(16.0, help="the difference is multiplied by alpha / rank")
    patterns: tuple[str, ...] = field(
        ("layers/attention/*", "layers/feed_forward/*"), help="shell patterns on parameter paths"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.rank > 0, argument="LoraConfig.rank", value=self.rank, rule="must be positive")

    @property
    def scale(self) -> float:
        """Factor on the product of the two matrices."""
        return self.alpha / self.rank


def _stacked(path: str) -> int:
    return 0 if not path.startswith("layers/") else 2 if "/experts/" in path else 1


def _num_inputs(path: str) -> int:
    return 2 if path.endswith("attention/output") else 1


def init_lora(key: PRNGKey, params: Params, config: LoraConfig) -> dict[str, dict[str, Array]]:
    """A difference of zero: a is normal with variance 1 / inputs, b is zero.

    Args:
        key: consumed.
        params: the parameters to adapt.
        config: rank and patterns; vectors (norms, biases) that a pattern hits are passed over.

    Returns:
        path -> {"a": [*stack, *inputs, R], "b": [*stack, R, *outputs]} for every matrix that a pattern matches.

    Raises:
        ValueError: a pattern matches no matrix.

    References:
        Hu et al. (2021), arXiv 2106.09685, section 4.1.
    """
    matrices = {
        path: leaf
        for path, leaf in flatten(params).items()
        if leaf.ndim - _stacked(path) >= 2 and not path.endswith("_bias")
    }
    remedy = f"Matrices: {', '.join(matrices)}"
    for pattern in config.patterns:
        hit = any(fnmatch.fnmatch(path, pattern) for path in matrices)
        check(hit, argument="LoraConfig.patterns", value=pattern, rule="matches no matrix", remedy=remedy)
    chosen = {path: leaf for path, leaf in matrices.items() if any(fnmatch.fnmatch(path, p) for p in config.patterns)}
    lora = {}
    for path, leaf in chosen.items():
        border = _stacked(path) + _num_inputs(path)
        stack, inputs, outputs = leaf.shape[: _stacked(path)], leaf.shape[_stacked(path) : border], leaf.shape[border:]
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        a = jax.random.normal(path_key, (*stack, *inputs, config.rank), leaf.dtype)
        lora[path] = {
            "a": a * jnp.asarray(math.prod(inputs) ** -0.5, leaf.dtype),
            "b": jnp.zeros((*stack, config.rank, *outputs), leaf.dtype),
        }
    return lora


def apply_lora(params: Params, lora: dict[str, dict[str, Array]], config: LoraConfig) -> Params:
    """Parameters whose adapted matrices carry their difference; for training.

    Projections multiply by the two thin matrices, so that no gradient of the whole matrix is ever made. Matrices that
    are read in other ways (tables, router, routed experts) are added up.
    """
    leaves = dict(flatten(params))
    for path, pair in lora.items():
        if path.endswith(_PROJECTED) and "/experts/" not in path:
            leaves[path] = LowRank(jax.lax.stop_gradient(leaves[path]), pair["a"], pair["b"], config.scale)
        else:
            leaves[path] = jax.lax.stop_gradient(leaves[path]) + _difference(path, pair, config)
    return unflatten(leaves)


def merge_lora(params: Params, lora: dict[str, dict[str, Array]], config: LoraConfig) -> Params:
    """Ordinary parameters with every difference added in; for export and decoding."""
    leaves = dict(flatten(params))
    for path, pair in lora.items():
        leaves[path] = leaves[path] + _difference(path, pair, config).astype(leaves[path].dtype)
    return unflatten(leaves)


def _difference(path: str, pair: dict[str, Array], config: LoraConfig) -> Array:
    a, b = pair["a"], pair["b"]
    depth, border = _stacked(path), _stacked(path) + _num_inputs(path)
    stack, inputs, outputs = a.shape[:depth], a.shape[depth:border], b.shape[depth + 1 :]
    product = a.reshape(*stack, -1, config.rank) @ b.reshape(*stack, config.rank, -1)
    return product.reshape(*stack, *inputs, *outputs) * jnp.asarray(config.scale, a.dtype)
