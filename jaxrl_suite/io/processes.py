"""Several processes of one job: how they meet, who writes, and how what the writer knows reaches the others.

Process 0 is the writer: it alone touches the run's folder, and the others learn from it what is there. Hence the hosts
of a job need no file system in common. With one process every function here is the identity.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_CHUNK_BYTES = 2**26  # what one broadcast carries at most


class ProcessError(RuntimeError):
    """The processes of a job cannot meet, or one of them has failed; the message says what to do."""


def connect(coordinator: str, num_processes: int = 0, process_id: int = -1, *, timeout_seconds: int = 120) -> None:
    """Joins a job of several processes. Call it before the first array.

    Args:
        coordinator: "host:port" of process 0, the same for all; "auto" asks the scheduler (SLURM, Open MPI, GKE and
            whatever else ``jax.distributed.initialize`` knows), which also knows the two numbers.
        num_processes: how many there are.
        process_id: which one this is, from 0.
        timeout_seconds: how long to wait for the others.

    Raises:
        ProcessError: an argument that cannot be, or the others did not come.
    """
    named: dict[str, Any] = {}
    if coordinator != "auto":
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise ProcessError(
                f"process_id={process_id}, num_processes={num_processes}: with coordinator={coordinator!r} give the "
                "number of processes and the number of this one, from 0 to num_processes - 1."
            )
        if ":" not in coordinator:
            raise ProcessError(f"coordinator={coordinator!r}: must be host:port of process 0, or auto.")
        named = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **named, initialization_timeout=timeout_seconds, heartbeat_timeout_seconds=20, shutdown_timeout_seconds=30
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ProcessError(
            f"coordinator={coordinator!r}: the {num_processes or ''} processes did not meet within {timeout_seconds} s "
            f"({reason}). Start all of them with the same coordinator, and check that its port can be reached."
        ) from error


def is_writer() -> bool:
    """Whether this process writes files and speaks to the user: it is the first, or the only one."""
    return jax.process_index() == 0


def broadcast_bytes(content: bytes | None) -> bytes:
    """What the writer passes, on every process. All must call it; what the others pass is not read."""
    if jax.process_count() == 1:
        return content or b""
    from jax.experimental import multihost_utils

    content = content or b""
    high_low = np.asarray(divmod(len(content), 2**24), np.int32)  # int64 may be off
    high, low = multihost_utils.broadcast_one_to_all(high_low)
    length = int(high) * 2**24 + int(low)
    received = bytearray()
    while len(received) < length:
        rest = min(length - len(received), _CHUNK_BYTES)
        room = 1 << max(10, (rest - 1).bit_length())  # few lengths, since each is compiled
        piece = np.zeros(room, np.uint8)
        if is_writer():
            piece[:rest] = np.frombuffer(content, np.uint8, rest, len(received))
        received += multihost_utils.broadcast_one_to_all(piece)[:rest].tobytes()
    return bytes(received)


def broadcast_json(value: Any) -> Any:
    """A JSON value of the writer on every process."""
    if jax.process_count() == 1:
        return value
    return json.loads(broadcast_bytes(json.dumps(value).encode() if is_writer() else None))


def broadcast_array(array: np.ndarray | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of the writer on every process, bit for bit; the others pass None."""
    if jax.process_count() == 1:
        return np.asarray(array)
    content = np.ascontiguousarray(array).tobytes() if is_writer() else None
    return np.frombuffer(broadcast_bytes(content), np.dtype(dtype)).reshape(shape)


def on_writer(function: Callable[[], Any], *errors: type[Exception]) -> Any:
    """Calls ``function`` on the writer and gives its JSON result to all; all raise its errors of the named kinds."""
    if jax.process_count() == 1:
        return function()
    outcome: dict[str, Any] = {}
    caught: Exception | None = None
    if is_writer():
        try:
            outcome = {"result": function()}
        except errors as error:
            caught = error
            outcome = {"error": next(n for n, kind in enumerate(errors) if isinstance(error, kind)), "text": str(error)}
    outcome = broadcast_json(outcome)
    if caught is not None:
        raise caught
    if "error" in outcome:
        raise errors[outcome["error"]](outcome["text"])
    return outcome["result"]


def to_host(array: Any) -> np.ndarray:
    """The whole array in NumPy, also where its shards lie on several processes; all of them must call it then."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
