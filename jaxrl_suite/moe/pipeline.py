"""Pipeline schedules inside one program: every stage runs the same ticks, on its own layers.

*GPipe and circular* are one schedule. With v rounds, stage p works in tick t on unit u = t - p; unit u is micro-batch
``(u div (PP·v)) · PP + u mod PP`` in round ``(u mod (PP·v)) div PP``. The last stage hands its output of round r to the
first stage, which needs it exactly one tick later, so nothing is stored on the way; all takes v·M + PP - 1 ticks.
Derivatives come from JAX, hence all micro-batches are alive at once. A stage owns rounds of consecutive layers, while
stored arrays stay in layer order (:func:`circular_layers`).

*1F1B* runs in tick t the forward pass of micro-batch t - p and the backward pass of micro-batch t - 2(PP - 1) + p.
At most 2·PP - 1 micro-batches wait for their backward pass, whatever their number, in a ring buffer. Of each it holds
inputs of layers, which then repeat the exchange of tokens too, where the policy recomputes whole layers ("full",
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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.lm import embed
from jaxrl_suite.moe.config import HParams, MoEConfig
from jaxrl_suite.moe.hooks import tensor_parallel
from jaxrl_suite.moe.model import (
    Batch,
    Layout,
    Loss,
    ObjectiveParts,
    gather_outside_layers,
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
    """Whether layers that are recomputed exchange tokens again."""
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
        waiting: [2·PP - 1, ...], what is kept of the micro-batches whose backward pass is to come.
        gradients: sum so far, in the dtypes of the stored weights.
        totals: objective so far.
    """

    received: Array
    returned: Array
    waiting: Any
    gradients: Params
    totals: ObjectiveParts


class _Recipe(NamedTuple):
    """How the pullback of a stage's layers is put together again; static.

    Attributes:
        tree: structure of the pullback.
        weights: of each leaf, its index among the leaves of the layers' weights; None for those that are kept.
    """

    tree: Any
    weights: tuple[int | None, ...]


def take_apart(pullback: Any, weights: Params) -> tuple[list[Array], _Recipe]:
    """What a pullback holds besides the weights, which are at hand in every tick.

    Args:
        pullback: of ``jax.vjp``, a pytree.
        weights: among the arguments of the function that it belongs to.

    Returns:
        The arrays to keep, and how to make the pullback of them.
    """
    leaves, tree = jax.tree.flatten(pullback)
    place = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves(weights))}
    recipe = _Recipe(tree, tuple(place.get(id(leaf)) for leaf in leaves))
    return [leaf for leaf, index in zip(leaves, recipe.weights) if index is None], recipe


def put_together(recipe: _Recipe, kept: list[Array], weights: Params) -> Any:
    """The pullback again, see :func:`take_apart`."""
    rest, at_hand = iter(kept), jax.tree.leaves(weights)
    return jax.tree.unflatten(recipe.tree, [next(rest) if i is None else at_hand[i] for i in recipe.weights])


