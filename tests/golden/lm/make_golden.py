"""Makes the tiny checkpoints and logits beside this file with torch and transformers.

    python -m pip install -e ".[parity]" && python tests/golden/lm/make_golden.py

One folder a case: config.json and model.safetensors as ``save_pretrained`` writes them, and expected.npz with tokens
[2, 12] and float32 logits [2, 12, V].
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

BASE = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "head_dim": 4,
}
ROPE = {"rope_theta": 10000.0}
SPARSE = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
QWEN2 = {name: value for name, value in BASE.items() if name != "head_dim"}
CASES = {
    "llama": ("Llama", BASE | {"tie_word_embeddings": True}),
    "llama3_rope": (
        "Llama",
        BASE
        | {
            "rope_parameters": ROPE
            | {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "linear_rope": ("Llama", BASE | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("Mistral", BASE | {"sliding_window": 5}),
    "mixtral": ("Mixtral", BASE | SPARSE | {"sliding_window": None}),
    "qwen2": ("Qwen2", QWEN2 | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2_moe": ("Qwen2Moe", QWEN2 | QWEN_MOE | {"shared_expert_intermediate_size": 14, "norm_topk_prob": False}),
    "qwen3": (
        "Qwen3",
        BASE | {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "qwen3_moe": ("Qwen3Moe", BASE | QWEN_MOE | {"norm_topk_prob": True}),
}


def make(folder: Path) -> None:
    for name, (family, options) in CASES.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**options)
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():  # norms and biases away from one and zero, or a mix-up would not show
            for key, value in model.named_parameters():
                if "norm" in key or "bias" in key:
                    value.add_(0.2 * torch.randn_like(value))
            tokens = torch.randint(0, BASE["vocab_size"], (2, 12))
            logits = model(tokens).logits
        shutil.rmtree(folder / name, ignore_errors=True)
        model.save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        np.savez(folder / name / "expected.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    make(Path(__file__).parent)
