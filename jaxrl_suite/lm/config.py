"""Configuration of the decoder: one class for every family, and the published shapes by name."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from jaxrl_suite.config import Config, check, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Config):
    """Shape and conventions of a decoder-only transformer; static under jit.

    A family only decides the names under which weights are stored; everything that changes the mathematics is a field
    of its own. ``num_experts = 0`` is a dense model, otherwise every layer is sparse.
    """

    family: Literal["llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"] = field(
        "llama", help="naming scheme of stored weights"
    )
    vocab_size: int = field(256, help="V, number of tokens")
    width: int = field(64, help="D, width of the residual stream")
    num_layers: int = field(2, help="L, number of blocks")
    num_heads: int = field(4, help="Hq, number of query heads")
    num_kv_heads: int = field(2, help="Hk, number of key and value heads; divides num_heads")
    head_dim: int = field(16, help="C, width of one head; even")
    ffn_width: int = field(128, help="F, hidden width of the dense feed-forward")
    tied_head: bool = field(True, help="the output head is the embedding table")
    norm_eps: float = field(1e-5, help="added to the mean square inside RMSNorm")
    qkv_bias: bool = field(False, help="bias of the query, key and value projections (Qwen2)")
    qk_norm: bool = field(False, help="RMSNorm of each query and key head (Qwen3)")
    max_length: int = field(2048, help="longest sequence that the model was made for, in tokens")

    rope_theta: float = field(10_000.0, help="base of the rotary frequencies")
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = field("none", help="rule that stretches the rotation")
    rope_factor: float = field(1.0, help="stretching factor of rope_scaling")
    rope_original_length: int = field(2048, help="length before stretching, in tokens (llama3, yarn)")
    rope_low_freq_factor: float = field(1.0, help="llama3: longer wavelengths than length/this are fully stretched")
    rope_high_freq_factor: float = field(4.0, help="llama3: shorter wavelengths than length/this are kept")
    rope_beta_fast: float = field(32.0, help="yarn: rotations above which a frequency is kept")
    rope_beta_slow: float = field(1.0, help="yarn: rotations below which a frequency is fully stretched")
    rope_truncate: bool = field(True, help="yarn: round the borders of the ramp to whole dimensions")
    rope_attention_factor: float | None = field(None, help="yarn: scale of cos and sin; None for 0.1 ln(factor) + 1")

    sliding_window: int | None = field(None, help="a token sees this many tokens, itself included; None for all")
    first_window_layer: int = field(0, help="layers before this one see everything (Qwen2)")

    num_experts: int = field(0, help="E, routed experts a layer; 0 for a dense model")
    experts_per_token: int = field(2, help="k, experts that each token is sent to")
    expert_width: int = field(0, help="hidden width of one routed expert; 0 for ffn_width")
    shared_width: int = field(0, help="hidden width of the shared expert; 0 for none")
    shared_gate: bool = field(False, help="multiply the shared expert by sigmoid(x . w) (Qwen2-MoE)")
    router_score: Literal["softmax", "sigmoid"] = field("softmax", help="score of an expert, over all experts")
    router_normalize: bool = field(True, help="chosen scores divided by their sum (Mixtral); False keeps them raw")
    router_scale: float = field(1.0, help="factor on the combine weights")
    router_groups: int = field(1, help="groups of experts for group-limited top-k")
    router_top_groups: int = field(1, help="groups that a token may use")
    router_bias: bool = field(False, help="a parameter [E] added to the scores for the selection only")
    router_top_k: Literal["hard", "straight_through", "continuous"] = field(
        "hard", help="how the loss sees the choice of experts; see lm.route"
    )
    router_dtype: Literal["float32", "float64"] = field("float32", help="lowest precision of the router")

    init_std: float = field(0.02, help="standard deviation of initial matrices")
    param_dtype: Literal["float32", "bfloat16", "float16", "float64"] = field("float32", help="dtype of new parameters")
    compute_dtype: Literal["param", "float32", "bfloat16", "float16", "float64"] = field(
        "param", help="dtype of activations and products; 'param' follows the parameters"
    )
    accumulate_dtype: Literal["float32", "float64"] = field("float32", help="lowest dtype in which sums are taken")
    remat: Literal["none", "full", "dots", "elementwise"] = field(
        "elementwise", help="what the backward pass of a block recomputes"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_width"):
            self._check(getattr(self, name) > 0, name, "must be positive")
        self._check(self.num_heads % self.num_kv_heads == 0, "num_kv_heads", f"must divide num_heads={self.num_heads}")
        self._check(self.head_dim % 2 == 0, "head_dim", "must be even, since the rotation pairs dimensions")
        self._check(self.norm_eps > 0, "norm_eps", "must be positive")
        self._check(self.sliding_window is None or self.sliding_window > 0, "sliding_window", "must be positive")
        self._check(self.first_window_layer >= 0, "first_window_layer", "must not be negative")
        self._check(self.rope_factor >= 1, "rope_factor", "must be at least 1")
        self._check(self.num_experts >= 0, "num_experts", "must not be negative")
        if self.num_experts:
            self._check(
                1 <= self.experts_per_token <= self.num_experts,
                "experts_per_token",
                f"must be between 1 and num_experts={self.num_experts}",
            )
            self._check(self.num_experts % self.router_groups == 0, "router_groups", "must divide num_experts")
            self._check(
                1 <= self.router_top_groups <= self.router_groups,
                "router_top_groups",
                f"must be between 1 and router_groups={self.router_groups}",
            )
            reachable = self.num_experts // self.router_groups * self.router_top_groups
            self._check(
                self.experts_per_token <= reachable,
                "experts_per_token",
                f"must be at most {reachable}, the experts of router_top_groups groups",
            )
            if self.router_top_k == "continuous":
                rule = "needs router_groups=1 and router_bias=False, since a margin is one of scores"
                self._check(self.router_groups == 1 and not self.router_bias, "router_top_k", rule)
                rule = (
                    "needs experts_per_token > 1 or router_normalize=False: one weight divided by itself is no weight"
                )
                self._check(self.experts_per_token > 1 or not self.router_normalize, "router_top_k", rule)

    def _check(self, condition: bool, name: str, rule: str) -> None:
        check(condition, argument=f"LanguageModelConfig.{name}", value=getattr(self, name), rule=rule)

    @property
    def routed_width(self) -> int:
        """Hidden width of one routed expert."""
        return self.expert_width or self.ffn_width

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Sliding window of every layer, None where a layer sees everything."""
        return tuple(self.sliding_window if i >= self.first_window_layer else None for i in range(self.num_layers))

    def activation_dtype(self, param_dtype: jnp.dtype) -> jnp.dtype:
        """Dtype of activations, given that of the parameters."""
        return jnp.dtype(param_dtype if self.compute_dtype == "param" else self.compute_dtype)


