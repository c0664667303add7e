"""Weights that people have, in and out: Hugging Face folders (safetensors) and GGUF files."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.hf_config import config_from_gguf, config_from_hf, config_to_hf
from jaxrl_suite.lm.model import LanguageModel
from jaxrl_suite.lm.parameters import flatten, parameter_shapes, unflatten
from jaxrl_suite.lm.tensor_files import Tensor, check_names, read_gguf, read_safetensors, write_safetensors
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
    source = _open(Path(path))
    config = source.config.replace(param_dtype=dtype.name)
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
    shards = {}
    for name in sorted(set(places.values())):
        exists = (path / name).exists()
        check(exists, argument=str(index), value=name, rule="the shard that it names is missing")
        shards[name] = read_safetensors(path / name)
    tensors = {}
    for name, shard in places.items():
        check(name in shards[shard], argument=str(path / shard), value=name, rule="the index puts this tensor here")
        tensors[name] = shards[shard][name]
    return tensors


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


def save_pretrained(
    path: str | os.PathLike[str],
    pretrained: Pretrained,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes a Hugging Face folder that ``transformers`` loads.

    Everything is written to a hidden folder beside the target, which takes its name only when complete: a killed
    export leaves nothing that looks whole.

    Args:
        path: the folder.
        pretrained: what to write; a tokenizer that is not of Hugging Face's kind is left out.
        overwrite: replace an existing folder.
        max_shard_bytes: largest size of one safetensors file.

    Returns:
        The folder.

    Raises:
        ValueError: the folder exists, the parameters do not fit the configuration, or the family cannot express it.
    """
    path = Path(path)
    rule, remedy = "exists", "Give another name or overwrite=True"
    check(overwrite or not path.exists(), argument="path", value=str(path), rule=rule, remedy=remedy)
    config, leaves = pretrained.config, flatten(pretrained.params)
    shapes = parameter_shapes(config)
    check_names(leaves, shapes, "params")
    for name, shape in shapes.items():
        found = tuple(leaves[name].shape)
        check(found == shape, argument=f"params: {name}", value=found, rule=f"shape must be {shape}")
    dtype = np.dtype(leaves["embed/table"].dtype)
    values = config_to_hf(config, dtype.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        _write_shards(partial, config, leaves, dtype, max_shard_bytes)
        if isinstance(pretrained.tokenizer, Tokenizer):
            pretrained.tokenizer.save(partial)
            numbers = {"bos_token_id": pretrained.tokenizer.bos_token, "pad_token_id": pretrained.tokenizer.pad_token}
            stops = list(pretrained.tokenizer.stop_tokens)
            values |= numbers | {"eos_token_id": stops[0] if len(stops) == 1 else stops or None}
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        partial.chmod(0o755)
        _replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def _replace(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    path.rename(old / path.name)
    partial.rename(path)
    shutil.rmtree(old)


def _write_shards(
    folder: Path, config: LanguageModelConfig, leaves: dict[str, Any], dtype: np.dtype, max_shard_bytes: int
) -> None:
    where = {piece.name: (path, piece) for path, group in stored_tensors(config, "hf").items() for piece in group}
    shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
    size = 0
    for name, (_, piece) in where.items():
        bytes_ = int(np.prod(piece.shape)) * dtype.itemsize
        if shards[-1] and size + bytes_ > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = (piece.shape, dtype)
        size += bytes_

    def read(name: str) -> np.ndarray:
        path, piece = where[name]
        array = np.asarray(leaves[path][piece.index]).astype(dtype)
        if piece.kind == "matrix":
            return array.reshape(piece.shape[1], piece.shape[0]).T
        return array.reshape(piece.shape)

    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], read)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards):
        write_safetensors(folder / name, shard, read)
    total = sum(int(np.prod(piece.shape)) for _, piece in where.values()) * dtype.itemsize
    weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
