"""Presets of the studies of this family: study -> preset -> values of configuration and hyperparameters."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "deep_sea_treasure": {
        "smoke": {"num_weights": 201},
        "default": {"num_weights": 2001},
        "paper": {"num_weights": 10001},
    },
}
