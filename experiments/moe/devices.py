"""Virtual CPU devices for commands that check foldings without accelerators."""

import os


def virtual_devices(number: int) -> None:
    """Asks for a number of virtual CPU devices, before JAX starts; JAX_PLATFORMS may ask for real ones instead."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in ("NPROC", "PJRT_NPROC"):  # threads: one a device is too few for collectives that wait for each other
        os.environ.setdefault(name, str(4 * number))
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags += f" --xla_force_host_platform_device_count={number}"
    if "collective_call_terminate" not in flags:  # many devices on few cores may wait long for each other
        flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    os.environ["XLA_FLAGS"] = flags
