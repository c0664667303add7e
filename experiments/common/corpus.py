"""Real text that every Python installation carries: the source of its own standard library."""

import sysconfig
from pathlib import Path

import numpy as np


def source_files() -> list[Path]:
    """The standard library's public top-level modules in alphabetical order.

    Raises:
        FileNotFoundError: this Python ships no source text.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    if not files:
        raise FileNotFoundError(
            "this Python was installed without the source text of its standard library. Use another Python."
        )
    return files


def source_bytes(num_bytes: int) -> np.ndarray:
    """The first bytes of those modules, one after another.

    Args:
        num_bytes: how many.

    Returns:
        uint8 [num_bytes].

    Raises:
        ValueError: the library is shorter.
    """
    pieces, total = [], 0
    for path in source_files():
        pieces.append(path.read_bytes())
        total += len(pieces[-1])
        if total >= num_bytes:
            return np.frombuffer(b"".join(pieces)[:num_bytes], np.uint8)
    raise ValueError(f"num_bytes={num_bytes}: the standard library's source has {total} bytes. Ask for fewer.")
