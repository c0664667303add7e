"""Configuration files of Hugging Face folders and metadata of GGUF files, both ways where it makes sense."""

from collections.abc import Mapping, Set
from typing import Any

from jaxrl_suite.config import check
from jaxrl_suite.lm.config import LanguageModelConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
_SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe")


def config_from_hf(values: Mapping[str, Any], *, where: str, tensors: Set[str] | None = None) -> LanguageModelConfig:
    """Reads a config.json.

    Args:
        values: its content.
        where: file name, for messages.
        tensors: names of the stored tensors, which decide whether the head is tied where the file does not say.

    Raises:
        ValueError: an architecture or option that this decoder does not have, naming file, field and value.
    """

    def rule(condition: bool, name: str, text: str) -> None:
        check(condition, argument=f"{where}: {name}", value=values.get(name), rule=text)

    family = values.get("model_type")
    rule(family in _ARCHITECTURES, "model_type", f"unsupported architecture; must be {', '.join(_ARCHITECTURES)}")
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for name in needed:
        rule(isinstance(values.get(name), int), name, "must be an integer")
    rule(values.get("hidden_act", "silu") == "silu", "hidden_act", "must be silu")
    for name in ("attention_bias", "mlp_bias"):
        rule(not values.get(name, False), name, "is not supported for this architecture")
    heads = values["num_attention_heads"]
    tied = values.get("tie_word_embeddings")
    if tied is None:
        tied = tensors is not None and "lm_head.weight" not in tensors
    fields: dict[str, Any] = {
        "family": family,
        "vocab_size": values["vocab_size"],
        "width": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or values["hidden_size"] // heads,
        "ffn_width": values["intermediate_size"],
        "tied_head": bool(tied),
        "norm_eps": float(values.get("rms_norm_eps", 1e-6)),
        "qkv_bias": family in ("qwen2", "qwen2_moe") and values.get("qkv_bias", True),
        "qk_norm": family in ("qwen3", "qwen3_moe"),
        "max_length": values.get("max_position_embeddings", 2048),
        "init_std": float(values.get("initializer_range", 0.02)),
    }
    fields |= _rope_from_hf(values, where) | _window_from_hf(values, rule)
    if family in _SPARSE:
        fields |= _experts_from_hf(values, rule)
    return LanguageModelConfig(**fields)


