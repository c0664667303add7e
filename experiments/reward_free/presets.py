"""Presets of the studies of this family: study -> preset -> values of configuration and hyperparameters."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "frozen_lake": {
        "smoke": {"num_episodes": 12, "maps": ("4x4",), "play_episodes": 500},
        "default": {"num_episodes": 60},
        "paper": {"num_episodes": 300},
    },
}
