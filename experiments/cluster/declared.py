"""FLOPs that the train step is known to spend beyond what the model needs, by reason."""

from jaxrl_suite.moe.config import MoEConfig
from jaxrl_suite.moe.cost_model import token_flops
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.pipeline import num_ticks, repeats_stages

# Forward passes of a layer that the backward pass repeats, by policy; the others repeat no product of a layer.
_REPEATS = {"full": 1, "full_with_dispatch": 1}
_LAST = 1 / 3  # of the three products of experts: no backward pass of a layer needs what the last yields


def declared_flops(config: MoEConfig, folding: Folding, *, sequence: int, global_batch: int) -> dict[str, float]:
    """FLOPs of one step over all devices.

    * ``model``: three forward passes, attention counted causally; what MFU counts.
    * ``recomputation``: forward passes repeated. The policy ``experts`` repeats two of the three products of experts,
      ``full`` all of a layer but the third, and GPipe under it that of a stage once more; under any other policy 1F1B
      repeats that of a stage, since it keeps only its input; blockwise attention recomputes its scores in the backward
      pass (half a forward pass).
    * ``head_on_every_stage``: all stages are one program, so each computes the output table, which counts on the last.
    * ``idle_ticks``: passes of a stage without a micro-batch compute all the same: (v m + PP - 1) / (v m) times
      everything that runs in a tick, in GPipe and in 1F1B (v = 1).
    * ``capacity``: slots of experts over the even share; negative below it.

    Args:
        config: model and step.
        folding: degrees.
        sequence: tokens of a sequence.
        global_batch: sequences of a step.
    """
    tokens, stages = sequence * global_batch, folding.pp
    flops = token_flops(config.model, sequence)
    factor = config.capacity_factor or 1.0
    layers = tokens * (flops.forward - flops.head)
    surplus = tokens * flops.experts * (factor - 1)
    in_ticks = config.schedule == "1f1b" and stages > 1
    repeats = _REPEATS.get(config.remat, 0)
    of_experts = 1 - _LAST if config.remat == "experts" else -_LAST * repeats
    recomputed = of_experts * tokens * factor * flops.experts
    if stages > 1:  # under "full" a tick of GPipe is checkpointed as a whole
        repeats += repeats_stages(config, stages) if in_ticks else repeats
    recomputed += repeats * (layers + surplus) + 0.5 * tokens * flops.attention
    head = 3 * tokens * flops.head
    if stages > 1 and not in_ticks:  # the last stage's outputs wait for the head, which is then checkpointed
        recomputed += tokens * flops.head * stages
    units = config.num_microbatches * config.virtual_stages
    idle = num_ticks(config.num_microbatches, stages, config.virtual_stages) / units - 1
    running = 3 * (layers + surplus) + recomputed + (stages * head if in_ticks else 0.0)
    return {
        "model": tokens * flops.train,
        "recomputation": recomputed,
        "head_on_every_stage": (stages - 1) * head,
        "idle_ticks": idle * running,
        "capacity": 3 * surplus,
    }
