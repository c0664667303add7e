"""Upcycling: a sparse model that starts from a trained dense one.

With granularity G (dense width over expert width) and expansion R = E / G, each dense feed-forward is cut into G
slices along its width, the list of slices is repeated R times, and the router is drawn for R groups and repeated so
that the G slices of a copy have equal logits and are chosen together. A token that visits k = c·G experts then sees c
whole copies; with softmax after top-k each slice has weight 1/(c·G) where copies are chosen equally, so outputs shrink
by G.

The factor that restores them stands on the down projection alone (the default): exact, as the layer is linear in it.
Differs: Megatron spreads the factor as a^(1/3) over the three matrices of SwiGLU; SiLU is not homogeneous, so that rule
changes the function. It is offered as ``scaling="cube_root"`` for comparison.

References:
    He et al. (2024), Upcycling Large Language Models into Mixture of Experts, arXiv:2410.07524, sections 3.2 and 3.3;
    Komatsuzaki et al. (2022), Sparse Upcycling, arXiv:2212.05055.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.types import Array, Params, PRNGKey

_FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}


def upcycled_config(
    dense: LanguageModelConfig, *, num_experts: int, experts_per_token: int, granularity: int = 1
) -> LanguageModelConfig:
    """Shape of the sparse model.

    Args:
        dense: shape of the trained model.
        num_experts: E, a multiple of the granularity.
        experts_per_token: k; a multiple of the granularity if whole copies are to be chosen.
        granularity: G, divides the dense width.

    Raises:
        ValueError: the dense model is sparse already, or something does not divide.

    >>> upcycled_config(LanguageModelConfig(), num_experts=8, experts_per_token=2, granularity=2).expert_width
    64
    """
    check(dense.num_experts == 0, argument="num_experts", value=dense.num_experts, rule="the model is sparse already")
    rule = f"must divide the dense width {dense.ffn_width}"
    check(granularity >= 1 and dense.ffn_width % granularity == 0, argument="granularity", value=granularity, rule=rule)
    rule = f"must be a multiple of granularity={granularity}"
    check(num_experts % granularity == 0, argument="num_experts", value=num_experts, rule=rule)
    return dense.replace(
        family=_FAMILIES.get(dense.family, dense.family),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_width=dense.ffn_width // granularity,
        router_normalize=True,
    )


def upcycle(
    key: PRNGKey,
    params: Params,
    dense: LanguageModelConfig,
    sparse: LanguageModelConfig,
    *,
    scaling: Literal["down", "cube_root"] = "down",
    router_std: float = 0.02,
) -> Params:
    """Parameters of the sparse model; attention, norms and vocabulary tables are taken over as they are.

    Args:
        key: consumed, draws the router.
        params: of the dense model.
        dense: its shape.
        sparse: from :func:`upcycled_config`.
        scaling: where the factor that restores the dense output stands.
        router_std: standard deviation of the router; every group of slices shares one row.

    Raises:
        ValueError: the shapes do not belong together.
    """
    num_experts, granularity = sparse.num_experts, dense.ffn_width // sparse.routed_width
    rule = f"must be the dense width {dense.ffn_width} over an integer that divides num_experts={num_experts}"
    fits = granularity * sparse.routed_width == dense.ffn_width and num_experts % granularity == 0
    check(fits, argument="expert_width", value=sparse.routed_width, rule=rule)
    copies = num_experts // granularity
    factor = copy_factor(sparse, granularity)
    up_factor, down_factor = (factor ** (1 / 3), factor ** (1 / 3)) if scaling == "cube_root" else (1.0, factor)
    slices = params["layers"]["feed_forward"]
    experts = {
        "gate": _cut(slices["gate"], granularity, copies, axis=2) * up_factor,
        "up": _cut(slices["up"], granularity, copies, axis=2) * up_factor,
        "down": _cut(slices["down"], granularity, copies, axis=1) * down_factor,
    }
    shape = (sparse.num_layers, sparse.width, copies)
    router = router_std * jax.random.normal(key, shape, slices["gate"].dtype)
    feed_forward = {"router": jnp.repeat(router, granularity, axis=2), "experts": experts}
    if "router_bias" in slices or sparse.router_bias:
        feed_forward["router_bias"] = jnp.zeros((sparse.num_layers, num_experts), sparse.router_dtype)
    return {**params, "layers": {**params["layers"], "feed_forward": feed_forward}}


def copy_factor(sparse: LanguageModelConfig, granularity: int) -> float:
    """What one slice's output must be multiplied by so that whole copies add up to the dense output.

    Softmax after top-k: k chosen slices share weight 1, each output counts 1/G of a copy, hence G. Raw softmax over all
    E experts (near uniform at the start): weights are about 1/E, k/G copies are seen, hence E·G/k.
    """
    if sparse.router_normalize:
        return float(granularity)
    return sparse.num_experts * granularity / sparse.experts_per_token


def _cut(matrix: Array, granularity: int, copies: int, *, axis: int) -> Array:
    """[L, D, F] (or [L, F, D]) to [L, copies · G, ...]: slices along F, the whole list repeated."""
    parts = jnp.stack(jnp.split(matrix, granularity, axis=axis), axis=1)
    return jnp.concatenate([parts] * copies, axis=1)
