"""Memory of one device in the train step of this package, everything recomputed: from shapes, nothing fitted.

``cost_memory`` counts what the published framework holds; this counts what XLA holds for ``moe.train_step``. They
differ in what our program does otherwise: it keeps what tokens exchanged (without a pipeline), every stage holds both
tables, 2 PP - 1 micro-batches wait, gradients of one micro-batch stand whole beside their sum, and FSDP leaves nothing
resident.
"""

from jaxrl_suite.config import check
from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.cost_memory import Memory, layer_activations
from jaxrl_suite.moe.cost_model import Workload, parameter_counts, tokens_per_device
from jaxrl_suite.moe.folding import Folding

_NARROW, _WIDE = 2.0, 4.0  # bytes of bfloat16 and float32


def step_memory(model: LanguageModelConfig, folding: Folding, workload: Workload) -> Memory:
    """Bytes of a device: float32 weights, bfloat16 products, AdamW, 1F1B, ``remat="full"``; the same on every stage.

    * ``optimizer``: weights and two moments in float32, split over data ranks: 12 bytes a weight.
    * ``weights``: gathered, in bfloat16; under FSDP none outlive their use.
    * ``gradients``: the sum in float32, and those of a micro-batch's layers: in bfloat16, or of the shards in float32
      under FSDP. With a pipeline compiled programs hold one more array of 2 bytes a weight of the layers; it is counted
      because it is seen, why XLA keeps it is not known.
    * ``activations``: inputs of layers, and what was exchanged (rows that experts got, gathered over ETP, and rows that
      came back); with a pipeline inputs alone, of the 2 PP - 1 micro-batches that wait and of one that runs.
    * ``working`` or ``logits``: the larger of a layer's activations with their gradients and the last layer with its
      loss, each with the weights that FSDP gathers for it: those of two layers and the gradient of one, or the output
      table and its gradient. The two are never there at once.

    Args:
        model: shapes.
        folding: degrees.
        workload: step with ``recompute="full"``.

    Raises:
        ValueError: another level of recomputation.

    >>> from jaxrl_suite.lm import named_config
    >>> folded = Folding.parse("attention=tp2.dp8 experts=ep8.edp2 pipeline=8")
    >>> held = step_memory(named_config("mixtral-8x22b"), folded, Workload(recompute="full"))
    >>> f"{held.total / 1e9:.1f} GB"  # compiled: 42.4
    '43.1 GB'
    """
    level = workload.recompute
    check(level == "full", argument="recompute", value=level, rule="memory of the train step is known for full only")
    counts, fsdp, piped = parameter_counts(model), workload.sharding == "fsdp", folding.pp > 1
    tables = (counts.embedding + counts.head) / folding.tp
    dense, experts = counts.layers / (folding.tp * folding.pp), counts.experts / (folding.pp * folding.etp * folding.ep)
    shards = (dense + tables) / (folding.dp * folding.cp) + experts / folding.edp
    whole, layers = dense + tables + experts, dense + experts
    working, logits = _largest_moments(model, folding, workload, layer=layers * folding.pp / model.num_layers)
    return Memory(
        weights=0.0 if fsdp else _NARROW * whole,
        gradients=2 * _WIDE * shards if fsdp else _WIDE * whole + _NARROW * layers * (1 + piped),
        optimizer=3 * _WIDE * shards,
        activations=_NARROW * _kept(model, folding, workload),
        logits=logits if logits > working else 0.0,
        working=working if working >= logits else 0.0,
        overhead=0.0,
    )


def _kept(model: LanguageModelConfig, folding: Folding, workload: Workload) -> float:
    """Numbers kept for backward passes."""
    tokens, layers = tokens_per_device(folding, workload), model.num_layers / folding.pp
    if folding.pp > 1:  # and activations on their way to and from other stages
        return tokens * model.width * (2 * folding.pp * layers + 3)
    copies = model.experts_per_token * workload.capacity_factor * (folding.etp + 1)
    return tokens * model.width * layers * (1 + copies)


def _largest_moments(
    model: LanguageModelConfig, folding: Folding, workload: Workload, *, layer: float
) -> tuple[float, float]:
    """Bytes while a layer of so many weights runs backward, and while the loss does."""
    fsdp, tokens = workload.sharding == "fsdp", tokens_per_device(folding, workload)
    everything = sum(layer_activations(model, folding, workload.replace(recompute="none", weigh_output=True)))
    working = 2 * _NARROW * everything + (2 * _NARROW + _WIDE) * layer * fsdp
    head = parameter_counts(model).head / folding.tp
    return working, (_NARROW + 2 * _WIDE) * tokens * model.vocab_size + (_NARROW + _WIDE) * head * fsdp
