"""The byte-level mixture of experts that the studies train."""

from typing import Any

from jaxrl_suite import lm


def byte_mixture(config: Any, **changes: Any) -> lm.LanguageModelConfig:
    """A small model over bytes with Mixtral's conventions.

    Args:
        config: of a study; ``width``, ``num_layers`` and ``num_experts`` are read.
        **changes: fields of the model that differ.
    """
    fields: dict[str, Any] = {
        "family": "mixtral",
        "vocab_size": 256,
        "width": config.width,
        "num_layers": config.num_layers,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": config.width // 4,
        "ffn_width": 2 * config.width,
        "num_experts": config.num_experts,
        "experts_per_token": 2,
    }
    return lm.LanguageModelConfig(**{**fields, **changes})
