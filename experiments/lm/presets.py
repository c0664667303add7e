"""Presets of the studies of this family: study name -> preset name -> fields of its configuration."""

PRESETS = {
    "finetune": {
        "smoke": {
            "num_steps": 30,
            "batch_size": 8,
            "length": 64,
            "num_layers": 1,
            "width": 32,
            "num_bytes": 200_000,
            "sample_tokens": 32,
        },
        "default": {},
        "paper": {"num_steps": 3000, "batch_size": 32, "length": 256, "num_layers": 6, "width": 256},
    },
}
