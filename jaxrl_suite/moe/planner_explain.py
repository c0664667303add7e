"""A candidate in words: what bounds it, which groups leave the node, what to change when it does not fit."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.cost_fit import PAPER_CONSTANTS
from jaxrl_suite.moe.cost_memory import FRAMEWORK, MemoryModel
from jaxrl_suite.moe.cost_model import Workload
from jaxrl_suite.moe.cost_time import Constants
from jaxrl_suite.moe.cost_traffic import degree_of, local_peers, step_traffic, stride_of
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.hardware import Hardware
from jaxrl_suite.moe.planner import Candidate, first_problem, predict, unfolded

PARTS = {
    "projections": "matrices of attention and shared experts",
    "head": "output vocabulary",
    "attention": "core attention",
    "experts": "products of routed experts",
    "elementwise": "permutation, norms and activations through device memory",
    "recompute": "repeated products",
    "tp": "tensor-parallel traffic",
    "cp": "keys and values between context ranks, and joining their results",
    "ep": "exchange of tokens between expert ranks",
    "etp": "traffic inside expert tensor groups",
    "pp": "activations between stages",
    "weights": "gathering sharded weights",
    "bubble": "pipeline bubble",
    "gradients": "gradients and new weights at the end of a step",
}
# Remedies by part, said when a part takes more than a tenth of the step.
_REMEDIES = {
    "bubble": "fewer stages, a larger global batch, or smaller micro-batches shorten the bubble",
    "etp": "ETP=1 with more expert ranks moves 1/ETP of these bytes",
    "ep": "fewer expert ranks, kept inside a node, or overlap with the shared expert",
    "tp": "a smaller TP, if the memory allows it",
    "cp": "a smaller CP, if the memory allows it",
    "weights": "ZeRO-1 with a pipeline gathers weights once a step; fewer and larger micro-batches gather less often",
    "gradients": "a larger global batch makes gradient traffic rarer",
    "recompute": "more stages or expert ranks would make room to keep activations",
    "elementwise": "fused permutation and activation kernels",
}


class Remedy(NamedTuple):
    """One change that lowers memory.

    Attributes:
        change: in words.
        saved_bytes: memory that it saves.
        fits: whether the mapping then fits.
    """

    change: str
    saved_bytes: float
    fits: bool


def shares(candidate: Candidate) -> dict[str, float]:
    """Fraction of the step by part, largest first, zero parts left out."""
    total = candidate.seconds.total
    parts = {name: value / total for name, value in candidate.seconds._asdict().items() if value > 0}
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def group_sentence(folding: Folding, kind: str, node_size: int = 8) -> str:
    """Where the groups of one kind lie.

    >>> group_sentence(Folding.parse("attention=tp2.dp8 experts=ep8.edp2 pipeline=8"), "ep")
    'ep8: 8 neighbouring ranks, inside a node'
    >>> group_sentence(Folding.parse("attention=tp4.dp4 experts=etp4.ep4"), "ep")
    'ep4: every 4th rank, all 4 groups leave the node (2 of 4 ranks share one)'
    """
    degree, stride = degree_of(folding, kind), stride_of(folding, kind)
    leaving, number = folding.leaving_node(node_size)[kind], folding.num_ranks // degree
    place = f"{degree} neighbouring ranks" if stride == 1 else f"every {_ordinal(stride)} rank"
    if not leaving:
        return f"{kind}{degree}: {place}, inside a node"
    peers = local_peers(degree, stride, node_size)
    many = f"all {number}" if leaving == number else f"{leaving} of {number}"
    together = f"{peers} of {degree} ranks share one" if peers > 1 else "no two ranks share one"
    return f"{kind}{degree}: {place}, {many} groups leave the node ({together})"


def explain(
    model: LanguageModelConfig,
    candidate: Candidate,
    hardware: Hardware | None = None,
    memory_model: MemoryModel = FRAMEWORK,
) -> list[str]:
    """What bounds a candidate, as sentences.

    Args:
        model: shapes.
        candidate: what was predicted.
        hardware: the machine; the paper's by default.
        memory_model: whose memory, for what would make it fit.
    """
    hardware = Hardware() if hardware is None else hardware
    folding, parts = candidate.folding, shares(candidate)
    first = [f"{PARTS[name]} {share:.0%}" for name, share in list(parts.items())[:3]]
    lines = [f"Time: {', '.join(first)} of {candidate.seconds.total:.2f} s a step."]
    work = candidate.counts.work
    lines.append(
        f"Experts: {work.expert_rows:,.0f} rows by {work.expert_width:,.0f} columns an expert and device, "
        f"{work.num_microbatches:g} micro-batches in {folding.pp} stage{'s' * (folding.pp > 1)}."
    )
    kinds = [kind for kind in ("tp", "cp", "etp", "ep", "pp") if degree_of(folding, kind) > 1]
    if kinds:
        lines.append("Groups: " + "; ".join(group_sentence(folding, kind, hardware.node_size) for kind in kinds) + ".")
    lines.append(_traffic_sentence(candidate))
    lines.append(_memory_sentence(candidate, hardware))
    advice = [f"{PARTS[name]}: {_REMEDIES[name]}" for name, share in parts.items() if share > 0.1 and name in _REMEDIES]
    if advice:
        lines.append("To go faster: " + "; ".join(advice) + ".")
    if not candidate.fits:
        lines.append(_remedy_sentence(remedies(model, candidate, hardware, memory_model)))
    return lines


def folding_gain(
    model: LanguageModelConfig,
    candidate: Candidate,
    hardware: Hardware | None = None,
    constants: Constants = PAPER_CONSTANTS,
    memory_model: MemoryModel = FRAMEWORK,
) -> str:
    """What the same mapping without folding would cost, in a sentence; empty if it does not exist."""
    plain = unfolded(candidate.folding)
    if plain is None or plain == candidate.folding or first_problem(model, plain, candidate.workload):
        return ""
    other = predict(model, plain, candidate.workload, hardware=hardware, constants=constants, memory_model=memory_model)
    gain = other.seconds.total / candidate.seconds.total - 1
    return f"Unfolded (ETP = TP): {other.seconds.total:.2f} s a step, {gain:+.0%}; {other.memory.total / 1e9:.0f} GB."


def remedies(
    model: LanguageModelConfig,
    candidate: Candidate,
    hardware: Hardware | None = None,
    memory_model: MemoryModel = FRAMEWORK,
) -> list[Remedy]:
    """Single changes that lower the memory of a candidate, the most helpful first.

    Tried: every further level of recomputation; twice the PP, EP, TP, CP or ETP on the same devices; fsdp.
    """
    hardware = Hardware() if hardware is None else hardware
    folding, workload = candidate.folding, candidate.workload
    trials: list[tuple[str, Folding | None, Workload]] = [
        (f"recompute={level}", folding, workload.replace(recompute=level))
        for level in memory_model.levels[memory_model.levels.index(workload.recompute) + 1 :]
    ]
    trials += [
        (f"{kind.upper()}={2 * degree_of(folding, kind)}", _doubled(folding, kind), workload) for kind in _DOUBLED
    ]
    if workload.sharding == "zero1" and folding.pp == 1:
        trials.append(("sharding=fsdp", folding, workload.replace(sharding="fsdp")))
    found = []
    for change, other, step in trials:
        if other is None or first_problem(model, other, step):
            continue
        held = memory_model.of(model, other, step).total
        saved = candidate.memory.total - held
        if saved > 0:
            found.append(Remedy(change, float(saved), bool(held <= hardware.memory_bytes)))
    return sorted(found, key=lambda remedy: (not remedy.fits, -remedy.saved_bytes))


_DOUBLED = {"pp": ("dp", "edp"), "ep": ("edp",), "tp": ("dp",), "cp": ("dp",), "etp": ("edp",)}


def _doubled(folding: Folding, kind: str) -> Folding | None:
    """Twice a degree on the same ranks, the data degrees halved."""
    halved = {name: getattr(folding, name) // 2 for name in _DOUBLED[kind]}
    if any(getattr(folding, name) % 2 for name in halved):
        return None
    try:
        return folding.replace(**halved, **{kind: 2 * getattr(folding, kind)})
    except ValueError:  # the two views have no common refinement
        return None


def _traffic_sentence(candidate: Candidate) -> str:
    moved = step_traffic(candidate.counts.traffic, candidate.folding, candidate.workload)
    node, network = (sum(getattr(link, name) for link in moved.values()) / 1e9 for name in ("node", "network"))
    away = {name: link.network / 1e9 for name, link in moved.items() if link.network > 0}
    if not away:
        return f"Traffic of a device and step: {node:,.0f} GB inside the node, none between nodes."
    most = max(away, key=lambda name: away[name])
    return (
        f"Traffic of a device and step: {node:,.0f} GB inside the node, {network:,.1f} GB between nodes, most of that "
        f"for {_KINDS[most]} ({away[most]:,.1f} GB)."
    )


_KINDS = {
    "tp": "tensor parallelism",
    "cp": "context parallelism",
    "ep": "the exchange of tokens",
    "etp": "expert tensor parallelism",
    "pp": "the pipeline",
    "weights": "sharded weights",
    "dense_gradients": "gradients outside experts",
    "expert_gradients": "gradients of experts",
}


def _memory_sentence(candidate: Candidate, hardware: Hardware) -> str:
    held, limit = candidate.memory, hardware.memory_bytes
    state = (held.weights + held.gradients + held.optimizer) / 1e9
    kept = (held.activations + held.logits + held.working) / 1e9
    text = (
        f"Memory: {held.total / 1e9:.1f} of {limit / 1e9:.0f} GB ({state:.1f} state, {kept:.1f} activations and logits"
    )
    repeated = candidate.workload.recompute
    text += f", recompute={repeated})" if repeated != "none" else ", nothing recomputed)"
    over = held.total - limit
    return f"{text}: {over / 1e9:.1f} GB too much." if over > 0 else f"{text}."


def _remedy_sentence(found: Sequence[Remedy]) -> str:
    if not found:
        return "No single change of recomputation or of a degree lowers its memory: more devices are needed."
    enough = [remedy for remedy in found if remedy.fits]
    shown = [f"{r.change} saves {r.saved_bytes / 1e9:.1f} GB" for r in (enough or found)[:3]]
    return ("To make it fit: " if enough else "Not enough alone: ") + "; ".join(shown) + "."


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0, "th")
    return f"{number}{ending}"
