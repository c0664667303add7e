"""Presets of the studies of this family: study -> preset -> values of configuration and hyperparameters."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "frozen_lake": {
        "smoke": {"num_episodes": 12, "maps": ("4x4",), "play_episodes": 500},
        "default": {"num_episodes": 60},
        "paper": {"num_episodes": 300},
    },
    "horizon": {
        "smoke": {
            "horizons": (16,),
            "num_episodes": 15,
            "num_runs": 2,
            "max_doublings": 0,
            "num_random_rewards": 5,
        },
        "default": {},
        "paper": {
            "horizons": (8, 16, 32, 64, 128, 256, 512, 1024),
            "num_runs": 64,
            "kinds": ("weighted", "unweighted", "widest_targets", "ucrl_rfe"),
        },
    },
    "baselines": {
        "smoke": {
            "worlds": ("lock",),
            "explorers": ("hf_ucrl_rfe_pp", "ucrl_rfe"),
            "horizon": 8,
            "num_episodes": 15,
            "num_runs": 2,
            "num_random_rewards": 5,
        },
        "default": {},
        "paper": {"num_episodes": 300, "num_runs": 64},
    },
    "episodes": {
        "smoke": {  # one dimension, that of the gap: another would be a third explorer to compile
            "episodes": (8, 16),
            "dimensions": (4,),
            "dimension_episodes": 8,
            "horizon": 6,
            "num_runs": 2,
            "gap_scale": 0.15,
        },
        "default": {},
        "paper": {"episodes": (32, 64, 128, 256, 512, 1024), "num_runs": 64, "dimensions": (3, 4, 5, 6, 7, 8)},
    },
    "ablations": {
        "smoke": {
            "horizon": 8,
            "num_episodes": 10,
            "num_runs": 2,
            "variants": ("default", "one moment level"),
        },
        "default": {},
        "paper": {"num_episodes": 300, "num_runs": 64},
    },
    "coverage": {
        "smoke": {"horizon": 8, "num_episodes": 15, "num_runs": 8},
        "default": {},
        "paper": {"num_episodes": 300, "num_runs": 512},
    },
    "many_rewards": {
        "smoke": {"num_episodes": 15, "num_rewards": 500, "num_weights": 21, "horizon": 8},
        "default": {},
        "paper": {"num_episodes": 1000, "num_rewards": 20_000},
    },
    "own_world": {
        "smoke": {"num_episodes": 20, "horizon": 6},
        "default": {},
        "paper": {"algorithm": "ucrl_rfe", "num_episodes": 5000},
    },
    "learned_ridge": {
        "smoke": {"num_runs": 4, "num_steps": 60, "num_grid": 15},
        "default": {},
        "paper": {"num_runs": 256, "num_steps": 500},
    },
    "certificates": {
        "smoke": {"worlds": ("lock",), "num_chunks": 4, "chunk_episodes": 100, "horizon": 8},
        "default": {"chunk_episodes": 2000},
        "paper": {"chunk_episodes": 2000, "target": 0.25, "num_chunks": 200},
    },
}
