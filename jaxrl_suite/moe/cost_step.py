"""Memory of one device in the train step of this package, by what is recomputed: from shapes, nothing fitted.

``cost_memory`` counts what the published framework holds; this counts what XLA holds for ``moe.train_step``. They
differ in what our program does otherwise: it keeps the rows that experts got (without a pipeline, or if nothing but
element-wise work is repeated), every stage holds both tables, 2 PP - 1 micro-batches wait, and FSDP leaves nothing
resident.
"""

from jaxrl_suite.config import check
from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.lm.scores import chunk_rows
from jaxrl_suite.moe.cost_memory import Memory, MemoryModel, layer_activations
from jaxrl_suite.moe.cost_model import Recompute, Workload, parameter_counts, tokens_per_device
from jaxrl_suite.moe.folding import Folding

_NARROW, _WIDE = 2.0, 4.0  # bytes of bfloat16 and float32
_LEVELS: tuple[Recompute, ...] = ("activation", "full")


def step_memory(model: LanguageModelConfig, folding: Folding, workload: Workload) -> Memory:
    """Bytes of a device: float32 weights, bfloat16 products, AdamW, 1F1B; the same on every stage.

    ``recompute="full"`` is ``remat="full"``, and ``"activation"`` ``remat="elementwise"`` with ``pending="all"``.

    * ``optimizer``: weights and two moments in float32, split over data ranks: 12 bytes a weight.
    * ``weights``: gathered, in bfloat16; under FSDP none outlive their use.
    * ``gradients``: the sum in float32; without a pipeline those of a micro-batch's layers too, in bfloat16, or of the
      shards in float32 under FSDP.
    * ``activations``: inputs of layers, and rows that experts got, gathered over ETP; with a pipeline inputs alone, of
      the 2 PP - 1 micro-batches that wait. With ``"activation"`` all that
      products yielded besides, of as many; a ring of context ranks keeps their keys and partial results too.
    * ``working`` or ``logits``: the larger of a layer's activations with their gradients and the last layer with its
      loss, each with the weights that FSDP gathers for it or that a pipeline reads and their gradient: those of two
      layers and the gradient of one, or the output table and its gradient. The two are never there at once. Logits are
      those of all tokens, or of a chunk where the loss takes its gradient on the way (no tensor ranks, no pipeline).

    Args:
        model: shapes.
        folding: degrees.
        workload: step with ``recompute="full"`` or ``"activation"``.

    Raises:
        ValueError: another level of recomputation.

    >>> from jaxrl_suite.lm import named_config
    >>> folded = Folding.parse("attention=tp2.dp8 experts=ep8.edp2 pipeline=8")
    >>> held = step_memory(named_config("mixtral-8x22b"), folded, Workload(recompute="activation"))
    >>> f"{held.total / 1e9:.1f} GB"  # compiled: 77.8
    '76.8 GB'
    """
    level = workload.recompute
    rule = f"memory of the train step is known for {', '.join(_LEVELS)} only"
    check(level in _LEVELS, argument="recompute", value=level, rule=rule)
    workload = workload.replace(weigh_output=False)  # whatever the paper's framework did
    counts, fsdp, piped = parameter_counts(model), workload.sharding == "fsdp", folding.pp > 1
    tables = (counts.embedding + counts.head) / folding.tp
    dense, experts = counts.layers / (folding.tp * folding.pp), counts.experts / (folding.pp * folding.etp * folding.ep)
    shards = (dense + tables) / (folding.dp * folding.cp) + experts / folding.edp
    whole, layers = dense + tables + experts, dense + experts
    micro_batch = 0.0 if piped else _WIDE * shards if fsdp else _NARROW * layers
    working, logits = _largest_moments(model, folding, workload, layer=layers * folding.pp / model.num_layers)
    return Memory(
        weights=0.0 if fsdp else _NARROW * whole,
        gradients=_WIDE * (shards if fsdp else whole) + micro_batch,
        optimizer=3 * _WIDE * shards,
        activations=_NARROW * _kept(model, folding, workload),
        logits=logits if logits > working else 0.0,
        working=working if working >= logits else 0.0,
        overhead=0.0,
    )


TRAIN_STEP = MemoryModel(step_memory, _LEVELS, interleaved=False)  # its 1F1B has one chunk a stage


def _kept(model: LanguageModelConfig, folding: Folding, workload: Workload) -> float:
    """Numbers kept for backward passes, and activations on their way to and from other stages."""
    tokens, layers = tokens_per_device(folding, workload), model.num_layers / folding.pp
    copies = model.experts_per_token * workload.capacity_factor * folding.etp
    layer = tokens * model.width * (1 + copies * (folding.pp == 1))
    if workload.recompute == "activation":
        heads = model.num_heads + 2 * model.num_kv_heads
        ring = (folding.cp - 1) * tokens * heads * model.head_dim * (workload.context == "ring")
        layer = sum(layer_activations(model, folding, workload)) + ring
    waiting = 2 * folding.pp - 1
    return layer * layers * waiting + 3 * tokens * model.width * (folding.pp > 1)


def _largest_moments(
    model: LanguageModelConfig, folding: Folding, workload: Workload, *, layer: float
) -> tuple[float, float]:
    """Bytes while a layer of so many weights runs backward, and while the loss does."""
    fsdp, tokens, piped = workload.sharding == "fsdp", tokens_per_device(folding, workload), folding.pp > 1
    everything = sum(layer_activations(model, folding, workload.replace(recompute="none")))
    working = 2 * _NARROW * everything + (2 * _NARROW * (fsdp or piped) + _WIDE * fsdp) * layer
    head = parameter_counts(model).head / folding.tp
    rows = tokens if piped or folding.tp > 1 else chunk_rows(round(tokens), model.vocab_size)
    return working, (_NARROW + 2 * _WIDE) * rows * model.vocab_size + (_NARROW + _WIDE) * head * (fsdp or piped)
