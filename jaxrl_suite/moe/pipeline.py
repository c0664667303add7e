"""Pipeline schedules inside one program: every stage runs the same ticks, on its own layers.

*GPipe and circular* are one schedule. With v rounds, stage p works in tick t on unit u = t - p; unit u is micro-batch
``(u div (PP·v)) · PP + u mod PP`` in round ``(u mod (PP·v)) div PP``. The last stage hands its output of round r to the
first stage, which needs it exactly one tick later, so nothing is stored on the way; all takes v·M + PP - 1 ticks.
Derivatives come from JAX, hence all micro-batches are alive at once. A stage owns rounds of consecutive layers, while
stored arrays stay in layer order (:func:`circular_layers`).

*1F1B* runs in tick t the forward pass of micro-batch t - p and the backward pass of micro-batch t - 2(PP - 1) + p.
At most 2·PP - 1 micro-batches wait for their backward pass, whatever their number, in a ring buffer. Of each it holds
inputs of layers, which then send tokens to experts again too, where the policy recomputes whole layers ("full",
"full_with_dispatch"); else the input of the stage alone, whose forward pass the backward pass repeats, so that what a
layer keeps is there for one micro-batch at a time. With ``pending="all"`` it holds all that the policy keeps.
The first PP - 1 ticks have no backward pass on any stage and the last PP - 1 no forward pass, so they run without: each
kind of pass runs M + PP - 1 times.

Embedding and head run on every stage and count on the first and last only, as all stages are one program.

References:
    Huang et al. (2018), GPipe, arXiv:1811.06965; Narayanan et al. (2021), arXiv:2104.04473, section 2.2 (1F1B and
    interleaving).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.lm import embed
from jaxrl_suite.moe.config import HParams, MoEConfig
from jaxrl_suite.moe.hooks import tensor_parallel
from jaxrl_suite.moe.kept_layers import backward_layers, empty_ring, forward_layers
from jaxrl_suite.moe.model import (
    Batch,
    Layout,
    Loss,
    ObjectiveParts,
    gather_outside_layers,
    make_layer,
    objective_parts,
    run_layers,
    token_log_probs,
    total_objective,
)
from jaxrl_suite.moe.variance import axis_index, axis_size, vary, zeros_of
from jaxrl_suite.types import Array, Params


def num_ticks(num_microbatches: int, stages: int, rounds: int = 1) -> int:
    """Times that each stage runs a forward pass, and as often a backward pass, those without a micro-batch included.

    The same for every schedule: 1F1B takes PP - 1 ticks more from end to end, in which it runs one of the two alone.

    >>> num_ticks(8, 4), num_ticks(8, 4, rounds=2)
    (11, 19)
    """
    return rounds * num_microbatches + stages - 1


def repeats_stages(config: MoEConfig, stages: int) -> bool:
    """Whether each backward pass of 1F1B repeats the forward pass of its whole stage, whose input alone is kept."""
    return _keeps_inputs(config, stages) and not config.remat.startswith("full")


def repeats_exchanges(config: MoEConfig, stages: int) -> bool:
    """Whether layers that are recomputed send tokens to their experts again; what came back is never needed."""
    return config.remat == "full_with_dispatch" or (config.remat == "full" and _keeps_inputs(config, stages))


def _keeps_inputs(config: MoEConfig, stages: int) -> bool:
    return stages > 1 and config.schedule == "1f1b" and config.pending == "inputs"


def circular_layers(leaf: Array, stages: int, rounds: int) -> Array:
    """Layers in the order in which contiguous pipeline shards hold the rounds of each stage.

    Args:
        leaf: [L, ...] in layer order; stage p of round r owns layers (r·PP + p)·L/(PP·v) and following.
        stages: PP.
        rounds: v.

    Returns:
        [L, ...], a permutation; rounds of a stage follow each other.
    """
    chunks = leaf.reshape(rounds, stages, -1, *leaf.shape[1:])
    return chunks.swapaxes(0, 1).reshape(leaf.shape)


def pipeline_gradients(
    params: Params,
    dtypes: Params,
    batches: Batch,
    count: Array,
    hparams: HParams,
    loss: Loss,
    config: MoEConfig,
    layout: Layout,
) -> tuple[Params, ObjectiveParts]:
    """Gradients of all micro-batches on one rank of a pipeline, without reduction between ranks.

    Args:
        params: compute weights of this stage; layers in the order of :func:`circular_layers`.
        dtypes: of the stored weights, in which gradients are summed.
        batches: [M, b, T], the same on every stage.
        count: tokens that count in the whole step.
        hparams: traced hyperparameters.
        loss: see ``train_step``.
        config: model and schedule.
        layout: axes; ``layout.pp`` is not empty.
    """
    if config.schedule == "1f1b":
        return _one_forward_one_backward(params, dtypes, batches, count, hparams, loss, config, layout)
    # The transposed loop over ticks sums in the dtype of what is differentiated.
    params = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, dtypes)
    gradient = jax.grad(_gpipe_objective, has_aux=True)
    return gradient(params, batches, count, hparams, loss, config, layout)


def _microbatch(batches: Batch, index: Array) -> Batch:
    last = batches.inputs.shape[0] - 1
    return jax.tree.map(lambda leaf: leaf[jnp.clip(index, 0, last)], batches)


def _hand_on(x: Array, layout: Layout, *, back: bool = False) -> Array:
    """Sends activations to the next stage (or gradients to the previous one), the ends joined."""
    stages = axis_size(layout.pp)
    pairs = [(stage, (stage + 1) % stages) for stage in range(stages)]
    return jax.lax.ppermute(x, layout.pp, [(b, a) for a, b in pairs] if back else pairs)


def _mask_sums(sums: Any, valid: Array) -> Any:
    return jax.tree.map(lambda leaf: leaf * valid.astype(leaf.dtype), sums)


def _gpipe_objective(
    params: Params, batches: Batch, count: Array, hparams: HParams, loss: Loss, config: MoEConfig, layout: Layout
) -> tuple[Array, ObjectiveParts]:
    params = gather_outside_layers(params, layout)  # wide, as the transposed loop sums in their dtype
    stages, stage, rounds = axis_size(layout.pp), axis_index(layout.pp), config.virtual_stages
    number = batches.inputs.shape[0]
    layers = jax.tree.map(lambda leaf: leaf.reshape(rounds, -1, *leaf.shape[1:]), params["layers"])
    parallel = tensor_parallel(layout.layer.tp)

    def tick(received: Array, t: Array) -> tuple[Array, tuple[Array, Any]]:
        unit = t - stage
        within = unit % (stages * rounds)
        index, turn = unit // (stages * rounds) * stages + within % stages, within // stages
        valid = (unit >= 0) & (unit < number * rounds)
        batch = _microbatch(batches, index if rounds > 1 else unit)
        turn = jnp.clip(turn, 0, rounds - 1)
        entering = embed(params, batch.inputs, config=config.model, parallel=parallel)
        x = jnp.where((stage == 0) & (turn == 0), entering, received)
        mine = jax.tree.map(lambda leaf: leaf[turn] if rounds > 1 else leaf[0], layers)
        x, sums = run_layers(mine, x, batch, config=config, layout=layout)
        return _hand_on(x, layout), (x, _mask_sums(sums, valid))

    body = jax.checkpoint(tick, prevent_cse=False) if config.remat.startswith("full") else tick
    ticks = jnp.arange(num_ticks(number, stages, rounds), dtype=jnp.int32)
    start = vary(_no_activations(params, batches, config, layout), layout.mesh)
    _, (outputs, sums) = jax.lax.scan(body, start, ticks)
    finished = jnp.array([_last_tick(index, stages, rounds) for index in range(number)], jnp.int32)
    outputs = outputs[finished]

    def finish(_: None, item: tuple[Array, Batch]) -> tuple[None, Array]:
        x, batch = item
        log_probs = token_log_probs(params, x, batch.targets, config=config, layout=layout)
        return None, loss(log_probs, batch)

    totals = jax.lax.scan(jax.checkpoint(finish, prevent_cse=False), None, (outputs, batches))[1]
    totals = jnp.where(stage == stages - 1, totals, 0)
    by_microbatch = _sums_by_microbatch(sums, stage, number, stages, rounds)

    def add(whole: ObjectiveParts, item: tuple[Array, Any]) -> tuple[ObjectiveParts, None]:
        part = objective_parts(*item, count, config=config, layout=layout, num_parts=number)
        return jax.tree.map(jnp.add, whole, part), None

    whole = jax.lax.scan(add, _no_parts(add, totals, by_microbatch), (totals, by_microbatch))[0]
    return total_objective(whole, config, hparams), whole


def _no_parts(add: Any, totals: Array, sums: Any) -> ObjectiveParts:
    """Zero objective parts with the types that ``add`` returns."""
    first = jax.tree.map(lambda leaf: leaf[0], (totals, sums))
    zero = ObjectiveParts(*(jnp.zeros((), totals.dtype) for _ in ObjectiveParts._fields))
    return zeros_of(lambda: add(zero, first)[0])


def _last_tick(index: int, stages: int, rounds: int) -> int:
    """Tick in which the last stage finishes the last round of a micro-batch."""
    unit = index // stages * stages * rounds + (rounds - 1) * stages + index % stages
    return (unit if rounds > 1 else index) + stages - 1


def _sums_by_microbatch(sums: Any, stage: Array, number: int, stages: int, rounds: int) -> Any:
    """Router sums [ticks, l, ...] to [M, v·l, ...], layers of a stage in the order in which it holds them."""
    index = jnp.arange(number, dtype=jnp.int32)
    first = index // stages * stages * rounds + index % stages if rounds > 1 else index

    def pick(leaf: Array) -> Array:
        parts = [leaf[first + turn * stages + stage] for turn in range(rounds)]
        return jnp.concatenate(parts, axis=1) if rounds > 1 else parts[0]

    return jax.tree.map(pick, sums)


def _no_activations(params: Params, batches: Batch, config: MoEConfig, layout: Layout) -> Array:
    shape = jax.eval_shape(
        lambda p, b: embed(p, b, config=config.model, parallel=tensor_parallel(layout.layer.tp)),
        params,
        batches.inputs[0],
    )
    return jnp.zeros(shape.shape, shape.dtype)


class _Ticking(NamedTuple):
    """What 1F1B carries from tick to tick.

    Attributes:
        received: activations from the previous stage.
        returned: gradient of the activations handed on, from the next stage.
        waiting: what is kept of the micro-batches whose backward pass is to come, a :class:`Ring` or inputs of the
            stage [2·PP - 1, ...].
        gradients: sum so far, in the dtypes of the stored weights.
        totals: objective so far.
    """

    received: Array
    returned: Array
    waiting: Any
    gradients: Params
    totals: ObjectiveParts


def _one_forward_one_backward(
    params: Params,
    dtypes: Params,
    batches: Batch,
    count: Array,
    hparams: HParams,
    loss: Loss,
    config: MoEConfig,
    layout: Layout,
) -> tuple[Params, ObjectiveParts]:
    stages, stage = axis_size(layout.pp), axis_index(layout.pp)
    number, slots = batches.inputs.shape[0], 2 * axis_size(layout.pp) - 1
    dtype = config.model.activation_dtype(params["embed"]["table"].dtype)
    repeats = repeats_stages(config, stages)
    if repeats_exchanges(config, stages):
        config = config.replace(remat="full_with_dispatch")
    layers, outside = params["layers"], {name: part for name, part in params.items() if name != "layers"}
    layer = functools.partial(make_layer, config=config, layout=layout)

    def whole(outside: Params) -> Params:
        return gather_outside_layers(outside, layout, dtype)

    def enter(outside: Params, received: Array, batch: Batch) -> Array:
        entering = embed(outside, batch.inputs, config=config.model, parallel=tensor_parallel(layout.layer.tp))
        return jnp.where(stage == 0, entering, received)

    def leave(outside: Params, x: Array, sums: Any, batch: Batch, valid: Array) -> tuple[Array, ObjectiveParts]:
        """What one stage adds to the objective for one micro-batch, from what its layers yielded."""
        total = loss(token_log_probs(outside, x, batch.targets, config=config, layout=layout), batch)
        total = jnp.where((stage == stages - 1) & valid, total, 0)
        parts = objective_parts(total, _mask_sums(sums, valid), count, config=config, layout=layout, num_parts=number)
        return total_objective(parts, config, hparams), parts

    def forward_tick(carry: _Ticking, t: Array) -> tuple[_Ticking, Array]:
        batch, slot = _microbatch(batches, t - stage), (t - stage) % slots
        entering = enter(whole(outside), carry.received, batch)
        if repeats:
            x = run_layers(layers, entering, batch, config=config, layout=layout)[0]
            waiting = jax.lax.dynamic_update_index_in_dim(carry.waiting, carry.received, slot, 0)
        else:
            x, waiting = forward_layers(layer(batch), layers, entering, batch, ring=carry.waiting, slot=slot)
        return carry._replace(received=_hand_on(x, layout), waiting=waiting), x

    def backward_tick(carry: _Ticking, t: Array, x: Array) -> _Ticking:
        """``x``: what the layers yielded; only the last stage needs it, and there in the tick of its forward pass."""
        index = t - 2 * (stages - 1) + stage
        valid, slot, ring = (index >= 0) & (index < number), index % slots, carry.waiting
        batch = _microbatch(batches, index)
        tables, scatter = jax.vjp(whole, outside)
        received = ring[slot] if repeats else jnp.zeros_like(x)  # which the gradient of entering does not depend on
        entering, unembed = jax.vjp(lambda w, r: enter(w, r, batch), tables, received)
        if repeats:
            slot = jnp.zeros_like(slot)
            x, ring = forward_layers(layer(batch), layers, entering, batch, ring=empty, slot=slot)
        sums = jax.tree.map(lambda leaf: leaf[slot], ring.sums)
        objective, unhead, parts = jax.vjp(lambda w, x, s: leave(w, x, s, batch, valid), tables, x, sums, has_aux=True)
        d_head, d_x, d_sums = unhead(jnp.ones_like(objective))
        # The last stage has no successor; bubbles pass no gradient.
        d_x = d_x + jnp.where(valid & (stage < stages - 1), carry.returned, 0).astype(d_x.dtype)
        total = carry.gradients
        d_x, d_layers = backward_layers(
            recipe, layers, (d_x, d_sums), batch, ring=ring, slot=slot, gradients=total["layers"], valid=valid
        )
        d_embedding, d_received = unembed(d_x)
        (d_outside,) = scatter(jax.tree.map(jnp.add, d_embedding, d_head))
        gradients = {
            name: jax.tree.map(lambda t, g: t + jnp.where(valid, g, 0).astype(t.dtype), total[name], part)
            for name, part in d_outside.items()
        }
        return carry._replace(
            returned=_hand_on(d_received, layout, back=True),
            gradients={**gradients, "layers": d_layers},
            totals=jax.tree.map(jnp.add, carry.totals, parts),
        )

    def tick(carry: _Ticking, t: Array, *, forward: bool, backward: bool) -> tuple[_Ticking, None]:
        x = carry.received
        if forward:
            carry, x = forward_tick(carry, t)
        if backward:
            carry = backward_tick(carry, t, x)
        return carry, None

    nothing = vary(_no_activations(params, batches, config, layout), layout.mesh)
    first = _microbatch(batches, jnp.int32(0))
    empty, recipe = empty_ring(layer(first), layers, nothing, first, slots=1 if repeats else slots, mesh=layout.mesh)
    sums = jax.tree.map(lambda leaf: leaf[0], empty.sums)
    totals = zeros_of(lambda: leave(whole(outside), nothing, sums, first, jnp.bool_(True))[1])
    waiting = vary(jnp.zeros((slots, *nothing.shape), nothing.dtype), layout.mesh) if repeats else empty
    zeros = jax.tree.map(lambda leaf, dtype: jnp.zeros_like(leaf, dtype=dtype), params, dtypes)
    carry = _Ticking(nothing, nothing, waiting, zeros, totals)
    # Whatever the stage, nothing goes back in the first PP - 1 ticks and nothing forth in the last PP - 1.
    start = 0
    for length, forward, backward in ((stages - 1, True, False), (number, True, True), (stages - 1, False, True)):
        ticks = jnp.arange(start, start + length, dtype=jnp.int32)
        carry = jax.lax.scan(functools.partial(tick, forward=forward, backward=backward), carry, ticks)[0]
        start += length
    return carry.gradients, carry.totals