def _rope_from_hf(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    check(isinstance(rope, Mapping), argument=f"{where}: rope_parameters", value=rope, rule="must be an object")
    default = 1e6 if values["model_type"] == "mixtral" else 1e4
    fields: dict[str, Any] = {"rope_theta": float(rope.get("rope_theta") or values.get("rope_theta") or default)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
    check(kind in known, argument=f"{where}: rope_type", value=kind, rule=f"unsupported; must be {', '.join(known)}")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) or 1.0
    check(partial == 1.0, argument=f"{where}: partial_rotary_factor", value=partial, rule="must be 1")
    for name in ("mscale", "mscale_all_dim"):
        check(not rope.get(name), argument=f"{where}: {name}", value=rope.get(name), rule="is not supported")
    if kind == "default":
        return fields
    fields |= {"rope_scaling": known[kind], "rope_factor": float(rope["factor"])}
    original = rope.get("original_max_position_embeddings") or values.get("max_position_embeddings", 2048)
    fields["rope_original_length"] = int(original)
    names = {
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "beta_fast": "rope_beta_fast",
        "beta_slow": "rope_beta_slow",
        "attention_factor": "rope_attention_factor",
    }
    fields |= {ours: float(rope[theirs]) for theirs, ours in names.items() if rope.get(theirs) is not None}
    return fields | ({"rope_truncate": bool(rope["truncate"])} if rope.get("truncate") is not None else {})


def _window_from_hf(values: Mapping[str, Any], rule: Any) -> dict[str, Any]:
    family, layers = values["model_type"], values["num_hidden_layers"]
    window = values.get("sliding_window", 4096 if family == "mistral" else None)
    if family.startswith("qwen") and not values.get("use_sliding_window", False):
        window = None
    if family == "llama" or not window:
        return {}
    kinds = values.get("layer_types")
    if kinds is None:
        first = values.get("max_window_layers", 0) if family.startswith("qwen") else 0
    else:
        first = kinds.index("sliding_attention") if "sliding_attention" in kinds else layers
        expected = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
        rule(list(kinds) == expected, "layer_types", "must be full_attention layers followed by sliding_attention ones")
    return {"sliding_window": window, "first_window_layer": first} if first < layers else {}


def _experts_from_hf(values: Mapping[str, Any], rule: Any) -> dict[str, Any]:
    family = values["model_type"]
    rule(values.get("decoder_sparse_step", 1) == 1, "decoder_sparse_step", "dense and sparse layers cannot be mixed")
    rule(not values.get("mlp_only_layers"), "mlp_only_layers", "dense and sparse layers cannot be mixed")
    mixtral = family == "mixtral"
    count = "num_experts" if "num_experts" in values and not mixtral else "num_local_experts"
    rule(isinstance(values.get(count), int), count, "must be an integer")
    fields = {
        "num_experts": values[count],
        "experts_per_token": values["num_experts_per_tok"],
        "router_normalize": mixtral or bool(values.get("norm_topk_prob", False)),
    }
    if not mixtral:
        fields["expert_width"] = values["moe_intermediate_size"]
    if family == "qwen2_moe":
        fields |= {"shared_width": values["shared_expert_intermediate_size"], "shared_gate": True}
    return fields


def config_to_hf(config: LanguageModelConfig, dtype: str) -> dict[str, Any]:
    """Content of a config.json that ``transformers`` reads.

    Raises:
        ValueError: the configuration has something that its family cannot express.
    """
    _check_expressible(config)
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = config.rope_original_length
    if config.rope_scaling == "llama3":
        rope |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
    if config.rope_scaling == "yarn":
        rope |= {
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
            "truncate": config.rope_truncate,
        }
        rope |= {} if config.rope_attention_factor is None else {"attention_factor": config.rope_attention_factor}
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if config.rope_scaling != "none":  # readers before transformers 5
        values["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return values | _window_to_hf(config) | _experts_to_hf(config)


def _check_expressible(config: LanguageModelConfig) -> None:
    family = config.family

    def rule(condition: bool, name: str) -> None:
        text = f"family {family!r} cannot express it in a Hugging Face folder"
        check(condition, argument=f"LanguageModelConfig.{name}", value=getattr(config, name), rule=text)

    rule(bool(config.num_experts) == (family in _SPARSE), "num_experts")
    rule(config.qkv_bias == (family in ("qwen2", "qwen2_moe")), "qkv_bias")
    rule(config.qk_norm == (family in ("qwen3", "qwen3_moe")), "qk_norm")
    rule(family != "llama" or config.sliding_window is None, "sliding_window")
    rule(config.first_window_layer == 0 or family.startswith("qwen"), "first_window_layer")
    rule(config.router_score == "softmax", "router_score")
    rule(config.router_groups == 1, "router_groups")
    rule(config.router_scale == 1.0, "router_scale")
    rule(not config.router_bias, "router_bias")
    rule(config.router_top_k != "continuous", "router_top_k")
    rule(config.router_normalize or family != "mixtral", "router_normalize")
    rule((config.shared_width > 0 and config.shared_gate) == (family == "qwen2_moe"), "shared_width")
    standard = config.head_dim * config.num_heads == config.width
    rule(standard or family not in ("qwen2", "qwen2_moe"), "head_dim")


def _window_to_hf(config: LanguageModelConfig) -> dict[str, Any]:
    if config.family.startswith("qwen"):
        return {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "max_window_layers": config.first_window_layer,
        }
    return {} if config.family == "llama" else {"sliding_window": config.sliding_window}


def _experts_to_hf(config: LanguageModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {}
    values: dict[str, Any] = {"num_experts_per_tok": config.experts_per_token}
    if config.family == "mixtral":
        return values | {"num_local_experts": config.num_experts, "intermediate_size": config.routed_width}
    values |= {
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "moe_intermediate_size": config.routed_width,
        "norm_topk_prob": config.router_normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return values | ({"shared_expert_intermediate_size": config.shared_width} if config.shared_width else {})


_GGUF_FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}


def config_from_gguf(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, where: str):
    """Reads the metadata of a GGUF file into a :class:`LanguageModelConfig`.

    Args:
        metadata: of the file.
        shapes: name -> shape of its tensors.
        where: file name, for messages.

    Raises:
        ValueError: an architecture or option that this decoder does not have.
    """
    architecture = metadata.get("general.architecture")
    known = ", ".join(_GGUF_FAMILIES)
    ok = architecture in _GGUF_FAMILIES
    check(ok, argument=f"{where}: general.architecture", value=architecture, rule=f"unsupported; must be {known}")
    family = _GGUF_FAMILIES[str(architecture)]

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{name}", default)
        present = value is not None
        check(present, argument=f"{where}: {architecture}.{name}", value=None, rule="is missing from the metadata")
        return value

    scaling = get("rope.scaling.type", "none")
    kinds = ("none", "linear", "yarn")
    check(scaling in kinds, argument=f"{where}: rope.scaling.type", value=scaling, rule="must be none, linear or yarn")
    stretched = "rope_freqs.weight" in shapes
    rule = "a table of stretched frequencies (Llama 3.1 and later) is not supported; use the safetensors folder"
    check(not stretched, argument=where, value="rope_freqs.weight", rule=rule)
    check("token_embd.weight" in shapes, argument=where, value="token_embd.weight", rule="is missing")
    heads, width = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", width // heads)
    experts = get("expert_count", 0)
    fields: dict[str, Any] = {
        "family": "mixtral" if family == "llama" and experts else family,
        "vocab_size": shapes["token_embd.weight"][0],
        "width": width,
        "num_layers": get("block_count"),
        "num_heads": heads,
        "num_kv_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "ffn_width": get("feed_forward_length", metadata.get(f"{architecture}.expert_feed_forward_length")),
        "tied_head": "output.weight" not in shapes,
        "norm_eps": float(get("attention.layer_norm_rms_epsilon")),
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "qk_norm": "blk.0.attn_q_norm.weight" in shapes,
        "max_length": get("context_length", 2048),
        "rope_theta": float(get("rope.freq_base", 10_000.0)),
        "sliding_window": metadata.get(f"{architecture}.attention.sliding_window"),
    }
    if scaling != "none":
        fields |= {"rope_scaling": scaling, "rope_factor": float(get("rope.scaling.factor"))}
        fields["rope_original_length"] = get("rope.scaling.original_context_length", fields["max_length"])
    if experts:
        fields |= {
            "num_experts": experts,
            "experts_per_token": get("expert_used_count"),
            "expert_width": shapes["blk.0.ffn_gate_exps.weight"][1],
            "router_normalize": family != "qwen2_moe",
        }
        if family == "qwen2_moe":
            fields |= {"shared_width": shapes["blk.0.ffn_gate_shexp.weight"][0], "shared_gate": True}
    return LanguageModelConfig(**fields)
