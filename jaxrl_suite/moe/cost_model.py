"""Exact counts of a training step: FLOPs, parameters, and the work of one device under a folding.

Everything here follows from shapes alone; nothing is fitted. Times come from these counts in ``cost_time``, bytes on
the wire in ``cost_traffic``, memory in ``cost_memory``.

References:
    Liu et al. (2025), MoE Parallel Folding, arXiv:2504.14960, section 4 and tables 1-5 (models and settings).
    Narayanan et al. (2021), Efficient large-scale language model training, arXiv:2104.04473 (interleaved pipeline).
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

from jaxrl_suite.config import Config, check, field
from jaxrl_suite.lm import LanguageModelConfig, parameter_shapes
from jaxrl_suite.moe.folding import Folding

Recompute = Literal["none", "activation", "moe", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "activation", "moe", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload(Config):
    """What is trained in one step, and what is chosen about a step besides the folding."""

    sequence: int = field(4096, help="tokens of a sequence")
    global_batch: int = field(256, help="sequences of one optimizer step")
    micro_batch: int = field(1, help="sequences that a data rank takes at a time")
    sharding: Literal["zero1", "fsdp"] = field("zero1", help="what is split over data ranks: moments, or weights too")
    context: Literal["ring", "all_gather"] = field("ring", help="how context ranks see each other's keys and values")
    recompute: Recompute = field(
        "none", help="what the backward pass repeats: nothing, activation functions and norms, MoE layers, all"
    )
    virtual_stages: int = field(0, help="chunks of an interleaved stage, for its memory; 0 takes a layer a chunk")
    weigh_output: bool = field(
        False, help="routing weights multiply an expert's output, which keeps it for the backward pass, not its middle"
    )
    capacity_factor: float = field(1.0, help="rows of an expert over its even share")
    causal: bool = field(True, help="count core attention over the causal half only")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sequence", "global_batch", "micro_batch", "capacity_factor"):
            check(getattr(self, name) > 0, argument=name, value=getattr(self, name), rule="must be positive")
        check(
            self.virtual_stages >= 0, argument="virtual_stages", value=self.virtual_stages, rule="must not be negative"
        )


class TokenFlops(NamedTuple):
    """Forward FLOPs of one token through the whole model; a multiply-add is two.

    Attributes:
        projections: query, key, value and output matrices.
        attention: scores and weighted sums.
        router: gate of every layer.
        experts: routed experts, or the dense feed-forward of a dense model.
        shared: shared expert.
        head: output vocabulary.
    """

    projections: float
    attention: float
    router: float
    experts: float
    shared: float
    head: float

    @property
    def forward(self) -> float:
        """All of them."""
        return sum(self)

    @property
    def train(self) -> float:
        """Forward and backward, three times the forward pass."""
        return 3 * sum(self)


def token_flops(model: LanguageModelConfig, sequence: int, *, causal: bool = True) -> TokenFlops:
    """FLOPs of a token.

    Per layer ``2 D C (Hq + 2 Hk) + 2 Hq C D`` for the projections, ``2 s Hq C`` for causal core attention (4 if every
    pair is counted), ``2 D E`` for the router, ``6 k D F`` for routed and ``6 D F_shared`` for the shared expert; once
    ``2 D V`` for the head. Norms, rotations and softmax are left out, as everybody does.

    Args:
        model: shapes.
        sequence: tokens of a sequence.
        causal: count half of the score matrix (the convention of the fits) or all of it.

    >>> from jaxrl_suite.lm import named_config
    >>> flops = token_flops(named_config("mixtral-8x22b"), 4096)
    >>> f"{flops.train:.3g}"
    '2.42e+11'
    """
    D, L, width_q = model.width, model.num_layers, model.num_heads * model.head_dim
    active = model.experts_per_token if model.num_experts else 1
    return TokenFlops(
        projections=float(L * (2 * D * (width_q + 2 * model.num_kv_heads * model.head_dim) + 2 * width_q * D)),
        attention=float(L * (2 if causal else 4) * sequence * width_q),
        router=float(L * 2 * D * model.num_experts),
        experts=float(L * 6 * active * D * model.routed_width),
        shared=float(L * 6 * D * model.shared_width),
        head=float(2 * D * model.vocab_size),
    )


class ParameterCounts(NamedTuple):
    """Scalars in the parameters.

    Attributes:
        layers: those of all layers outside routed experts.
        experts: routed experts.
        embedding: input table and final norm.
        head: output table; 0 when it is the input table.
        active: those that one token meets, the whole vocabulary tables included.
    """

    layers: int
    experts: int
    embedding: int
    head: int
    active: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.layers + self.experts + self.embedding + self.head

    @property
    def dense(self) -> int:
        """All outside routed experts."""
        return self.layers + self.embedding + self.head


@functools.lru_cache(maxsize=64)
def parameter_counts(model: LanguageModelConfig) -> ParameterCounts:
    """Counts from the parameter table of ``lm``.

    >>> from jaxrl_suite.lm import named_config
    >>> counts = parameter_counts(named_config("qwen2-57b-a14b"))
    >>> round(counts.total / 1e9, 1), round(counts.active / 1e9, 1)
    (57.4, 14.2)
    """
    sizes = {path: math.prod(shape) for path, shape in parameter_shapes(model).items()}
    experts = sum(size for path, size in sizes.items() if "/experts/" in path)
    layers = sum(size for path, size in sizes.items() if path.startswith("layers/")) - experts
    head = sizes.get("head/table", 0)
    total = sum(sizes.values())
    used = experts * model.experts_per_token // model.num_experts if experts else 0
    return ParameterCounts(layers, experts, total - layers - experts - head, head, total - experts + used)


class Work(NamedTuple):
    """What one device computes, forward and backward, for one micro-batch of its pipeline stage.

    Attributes:
        projection_flops: matrices outside experts and head.
        head_flops: the output head, spread over the stages.
        attention_flops: core attention, counted causally.
        expert_flops: routed experts.
        expert_rows: rows of one expert on one device.
        expert_width: hidden columns of one expert on one device.
        hbm_bytes: traffic of permutation, activation functions and norms through the device's memory.
        merge_bytes: traffic of adding one partial result of attention to another, each way; 0 where CP = 1.
        repeated_attention: 1 if the backward pass repeats the attention part of the forward pass, else 0.
        repeated_moe: the same for the MoE part.
        hides_weights: 1 if gathered weights travel behind products (TP = 1), else 0.
        num_microbatches: micro-batches of a step on each data rank.
        num_stages: pipeline stages.
        num_devices: devices in all.
        model_flops: FLOPs of the step over all devices, without recomputation; what MFU counts.
    """

    projection_flops: float
    head_flops: float
    attention_flops: float
    expert_flops: float
    expert_rows: float
    expert_width: float
    hbm_bytes: float
    merge_bytes: float
    repeated_attention: float
    repeated_moe: float
    hides_weights: float
    num_microbatches: float
    num_stages: float
    num_devices: float
    model_flops: float


def tokens_per_device(folding: Folding, workload: Workload) -> float:
    """Tokens of a micro-batch that one device holds between layers: T = s b / (CP TP)."""
    return workload.sequence * workload.micro_batch / (folding.cp * folding.tp)


def num_microbatches(folding: Folding, workload: Workload) -> float:
    """Micro-batches of a step on each data rank."""
    return workload.global_batch / (folding.dp * workload.micro_batch)


def device_work(model: LanguageModelConfig, folding: Folding, workload: Workload) -> Work:
    """Counts of one device's work.

    Args:
        model: shapes of a sparse model.
        folding: degrees.
        workload: sequence, batch and the choices about a step.

    Raises:
        ValueError: a dense model.
    """
    check(model.num_experts > 0, argument="num_experts", value=model.num_experts, rule="a model with experts is needed")
    tokens, stages = tokens_per_device(folding, workload), folding.pp
    flops = token_flops(model, workload.sequence, causal=True)
    copies = model.experts_per_token * workload.capacity_factor
    share = 3 * tokens / stages
    counted = token_flops(model, workload.sequence, causal=workload.causal)
    return Work(
        projection_flops=share * (flops.projections + flops.router + flops.shared),
        head_flops=share * flops.head,
        attention_flops=share * flops.attention,
        expert_flops=share * flops.experts * workload.capacity_factor,
        expert_rows=tokens * copies * folding.etp * folding.ep / model.num_experts,
        expert_width=model.routed_width / folding.etp,
        hbm_bytes=tokens / stages * _elementwise_bytes(model, copies, workload.recompute),
        merge_bytes=tokens / stages * _merge_bytes(model) if folding.cp > 1 else 0.0,
        repeated_attention=float(workload.recompute == "full"),
        repeated_moe=float(workload.recompute in ("full", "moe")),
        hides_weights=float(folding.tp == 1),
        num_microbatches=num_microbatches(folding, workload),
        num_stages=float(stages),
        num_devices=float(folding.num_ranks),
        model_flops=counted.train * workload.sequence * workload.global_batch,
    )


def _merge_bytes(model: LanguageModelConfig) -> float:
    """Bytes of a token, over all layers, to add one partial result to a float32 sum: 2 read, 4 read, 4 written.

    Outputs in the forward pass, gradients of queries, keys and values in the backward pass.
    """
    return 10.0 * model.num_layers * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)


def _elementwise_bytes(model: LanguageModelConfig, copies: float, recompute: Recompute) -> float:
    """Bytes of a token, forward and backward, that no matrix product moves: 2 bytes each read and each write.

    Two residual sums (6 D), the permutation and its inverse (4 k D), two norms (4 D), and the gated activation of
    routed and shared experts (two columns read, one written, one more for the routing weight), three times in all;
    what is recomputed passes a fourth time.
    """
    routed = copies * model.routed_width  # etp times the rows, each 1/etp as wide
    norms_and_gates = 4 * model.width + 4 * routed + 3 * model.shared_width
    rest = 6 * model.width + 4 * copies * model.width
    again = {"none": 0.0, "activation": norms_and_gates, "moe": norms_and_gates + rest, "full": norms_and_gates + rest}
    return 2.0 * model.num_layers * (3 * (norms_and_gates + rest) + again[recompute])
