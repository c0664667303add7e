"""Time of a training step from counts and a dozen constants; differentiable in the constants.

    micro-batch = dense FLOPs / (peak gemm) + core attention / (peak attention) + expert FLOPs / (peak gemm e)
                  + element-wise bytes / memory bandwidth + exposed TP, CP, EP, ETP, PP and weight traffic
                  + CP > 1: unhidden merges of partial attention / memory bandwidth
    e           = r / (r + r0) · w / (w + w0)          r rows, w hidden columns of one expert on one device
    step        = m · micro-batch · (1 + (PP - 1) / (m v)) + exposed gradient traffic

The functions work on NumPy numbers in float64, on arrays of rows (a leading axis on every count), and on JAX arrays
under ``jit``, ``vmap`` and ``grad``.

References:
    Liu et al. (2025), MoE Parallel Folding, arXiv:2504.14960, tables 3-5 (what the constants are fitted to).
    Narayanan et al. (2021), arXiv:2104.04473, section 2.2 (bubble of an interleaved pipeline).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.lm import LanguageModelConfig
from jaxrl_suite.moe.cost_model import Work, Workload, device_work
from jaxrl_suite.moe.cost_traffic import Link, Traffic, traffic
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.hardware import Hardware

Number = Any  # a float, a NumPy or a JAX array


class Constants(NamedTuple):
    """What a machine and its software reach; every field positive.

    node: fraction of the peak inside a node that collectives reach.
    network: fraction of the peak between nodes that collectives reach.
    gemm: fraction of the FLOP peak that large matrix products reach.
    attention: fraction of the FLOP peak that causal core attention reaches.
    half_rows: rows of an expert at which its product reaches half of its ceiling.
    half_width: hidden columns of an expert at which its product reaches half of its ceiling.
    memory: fraction of the memory bandwidth that permutation, norms and activations reach.
    tp_exposed: part of the tensor-parallel traffic that is not hidden behind products.
    cp_exposed: part of the context traffic that is not hidden behind core attention.
    cp_merges: what attention over context ranks adds to a layer whatever their number, in units of one merge of a
        partial result that nothing hides. Fitted to one model's rows from 16,384 tokens on.
    weights_hidden: part of a micro-batch behind which the traffic of sharded weights can hide where TP = 1. With
        tensor parallelism nothing is hidden, since its own traffic needs the products in a fixed order.
    gradients_exposed: part of the gradient traffic at the end of a step that is not hidden.
    interleave: effective number of chunks v by which interleaving divides the bubble.
    """

    node: Number = 0.74
    network: Number = 0.82
    gemm: Number = 0.69
    attention: Number = 0.41
    half_rows: Number = 356.0
    half_width: Number = 643.0
    memory: Number = 0.8
    tp_exposed: Number = 0.68
    cp_exposed: Number = 0.5
    cp_merges: Number = 1.0
    weights_hidden: Number = 0.5
    gradients_exposed: Number = 0.5
    interleave: Number = 1.9


class Counts(NamedTuple):
    """Everything that the time of a step depends on besides the constants; a leading axis makes a table of rows."""

    work: Work
    traffic: Traffic


class StepTime(NamedTuple):
    """Seconds of one step by what they are spent on; they add up to the step.

    Attributes:
        projections: matrices of attention, shared experts and router.
        head: output vocabulary.
        attention: core attention.
        experts: products of routed experts.
        elementwise: permutation, norms, activation functions.
        recompute: products that the backward pass repeats.
        tp: exposed tensor-parallel traffic.
        cp: exposed context traffic, and the element-wise work that context parallelism adds.
        ep: exchange of tokens.
        etp: traffic inside expert tensor groups.
        pp: activations between stages.
        weights: exposed traffic of sharded weights.
        bubble: devices that wait for the pipeline to fill and drain.
        gradients: exposed gradient traffic at the end.
    """

    projections: Number
    head: Number
    attention: Number
    experts: Number
    elementwise: Number
    recompute: Number
    tp: Number
    cp: Number
    ep: Number
    etp: Number
    pp: Number
    weights: Number
    bubble: Number
    gradients: Number

    @property
    def total(self) -> Number:
        """Seconds of the step."""
        return sum(self[1:], self[0])


def counts_of(
    model: LanguageModelConfig,
    folding: Folding,
    workload: Workload,
    *,
    node_size: int = 8,
    expert_stride: int | None = None,
) -> Counts:
    """Work and traffic of one device; see :func:`device_work` and :func:`traffic`."""
    bytes_sent = traffic(model, folding, workload, node_size=node_size, expert_stride=expert_stride)
    return Counts(device_work(model, folding, workload), bytes_sent)


def stack_counts(rows: Sequence[Counts]) -> Counts:
    """A table of rows: every count becomes a float64 array [num_rows]."""
    return jax.tree.map(lambda *values: np.array(values, np.float64), *rows)


def step_time(counts: Counts, constants: Constants, hardware: Hardware) -> StepTime:
    """Predicted time of a step.

    Args:
        counts: of one row, or of a table of rows.
        constants: what the machine reaches.
        hardware: peaks.

    Returns:
        Seconds by part, each with the shape of a count.
    """
    work, sent = counts.work, counts.traffic
    maximum = jnp.maximum if _is_jax((counts, constants)) else np.maximum

    def seconds(link: Link) -> Number:
        node = link.node / (hardware.node_bandwidth * constants.node)
        return maximum(node, link.network / (hardware.network_bandwidth * constants.network))

    rate = hardware.peak_flops * constants.gemm
    rows = work.expert_rows / (work.expert_rows + constants.half_rows)
    width = work.expert_width / (work.expert_width + constants.half_width)
    projections, experts = work.projection_flops / rate, work.expert_flops / (rate * rows * width)
    attention = work.attention_flops / (hardware.peak_flops * constants.attention)
    memory_rate = hardware.memory_bandwidth * constants.memory
    repeated = (work.repeated_attention * (projections + attention) + work.repeated_moe * experts) / 3
    micro = StepTime(
        projections=projections,
        head=work.head_flops / rate,
        attention=attention,
        experts=experts,
        elementwise=work.hbm_bytes / memory_rate,
        recompute=repeated,
        tp=constants.tp_exposed * seconds(sent.tp),
        cp=constants.cp_exposed * seconds(sent.cp) + constants.cp_merges * work.merge_bytes / memory_rate,
        ep=seconds(sent.ep),
        etp=seconds(sent.etp),
        pp=seconds(sent.pp),
        weights=0.0,
        bubble=0.0,
        gradients=0.0,
    )
    hidden = constants.weights_hidden * work.hides_weights * micro.total
    micro = micro._replace(weights=maximum(seconds(sent.weights) - hidden, 0.0))
    busy = StepTime(*(part * work.num_microbatches for part in micro))
    gradients = seconds(sent.dense_gradients) + seconds(sent.expert_gradients)
    return busy._replace(
        bubble=micro.total * (work.num_stages - 1) / constants.interleave,
        gradients=constants.gradients_exposed * gradients,
    )


def model_flops_utilisation(counts: Counts, seconds: Number, hardware: Hardware) -> Number:
    """MFU, a fraction: model FLOPs of a step over what all devices could have done in its time."""
    return counts.work.model_flops / (seconds * counts.work.num_devices * hardware.peak_flops)


def _is_jax(tree: Any) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree))
