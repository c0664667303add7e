"""Sizes of the studies: study -> preset -> field values."""

PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "predicted_mfu": {
        # Published mappings only: a second of arithmetic.
        "smoke": {"search": False},
        # The best folding of every model and number of devices besides: about a minute.
        "default": {"search": True, "max_devices": 256},
        "paper": {"search": True, "max_devices": 1024},
    },
}
