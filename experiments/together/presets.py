"""Presets of the studies of this family: study -> preset -> values of configuration and hyperparameters."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "every_preference": {
        "smoke": {
            "horizon": 6,
            "episodes": (16, 64),
            "num_weightings": 2001,
            "num_runs": 3,
            "explorers": ("ucrl_rfe",),
            "rules": ("schedule",),
            "proof_episodes": 100_000,
        },
        "tour": {
            "horizon": 6,
            "episodes": (16, 64),
            "num_runs": 4,
            "explorers": ("ucrl_rfe",),
            "rules": ("schedule",),
        },
        "default": {},
        "paper": {"episodes": (8, 32, 128, 512, 2048), "num_runs": 32, "proof_episodes": 1_000_000},
    },
    "coding_over_learned_world": {
        "smoke": {"episodes": (2, 64), "num_runs": 2, "num_games": 100, "explorers": ("ucrl_rfe",)},
        "default": {},
        "paper": {"episodes": (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024), "num_runs": 32, "num_messages": 256,
                  "num_games": 1000},
    },
    "sharded_alignment": {
        "smoke": {"num_layers": 1, "supervised_steps": 150, "num_steps": 4, "num_prompts": 4, "group_size": 4},
        "default": {},
        "paper": {"width": 64, "supervised_steps": 3000, "num_steps": 300, "num_prompts": 64, "digits": 2},
        # An upcycled SmolLM2-135M: add --model PATH. Its 9 heads and 3 key heads do not split over tp2. Takes up to 21
        # GB of memory, mostly copies of the weights on eight devices that are one machine; eight experts take more.
        "pretrained": {"folding": "attention=dp8 experts=etp2.ep4", "num_experts": 4, "num_steps": 5, "num_prompts": 2,
                       "group_size": 4, "learning_rate": 1e-5},
    },
    "message_at_a_price": {
        "smoke": {"layout": ("S..", "..G"), "horizon": 3, "num_messages": 8, "prices": (0.03, 0.1, 0.3),
                  "temperatures": (0.1, 0.2, 0.3), "num_steps": 60, "text_prices": (0.7, 0.85, 1.0),
                  "num_characters": 40,
                  "num_blocks": 24, "num_texts": 16, "num_files": 10},
        "default": {},
        "paper": {"layout": ("S...", "....", "...G"), "horizon": 6, "num_messages": 32, "num_steps": 1000,
                  "num_texts": 512, "text_prices": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)},
    },
}  # fmt: skip
