"""Real text that every Python installation carries: the source of its own standard library."""

import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np


def standard_library_bytes(num_bytes: int) -> np.ndarray:
    """The first bytes of the standard library's top-level modules in alphabetical order, uint8 [num_bytes].

    Raises:
        ValueError: the installation has no readable source, or less than that.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    chunks, total = [], 0
    for path in sorted(folder.glob("*.py")):
        chunks.append(path.read_bytes())
        total += len(chunks[-1])
        if total >= num_bytes:
            return np.frombuffer(b"".join(chunks), np.uint8)[:num_bytes]
    raise ValueError(f"num_bytes={num_bytes}: {folder} holds {total} bytes of source. Ask for fewer.")


def windows(key: jax.Array, step: int | jax.Array, text: jax.Array, batch_size: int, length: int) -> jax.Array:
    """Random windows of a text for one step, int32 [B, length + 1]; the same for every layout of the model."""
    starts = jax.random.randint(jax.random.fold_in(key, step), (batch_size, 1), 0, text.shape[0] - length - 1)
    return text[starts + jnp.arange(length + 1)[None, :]].astype(jnp.int32)
