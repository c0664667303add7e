"""Which folding to launch: enumerate, predict time and memory, rank, explain.

>>> from jaxrl_suite.lm import named_config
>>> from jaxrl_suite.moe.cost_model import Workload
>>> found = plan(named_config("mixtral-8x7b"), 16, Workload(sequence=4096, global_batch=64))
>>> best = found.candidates[0]
>>> bool(best.fits and best.memory.total < 80e9)
True

References:
    Liu et al. (2025), MoE Parallel Folding, arXiv:2504.14960, sections 3-4.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.cost_fit import PAPER_CONSTANTS
from jaxrl_suite.moe.cost_memory import FRAMEWORK, Memory, MemoryModel
from jaxrl_suite.moe.cost_model import Recompute, Workload
from jaxrl_suite.moe.cost_time import (
    Constants,
    Counts,
    StepTime,
    counts_of,
    model_flops_utilisation,
    stack_counts,
    step_time,
)
from jaxrl_suite.moe.folding import Folding, foldings
from jaxrl_suite.moe.hardware import Hardware

MAX_DEVICES = 8192  # the enumeration grows with the fourth power of the logarithm; beyond it takes minutes
Sharding = Literal["zero1", "fsdp"]


class Candidate(NamedTuple):
    """One folding with what is predicted of it.

    Attributes:
        folding: degrees.
        workload: the step, with the sharding and recomputation chosen for this folding.
        counts: work and traffic of a device.
        seconds: time of a step by part.
        memory: bytes of the fullest device by kind.
        mfu: model FLOPs utilisation, a fraction.
        fits: whether the memory suffices.
    """

    folding: Folding
    workload: Workload
    counts: Counts
    seconds: StepTime
    memory: Memory
    mfu: float
    fits: bool


class Plan(NamedTuple):
    """Ranked foldings.

    Attributes:
        candidates: those that fit, fastest first, then those that do not, least memory first.
        num_enumerated: foldings of this number of devices.
        rejected: rule -> foldings that broke it (the first rule that a folding breaks counts).
        memory_model: whose memory it was.
    """

    candidates: list[Candidate]
    num_enumerated: int
    rejected: dict[str, int]
    memory_model: MemoryModel = FRAMEWORK

    @property
    def fitting(self) -> list[Candidate]:
        """Candidates that fit, fastest first."""
        return [candidate for candidate in self.candidates if candidate.fits]


def plan(
    model: LanguageModelConfig,
    num_devices: int,
    workload: Workload,
    *,
    hardware: Hardware | None = None,
    constants: Constants = PAPER_CONSTANTS,
    memory_model: MemoryModel = FRAMEWORK,
    recompute: Recompute | Literal["auto"] = "auto",
    shardings: Sequence[Sharding] = ("zero1", "fsdp"),
) -> Plan:
    """Ranks all foldings of a number of devices.

    Args:
        model: a sparse model.
        num_devices: devices in all.
        workload: sequence, batch, micro-batch; its sharding and recompute are replaced by what is chosen here.
        hardware: the machine; the paper's by default.
        constants: what the machine reaches.
        memory_model: whose memory and pipeline: ``cost_memory.FRAMEWORK``, the paper's, or ``cost_step.TRAIN_STEP``,
            this package's.
        recompute: a level for all, or "auto": for each folding the cheapest level that fits.
        shardings: what may be split over data ranks; "fsdp" is considered without a pipeline only.

    Raises:
        ValueError: a dense model, or no folding of this many devices divides the model and the batch; the message names
            the nearest numbers of devices that do.
    """
    check(model.num_experts > 0, argument="model", value=model.family, rule="the planner needs a model with experts")
    in_range = 1 <= num_devices <= MAX_DEVICES
    check(in_range, argument="num_devices", value=num_devices, rule=f"must be between 1 and {MAX_DEVICES}")
    hardware = Hardware() if hardware is None else hardware
    everything = foldings(num_devices)
    rejected: Counter[str] = Counter()
    usable = []
    for folding in everything:
        problem = first_problem(model, folding, workload)
        if problem:
            rejected[problem] += 1
        else:
            usable.append(folding)
    if not usable:
        raise ValueError(_no_folding(model, num_devices, workload, rejected))
    levels: Sequence[Recompute] = memory_model.levels if recompute == "auto" else (recompute,)
    chosen = [
        (folding, *_cheapest(model, folding, workload.replace(sharding=sharding), levels, hardware, memory_model))
        for folding in usable
        for sharding in shardings
        if sharding == "zero1" or (folding.pp == 1 and folding.dp * folding.cp > 1)
    ]
    candidates = _predict(model, chosen, hardware, constants, memory_model)
    candidates.sort(key=lambda c: (not c.fits, float(c.seconds.total) if c.fits else float(c.memory.total)))
    return Plan(candidates, len(everything), dict(rejected), memory_model)


def predict(
    model: LanguageModelConfig,
    folding: Folding,
    workload: Workload,
    *,
    hardware: Hardware | None = None,
    constants: Constants = PAPER_CONSTANTS,
    memory_model: MemoryModel = FRAMEWORK,
) -> Candidate:
    """What is predicted of one folding with a workload taken as it is.

    Raises:
        ValueError: the folding does not divide the model or the batch.
    """
    problem = first_problem(model, folding, workload)
    check(not problem, argument="folding", value=str(folding), rule=f"breaks the rule: {problem}")
    hardware = Hardware() if hardware is None else hardware
    held = memory_model.of(model, folding, workload)
    return _predict(model, [(folding, workload, held)], hardware, constants, memory_model)[0]


def first_problem(model: LanguageModelConfig, folding: Folding, workload: Workload) -> str:
    """The first rule of divisibility that a folding breaks, empty if none."""
    return next((rule for holds, rule in _rules(model, folding, workload) if not holds), "")


def unfolded(folding: Folding, *, keep: Literal["ep", "memory"] = "ep") -> Folding | None:
    """The same mapping as systems without folding build it: ETP = TP.

    Args:
        folding: degrees.
        keep: "ep" keeps the number of expert ranks (weights are then split further, by TP / ETP); "memory" keeps
            ETP EP, so that the weights of a device stay the same.

    Returns:
        None where no such mapping exists.

    >>> str(unfolded(Folding.parse("attention=tp2.dp8 experts=ep8.edp2 pipeline=8")))
    'attention=tp2.cp1.dp8 experts=etp2.ep8.edp1 pipeline=8'
    """
    stage = folding.tp * folding.cp * folding.dp
    ep = folding.ep if keep == "ep" else folding.ep * folding.etp // folding.tp
    exact = keep == "ep" or ep * folding.tp == folding.ep * folding.etp
    if not exact or ep < 1 or stage % (folding.tp * ep):
        return None
    try:
        return folding.replace(etp=folding.tp, ep=ep, edp=stage // (folding.tp * ep))
    except ValueError:  # the two views have no common refinement
        return None


def nearest_device_counts(
    model: LanguageModelConfig, num_devices: int, workload: Workload, *, count: int = 3, reach: int = 64
) -> list[int]:
    """Numbers of devices close to a given one that some folding divides."""
    found: list[int] = []
    for step in range(1, reach + 1):
        for number in (num_devices - step, num_devices + step):
            if 1 <= number <= MAX_DEVICES and _any_usable(model, number, workload):
                found.append(number)
        if len(found) >= count:
            break
    return sorted(found[:count])


def smallest_fitting_count(
    model: LanguageModelConfig,
    num_devices: int,
    workload: Workload,
    *,
    hardware: Hardware | None = None,
    shardings: Sequence[Sharding] = ("zero1", "fsdp"),
    memory_model: MemoryModel = FRAMEWORK,
) -> int | None:
    """The first doubling of a number of devices at which some folding fits, with everything recomputed if need be."""
    limit = (Hardware() if hardware is None else hardware).memory_bytes
    steps = [workload.replace(recompute="full", sharding=sharding) for sharding in shardings]
    number = 2 * num_devices
    while number <= MAX_DEVICES // 2:
        for folding in foldings(number):
            if first_problem(model, folding, workload):
                continue
            for step in steps:
                allowed = step.sharding == "zero1" or folding.pp == 1
                if allowed and memory_model.of(model, folding, step).total <= limit:
                    return number
        number *= 2
    return None


def _rules(model: LanguageModelConfig, folding: Folding, workload: Workload) -> Iterator[tuple[bool, str]]:
    tp, kv = folding.tp, model.num_kv_heads
    chunks = folding.tp * folding.cp * (2 if folding.cp > 1 else 1)
    yield model.num_experts % folding.ep == 0, "experts divide by EP"
    yield model.routed_width % folding.etp == 0, "expert width divides by ETP"
    yield model.num_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0), "heads divide by TP"
    yield model.shared_width % tp == 0, "shared width divides by TP"
    yield model.vocab_size % tp == 0, "vocabulary divides by TP"
    yield model.num_layers % folding.pp == 0, "layers divide by PP"
    yield workload.sequence % chunks == 0, "sequence divides by TP CP, twice with CP > 1"
    yield workload.global_batch % (folding.dp * workload.micro_batch) == 0, "global batch divides by DP micro-batch"


def _any_usable(model: LanguageModelConfig, num_devices: int, workload: Workload) -> bool:
    return any(not first_problem(model, folding, workload) for folding in foldings(num_devices))


def _no_folding(model: LanguageModelConfig, num_devices: int, workload: Workload, rejected: Counter[str]) -> str:
    rule, number = rejected.most_common(1)[0]
    near = ", ".join(map(str, nearest_device_counts(model, num_devices, workload))) or "none within 64"
    return (
        f"num_devices={num_devices}: none of {sum(rejected.values())} foldings divides {model.num_experts} experts, "
        f"{model.num_heads} heads, {model.num_layers} layers and a batch of {workload.global_batch} (most often "
        f"broken, {number} times: {rule}). Nearest numbers of devices that work: {near}."
    )


def _cheapest(
    model: LanguageModelConfig,
    folding: Folding,
    workload: Workload,
    levels: Sequence[Recompute],
    hardware: Hardware,
    memory_model: MemoryModel,
) -> tuple[Workload, Memory]:
    """The first level of recomputation that fits, or the last one."""
    trial, held = workload, None
    for level in levels:
        trial = workload.replace(recompute=level)
        held = memory_model.of(model, folding, trial)
        if held.total <= hardware.memory_bytes:
            break
    assert held is not None
    return trial, held


def _predict(
    model: LanguageModelConfig,
    chosen: Sequence[tuple[Folding, Workload, Memory]],
    hardware: Hardware,
    constants: Constants,
    memory_model: MemoryModel,
) -> list[Candidate]:
    """Times of all rows at once, in float64."""
    if not memory_model.interleaved:
        constants = constants._replace(interleave=1.0)
    rows = [counts_of(model, folding, workload, node_size=hardware.node_size) for folding, workload, _ in chosen]
    table = stack_counts(rows)
    seconds = step_time(table, constants, hardware)
    mfu = np.asarray(model_flops_utilisation(table, seconds.total, hardware))
    return [
        Candidate(
            folding=folding,
            workload=workload,
            counts=rows[index],
            seconds=StepTime(*(float(part[index]) for part in seconds)),
            memory=jax.tree.map(float, held),
            mfu=float(mfu[index]),
            fits=bool(held.total <= hardware.memory_bytes),
        )
        for index, (folding, workload, held) in enumerate(chosen)
    ]
