"""Files that are either whole or not there: atomic writes of bytes, text, JSON and named arrays."""

import contextlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class FileError(ValueError):
    """A file that cannot be read or written; the message names the file, what is wrong and the remedy."""


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes renames inside ``folder`` survive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # some file systems refuse to open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Writes a file whole or not at all.

    The content goes to a hidden neighbour first, which is flushed to disk and then renamed onto ``path``: a reader, or
    a process killed at any moment, finds the old content or the new, never a mixture. Missing folders are made.

    Args:
        path: the file.
        content: bytes, or text that is written as UTF-8.

    Returns:
        The path.

    Raises:
        FileError: the place cannot be written.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode_of(path))
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise FileError(
            f"cannot write {path}: {error.strerror or error}. Free some space or choose a folder that you may write to."
        ) from error
    except BaseException:
        _remove(temporary)
        raise
    sync_folder(path.parent)
    return path


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Writes JSON atomically, indented, keys in the order given; NumPy scalars and arrays become numbers and lists.

    Not-a-number and the infinities, which JSON lacks, become the strings "NaN", "Infinity" and "-Infinity".

    Raises:
        FileError: the place cannot be written.
        TypeError: the value holds something that JSON cannot express.
    """
    return atomic_write(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON, with the strings "NaN", "Infinity" and "-Infinity" turned back into floats.

    Raises:
        FileError: the file is missing, unreadable or not JSON.
    """
    path = Path(path)
    try:
        return revive(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}. Check the path.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(
            f"{path} is not valid JSON ({error}). Delete it, or start again in another folder; "
            "it is written again by the run that made it."
        ) from error


def plain(value: Any) -> Any:
    """Turns NumPy and JAX values, tuples and paths into what JSON can hold.

    Not-a-number and the infinities become "NaN", "Infinity" and "-Infinity", which ``float()`` reads back.

    >>> plain({"a": np.float32(0.5), "b": (1, np.nan)})
    {'a': 0.5, 'b': [1, 'NaN']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return _plain_float(float(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if not isinstance(array.tolist(), bool | int | float | str | list):
            array = array.astype(np.float64)  # bfloat16 and other small types, which Python does not know
        return plain(array.tolist())
    raise TypeError(
        f"{type(value).__name__} cannot be written as JSON: {value!r:.80}. Pass numbers, text, lists, dicts."
    )


def revive(value: Any) -> Any:
    """Turns the strings that :func:`plain` makes of special floats back into floats.

    >>> revive(["Infinity", {"loss": "-Infinity"}, "text"])
    [inf, {'loss': -inf}, 'text']
    """
    if isinstance(value, dict):
        return {key: revive(item) for key, item in value.items()}
    if isinstance(value, list):
        return [revive(item) for item in value]
    return _SPECIAL.get(value, value) if isinstance(value, str) else value


def save_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> Path:
    """Writes named arrays as one compressed npz file, atomically.

    Args:
        path: the file; the suffix .npz is added if it has none.
        arrays: name -> array or scalar. Types that NumPy does not know (bfloat16) are widened to float32.

    Raises:
        FileError: the place cannot be written.
        ValueError: an entry is not an array of numbers, booleans or text.
    """
    path = Path(path)
    path = path.with_name(path.name + ".npz") if path.suffix != ".npz" else path
    with tempfile.SpooledTemporaryFile(max_size=2**28) as buffer:
        entries: dict[str, Any] = {_PREFIX + name: _storable(name, value) for name, value in arrays.items()}
        np.savez_compressed(buffer, **entries)
        buffer.seek(0)
        return atomic_write(path, buffer.read())


def load_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads what :func:`save_arrays` wrote.

    Raises:
        FileError: the file is missing, cut short or damaged.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as archive:
            return {name.removeprefix(_PREFIX): archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist. Check the path, or run again what writes it.") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise FileError(f"{path} is damaged ({error}). Delete it and run again what writes it.") from error


# np.savez has parameters of its own ("file", "allow_pickle"), which arrays of those names would hit.
_PREFIX = "array:"
_SPECIAL = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def _storable(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind == "V" or array.dtype.name in ("bfloat16",) or array.dtype.name.startswith("float8"):
        array = array.astype(np.float32)
    if array.dtype.kind not in "biufcSU":
        raise ValueError(f"arrays[{name!r}]: dtype {array.dtype} cannot be stored. Pass numbers, booleans or text.")
    return array


def _plain_float(value: float) -> float | str:
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _mode_of(path: Path) -> int:
    # mkstemp makes private files; the result should look like any other new file of this user.
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _remove(path: str | None) -> None:
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)
