"""Pretrained weights straight onto a folding, and back into a Hugging Face folder."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from jaxrl_suite import lm
from jaxrl_suite.config import check
from jaxrl_suite.lm.hf_config import config_from_hf
from jaxrl_suite.moe.config import MoEConfig, check_folding
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.partition import placements
from jaxrl_suite.types import Params


class Loaded(NamedTuple):
    """A pretrained model on a folding.

    Attributes:
        config: model as read, and the options given.
        params: global arrays in the layout of the train step; pass them to ``state_from_params`` or ``policy``.
        tokenizer: the folder's, or None.
    """

    config: MoEConfig
    params: Params
    tokenizer: Any


def load_pretrained(
    path: str | os.PathLike[str], folding: Folding, *, dtype: Any = "float32", **options: Any
) -> Loaded:
    """Reads a Hugging Face folder (Mixtral, Qwen2-MoE, Qwen3-MoE or a dense family), each device its own part.

    Args:
        path: folder with config.json and safetensors.
        folding: where the arrays go.
        dtype: of the parameters.
        **options: fields of :class:`MoEConfig` other than ``model``.

    Raises:
        ValueError: the model cannot be laid out on the folding (before any weight is read), or the folder is damaged.
        FileNotFoundError: there is no config.json.
    """
    source = Path(path) / "config.json"
    check("model" not in options, argument="options", value="model", rule="the model is what the folder holds")
    model = config_from_hf(json.loads(source.read_text(encoding="utf-8")), where=str(source))
    config = MoEConfig(model=model, **options)
    check_folding(config, folding)
    mesh, places = folding.mesh(), placements(config, folding)

    def sharding(path: str, shape: tuple[int, ...]) -> Any:
        del shape
        return NamedSharding(mesh, places[path].stored)

    found = lm.load_pretrained(path, dtype=dtype, sharding=sharding)
    return Loaded(config.replace(model=found.config), found.params, found.tokenizer)


def save_pretrained(
    path: str | os.PathLike[str], params: Params, config: MoEConfig, *, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Writes parameters of any layout as a Hugging Face folder.

    Args:
        path: folder to write.
        params: global arrays.
        config: its model names the family.
        tokenizer: written beside the weights if given.
        overwrite: replace what is there.
    """
    host = jax.tree.map(jax.device_get, params)
    pretrained = lm.Pretrained(lm.LanguageModel(config.model), host, config.model, tokenizer)
    return Path(lm.save_pretrained(path, pretrained, overwrite=overwrite))
