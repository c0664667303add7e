"""Presets of the studies of this family: study -> preset -> values of configuration and hyperparameters."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "rate_information": {
        "smoke": {"num_files": 12, "num_rates": 101},
        "default": {"num_files": 60, "num_rates": 401},
        "paper": {"num_files": 150, "num_rates": 2001},
    },
    "source_coding": {
        "smoke": {"num_rates": 61},
        "default": {},
        "paper": {"num_rates": 901},
    },
    "coding_game": {
        "smoke": {
            "num_messages": 32,
            "num_episodes": 60,
            "log_temperatures": (-5.0, -4.0),
            "compressions": (1.0, 3.0),
            "horizon": 60,
        },
        "default": {},
        "paper": {
            "log_temperatures": (-6.0, -5.5, -5.0, -4.5, -4.0, -3.5, -3.0),
            "compressions": (1.0, 1.5, 2.0, 3.0, 5.0, 9.0),
            "horizon": 600,
            "num_episodes": 1000,
        },
    },
    "compression_maps": {
        "smoke": {"num_rates": 101},
        "default": {},
        "paper": {"num_rates": 2001},
    },
    "code_grid": {
        "smoke": {
            "num_messages": (32,),
            "temperatures": (0.03, 0.2),
            "compressions": (1.0,),
            "horizon": 6,
        },
        "default": {},
        "paper": {"temperatures": (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)},
    },
    "information_policy": {
        "smoke": {
            "layout": ("S..", "..G"),
            "horizon": 3,
            "num_messages": 8,
            "temperatures": (0.1, 0.2, 0.3),
            "weights": (0.03, 0.1),
            "num_steps": 60,
        },
        "default": {},
        "paper": {"layout": ("S...", "....", "...G"), "horizon": 6, "num_messages": 32, "num_steps": 1000},
    },
    "image_game": {
        "smoke": {"size": 8, "block_bits": 4, "horizon": 120, "temperatures": (0.1, 0.2), "copies": 2},
        "default": {},
        "paper": {"copies": 50, "horizon": 600},
    },
}
