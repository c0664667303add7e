"""The published rows of tables 3, 4 and 5 as data.

Source: Liu et al. (2025), MoE Parallel Folding, arXiv:2504.14960, tables 3 (global batch 256, 4,096 tokens), 4 (strong
scaling, global batch 1,024) and 5 (context scaling). H100, bfloat16, token dropping with capacity factor 1.

What the tables leave open, and how it is read here:

* Unfolded rows do not print ETP: it equals TP, as the framework sets it.
* Table 3 leaves CP, EP and PP of some baselines blank: they are 1.
* Llama3-8x70B, MCore with folding: ETP is blank, 1 is presumed. Its rows printed under 128 GPUs in table 4 are taken as
  256, since TP8 PP16 on 128 GPUs would leave no data parallelism and little memory for activations.
* Table 5 prints the numbers of Mixtral a second time under Qwen2, against the text: that block is left out.
"""

from typing import NamedTuple

from jaxrl_suite.moe.folding import Folding

METHODS = ("FSDP", "FSDP+EP", "TP+EP+DP", "MCore", "MCore with folding")
OUT_OF_MEMORY = None


class Row(NamedTuple):
    """One published measurement.

    Attributes:
        table: 3, 4 or 5.
        model: name on the command line.
        method: one of METHODS.
        num_devices: GPUs.
        sequence: tokens of a sequence.
        global_batch: sequences of a step.
        folding: degrees.
        mfu_percent: published MFU; None where the run did not fit into memory.
    """

    table: int
    model: str
    method: str
    num_devices: int
    sequence: int
    global_batch: int
    folding: Folding
    mfu_percent: float | None


# model, method -> CP, TP, EP, PP, ETP (None: equal to TP)
_MAPPINGS: dict[tuple[str, str], tuple[int, int, int, int, int | None]] = {
    ("mixtral-8x22b", "FSDP"): (1, 8, 1, 1, None),
    ("mixtral-8x22b", "FSDP+EP"): (1, 2, 8, 1, None),
    ("mixtral-8x22b", "TP+EP+DP"): (1, 4, 8, 1, None),
    ("mixtral-8x22b", "MCore"): (1, 2, 4, 8, None),
    ("mixtral-8x22b", "MCore with folding"): (1, 2, 8, 8, 1),
    ("qwen2-57b-a14b", "FSDP"): (1, 2, 1, 1, None),
    ("qwen2-57b-a14b", "FSDP+EP"): (1, 1, 8, 1, None),
    ("qwen2-57b-a14b", "TP+EP+DP"): (1, 4, 4, 1, None),
    ("qwen2-57b-a14b", "MCore"): (1, 2, 4, 4, None),
    ("qwen2-57b-a14b", "MCore with folding"): (1, 2, 4, 4, 1),
    ("mixtral-8x22b-g8t8", "FSDP"): (1, 8, 1, 1, None),
    ("mixtral-8x22b-g8t8", "FSDP+EP"): (1, 4, 8, 1, None),
    ("mixtral-8x22b-g8t8", "TP+EP+DP"): (1, 8, 8, 1, None),
    ("mixtral-8x22b-g8t8", "MCore"): (1, 2, 8, 8, None),
    ("mixtral-8x22b-g8t8", "MCore with folding"): (1, 4, 8, 8, 1),
    ("llama3-8x70b", "FSDP"): (8, 8, 1, 1, None),
    ("llama3-8x70b", "FSDP+EP"): (1, 8, 8, 1, None),
    ("llama3-8x70b", "TP+EP+DP"): (1, 8, 8, 1, None),
    ("llama3-8x70b", "MCore"): (1, 8, 4, 8, None),
    ("llama3-8x70b", "MCore with folding"): (1, 8, 8, 16, 1),
}

# model -> GPUs, MFU in the order of METHODS
_TABLE_3: dict[str, tuple[int, tuple[float | None, ...]]] = {
    "mixtral-8x22b": (128, (4.3, 23.4, 36.6, 46.3, 49.3)),
    "qwen2-57b-a14b": (64, (9.9, 25.4, 23.1, 35.3, 39.0)),
    "mixtral-8x22b-g8t8": (128, (2.2, 9.0, 8.7, 17.1, 28.8)),
    "llama3-8x70b": (256, (OUT_OF_MEMORY, 19.6, OUT_OF_MEMORY, 38.8, 41.6)),
}

