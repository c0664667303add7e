"""Accelerators and their networks as the numbers that a cost model needs."""

import dataclasses

from jaxrl_suite.config import Config, check, field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware(Config):
    """One kind of device, joined by a fast network inside a node and a slower one between nodes.

    Rates are peaks of the data sheets; what a run reaches of them is the affair of the constants of the cost model.
    """

    name: str = field("h100", help="what people call it")
    peak_flops: float = field(989.5e12, help="dense bfloat16 rate of a device, FLOP/s")
    memory_bytes: float = field(80e9, help="device memory that a job may fill, bytes")
    memory_bandwidth: float = field(3.35e12, help="rate of the device's own memory, bytes/s")
    node_size: int = field(8, help="devices on one fast network")
    node_bandwidth: float = field(450e9, help="inside a node, bytes/s in one direction of one device (NVLink)")
    network_bandwidth: float = field(50e9, help="between nodes, bytes/s in one direction of one device (InfiniBand)")

    def __post_init__(self) -> None:
        super().__post_init__()
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name != "name":
                check(value > 0, argument=f"Hardware.{item.name}", value=value, rule="must be positive")


_NAMED = {
    # The paper's machine: DGX H100 nodes, NVLink 4 and 400 Gb/s InfiniBand a device.
    "h100": Hardware(),
    "h200": Hardware(name="h200", memory_bytes=141e9, memory_bandwidth=4.8e12),
    "a100": Hardware(
        name="a100",
        peak_flops=312e12,
        memory_bytes=80e9,
        memory_bandwidth=2.04e12,
        node_bandwidth=300e9,
        network_bandwidth=25e9,
    ),
    "b200": Hardware(
        name="b200", peak_flops=2250e12, memory_bytes=180e9, memory_bandwidth=7.7e12, node_bandwidth=900e9
    ),
    # Chips on a torus: one network at the sum of a chip's links; distances are not modelled.
    "tpu-v5p": Hardware(
        name="tpu-v5p",
        peak_flops=459e12,
        memory_bytes=95e9,
        memory_bandwidth=2.765e12,
        node_size=8960,
        node_bandwidth=600e9,
        network_bandwidth=25e9,
    ),
    "tpu-v5e": Hardware(
        name="tpu-v5e",
        peak_flops=197e12,
        memory_bytes=16e9,
        memory_bandwidth=0.819e12,
        node_size=256,
        node_bandwidth=200e9,
        network_bandwidth=25e9,
    ),
    "tpu-v6e": Hardware(
        name="tpu-v6e",
        peak_flops=918e12,
        memory_bytes=32e9,
        memory_bandwidth=1.64e12,
        node_size=256,
        node_bandwidth=448e9,
        network_bandwidth=25e9,
    ),
}


def named_hardware(name: str, **changes: object) -> Hardware:
    """A known accelerator, with some numbers changed.

    Args:
        name: "h100" (the paper's machine), "h200", "a100" or "b200", eight to a node; "tpu-v5p", "tpu-v5e", "tpu-v6e",
            a pod on one network (bounds from compiled programs; the time model is fitted to GPUs).
        **changes: fields that differ, for example ``network_bandwidth=100e9``.

    Raises:
        ValueError: unknown name or field, or a number that is not positive.

    >>> named_hardware("h100", node_size=16).node_size
    16
    """
    check(name in _NAMED, argument="hardware", value=name, rule="unknown", remedy=f"Known: {', '.join(_NAMED)}")
    return _NAMED[name].replace(**changes)