# Shapes from the public configuration files of these models.
_NAMED = {
    "smollm2-135m": LanguageModelConfig(
        vocab_size=49152,
        width=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        ffn_width=1536,
        rope_theta=1e5,
        max_length=8192,
    ),
    "llama-3-8b": LanguageModelConfig(
        vocab_size=128256,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=14336,
        rope_theta=5e5,
        tied_head=False,
        max_length=8192,
    ),
    "llama-3-70b": LanguageModelConfig(
        vocab_size=128256,
        width=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=28672,
        rope_theta=5e5,
        tied_head=False,
        max_length=8192,
    ),
    "mistral-7b": LanguageModelConfig(
        family="mistral",
        vocab_size=32000,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=14336,
        tied_head=False,
        max_length=32768,
        sliding_window=4096,
    ),
    "mixtral-8x7b": LanguageModelConfig(
        family="mixtral",
        vocab_size=32000,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=14336,
        rope_theta=1e6,
        tied_head=False,
        max_length=32768,
        num_experts=8,
        experts_per_token=2,
    ),
    "mixtral-8x22b": LanguageModelConfig(
        family="mixtral",
        vocab_size=32768,
        width=6144,
        num_layers=56,
        num_heads=48,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=16384,
        rope_theta=1e6,
        tied_head=False,
        max_length=65536,
        num_experts=8,
        experts_per_token=2,
    ),
    "mixtral-8x22b-g8t8": LanguageModelConfig(
        family="mixtral",
        vocab_size=32768,
        width=6144,
        num_layers=56,
        num_heads=48,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=16384,
        rope_theta=1e6,
        tied_head=False,
        max_length=65536,
        num_experts=64,
        experts_per_token=8,
        expert_width=2048,
    ),
    "llama3-8x70b": LanguageModelConfig(
        family="mixtral",
        vocab_size=128256,
        width=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=28672,
        rope_theta=5e5,
        tied_head=False,
        max_length=8192,
        num_experts=8,
        experts_per_token=2,
    ),
    "qwen2-57b-a14b": LanguageModelConfig(
        family="qwen2_moe",
        vocab_size=151936,
        width=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        ffn_width=18944,
        rope_theta=1e6,
        tied_head=False,
        norm_eps=1e-6,
        qkv_bias=True,
        max_length=131072,
        num_experts=64,
        experts_per_token=8,
        expert_width=2560,
        shared_width=20480,
        shared_gate=True,
        router_normalize=False,
    ),
    "qwen3-30b-a3b": LanguageModelConfig(
        family="qwen3_moe",
        vocab_size=151936,
        width=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        ffn_width=6144,
        rope_theta=1e6,
        tied_head=False,
        norm_eps=1e-6,
        qk_norm=True,
        max_length=40960,
        num_experts=128,
        experts_per_token=8,
        expert_width=768,
    ),
}


def named_config(name: str, **changes: object) -> LanguageModelConfig:
    """The published shape of a model.

    Args:
        name: for example "smollm2-135m", "mixtral-8x7b", "qwen2-57b-a14b"; the error lists all.
        **changes: fields that differ.

    Raises:
        ValueError: unknown name or field.

    >>> named_config("mixtral-8x7b", num_layers=2).num_experts
    8
    """
    check(name in _NAMED, argument="name", value=name, rule="unknown model", remedy=f"Known: {', '.join(_NAMED)}")
    return _NAMED[name].replace(**changes)
