"""Writing a model as a Hugging Face folder that `transformers` loads."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.hf_config import config_to_hf
from jaxrl_suite.lm.parameters import flatten, parameter_shapes
from jaxrl_suite.lm.pretrained import Pretrained
from jaxrl_suite.lm.tensor_files import check_names, write_safetensors
from jaxrl_suite.lm.tensor_names import stored_tensors
from jaxrl_suite.lm.tokenizer import Tokenizer


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
