"""Where each parameter is stored under the names of Hugging Face folders and of GGUF files."""

import math
from typing import Literal, NamedTuple

from jaxrl_suite.lm.config import LanguageModelConfig
from jaxrl_suite.lm.parameters import Shape, parameter_shapes

Scheme = Literal["hf", "gguf"]


class Stored(NamedTuple):
    """One tensor of a file that holds one piece (a layer's, an expert's) of a parameter, or all experts of a layer.

    Attributes:
        name: name of the tensor.
        index: leading indices of the piece in the parameter: () or (layer,) or (layer, expert).
        shape: shape of the tensor in the file.
        kind: "same" (same numbers in the same order), "matrix" (stored output by output), or "interleaved" (a matrix
            whose rows within a head alternate between the halves of the rotation, as GGUF stores Llama's).
    """

    name: str
    index: tuple[int, ...]
    shape: Shape
    kind: Literal["same", "matrix", "interleaved"]


_HF = {
    "embed/table": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{l}.input_layernorm.weight",
    "layers/attention/query": "model.layers.{l}.self_attn.q_proj.weight",
    "layers/attention/key": "model.layers.{l}.self_attn.k_proj.weight",
    "layers/attention/value": "model.layers.{l}.self_attn.v_proj.weight",
    "layers/attention/output": "model.layers.{l}.self_attn.o_proj.weight",
    "layers/attention/query_bias": "model.layers.{l}.self_attn.q_proj.bias",
    "layers/attention/key_bias": "model.layers.{l}.self_attn.k_proj.bias",
    "layers/attention/value_bias": "model.layers.{l}.self_attn.v_proj.bias",
    "layers/attention/query_norm": "model.layers.{l}.self_attn.q_norm.weight",
    "layers/attention/key_norm": "model.layers.{l}.self_attn.k_norm.weight",
    "layers/feed_forward_norm/scale": "model.layers.{l}.post_attention_layernorm.weight",
    "layers/feed_forward/gate": "model.layers.{l}.mlp.gate_proj.weight",
    "layers/feed_forward/up": "model.layers.{l}.mlp.up_proj.weight",
    "layers/feed_forward/down": "model.layers.{l}.mlp.down_proj.weight",
    "layers/feed_forward/router": "model.layers.{l}.mlp.gate.weight",
    "layers/feed_forward/experts/gate": "model.layers.{l}.mlp.experts.{e}.gate_proj.weight",
    "layers/feed_forward/experts/up": "model.layers.{l}.mlp.experts.{e}.up_proj.weight",
    "layers/feed_forward/experts/down": "model.layers.{l}.mlp.experts.{e}.down_proj.weight",
    "layers/feed_forward/shared/gate": "model.layers.{l}.mlp.shared_expert.gate_proj.weight",
    "layers/feed_forward/shared/up": "model.layers.{l}.mlp.shared_expert.up_proj.weight",
    "layers/feed_forward/shared/down": "model.layers.{l}.mlp.shared_expert.down_proj.weight",
    "layers/feed_forward/shared_gate": "model.layers.{l}.mlp.shared_expert_gate.weight",
    "final_norm/scale": "model.norm.weight",
    "head/table": "lm_head.weight",
}
_MIXTRAL = {
    "layers/feed_forward/router": "model.layers.{l}.block_sparse_moe.gate.weight",
    "layers/feed_forward/experts/gate": "model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight",
    "layers/feed_forward/experts/up": "model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight",
    "layers/feed_forward/experts/down": "model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
}
_GGUF = {
    "embed/table": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{l}.attn_norm.weight",
    "layers/attention/query": "blk.{l}.attn_q.weight",
    "layers/attention/key": "blk.{l}.attn_k.weight",
    "layers/attention/value": "blk.{l}.attn_v.weight",
    "layers/attention/output": "blk.{l}.attn_output.weight",
    "layers/attention/query_bias": "blk.{l}.attn_q.bias",
    "layers/attention/key_bias": "blk.{l}.attn_k.bias",
    "layers/attention/value_bias": "blk.{l}.attn_v.bias",
    "layers/attention/query_norm": "blk.{l}.attn_q_norm.weight",
    "layers/attention/key_norm": "blk.{l}.attn_k_norm.weight",
    "layers/feed_forward_norm/scale": "blk.{l}.ffn_norm.weight",
    "layers/feed_forward/gate": "blk.{l}.ffn_gate.weight",
    "layers/feed_forward/up": "blk.{l}.ffn_up.weight",
    "layers/feed_forward/down": "blk.{l}.ffn_down.weight",
    "layers/feed_forward/router": "blk.{l}.ffn_gate_inp.weight",
    "layers/feed_forward/experts/gate": "blk.{l}.ffn_gate_exps.weight",
    "layers/feed_forward/experts/up": "blk.{l}.ffn_up_exps.weight",
    "layers/feed_forward/experts/down": "blk.{l}.ffn_down_exps.weight",
    "layers/feed_forward/shared/gate": "blk.{l}.ffn_gate_shexp.weight",
    "layers/feed_forward/shared/up": "blk.{l}.ffn_up_shexp.weight",
    "layers/feed_forward/shared/down": "blk.{l}.ffn_down_shexp.weight",
    "layers/feed_forward/shared_gate": "blk.{l}.ffn_gate_inp_shexp.weight",
    "final_norm/scale": "output_norm.weight",
    "head/table": "output.weight",
}
_NUM_INPUTS = {"layers/attention/output": 2}


def stored_tensors(config: LanguageModelConfig, scheme: Scheme) -> dict[str, tuple[Stored, ...]]:
    """Parameter path -> the tensors of a file that make it up.

    Raises:
        ValueError: the family has no name for a parameter (a router bias, say).
    """
    names = _GGUF if scheme == "gguf" else _HF | (_MIXTRAL if config.family == "mixtral" else {})
    stored = {}
    for path, shape in parameter_shapes(config).items():
        if path not in names:
            raise ValueError(f"{path}: family {config.family!r} has no name for this parameter in a {scheme} file.")
        stored[path] = tuple(_pieces(path, shape, names[path], config, scheme))
    return stored


def _pieces(path: str, shape: Shape, name: str, config: LanguageModelConfig, scheme: Scheme) -> list[Stored]:
    if "{l}" not in name:
        return [Stored(name, (), shape, "same")]
    pieces = []
    for layer in range(shape[0]):
        if "{e}" in name:
            pieces += [
                _piece(path, name.format(l=layer, e=expert), (layer, expert), shape[2:], config, scheme)
                for expert in range(shape[1])
            ]
        else:
            pieces.append(_piece(path, name.format(l=layer), (layer,), shape[1:], config, scheme))
    return pieces


def _piece(
    path: str, name: str, index: tuple[int, ...], shape: Shape, config: LanguageModelConfig, scheme: Scheme
) -> Stored:
    if path.endswith(("scale", "_norm", "_bias")):
        return Stored(name, index, (math.prod(shape),), "same")
    if path.endswith("shared_gate"):
        return Stored(name, index, shape if scheme == "gguf" else (1, *shape), "same")
    experts, matrix = ((), shape) if len(index) == 2 or "experts" not in path else (shape[:1], shape[1:])
    inputs = _NUM_INPUTS.get(path, 1)
    rows, columns = math.prod(matrix[inputs:]), math.prod(matrix[:inputs])
    interleaved = scheme == "gguf" and config.family in ("llama", "mistral", "mixtral")
    twisted = interleaved and path.endswith(("query", "key"))
    return Stored(name, index, (*experts, rows, columns), "interleaved" if twisted else "matrix")