def _replay(outputs: Any, pullback: Any) -> Callable[..., Any]:
    """A function whose results are known and whose derivative is a pullback of before: nothing runs a second time."""

    @jax.custom_vjp
    def known(*_: Any) -> Any:
        return outputs

    known.defvjp(lambda *_: (outputs, None), lambda _, cotangents: pullback(cotangents))
    return known


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

    def through(batch: Batch) -> Callable[[Params, Array], tuple[Array, Any]]:
        return functools.partial(run_layers, batch=batch, config=config, layout=layout)

    def enter(params: Params, received: Array, batch: Batch) -> Array:
        entering = embed(params, batch.inputs, config=config.model, parallel=tensor_parallel(layout.layer.tp))
        return jnp.where(stage == 0, entering, received)

    def run(
        params: Params, received: Array, batch: Batch, valid: Array, layers: Callable[[Params, Array], Any]
    ) -> tuple[tuple[Array, Array], ObjectiveParts]:
        """One stage on one micro-batch: activations to hand on, and what it adds to the objective."""
        params = gather_outside_layers(params, layout, dtype)
        x, sums = layers(params["layers"], enter(params, received, batch))
        total = loss(token_log_probs(params, x, batch.targets, config=config, layout=layout), batch)
        total = jnp.where((stage == stages - 1) & valid, total, 0)
        parts = objective_parts(total, _mask_sums(sums, valid), count, config=config, layout=layout, num_parts=number)
        return (x, total_objective(parts, config, hparams)), parts

    def forward_only(received: Array, batch: Batch) -> tuple[Array, Any, _Recipe | None]:
        """Activations to hand on, what to keep until the backward pass, and how to use it."""
        whole = gather_outside_layers(params, layout, dtype)
        entering, layers = enter(whole, received, batch), params["layers"]
        if repeats:
            return through(batch)(layers, entering)[0], received, None
        (x, sums), pullback = jax.vjp(through(batch), layers, entering)
        kept, recipe = take_apart(pullback, layers)
        return x, (kept, sums), recipe

    recipes: list[_Recipe | None] = []

    def kept_of(received: Array) -> Any:
        _, kept, recipe = forward_only(received, _microbatch(batches, jnp.int32(0)))
        recipes.append(recipe)
        return kept

    def layers_again(kept: Any, x: Array, batch: Batch) -> tuple[Callable[[Params, Array], Any], Array]:
        """The layers for the backward pass, and what entered the stage (of no meaning where nothing runs again).

        ``x``: what the layers yielded; only the last stage needs it, and there in the tick of its forward pass.
        """
        if recipes[0] is None:
            return through(batch), kept
        kept, sums = kept
        return _replay((x, sums), put_together(recipes[0], kept, params["layers"])), jnp.zeros_like(x)

    def tick(carry: _Ticking, t: Array, *, forward: bool, backward: bool) -> tuple[_Ticking, None]:
        x = carry.received
        if forward:
            x, kept, _ = forward_only(carry.received, _microbatch(batches, t - stage))
            waiting = jax.tree.map(lambda ring, new: ring.at[(t - stage) % slots].set(new), carry.waiting, kept)
            carry = carry._replace(received=_hand_on(x, layout), waiting=waiting)
        if backward:
            index = t - 2 * (stages - 1) + stage
            valid = (index >= 0) & (index < number)
            batch = _microbatch(batches, index)
            layers, entered = layers_again(jax.tree.map(lambda ring: ring[index % slots], carry.waiting), x, batch)
            (y, _), pullback, parts = jax.vjp(
                lambda p, r: run(p, r, batch, valid, layers), params, entered, has_aux=True
            )
            # The last stage has no successor; bubbles pass no gradient.
            cotangent = jnp.where(valid & (stage < stages - 1), carry.returned, jnp.zeros_like(carry.returned))
            d_params, d_received = pullback((cotangent.astype(y.dtype), jnp.ones((), parts.loss.dtype)))
            gradients = jax.tree.map(
                lambda total, g: total + jnp.where(valid, g, 0).astype(total.dtype), carry.gradients, d_params
            )
            totals = jax.tree.map(jnp.add, carry.totals, parts)
            carry = carry._replace(returned=_hand_on(d_received, layout, back=True), gradients=gradients, totals=totals)
        return carry, None

    empty = vary(_no_activations(params, batches, config, layout), layout.mesh)
    first = _microbatch(batches, jnp.int32(0))
    totals = zeros_of(lambda: run(params, empty, first, jnp.bool_(True), through(first))[1])
    kept = zeros_of(lambda: kept_of(empty))
    waiting = jax.tree.map(lambda leaf: vary(jnp.zeros((slots, *leaf.shape), leaf.dtype), layout.mesh), kept)
    zeros = jax.tree.map(lambda leaf, dtype: jnp.zeros_like(leaf, dtype=dtype), params, dtypes)
    carry = _Ticking(empty, empty, waiting, zeros, totals)
    # Whatever the stage, nothing goes back in the first PP - 1 ticks and nothing forth in the last PP - 1.
    start = 0
    for length, forward, backward in ((stages - 1, True, False), (number, True, True), (stages - 1, False, True)):
        ticks = jnp.arange(start, start + length, dtype=jnp.int32)
        carry = jax.lax.scan(functools.partial(tick, forward=forward, backward=backward), carry, ticks)[0]
        start += length
    return carry.gradients, carry.totals
