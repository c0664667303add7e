"""Memory of one device by kind, from shapes.

    parameters   2 bytes a weight (bfloat16) and 4 a gradient (float32), whole on every data rank
    optimizer    12 bytes a weight (float32 copy and two moments), split over DP CP (dense) or EDP (experts)
    activations  what the backward pass of every micro-batch in flight needs, less what it repeats
    logits       the output of the last stage, in bfloat16 and twice in float32
    working      one layer's activations and gradients while it runs
    overhead     runtime, communication buffers, fragmentation: a constant

With ``sharding="fsdp"`` weights, gradients and moments are all split, and beside them stands one array of 2 bytes a
weight of the device's tensor and expert shard (a framework that keeps gathered weights or unsharded gradients). That
array is inferred, not stated: with it the tensor degrees of the paper's FSDP rows are needed, and Llama3-8x70B runs out
of memory as table 3 says; without it neither is so. ``resident=0`` is a framework that keeps nothing.

References:
    Liu et al. (2025), MoE Parallel Folding, arXiv:2504.14960, table 3 (which rows fit 80 GB).
    Korthikanti et al. (2022), Reducing activation recomputation, arXiv:2205.05198, section 4 (counting activations).
    Rajbhandari et al. (2020), ZeRO, arXiv:1910.02054 (what is split).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.cost_model import (
    RECOMPUTE,
    Recompute,
    Workload,
    num_microbatches,
    parameter_counts,
    tokens_per_device,
)
from jaxrl_suite.moe.folding import Folding

Number = Any


class MemoryConstants(NamedTuple):
    """Bytes of the parts of a training state.

    weight: bytes of a weight.
    gradient: bytes of a gradient.
    optimizer: bytes of optimizer state a weight.
    resident: bytes a weight that fsdp leaves whole beside the shards.
    activation: bytes of a kept number.
    overhead: bytes that no array accounts for.
    """

    weight: Number = 2.0
    gradient: Number = 4.0
    optimizer: Number = 12.0
    resident: Number = 2.0
    activation: Number = 2.0
    overhead: Number = 4e9


class MemoryCounts(NamedTuple):
    """Numbers (not bytes) that one device of a stage holds.

    Attributes:
        weights: weights at hand, split over tensor and expert ranks.
        shards: the same, split over data ranks too.
        resident: weights of which fsdp keeps a whole array; 0 otherwise.
        activations: kept activations of all micro-batches in flight.
        logits: rows times vocabulary, on the last stage.
        working: activations and gradients of the layer that runs.
        gathered: weights of the layers that fsdp has gathered.
    """

    weights: float
    shards: float
    resident: float
    activations: float
    logits: float
    working: float
    gathered: float


class Memory(NamedTuple):
    """Bytes of one device by kind.

    Attributes:
        weights: parameters at hand, gathered ones included.
        gradients: gradients.
        optimizer: float32 copy and moments.
        activations: kept for the backward pass.
        logits: output of the last stage.
        working: the layer that runs.
        overhead: what no array accounts for.
    """

    weights: Number
    gradients: Number
    optimizer: Number
    activations: Number
    logits: Number
    working: Number
    overhead: Number

    @property
    def total(self) -> Number:
        """All of it."""
        return sum(self[1:], self[0])


def memory(counts: MemoryCounts, constants: MemoryConstants, *, fsdp: bool) -> Memory:
    """Bytes from numbers; differentiable in the constants.

    Args:
        counts: numbers that one device holds.
        constants: bytes of each kind.
        fsdp: whether weights and gradients are split over data ranks too.
    """
    whole = counts.shards if fsdp else counts.weights
    return Memory(
        weights=constants.weight * (whole + counts.gathered),
        gradients=constants.gradient * whole + constants.resident * counts.resident,
        optimizer=constants.optimizer * counts.shards,
        activations=constants.activation * counts.activations,
        logits=(2 + 4 + 4) * counts.logits,
        working=constants.activation * counts.working,
        overhead=constants.overhead,
    )


def device_memory(
    model: LanguageModelConfig, folding: Folding, workload: Workload, constants: MemoryConstants | None = None
) -> Memory:
    """Memory of the fullest device: the larger of first and last pipeline stage.

    >>> from jaxrl_suite.lm import named_config
    >>> folded = Folding.parse("attention=tp2.dp8 experts=ep8.edp2 pipeline=8")
    >>> held = device_memory(named_config("mixtral-8x22b"), folded, Workload())
    >>> bool(held.total < 80e9)
    True
    """
    constants = MemoryConstants() if constants is None else constants
    ends: tuple[Literal["first", "last"], ...] = ("first", "last") if folding.pp > 1 else ("first",)
    stages = [
        memory(memory_counts(model, folding, workload, end), constants, fsdp=workload.sharding == "fsdp")
        for end in ends
    ]
    return max(stages, key=lambda held: float(held.total))


class MemoryModel(NamedTuple):
    """Whose memory a plan goes by, and whose pipeline.

    Attributes:
        of: ``of(model, folding, workload) -> Memory`` of the fullest device.
        levels: levels of recomputation that it knows, the least first.
        interleaved: whether its pipeline is; if not, nothing divides the bubble of (PP - 1) / m.
    """

    of: Callable[[LanguageModelConfig, Folding, Workload], Memory]
    levels: Sequence[Recompute]
    interleaved: bool = True


FRAMEWORK = MemoryModel(device_memory, RECOMPUTE)


def memory_counts(
    model: LanguageModelConfig, folding: Folding, workload: Workload, stage: Literal["first", "last"] = "first"
) -> MemoryCounts:
    """Numbers that a device of the first or the last stage holds; with one stage the first is the last."""
    counts, fsdp = parameter_counts(model), workload.sharding == "fsdp"
    alone = folding.pp == 1
    tables = counts.embedding * (alone or stage == "first") + counts.head * (alone or stage == "last")
    dense = (counts.layers / folding.pp + tables) / folding.tp
    experts = counts.experts / (folding.pp * folding.etp * folding.ep)
    layer = (counts.layers / folding.tp + counts.experts / (folding.etp * folding.ep)) / model.num_layers
    tokens = tokens_per_device(folding, workload)
    in_flight = micro_batches_in_flight(model, folding, workload) if stage == "first" else 1.0
    per_layer = sum(layer_activations(model, folding, workload))
    everything = sum(layer_activations(model, folding, workload.replace(recompute="none")))
    logits = tokens * folding.tp * model.vocab_size / folding.tp if alone or stage == "last" else 0.0
    return MemoryCounts(
        weights=dense + experts,
        shards=dense / (folding.dp * folding.cp) + experts / folding.edp,
        resident=(dense + experts) if fsdp else 0.0,
        activations=in_flight * per_layer * model.num_layers / folding.pp,
        logits=logits,
        working=everything,
        gathered=2 * layer if fsdp else 0.0,  # the layer that runs and the one fetched ahead
    )


def layer_activations(model: LanguageModelConfig, folding: Folding, workload: Workload) -> tuple[float, float]:
    """Numbers kept for the backward pass of one layer and micro-batch: (attention part, MoE part).

    Attention keeps its input, its norm's output, queries, keys, values and its output. The MoE part keeps its input and
    norm's output, the dispatched rows, the two halves of the gated product and its result, the same for a shared expert
    (and the combined rows if routing weights multiply them).
    ``activation`` repeats norms and activation functions, ``moe`` keeps the input of the MoE part only, ``full`` the
    input of the layer only.
    """
    tokens, width = tokens_per_device(folding, workload), model.width
    if workload.recompute == "full":
        return tokens * width, 0.0
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    norms = 0 if workload.recompute != "none" else width
    attention = tokens * (width + norms + heads)
    if workload.recompute == "moe":
        return attention, tokens * width
    products = 3 if workload.recompute == "none" else 2
    rows = tokens * model.experts_per_token * workload.capacity_factor * folding.etp
    routed = rows * (width + products * model.routed_width / folding.etp)
    if workload.weigh_output:
        routed += tokens * model.experts_per_token * workload.capacity_factor * width
    return attention, tokens * (width + norms + products * model.shared_width) + routed


def micro_batches_in_flight(model: LanguageModelConfig, folding: Folding, workload: Workload) -> float:
    """Micro-batches whose activations the first stage holds at once, in units of its whole stage.

    One forward, one backward: PP. Interleaved in v chunks: PP + (PP - 1) / v, see Narayanan et al. (2021); chunks of
    one layer unless the workload names v. Never more than there are.
    """
    available, stages = num_microbatches(folding, workload), folding.pp
    if stages == 1:
        return 1.0
    chunks = workload.virtual_stages or max(1, model.num_layers // stages)
    interleaved = chunks > 1 and available % stages == 0
    return min(available, stages + (stages - 1) / chunks if interleaved else float(stages))


def static_bytes(model: LanguageModelConfig, folding: Folding, constants: MemoryConstants | None = None) -> float:
    """Weights, gradients and optimizer state of a device, tables spread evenly over the stages (ZeRO-1).

    >>> from jaxrl_suite.lm import named_config
    >>> folded = Folding.parse("attention=tp2.dp8 experts=ep8.edp2 pipeline=8")
    >>> f"{static_bytes(named_config('mixtral-8x22b'), folded) / 1e9:.1f} GB"
    '27.9 GB'
    """
    constants = MemoryConstants() if constants is None else constants
    counts = parameter_counts(model)
    dense = counts.dense / (folding.tp * folding.pp)
    experts = counts.experts / (folding.etp * folding.ep * folding.pp)
    held = constants.weight + constants.gradient
    return (dense + experts) * held + constants.optimizer * (dense / (folding.dp * folding.cp) + experts / folding.edp)
