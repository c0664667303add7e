"""Bytes that one device sends for each kind of traffic, and which of them leave the node.

Three forms of collective occur. In an *exchange* (all-to-all) over n ranks each rank keeps 1/n of its volume V, sends
(g - 1)/n of it to the g - 1 peers in its node and (n - g)/n to the rest. In a *gather* (all-gather, and reduce-scatter
as its mirror) every rank ends with V; what comes from other nodes enters the node once, shared by the g ranks of the
group there, and is passed on inside. In a *ring* each rank passes everything to its one neighbour, and the rank at the
border of a node sends all of it over the slow link. Both links work at the same time: the slower one sets the pace.

References:
    Liu et al. (2025), MoE Parallel Folding, arXiv:2504.14960, section 3 (dispatcher, locality of folded groups).
"""

import math
from typing import Literal, NamedTuple

from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.cost_model import Workload, num_microbatches, parameter_counts, tokens_per_device
from jaxrl_suite.moe.folding import Folding

BFLOAT16 = 2.0  # bytes
GRADIENT = 4.0  # gradients are summed in float32
Form = Literal["exchange", "gather", "ring"]


class Link(NamedTuple):
    """Bytes of one device in one direction.

    Attributes:
        node: over the network inside the node.
        network: over the network between nodes.
    """

    node: float
    network: float

    def times(self, factor: float) -> "Link":
        """Both, multiplied."""
        return Link(self.node * factor, self.network * factor)

    def plus(self, other: "Link") -> "Link":
        """Sum of two traffics."""
        return Link(self.node + other.node, self.network + other.network)


class Traffic(NamedTuple):
    """Bytes of one device by kind.

    The first five are per micro-batch of a stage, forward and backward; the others as their text says.

    Attributes:
        tp: sequence-parallel gathers and scatters around attention (and the shared expert).
        cp: keys and values around the context group.
        ep: dispatch and combine of tokens.
        etp: rows gathered and scattered inside expert tensor groups.
        pp: activations between pipeline stages.
        weights: weights gathered and gradients scattered per micro-batch (fsdp only).
        dense_gradients: per step, gradients and new weights outside experts.
        expert_gradients: per step, of routed experts.
    """

    tp: Link
    cp: Link
    ep: Link
    etp: Link
    pp: Link
    weights: Link
    dense_gradients: Link
    expert_gradients: Link


def stride_of(folding: Folding, kind: str) -> int:
    """Distance in ranks between neighbours of a group of ``kind`` (also "dense", the data and context ranks).

    Read from the atoms of the folding, so that there is one definition of groups.

    >>> stride_of(Folding.parse("attention=tp2.cp2.dp2 experts=ep8"), "dp")
    4
    """
    if kind == "pp":
        return folding.num_ranks // folding.pp
    run = folding.roles[kind]
    if not run:
        return 1
    position = folding.atoms.names.index(run[-1])
    return math.prod(folding.atoms.sizes[position + 1 :])


def degree_of(folding: Folding, kind: str) -> int:
    """Ranks of a group of ``kind`` (also "dense")."""
    return folding.dp * folding.cp if kind == "dense" else getattr(folding, kind)


