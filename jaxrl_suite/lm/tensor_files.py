"""Reading and writing of safetensors files and reading of GGUF files, memory-mapped and a few rows at a time."""

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxrl_suite.config import check

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: where it is stored.
        shape: its shape, outermost axis first.
        rows: ``rows(start, stop)`` reads rows of the first axis as floating point; a scalar axis is one row.
        release: gives the memory that reading it mapped back to the system.
    """

    file: Path
    shape: tuple[int, ...]
    rows: Callable[[int, int], np.ndarray]
    release: Callable[[], None]


def _map(path: Path) -> mmap.mmap:
    check(path.stat().st_size > 0, argument="file", value=str(path), rule="is empty")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _releaser(mapped: mmap.mmap, start: int, size: int) -> Callable[[], None]:
    def release() -> None:  # mapped pages of a file count as resident until they are given back
        page = mmap.PAGESIZE
        first = start // page * page
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED, first, start + size - first)

    return release


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Opens a safetensors file; nothing but its header is read.

    Args:
        path: the file.

    Returns:
        name -> tensor.

    Raises:
        ValueError: the file is truncated, its header is not JSON, a dtype is not a float, or a tensor's bytes do not
            fit its shape or the file.
    """

    def rule(condition: bool, what: str, text: str) -> None:
        check(condition, argument=str(path), value=what, rule=text, remedy="The file is damaged; fetch it again")

    size = path.stat().st_size
    rule(size >= 8, f"{size} bytes", "is too short for a safetensors file")
    mapped = _map(path)
    (length,) = struct.unpack("<Q", mapped[:8])
    rule(8 + length <= size, f"{size} bytes", f"is truncated: its header alone says {8 + length} bytes")
    try:
        header = json.loads(bytes(mapped[8 : 8 + length]))
    except ValueError as error:
        raise ValueError(f"{path}: the header is not JSON ({error}). The file is damaged; fetch it again.") from error
    rule(isinstance(header, dict), "header", "must be a JSON object")
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        expected = math.prod(shape) * dtype.itemsize
        rule(stop - start == expected, name, f"holds {stop - start} bytes, but its shape {shape} needs {expected}")
        rule(start == end, name, f"begins at byte {start} of the data, but what is before it ends at {end}")
        rule(8 + length + stop <= size, name, f"ends at byte {8 + length + stop} of a file of {size}")
        tensors[name], end = _plain_tensor(path, mapped, 8 + length + start, shape, dtype), stop
    rule(8 + length + end == size, f"{size} bytes", f"must be {8 + length + end} bytes, as its header says")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Dtype, shape, first and last byte of a tensor, from its entry in the header."""

    def whole(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    ok = isinstance(entry, dict) and whole(entry.get("shape")) and whole(entry.get("data_offsets"))
    ok = ok and len(entry["data_offsets"]) == 2
    text = "header entry needs dtype, shape and data_offsets"
    check(ok, argument=str(path), value=name, rule=text, remedy="The file is damaged; fetch it again")
    code = str(entry.get("dtype"))
    supported = f"dtype {code} is not supported, only {', '.join(_DTYPES)}"
    check(code in _DTYPES, argument=str(path), value=name, rule=supported)
    return _DTYPES[code], tuple(entry["shape"]), *entry["data_offsets"]


def _plain_tensor(path: Path, mapped: mmap.mmap, start: int, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
    def rows(first: int, last: int) -> np.ndarray:
        # Misaligned offsets are legal: read bytes, then view.
        row = math.prod(shape[1:]) * dtype.itemsize
        data = np.frombuffer(mapped, np.uint8, (last - first) * row, start + first * row)
        if (start + first * row) % dtype.itemsize:
            data = data.copy()
        return data.view(dtype).reshape(last - first, *shape[1:])

    return Tensor(path, shape, rows, _releaser(mapped, start, math.prod(shape) * dtype.itemsize))


def write_safetensors(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], read: Any) -> None:
    """Writes a safetensors file one tensor at a time.

    Args:
        path: the file, created.
        tensors: name -> (shape, dtype).
        read: ``read(name)`` gives the array when its turn comes.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in tensors:
            file.write(np.ascontiguousarray(read(name)).view(np.uint8).reshape(-1).data)
        file.flush()
        os.fsync(file.fileno())


# GGUF value types: number -> struct code; 8 is a string, 9 an array.
_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_FLOATS = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    28: np.dtype(np.float64),
    30: np.dtype(ml_dtypes.bfloat16),
}
_GGUF_MAX_AXES = 4


