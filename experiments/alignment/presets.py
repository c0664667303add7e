"""Presets of the studies of this family: study -> preset -> values of configuration and hyperparameters."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "arithmetic": {
        "smoke": {"digits": 1, "width": 32, "supervised_steps": 240, "num_steps": 6, "eval_every": 3,
                  "rules": ("influence",), "num_prompts": 8, "group_size": 4, "num_layers": 1, "num_eval": 64},
        "default": {},
        "paper": {"supervised_steps": 3000, "num_steps": 600, "num_prompts": 64, "group_size": 8},
    },
    "dynamic_against_fixed": {
        "smoke": {"digits": 1, "width": 32, "supervised_steps": 300, "num_steps": 4, "eval_every": 2,
                  "num_prompts": 4, "num_layers": 1, "num_eval": 32, "candidates": ("sweep:0.5",),
                  "learning_rates": (1e-3,), "tuning_seeds": 1, "test_seeds": 2},
        # About an hour of one core; every weighting of every seed is stored on its own, so it can be stopped.
        "default": {"width": 48, "supervised_steps": 1000, "num_steps": 64, "eval_every": 4, "num_prompts": 12},
        "paper": {"supervised_steps": 3000, "num_steps": 600, "num_prompts": 64},
    },
    "own_data": {
        "smoke": {"num_steps": 2, "num_prompts": 2, "group_size": 4, "max_tokens": 8, "max_prompt": 96,
                  "num_questions": 8},
        "default": {},
        # The published hyperparameters (Qwen3-8B, Math500); needs accelerators.
        "paper": {"num_steps": 360, "num_prompts": 64, "group_size": 8, "num_minibatches": 2, "max_prompt": 2048,
                  "max_tokens": 2048, "learning_rate": 1e-6, "schedule": "polynomial", "mu": 1e-5, "combine": "reward",
                  "kl_in_influence": True, "influence_clip": 1.0,
                  "gain_on": "reward", "estimator": "grpo", "clip": 100.0},
    },
}  # fmt: skip