def local_peers(degree: int, stride: int, node_size: int) -> int:
    """Ranks of a group in one node, a rank itself included.

    Groups whose stride does not divide the node lie unevenly; the smaller number is taken.

    >>> local_peers(8, 1, 8), local_peers(8, 2, 8), local_peers(4, 16, 8)
    (8, 4, 1)
    """
    return min(degree, max(1, node_size // stride))


def link_bytes(form: Form, volume: float, degree: int, peers: int) -> Link:
    """Bytes of one collective.

    Args:
        form: see the text of this module.
        volume: bytes that a rank starts with (exchange) or ends with (gather, ring).
        degree: ranks of the group.
        peers: ranks of the group in one node.

    >>> link_bytes("exchange", 8.0, 8, 2)
    Link(node=1.0, network=6.0)
    >>> link_bytes("gather", 8.0, 8, 2)
    Link(node=7.0, network=3.0)
    """
    away = volume * (degree - peers) / degree
    if form == "exchange":
        return Link(volume * (peers - 1) / degree, away)
    everything = volume * (degree - 1) / degree
    node = everything if peers > 1 else 0.0  # a rank alone in its node receives over the network only
    if form == "ring":
        return Link(node, everything if peers < degree else 0.0)
    return Link(node, away / peers)


def layer_bytes(model: LanguageModelConfig, folding: Folding, workload: Workload) -> dict[str, float]:
    """Bytes of one device, layer and micro-batch in the forward pass by kind, whatever the links.

    T = s b / (TP CP). TP: ``2 (TP-1)/TP (s b/CP) D``; CP: ``(CP-1)/CP s b 2 Hk C / TP``; EP: ``2 (EP-1)/EP T k D``;
    ETP: ``2 (ETP-1) T k D``; PP (per boundary): ``T D``; all times two bytes. ``shared`` is the tensor traffic of a
    shared expert, whose matrices are split like those of attention.

    >>> from jaxrl_suite.lm import named_config
    >>> folded = Folding.parse("attention=tp2.dp8 experts=ep8.edp2 pipeline=8")
    >>> sent = layer_bytes(named_config("mixtral-8x22b"), folded, Workload())
    >>> {kind: round(size / 1e6) for kind, size in sent.items()}
    {'tp': 50, 'shared': 0, 'cp': 0, 'ep': 88, 'etp': 0, 'pp': 25}
    """
    tokens = tokens_per_device(folding, workload)
    volumes = _layer_volumes(model, folding, workload)
    return {
        "tp": volumes["tp"] * (folding.tp - 1) / folding.tp,
        "shared": volumes["shared"] * (folding.tp - 1) / folding.tp,
        "cp": volumes["cp"] * (folding.cp - 1) / folding.cp,
        "ep": volumes["ep"] * (folding.ep - 1) / folding.ep,
        "etp": volumes["etp"] * (folding.etp - 1) / folding.etp,
        "pp": BFLOAT16 * tokens * model.width,
    }


def _layer_volumes(model: LanguageModelConfig, folding: Folding, workload: Workload) -> dict[str, float]:
    """Forward volumes of a layer: what a rank holds after a gather or before an exchange, over both directions."""
    tokens = tokens_per_device(folding, workload)
    sequence = BFLOAT16 * tokens * folding.tp * model.width
    copies = BFLOAT16 * tokens * model.experts_per_token * workload.capacity_factor * model.width
    return {
        "tp": 2 * sequence,
        "shared": 2 * sequence if model.shared_width else 0.0,
        "cp": BFLOAT16 * tokens * folding.cp * 2 * model.num_kv_heads * model.head_dim,
        "ep": 2 * copies,
        "etp": 2 * copies * folding.etp,
    }


def traffic(
    model: LanguageModelConfig,
    folding: Folding,
    workload: Workload,
    *,
    node_size: int = 8,
    expert_stride: int | None = None,
) -> Traffic:
    """Bytes of one device by kind and link.

    Args:
        model: shapes.
        folding: degrees.
        workload: sequence, batch and the choices about a step.
        node_size: consecutive ranks on one fast network.
        expert_stride: distance between neighbours of an EP group where it is not the folding's own; TP CP for systems
            that place EP inside DP.
    """
    volumes = _layer_volumes(model, folding, workload)
    layers = model.num_layers / folding.pp

    def link(form: Form, volume: float, kind: str, stride: int | None = None) -> Link:
        degree = degree_of(folding, kind)
        peers = local_peers(degree, stride or stride_of(folding, kind), node_size)
        return link_bytes(form, volume, degree, peers)

    # Backward passes mirror forward ones; attention gathers its input once more, the ring carries keys and gradients.
    repeated = 0.5 if workload.recompute in ("moe", "full") else 0.0
    whole = 0.5 if workload.recompute == "full" else 0.0
    stage_bytes = BFLOAT16 * tokens_per_device(folding, workload) * model.width
    boundaries = 2 * stage_bytes * (folding.pp - 1) / folding.pp
    return Traffic(
        tp=link("gather", (volumes["tp"] * (2.5 + whole) + volumes["shared"] * (2.5 + repeated)) * layers, "tp"),
        cp=link("ring" if workload.context == "ring" else "gather", volumes["cp"] * (3 + whole) * layers, "cp"),
        ep=link("exchange", volumes["ep"] * (2 + repeated) * layers, "ep", expert_stride),
        etp=link("gather", volumes["etp"] * (2 + repeated) * layers, "etp"),
        pp=Link(0.0, boundaries) if stride_of(folding, "pp") >= node_size else Link(boundaries, 0.0),
        **_weight_traffic(model, folding, workload, link),
    )


def _weight_traffic(model: LanguageModelConfig, folding: Folding, workload: Workload, link) -> dict[str, Link]:
    """Gradients and weights over the data ranks: dense ones over DP CP, routed experts over EDP."""
    counts = parameter_counts(model)
    dense = counts.dense / (folding.tp * folding.pp)
    experts = counts.experts / (folding.etp * folding.ep * folding.pp)
    none = Link(0.0, 0.0)
    if workload.sharding == "fsdp":
        # Weights are gathered for the forward and for the backward pass, gradients scattered once.
        per_weight = 2 * BFLOAT16 + BFLOAT16
        both = link("gather", dense * per_weight, "dense").plus(link("gather", experts * per_weight, "edp"))
        return {"weights": both, "dense_gradients": none, "expert_gradients": none}
    per_weight = GRADIENT + BFLOAT16
    return {
        "weights": none,
        "dense_gradients": link("gather", dense * per_weight, "dense"),
        "expert_gradients": link("gather", experts * per_weight, "edp"),
    }


def step_traffic(counts: Traffic, folding: Folding, workload: Workload) -> dict[str, Link]:
    """Bytes of one device in a whole step by kind."""
    steps = num_microbatches(folding, workload)
    per_step = ("dense_gradients", "expert_gradients")
    return {name: link if name in per_step else link.times(steps) for name, link in counts._asdict().items()}