class _Cursor:
    """Reads GGUF's little-endian values one after another, and refuses to run over the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, size: int) -> bytes:
        rule = f"is truncated: {size} bytes wanted at {self.at} of {len(self.data)}"
        check(0 <= size <= len(self.data) - self.at, argument="file", value=str(self.path), rule=rule)
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.string()
        if kind == 9:
            inner, count = self.scalar("I"), self.scalar("Q")
            rule = "has a list of lists in its metadata, which is not supported"
            check(inner != 9, argument="file", value=str(self.path), rule=rule)
            if inner in _GGUF_SCALARS:
                code = _GGUF_SCALARS[inner]
                return np.frombuffer(self.take(count * struct.calcsize("<" + code)), "<" + code).tolist()
            return [self.value(inner) for _ in range(count)]
        check(kind in _GGUF_SCALARS, argument="file", value=str(self.path), rule=f"has a value of unknown type {kind}")
        return self.scalar(_GGUF_SCALARS[kind])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Opens a GGUF file (versions 2 and 3); of the tensors nothing is read.

    Args:
        path: the file.

    Returns:
        metadata, and name -> tensor; F32, F16 and BF16 are read as they are, quantised types as the ``gguf`` package
        dequantises them, a few rows at a time.

    Raises:
        ValueError: not a GGUF file, truncated, or of an unsupported type of quantisation.
        ImportError: quantised tensors without the ``gguf`` package.
    """
    mapped = _map(path)
    cursor = _Cursor(path, mapped)
    check(cursor.take(4) == b"GGUF", argument="file", value=str(path), rule="is not a GGUF file")
    version = cursor.scalar("I")
    check(version in (2, 3), argument=str(path), value=version, rule="GGUF version must be 2 or 3")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {}
    for _ in range(num_values):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.scalar("I"))
    entries = []
    for _ in range(num_tensors):
        name, num_axes = cursor.string(), cursor.scalar("I")
        rule = f"has {num_axes} axes; there must be 1 to {_GGUF_MAX_AXES}"
        check(1 <= num_axes <= _GGUF_MAX_AXES, argument=str(path), value=name, rule=rule)
        shape = tuple(reversed([cursor.scalar("Q") for _ in range(num_axes)]))
        entries.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    ok = isinstance(alignment, int) and alignment > 0
    check(ok, argument=f"{path}: general.alignment", value=alignment, rule="must be a positive integer")
    start = -(-cursor.at // alignment) * alignment
    tensors, end = {}, 0
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        rule, remedy = f"begins at byte {offset} of the data, inside of what is before it", "The file is damaged"
        check(offset >= end and name not in tensors, argument=str(path), value=name, rule=rule, remedy=remedy)
        tensors[name], size = _gguf_tensor(path, mapped, name, shape, kind, start + offset)
        end = offset + size
    return metadata, tensors


def _gguf_tensor(
    path: Path, mapped: mmap.mmap, name: str, shape: tuple[int, ...], kind: int, start: int
) -> tuple[Tensor, int]:
    """A tensor and its size in bytes."""
    if kind in _GGUF_FLOATS:
        size = math.prod(shape) * _GGUF_FLOATS[kind].itemsize
        tensor = _plain_tensor(path, mapped, start, shape, _GGUF_FLOATS[kind])
    else:
        block, block_bytes, decode = _quantisation(path, name, kind)
        fits = shape[-1] % block == 0
        check(fits, argument=str(path), value=name, rule=f"rows of {shape[-1]} do not divide into blocks of {block}")
        row = shape[-1] // block * block_bytes
        size, inner = math.prod(shape[:-1]) * row, math.prod(shape[1:-1])

        def rows(first: int, last: int) -> np.ndarray:
            data = np.frombuffer(mapped, np.uint8, (last - first) * inner * row, start + first * inner * row)
            return decode(data.reshape(-1, row)).reshape(last - first, *shape[1:])

        tensor = Tensor(path, shape, rows, _releaser(mapped, start, size))
    rule = f"ends at byte {start + size} of a file of {len(mapped)}"
    check(start + size <= len(mapped), argument=str(path), value=name, rule=rule, remedy="The file is truncated")
    return tensor, size


def _quantisation(path: Path, name: str, kind: int) -> tuple[int, int, Callable[[np.ndarray], np.ndarray]]:
    """Numbers of a block, its bytes, and the function that dequantises rows of bytes to float32."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ImportError(
            f"{path}: tensor {name} is quantised; reading it needs the gguf package. "
            "Remedy: python -m pip install 'jaxrl-suite[hf]'"
        ) from error
    known = {int(member) for member in GGMLQuantizationType}
    check(kind in known, argument=str(path), value=name, rule=f"is of unknown type {kind}")
    quantisation = GGMLQuantizationType(kind)
    block, block_bytes = GGML_QUANT_SIZES[quantisation]
    try:  # one block of zeros tells whether the package can, before any tensor is read
        dequantize(np.zeros((1, block_bytes), np.uint8), quantisation)
    except NotImplementedError as error:
        rule = f"its type {quantisation.name} cannot be dequantised"
        raise ValueError(f"{path}={name!r}: {rule}. Convert the file to another quantisation.") from error
    return block, block_bytes, lambda data: dequantize(data, quantisation)


def check_names(found: Iterable[str], expected: Iterable[str], where: str) -> None:
    """Refuses missing and unexpected tensors.

    Raises:
        ValueError: naming the first few of each.
    """
    found, expected = set(found), set(expected)
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        parts = [f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
                 for names, what in ((missing, "missing"), (extra, "unexpected")) if names]  # fmt: skip
        raise ValueError(
            f"{where}: tensors do not match the configuration: {' and '.join(parts)}. "
            "Is config.json that of these weights?"
        )
