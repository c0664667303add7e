"""One decoder-only transformer for every use: Llama/SmolLM2, Mistral, Mixtral, Qwen2(-MoE), Qwen3(-MoE).

The decoder is three pure functions over a nested dict of arrays, which read their sizes from the arrays, so that the
same code runs on whole arrays and on shards inside ``shard_map``::

    x      = embed(params, tokens, config=..., parallel=...)                          # [B, T, D]
    x, aux = block(layer, x, positions, segments, config=..., feed_forward=..., attend=..., parallel=...)
    logits = head(params, x, config=..., parallel=...)                                # [B, T, V]

``layer`` is one entry of ``params["layers"]`` (the leading axis L removed); ``forward`` scans over all of them and
``apply`` adds the head. ``feed_forward(layer["feed_forward"], x) -> (y, aux)`` gets the normalised residual stream
before any hook. Default slots: :func:`dense_feed_forward`, :func:`sparse_feed_forward`, :func:`blockwise_attend`.

Parameter table, the canonical layout of checkpoints, foldings and conversion (``parameter_shapes(config)``):

=================================== ================ ==================================================
path                                shape            when
=================================== ================ ==================================================
embed/table                         [V, D]
layers/attention_norm/scale         [L, D]
layers/attention/query              [L, D, Hq, C]    C is the width of a head
layers/attention/key, value         [L, D, Hk, C]
layers/attention/output             [L, Hq, C, D]
layers/attention/query_bias         [L, Hq, C]       qkv_bias
layers/attention/key_bias, ...      [L, Hk, C]       qkv_bias (key_bias, value_bias)
layers/attention/query_norm         [L, C]           qk_norm
layers/attention/key_norm           [L, C]           qk_norm
layers/feed_forward_norm/scale      [L, D]
layers/feed_forward/gate, up        [L, D, F]        dense
layers/feed_forward/down            [L, F, D]        dense
layers/feed_forward/router          [L, D, E]        sparse
layers/feed_forward/router_bias     [L, E]           sparse and router_bias (float32, selection only)
layers/feed_forward/experts/gate    [L, E, D, F]     sparse (and experts/up)
layers/feed_forward/experts/down    [L, E, F, D]     sparse
layers/feed_forward/shared/gate     [L, D, S]        shared_width (and shared/up)
layers/feed_forward/shared/down     [L, S, D]        shared_width
layers/feed_forward/shared_gate     [L, D]           shared_gate
final_norm/scale                    [D]
head/table                          [V, D]           unless tied_head
=================================== ================ ==================================================
"""

from jaxrl_suite.distributions import draw_token as draw
from jaxrl_suite.lm.attention import attention_with_normaliser, blockwise_attend
from jaxrl_suite.lm.byte_tokenizer import ByteTokenizer
from jaxrl_suite.lm.cache import DecodeParams, DecodeState, decode_params, decode_step, decoder_law, prefill
from jaxrl_suite.lm.config import LanguageModelConfig, named_config
from jaxrl_suite.lm.decoder import (
    apply,
    block,
    block_with_state,
    embed,
    final_norm,
    forward,
    head,
    head_table,
    layer_groups,
    logits_of,
    rematerialised,
    sequence_positions,
)
from jaxrl_suite.lm.export import save_pretrained
from jaxrl_suite.lm.feed_forward import (
    RouterOutput,
    default_feed_forward,
    dense_feed_forward,
    router_logits,
    shared_expert,
    sparse_feed_forward,
    swiglu,
)
from jaxrl_suite.lm.generation import generate_and_keep, generate_from_law, left_pad, row_keys
from jaxrl_suite.lm.layers import LowRank, RowMajor, project, rms_norm, row_major, vary_like
from jaxrl_suite.lm.likelihood import log_probs, weighted_log_probs
from jaxrl_suite.lm.lora import LoraConfig, apply_lora, init_lora, merge_lora
from jaxrl_suite.lm.model import (
    LanguageModel,
    early_gradient,
    generate,
    policy,
    sequence_law,
    token_log_probs,
    weighted_token_log_probs,
)
from jaxrl_suite.lm.parameters import flatten, init_params, num_parameters, parameter_shapes, unflatten
from jaxrl_suite.lm.pretrained import Pretrained, load_pretrained
from jaxrl_suite.lm.rope import rope_frequencies, rope_tables, rotate
from jaxrl_suite.lm.routing import route, top_k_indices
from jaxrl_suite.lm.sampling import Sampling, sampling_logits
from jaxrl_suite.lm.scores import weighted_log_prob
from jaxrl_suite.lm.streaming import prepare_decode, stream
from jaxrl_suite.lm.supervised import (
    SupervisedBatch,
    SupervisedState,
    init_supervised,
    jit_supervised_step,
    supervised_loss,
    supervised_step,
    text_rows,
)
from jaxrl_suite.lm.tokenizer import Tokenizer

__all__ = [
    "ByteTokenizer",
    "DecodeParams",
    "DecodeState",
    "LanguageModel",
    "LanguageModelConfig",
    "LoraConfig",
    "LowRank",
    "Pretrained",
    "RouterOutput",
    "RowMajor",
    "Sampling",
    "SupervisedBatch",
    "SupervisedState",
    "Tokenizer",
    "apply",
    "apply_lora",
    "attention_with_normaliser",
    "block",
    "block_with_state",
    "blockwise_attend",
    "decode_params",
    "decode_step",
    "decoder_law",
    "default_feed_forward",
    "dense_feed_forward",
    "draw",
    "early_gradient",
    "embed",
    "final_norm",
    "flatten",
    "forward",
    "generate",
    "generate_and_keep",
    "generate_from_law",
    "head",
    "head_table",
    "init_lora",
    "init_params",
    "init_supervised",
    "jit_supervised_step",
    "layer_groups",
    "left_pad",
    "load_pretrained",
    "log_probs",
    "logits_of",
    "merge_lora",
    "named_config",
    "num_parameters",
    "parameter_shapes",
    "policy",
    "prefill",
    "prepare_decode",
    "project",
    "rematerialised",
    "rms_norm",
    "rope_frequencies",
    "rope_tables",
    "rotate",
    "route",
    "router_logits",
    "row_keys",
    "row_major",
    "sampling_logits",
    "save_pretrained",
    "sequence_law",
    "sequence_positions",
    "shared_expert",
    "sparse_feed_forward",
    "stream",
    "supervised_loss",
    "supervised_step",
    "swiglu",
    "text_rows",
    "token_log_probs",
    "top_k_indices",
    "unflatten",
    "vary_like",
    "weighted_log_prob",
    "weighted_log_probs",
    "weighted_token_log_probs",
]
