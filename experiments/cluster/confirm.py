"""Compiled memory as the planner's filter: what the compiler says does not fit is dropped and the next is tried."""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.config import MoEConfig
from jaxrl_suite.moe.cost_fit import PAPER_CONSTANTS
from jaxrl_suite.moe.cost_memory import FRAMEWORK, MemoryModel
from jaxrl_suite.moe.cost_model import RECOMPUTE, Workload
from jaxrl_suite.moe.cost_time import Constants
from jaxrl_suite.moe.hardware import Hardware
from jaxrl_suite.moe.planner import Candidate, predict

# What the train step repeats for a level of the planner; it has none for MoE layers alone.
REMAT: dict[str, Any] = {"none": "none", "activation": "elementwise", "moe": "elementwise", "full": "full"}
TRIES = 3  # compiles for each folding that is wanted


class Confirmed(NamedTuple):
    """A candidate after the compiler has seen it.

    Attributes:
        candidate: folding, workload, prediction.
        compiled_bytes: memory of a device that the compiler needs.
        compile_seconds: time it took.
        fits: whether that is within the machine's memory.
    """

    candidate: Candidate
    compiled_bytes: int
    compile_seconds: float
    fits: bool


Compile = Callable[[Candidate], tuple[int, float]]


def confirm(
    model: LanguageModelConfig,
    ranked: Sequence[Candidate],
    wanted: int,
    compile_candidate: Compile,
    *,
    hardware: Hardware | None = None,
    constants: Constants = PAPER_CONSTANTS,
    memory_model: MemoryModel = FRAMEWORK,
) -> Iterator[Confirmed]:
    """Compiles candidates, fastest first, until ``wanted`` of them fit, at most three times as many.

    A candidate that does not fit comes back with more recomputed, at the place that its new time earns it, and by how
    much its plan was short is taken for every plan of that policy: what would then not fit is not compiled.

    Args:
        model: shapes.
        ranked: candidates that fit by prediction, fastest first.
        wanted: how many to confirm.
        compile_candidate: ``compile_candidate(candidate) -> (bytes of a device, seconds)``.
        hardware: the machine.
        constants: what the machine reaches, for the time of a candidate that comes back.
        memory_model: whose memory ``ranked`` was planned by.

    Yields:
        What was compiled, in order, whether or not it fits.
    """
    hardware = Hardware() if hardware is None else hardware
    order = itertools.count()
    queue = [(float(c.seconds.total), next(order), c) for c in ranked]
    heapq.heapify(queue)
    excess: dict[str, float] = {}  # compiled over planned memory by policy, the largest of what did not fit
    confirmed = compiled = 0
    while queue and confirmed < wanted and compiled < TRIES * wanted:
        candidate = heapq.heappop(queue)[2]
        policy, planned = REMAT[candidate.workload.recompute], candidate.memory.total
        hopeless = planned * excess.get(policy, 1.0) > hardware.memory_bytes
        if not hopeless:
            size, seconds = compile_candidate(candidate)
            compiled += 1
            fits = size <= hardware.memory_bytes
            confirmed += fits
            yield Confirmed(candidate, size, seconds, fits)
            if fits:
                continue
            excess[policy] = max(excess.get(policy, 1.0), size / planned)
        level = _next_level(candidate.workload.recompute)
        if level:
            step = candidate.workload.replace(recompute=level)
            again = predict(
                model, candidate.folding, step, hardware=hardware, constants=constants, memory_model=memory_model
            )
            heapq.heappush(queue, (float(again.seconds.total), next(order), again))


def _next_level(level: Any) -> Any:
    """The next level of the planner that the train step has a policy of its own for; None after the last."""
    rest = RECOMPUTE[RECOMPUTE.index(level) + 1 :]
    return next((other for other in rest if REMAT[other] != REMAT[level]), None)


def pending_of(workload: Workload) -> Literal["inputs", "all"]:
    """What 1F1B keeps of micro-batches that wait: all, where no layer is to run a second time."""
    return "inputs" if workload.recompute == "full" else "all"


def step_of(model: LanguageModelConfig, candidate: Candidate) -> MoEConfig:
    """The train step of a candidate: float32 weights, bfloat16 products, capacity as in its workload."""
    folding, workload = candidate.folding, candidate.workload
    return MoEConfig(
        model=model.replace(param_dtype="float32", compute_dtype="bfloat16"),
        dispatch="drop_pad",
        capacity_factor=workload.capacity_factor,
        num_microbatches=int(workload.global_batch // (folding.dp * workload.micro_batch)),
        schedule="1f1b" if folding.pp > 1 else "gpipe",
        sharding=workload.sharding,
        remat=REMAT[workload.recompute],
        pending=pending_of(workload),
        context=workload.context,
    )


def compiler_of(model: LanguageModelConfig, num_devices: int, hardware: Hardware) -> Compile:
    """Compiles the real train step of a candidate for H100s.

    Raises:
        ValueError: not whole nodes.
        ImportError: the compiler is not installed; the message says what to install.
    """
    from experiments.cluster.aot import compile_train_step
    from experiments.cluster.topology import topology_devices

    nodes, rest = divmod(num_devices, hardware.node_size)
    if rest:
        raise ValueError(f"--confirm: --gpus={num_devices} must be whole nodes of {hardware.node_size}.")
    devices = topology_devices("cuda", f"1x{nodes}x{hardware.node_size}")

    def compile_candidate(candidate: Candidate) -> tuple[int, float]:
        shape = {"sequence": candidate.workload.sequence, "global_batch": candidate.workload.global_batch}
        config = step_of(model, candidate)
        found = compile_train_step(config, candidate.folding, devices, **shape, node_size=hardware.node_size)
        return found.total_bytes, found.lower_seconds + found.compile_seconds

    return compile_candidate
