"""Presets of the studies of this family: study -> preset -> values of configuration and hyperparameters."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "rate_information": {
        "smoke": {"num_files": 12, "num_rates": 101},
        "default": {"num_files": 60, "num_rates": 401},
        "paper": {"num_files": 150, "num_rates": 2001},
    },
}