# model, method -> GPUs -> MFU
_TABLE_4: dict[tuple[str, str], dict[int, float]] = {
    ("mixtral-8x22b", "MCore"): {128: 49.4, 256: 48.0, 512: 45.5, 1024: 42.3},
    ("mixtral-8x22b", "MCore with folding"): {128: 52.2, 256: 50.7, 512: 48.9, 1024: 44.9},
    ("mixtral-8x22b", "FSDP+EP"): {128: 23.9, 256: 25.5, 512: 24.4, 1024: 23.8},
    ("mixtral-8x22b", "TP+EP+DP"): {128: 40.4, 256: 39.1, 512: 36.0, 1024: 36.2},
    ("qwen2-57b-a14b", "MCore"): {64: 36.2, 128: 36.0, 256: 34.8, 512: 32.5, 1024: 29.8},
    ("qwen2-57b-a14b", "MCore with folding"): {64: 39.9, 128: 39.7, 256: 38.1, 512: 36.6, 1024: 33.4},
    ("qwen2-57b-a14b", "FSDP+EP"): {64: 26.3, 128: 25.6, 256: 23.4, 512: 22.8, 1024: 21.6},
    ("qwen2-57b-a14b", "TP+EP+DP"): {64: 22.4, 128: 20.9, 256: 19.8, 512: 19.7, 1024: 17.9},
    ("mixtral-8x22b-g8t8", "MCore"): {128: 19.8, 256: 18.4, 512: 16.3, 1024: 13.4},
    ("mixtral-8x22b-g8t8", "MCore with folding"): {128: 30.0, 256: 29.3, 512: 26.7, 1024: 25.5},
    ("mixtral-8x22b-g8t8", "FSDP+EP"): {128: 9.0, 256: 8.5, 512: 8.9, 1024: 8.6},
    ("mixtral-8x22b-g8t8", "TP+EP+DP"): {128: 8.6, 256: 8.5, 512: 8.5, 1024: 8.1},
    ("llama3-8x70b", "MCore"): {256: 40.1, 512: 39.5, 1024: 39.1},
    ("llama3-8x70b", "MCore with folding"): {256: 43.7, 512: 42.7, 1024: 41.5},
    ("llama3-8x70b", "FSDP+EP"): {256: 18.9, 512: 17.3, 1024: 17.1},
}

# GPUs, sequence, global batch, (CP, TP, EP, PP, ETP), MFU: Mixtral 8x22B without and with folding
_TABLE_5 = (
    (128, 16384, 1024, (4, 2, 4, 8, None), 45.3, (4, 2, 8, 8, 1), 47.6),
    (256, 32768, 512, (8, 2, 4, 8, None), 43.2, (8, 2, 8, 8, 1), 45.1),
    (512, 65536, 256, (16, 2, 4, 8, None), 42.6, (8, 4, 8, 8, 1), 44.5),
    (1024, 131072, 128, (16, 4, 8, 8, None), 38.2, (8, 8, 8, 8, 1), 42.9),
)


def published_folding(mapping: tuple[int, int, int, int, int | None], num_devices: int) -> Folding:
    """The folding of a published mapping (CP, TP, EP, PP, ETP); the data degrees follow from the GPUs."""
    cp, tp, ep, pp, etp = mapping
    text = f"attention=tp{tp}.cp{cp} experts=etp{etp or tp}.ep{ep} pipeline={pp}"
    return Folding.parse(text, num_devices)


def table_3() -> list[Row]:
    """Twenty rows, two of them out of memory."""
    return [
        Row(3, model, method, gpus, 4096, 256, published_folding(_MAPPINGS[model, method], gpus), mfu)
        for model, (gpus, values) in _TABLE_3.items()
        for method, mfu in zip(METHODS, values)
    ]


def table_4() -> list[Row]:
    """Sixty-one rows of strong scaling."""
    return [
        Row(4, model, method, gpus, 4096, 1024, published_folding(_MAPPINGS[model, method], gpus), mfu)
        for (model, method), values in _TABLE_4.items()
        for gpus, mfu in values.items()
    ]


def table_5() -> list[Row]:
    """Eight rows of context scaling."""
    rows = []
    for gpus, sequence, batch, unfolded, mfu, folded, folded_mfu in _TABLE_5:
        for method, mapping, value in ((METHODS[3], unfolded, mfu), (METHODS[4], folded, folded_mfu)):
            folding = published_folding(mapping, gpus)
            rows.append(Row(5, "mixtral-8x22b", method, gpus, sequence, batch, folding, value))
    return rows


def all_rows() -> list[Row]:
    """All three tables."""
    return table_3() + table_4() + table_5()
