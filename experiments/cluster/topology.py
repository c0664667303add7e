"""Devices of a cluster that is not there, for the compiler only."""

import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from typing import Any, Literal
from unittest import mock

Platform = Literal["cuda", "tpu"]

# Facts of the H100 SXM, in the form that XLA's compiler reads.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_FORMS = {
    "cuda": (r"\d+x\d+x\d+", "partitions x hosts x GPUs of a host, for example 1x16x8"),
    "tpu": (r"v\w+:\d+x\d+(x\d+)?", "generation and chips, for example v5p:4x4x4"),
}


def topology_devices(platform: Platform, shape: str) -> list[Any]:
    """Devices to compile for.

    Args:
        platform: "cuda" (H100) or "tpu".
        shape: "1x16x8" (partitions, hosts, GPUs of a host) or "v5p:4x4x4".

    Raises:
        ValueError: a platform or shape that cannot be, or that the compiler does not know.
        ImportError: the compiler's package is not installed; the message says which to install.
    """
    check_topology(platform, shape)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask a cloud where we are
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")  # nothing runs: the plugins are used as compilers
    _need(platform)
    try:
        if platform == "cuda":
            found = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=shape)
        else:
            found = topologies.get_topology_desc(platform="tpu", topology_name=shape)
    except Exception as error:  # the plugins raise what they like
        raise ValueError(f"--topology={shape}: the compiler does not know it ({str(error).splitlines()[0]}).") from None
    return list(found.devices)


def check_topology(platform: str, shape: str) -> None:
    """Checks what can be checked without a compiler.

    Raises:
        ValueError: an unknown platform, or a shape of another form.
    """
    if platform not in _FORMS:
        raise ValueError(f"--platform={platform}: must be cuda or tpu.")
    form, words = _FORMS[platform]
    if not re.fullmatch(form, shape):
        raise ValueError(f"--topology={shape}: on {platform} the form is {words}.")


def _need(platform: Platform) -> None:
    """Loads the compiler's plugin or says what to install."""
    import jax

    version = jax.__version__
    module, packages = {
        "cuda": ("jax_plugins.xla_cuda13", f"--no-deps jax-cuda13-pjrt=={version} jax-cuda13-plugin=={version}"),
        "tpu": ("libtpu", f'"jax[tpu]=={version}"'),
    }[platform]
    try:
        importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"--platform={platform}: the compiler {module} is not installed. In an environment of its own: "
            f"python -m pip install {packages}"
        ) from None


@contextlib.contextmanager
def standing_in(devices: list[Any]) -> Iterator[None]:
    """Lets devices of a topology stand in for those of this machine while a program is traced and lowered.

    What a program asks about its platform is answered for them too, so that it takes the paths it would take there.
    """
    import jax

    backend = {"cuda": "gpu"}.get(devices[0].platform, devices[0].platform)
    with (
        mock.patch.object(jax, "devices", lambda *_: devices),
        mock.patch.object(jax, "default_backend", lambda: backend),
    ):
        yield
