"""Weights that people have: Hugging Face folders (safetensors) and GGUF files. The way out is in `export`."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.hf_config import config_from_gguf, config_from_hf
from jaxrl_suite.lm.model import LanguageModel
from jaxrl_suite.lm.parameters import parameter_shapes, unflatten
from jaxrl_suite.lm.tensor_files import Tensor, check_names, read_gguf, read_safetensors
from jaxrl_suite.lm.tensor_names import Scheme, Stored, stored_tensors
from jaxrl_suite.lm.tokenizer import Tokenizer, read_tokenizer, tokenizer_from_gguf
from jaxrl_suite.types import Params

Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
_CHUNK_BYTES = 1 << 22  # rows converted at once


class Pretrained(NamedTuple):
    """A model with its weights.

    Attributes:
        model: the Linen module, ``model.apply({"params": params}, tokens) -> logits``.
        params: parameter dict.
        config: shape and conventions.
        tokenizer: of the same folder or file; None where there is none.
    """

    model: LanguageModel
    params: Params
    config: LanguageModelConfig
    tokenizer: Tokenizer | None


class _Source(NamedTuple):
    """An opened folder or file."""

    where: str
    scheme: Scheme
    config: LanguageModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None


def load_pretrained(
    path: str | os.PathLike[str], *, dtype: Any = "float32", sharding: Sharding | None = None
) -> Pretrained:
    """Reads a model.

    Files are memory-mapped and read one tensor at a time, a few rows at a time, straight into place, so that loading
    needs little more memory than the parameters. Everything that can be wrong is checked before anything is read.

    Args:
        path: a Hugging Face folder (config.json, *.safetensors, sharded or not, tokenizer.json), a GGUF file, or a
            folder that holds exactly one.
        dtype: of the parameters: "float32", "bfloat16", "float16" or "float64".
        sharding: ``sharding(parameter path, shape) -> jax Sharding``; each device's part is read on its own. By
            default everything goes to the default device.

    Returns:
        Model, parameters, configuration and tokenizer.

    Raises:
        ValueError: missing or unexpected tensors, wrong shapes, unsupported architecture or quantisation, damaged
            files, a vocabulary that does not match; the message names file, tensor, expected and found.
        FileNotFoundError: nothing to load at ``path``.
    """
    dtype = jnp.dtype(dtype)
    names = ("float32", "bfloat16", "float16", "float64")
    check(dtype.name in names, argument="dtype", value=dtype.name, rule=f"must be {', '.join(names)}")
    with _naming(path):
        source = _open(Path(path))
    config = source.config.replace(param_dtype=dtype.name)
    _check_count(source)
    stored = stored_tensors(config, source.scheme)
    _check_tensors(source, stored)
    if source.tokenizer is not None:
        count, rows = source.tokenizer.vocab_size, config.vocab_size
        rule = f"the tokenizer has more tokens than the embedding table has rows, {rows}"
        check(count <= rows, argument=f"{source.where}: vocabulary", value=count, rule=rule)
    leaves = {
        name: _load_leaf(name, shape, stored[name], source, dtype, sharding)
        for name, shape in parameter_shapes(config).items()
    }
    return Pretrained(LanguageModel(config), unflatten(leaves), config, source.tokenizer)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes every complaint about a description name its place, also what a field of another kind trips over."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(f"{path}: its description is damaged or of another kind ({error!r}).") from error


def _open(path: Path) -> _Source:
    if path.is_file():
        check(path.suffix == ".gguf", argument="path", value=str(path), rule="a single file must be a .gguf")
        return _open_gguf(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    if (path / "config.json").exists():
        return _open_folder(path)
    files = sorted(path.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"{path}: neither config.json nor a .gguf file in this folder.")
    found = [file.name for file in files]
    check(
        len(files) == 1, argument="path", value=str(path), rule=f"holds several models ({', '.join(found)}); name one"
    )
    return _open_gguf(files[0])


def _open_gguf(path: Path) -> _Source:
    metadata, tensors = read_gguf(path)
    config = config_from_gguf(metadata, {name: tensor.shape for name, tensor in tensors.items()}, where=str(path))
    tokenizer = read_tokenizer(path.parent) or tokenizer_from_gguf(metadata, where=str(path))
    return _Source(str(path), "gguf", config, tensors, tokenizer)


def _open_folder(path: Path) -> _Source:
    try:
        values = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: not JSON ({error}).") from error
    tensors = _open_shards(path)
    config = config_from_hf(values, where=str(path / "config.json"), tensors=tensors.keys())
    if config.tied_head:  # some exports store the tied head a second time
        tensors.pop("lm_head.weight", None)
    return _Source(str(path), "hf", config, tensors, read_tokenizer(path))


def _open_shards(path: Path) -> dict[str, Tensor]:
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise FileNotFoundError(f"{path}: neither model.safetensors nor model.safetensors.index.json.")
        return read_safetensors(single)
    try:
        places = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{index}: not an index of shards ({error!r}).") from error
    tensors = {}
    for shard in sorted(set(places.values())):
        inside = Path(shard).name == shard
        check(inside, argument=str(index), value=shard, rule="a shard must be a file of the same folder")
        check((path / shard).exists(), argument=str(index), value=shard, rule="the shard that it names is missing")
        found = read_safetensors(path / shard)
        for name in found:
            rule = "is stored here, but not according to the index"
            check(places.get(name) == shard, argument=str(path / shard), value=name, rule=rule)
        tensors |= found
    for name, shard in places.items():
        check(name in tensors, argument=str(path / shard), value=name, rule="the index puts this tensor here")
    return tensors


def _check_count(source: _Source) -> None:
    """Refuses a layer count that the file cannot hold, before a name is written out for each."""
    config, found = source.config, len(source.tensors)
    experts = config.num_experts if source.scheme == "hf" and config.num_experts else 1
    rule = f"{config.num_layers} layers of {experts} tensors need more than the {found} tensors that are there"
    check(config.num_layers * experts <= found, argument=source.where, value=config.num_layers, rule=rule)


def _check_tensors(source: _Source, stored: dict[str, tuple[Stored, ...]]) -> None:
    pieces = {piece.name: piece for group in stored.values() for piece in group}
    check_names(source.tensors, pieces, source.where)
    for name, piece in pieces.items():
        tensor = source.tensors[name]
        rule = f"shape must be {piece.shape}, as config.json or the metadata says"
        check(tensor.shape == piece.shape, argument=f"{tensor.file}: {name}", value=tensor.shape, rule=rule)


def _load_leaf(
    path: str,
    shape: tuple[int, ...],
    pieces: tuple[Stored, ...],
    source: _Source,
    dtype: np.dtype,
    sharding: Sharding | None,
) -> jax.Array:
    def read(index: Any) -> np.ndarray:
        bounds = [axis.indices(size)[:2] for axis, size in zip(index, shape)]
        part = _aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
        for piece in pieces:
            depth = len(piece.index)
            if all(start <= i < stop for i, (start, stop) in zip(piece.index, bounds)):
                place = tuple(i - start for i, (start, _) in zip(piece.index, bounds))
                tensor = source.tensors[piece.name]
                _fill(part[place], tensor, piece, shape[depth:], bounds[depth:], source.config.head_dim)
                tensor.release()
        return part

    if sharding is None:
        # An aligned buffer that nobody writes again: the CPU backend keeps it instead of copying.
        return jax.device_put(read(tuple(slice(None) for _ in shape)))
    return jax.make_array_from_callback(shape, sharding(path, shape), read)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _fill(
    out: np.ndarray,
    tensor: Tensor,
    piece: Stored,
    shape: tuple[int, ...],
    bounds: list[tuple[int, int]],
    head_dim: int,
) -> None:
    """Reads one piece of a parameter, of whole shape ``shape``, into the part of it that ``bounds`` cuts out."""
    cut = tuple(slice(start, stop) for start, stop in bounds)
    if piece.kind == "same":
        if shape == tensor.shape and len(shape) == 2:  # a vocabulary table
            for first, last in _row_chunks(bounds[0][0], bounds[0][1], shape[1] * 4, 1):
                out[first - bounds[0][0] : last - bounds[0][0]] = tensor.rows(first, last)[:, cut[1]]
        else:
            out[...] = tensor.rows(0, tensor.shape[0]).reshape(shape)[cut]
        return
    if len(tensor.shape) == 3:  # all experts of a layer in one tensor
        for expert in range(*bounds[0]):
            one = tensor.rows(expert, expert + 1)[0]
            out[expert - bounds[0][0]] = one.T[cut[1:]]
        return
    whole = all(stop - start == size for (start, stop), size in zip(bounds, shape))
    target = out if whole else np.empty(shape, out.dtype)
    matrix = target.reshape(tensor.shape[1], tensor.shape[0])
    for first, last in _row_chunks(0, tensor.shape[0], tensor.shape[1] * 4, head_dim):
        rows = tensor.rows(first, last)
        if piece.kind == "interleaved":
            rows = rows.reshape(-1, head_dim // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        matrix[:, first:last] = rows.T
    if not whole:
        out[...] = target[cut]


def _row_chunks(start: int, stop: int, row_bytes: int, multiple: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_BYTES // max(1, row_bytes * multiple)) * multiple
    for first in range(start, stop, step):
        yield first, min(first + step, stop)
