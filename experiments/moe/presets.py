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
}
