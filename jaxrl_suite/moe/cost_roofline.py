"""Roofline of a compiled step: the least time that its products, memory and networks need, and what that allows.

Every term is work over a peak rate of the data sheet: the largest of them bounds the step from below, however well
everything overlaps, and MFU from above. Nothing is fitted here; what
machines reach of their peaks is the affair of ``cost_time``.

References:
    Williams, Waterman, Patterson (2009), Roofline: an insightful visual performance model, CACM 52(4).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxrl_suite.config import check
from jaxrl_suite.moe.cost_traffic import Link
from jaxrl_suite.moe.hardware import Hardware

Group = tuple[int, ...]


class Roofline(NamedTuple):
    """Least seconds of one step on one device by what sets them.

    Attributes:
        compute: all FLOPs of its matrix products, recomputed and idle ones included.
        memory: operands and results of those products, each once, through device memory.
        node: bytes sent over the network inside the node.
        network: bytes sent over the network between nodes.
    """

    compute: float
    memory: float
    node: float
    network: float

    @property
    def dominant(self) -> str:
        """The term that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def bound(self) -> float:
        """Seconds that no schedule beats: everything else hidden behind the longest term."""
        return max(self)

    @property
    def exposed(self) -> float:
        """Seconds if nothing overlaps but the two networks."""
        return self.compute + self.memory + max(self.node, self.network)


def roofline(flops: float, product_bytes: float, sent: Link, hardware: Hardware) -> Roofline:
    """Seconds from counts of one device and one step.

    Args:
        flops: of its products.
        product_bytes: that these products read and write.
        sent: bytes over each network.
        hardware: peak rates.

    >>> roofline(989.5e12, 3.35e12, Link(0.0, 100e9), Hardware())
    Roofline(compute=1.0, memory=1.0, node=0.0, network=2.0)
    """
    return Roofline(
        compute=flops / hardware.peak_flops,
        memory=product_bytes / hardware.memory_bandwidth,
        node=sent.node / hardware.node_bandwidth,
        network=sent.network / hardware.network_bandwidth,
    )


def mfu_bound(times: Roofline, model_flops: float, num_devices: int, hardware: Hardware) -> float:
    """Upper bound on MFU: FLOPs that the model needs over what the devices could do in the bound's time.

    >>> times = Roofline(compute=1.0, memory=0.2, node=0.1, network=0.5)
    >>> mfu_bound(times, 8 * 989.5e12 * 0.6, 8, Hardware())
    0.6
    """
    check(times.bound > 0, argument="times", value=times, rule="a step without work has no MFU")
    return model_flops / (num_devices * hardware.peak_flops * times.bound)


def peers_in_node(groups: Iterable[Group], node_size: int) -> int:
    """Ranks of a group in one node, for the group and node where they are fewest; 0 without groups.

    >>> peers_in_node([(0, 1, 2, 3), (4, 5, 6, 7)], 8), peers_in_node([(0, 4, 8, 12)], 8)
    (4, 2)
    """
    fewest = []
    for group in groups:
        nodes = [rank // node_size for rank in group]
        fewest.append(min(nodes.count(node) for node in set(nodes)))
    return min(fewest, default=0)


def sent_by_link(row: Mapping[str, Any]) -> Link:
    """Bytes of one collective (or of many alike) by network.

    In an exchange everything for a peer in another node leaves this one. In a gather, scatter or reduction what another
    node needs leaves once and is shared by the ranks of the group here. A permutation is as slow as its slowest pair.

    Args:
        row: ``kind``, ``group_size``, ``peers`` (:func:`peers_in_node`), ``groups_leaving_node``, ``num_groups`` and
            ``bytes`` that one device sends in all.

    >>> row = {"group_size": 8, "peers": 4, "bytes": 7.0, "groups_leaving_node": 2, "num_groups": 2}
    >>> sent_by_link({"kind": "all-to-all", **row})
    Link(node=3.0, network=4.0)
    >>> sent_by_link({"kind": "all-gather", **row})
    Link(node=7.0, network=1.0)
    """
    size, peers, sent = row["group_size"], row["peers"], row["bytes"]
    if row["kind"] == "collective-permute":
        leaving, groups = row["groups_leaving_node"], row["num_groups"]
        return Link(sent if leaving < groups else 0.0, sent if leaving else 0.0)
    away = sent * (size - peers) / (size - 1)
    if "all-to-all" in row["kind"]:
        return Link(sent - away, away)
    return Link(sent if peers > 1 else 0.0, away / peers)


def sent_in_all(rows: Iterable[Mapping[str, Any]]) -> Link:
    """Bytes of all collectives by network."""
    total = Link(0.0, 0.0)
    for row in rows:
        total = total.plus(sent_by_link(row))
    return total
