"""Presets of the studies of this family: study -> preset -> values of configuration and hyperparameters."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "arithmetic": {
        "smoke": {"digits": 1, "width": 32, "supervised_steps": 240, "num_steps": 6, "eval_every": 3,
                  "rules": ("influence",), "num_prompts": 8, "group_size": 4, "num_layers": 1, "num_eval": 64},
        "default": {},
        "paper": {"supervised_steps": 3000, "num_steps": 600, "num_prompts": 64, "group_size": 8},
    },
    "dynamic_against_fixed": {
        "smoke": {"digits": 1, "width": 32, "supervised_steps": 200, "num_steps": 4, "eval_every": 2,
                  "num_prompts": 4, "num_layers": 1, "num_eval": 32, "candidates": ("sweep:0.5",),
                  "learning_rates": (1e-3,), "tuning_seeds": 1, "test_seeds": 2},
        # About ten minutes of processor time; every weighting and rule is a stage, so it can be stopped. The start adds
        # with an accuracy of 0.8: from a weaker one (0.15) accuracy is noise and no rule can be told from another.
        "default": {"num_steps": 64, "eval_every": 4, "num_prompts": 12},
        "paper": {"supervised_steps": 3000, "num_steps": 600, "num_prompts": 64},
    },
    "exact_problems": {
        "smoke": {"problems": ("tied",), "rules": ("influence", "tchebycheff"), "estimators": ("rloo",),
                  "num_repeats": 2, "num_steps": 40},
        "default": {},
        "paper": {"num_repeats": 100, "num_steps": 1000},
    },
    "families": {
        "smoke": {"digits": 1, "width": 32, "num_layers": 1, "supervised_steps": 200, "num_steps": 4, "eval_every": 2,
                  "num_prompts": 4, "num_eval": 32, "families": ("qwen3",), "operations": ("products",),
                  "rules": ("saw:0.9",), "num_repeats": 2},
        # About fifteen minutes of processor time; every cell and rule is a stage, so it can be stopped.
        "default": {"num_steps": 64, "eval_every": 4, "num_prompts": 12},
        "paper": {"supervised_steps": 3000, "num_steps": 600, "num_prompts": 64},
    },
    "own_data": {
        "smoke": {"num_steps": 2, "num_prompts": 2, "group_size": 4, "max_tokens": 8, "max_prompt": 96,
                  "num_questions": 8},
        "default": {},
        # SmolLM2-135M on two cores, about half a minute a rollout: add --model PATH. Sums of two digits, which it can
        # add, though in sentences. Were mu ten times smaller, all weight would go to conciseness in seven rollouts.
        "cpu": {"task": "chain_sum", "task_settings": "max_terms=2,max_digits=1", "judge": "last_number",
                "num_steps": 60, "num_prompts": 4, "group_size": 6, "max_prompt": 96, "max_tokens": 48,
                "lora_rank": 8, "learning_rate": 3e-4, "mu": 3e-3},
        # The same model on easy questions of the MATH splits: add --model PATH --data PARQUET. By itself it boxes one
        # answer of 64; a worked example and a start show it the form in which all three rewards can be earned. After
        # twelve rollouts every answer has that form; the model is too weak for accuracy to rise with it.
        "math": {"rows": "level=Level 1|Level 2|1|2", "num_questions": 2000, "num_steps": 12, "num_prompts": 4,
                 "group_size": 6, "max_prompt": 112, "max_tokens": 40, "temperature": 0.7, "system": "Be brief.",
                 "example_question": "If $2x+3=9$, what is $x$?", "example_answer": "1. $2x=6$.\n2. $x=3$.\n\\boxed{3}",
                 "answer_start": "1.", "combine": "advantage", "base_weights": (0.5, 0.2, 0.3), "lora_rank": 8,
                 "learning_rate": 5e-4, "mu": 5e-3, "num_test": 24},
        # SmolLM2-135M on one GPU: add --model PATH --data PARQUET (MATH, say). 60 rollouts take over 200 s on an H200.
        "gpu": {"num_steps": 60, "num_prompts": 16, "group_size": 8, "max_prompt": 256, "max_tokens": 256,
                "learning_rate": 1e-5, "mu": 1e-4},
        # The published hyperparameters (Qwen3-8B, Math500); needs accelerators.
        "paper": {"num_steps": 360, "num_prompts": 64, "group_size": 8, "num_minibatches": 2, "max_prompt": 2048,
                  "max_tokens": 2048, "learning_rate": 1e-6, "schedule": "polynomial", "mu": 1e-5, "combine": "reward",
                  "kl_in_influence": True, "influence_clip": 1.0,
                  "gain_on": "reward", "estimator": "grpo", "clip": 100.0, "influence_layers": (10, 25)},
    },
}  # fmt: skip
