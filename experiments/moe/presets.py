"""Presets of the studies of this family: study name -> preset name -> fields of its configuration."""

PRESETS = {
    "text_folding": {
        "smoke": {
            "num_steps": 20,
            "num_layers": 1,
            "width": 32,
            "length": 64,
            "foldings": "attention=tp2.dp4 experts=ep8",
        },
        "default": {},
        "paper": {
            "num_steps": 1000,
            "num_layers": 4,
            "width": 128,
            "length": 256,
            "foldings": "attention=tp2.dp4 experts=ep8; attention=tp4.dp2 experts=etp2.ep4; "
            "attention=tp2.cp2.dp2 experts=ep4.edp2",
        },
    },
    "load_balance": {
        "smoke": {"num_steps": 30, "rules": "none, global, bias", "num_layers": 1, "width": 32, "length": 32},
        "default": {},
        "paper": {"num_steps": 3000, "num_layers": 4, "width": 128, "num_experts": 16, "length": 128},
    },
    "drop_rate": {
        "smoke": {
            "factors": "0.5, 1, 1.5, 2, 4",
            "num_steps": 60,
            "num_batches": 2,
            "num_layers": 1,
            "width": 32,
            "length": 64,
        },
        "default": {},
        "paper": {"num_steps": 5000, "num_layers": 4, "width": 128, "num_experts": 16, "num_batches": 64},
    },
    "bytes_moved": {
        "smoke": {
            "foldings": "attention=tp2.dp4 experts=ep8; attention=tp2.dp4 experts=etp2.ep4",
            "num_layers": 2,
            "width": 32,
            "length": 32,
        },
        "default": {},
        "paper": {"num_layers": 8, "width": 256, "length": 1024, "num_experts": 16},
    },
    "upcycled": {
        "smoke": {
            "num_steps": 20,
            "evaluate_every": 10,
            "dense_steps": 30,
            "num_batches": 2,
            "width": 32,
            "num_layers": 1,
            "length": 64,
        },
        "default": {},
        "paper": {"num_steps": 3000, "dense_steps": 5000, "width": 128, "num_layers": 4, "evaluate_every": 200},
    },
}
