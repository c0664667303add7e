"""The train step: five parallel dimensions in one manual ``shard_map``, AdamW on global arrays outside of it."""

import functools
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_suite.config import check, check_key
from jaxrl_suite.lm import flatten, init_params, unflatten
from jaxrl_suite.moe.balancing import load_imbalance, update_balance_bias
from jaxrl_suite.moe.config import HParams, MoEConfig, check_folding
from jaxrl_suite.moe.folding import Folding
from jaxrl_suite.moe.model import (
    Batch,
    Layout,
    Loss,
    ObjectiveParts,
    gather_weights,
    make_layout,
    next_token_loss,
    order_for_context,
    split_microbatches,
    whole_objective,
)
from jaxrl_suite.moe.partition import is_multiplied, placements, stored_shardings
from jaxrl_suite.moe.pipeline import circular_layers, pipeline_gradients
from jaxrl_suite.moe.variance import sum_over, vary, zeros_of
from jaxrl_suite.types import Array, Params, PRNGKey

_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8)


class TrainState(flax.struct.PyTreeNode):
    """Everything a run needs to continue.

    Attributes:
        params: global arrays with the shapes of ``lm.parameter_shapes``, laid out by the folding.
        moments: Adam's state, laid out like the parameters.
        step: int32 [], steps done.
        config: model and options; static.
        folding: where arrays lie; static.
    """

    params: Params
    moments: Any
    step: Array
    config: MoEConfig = flax.struct.field(pytree_node=False)
    folding: Folding = flax.struct.field(pytree_node=False)


def init_train_state(key: PRNGKey, config: MoEConfig, folding: Folding) -> TrainState:
    """Initial state, the same draws under every folding (XLA may round the last bit of a shard differently).

    Args:
        key: consumed.
        config: model and options.
        folding: degrees; the first ``folding.num_ranks`` of ``jax.devices()`` are used.

    Raises:
        ValueError: the model cannot be laid out on the folding, or there are too few devices.
    """
    check_key(key)
    check_folding(config, folding)
    shardings = stored_shardings(config, folding)
    params = jax.jit(lambda k: init_params(k, config.model), out_shardings=shardings)(key)
    return state_from_params(params, config, folding)


def state_from_params(params: Params, config: MoEConfig, folding: Folding) -> TrainState:
    """State with fresh moments around given parameters (of any layout), for example loaded or upcycled ones."""
    check_folding(config, folding)
    shardings = stored_shardings(config, folding)
    params = jax.device_put(params, shardings)
    whole = NamedSharding(folding.mesh(), PartitionSpec())
    layout = optax.ScaleByAdamState(whole, shardings, shardings)  # type: ignore[arg-type]
    moments = jax.jit(init_moments, out_shardings=layout)(params)
    return TrainState(params, moments, jax.device_put(jnp.int32(0), whole), config, folding)


@functools.partial(jax.jit, static_argnames="loss")
def train_step(
    state: TrainState, batch: Batch, *, loss: Loss = next_token_loss, hparams: HParams | None = None
) -> tuple[TrainState, dict[str, Array]]:
    """One step of AdamW on a global batch.

    Args:
        state: from :func:`init_train_state`.
        batch: global arrays [B, T], see ``language_batch``.
        loss: ``loss(log_probs [b, t], batch) -> scalar``, the sum over the tokens given; the step divides the global
            sum by the global number of tokens in ``batch.mask``.
        hparams: traced hyperparameters.

    Returns:
        The next state and metrics: ``loss/nats``, ``loss/balance``, ``loss/z``, ``gradient/norm``,
        ``dispatch/drop_rate``, ``dispatch/overflow_rate``, ``load/max_over_mean`` and ``load/counts`` [L, E].
    """
    hparams = HParams() if hparams is None else hparams
    gradients, parts = loss_and_gradients(state.params, batch, state.config, state.folding, loss=loss, hparams=hparams)
    params, moments, norm = apply_gradients(state.params, state.moments, gradients, parts.counts, hparams)
    shardings = stored_shardings(state.config, state.folding)
    params = jax.lax.with_sharding_constraint(params, shardings)
    new = state.replace(params=params, moments=moments, step=state.step + 1)
    copies = jnp.maximum(jnp.sum(parts.counts), 1)
    return new, {
        "loss/nats": parts.loss,
        "loss/balance": parts.balance,
        "loss/z": parts.z,
        "gradient/norm": norm,
        "dispatch/drop_rate": parts.dropped / copies,
        "dispatch/overflow_rate": parts.overflow / copies,
        "load/max_over_mean": jnp.max(load_imbalance(parts.counts)),
        "load/counts": parts.counts,
    }


# The same step where the arrays of ``state`` become those of the next: memory for one state instead of two, and
# ``state`` cannot be read afterwards. What a training loop calls.
train_step_in_place = jax.jit(
    getattr(train_step, "__wrapped__"),  # noqa: B009  the type of jitted functions does not know the attribute
    static_argnames="loss",
    donate_argnames="state",
)


def loss_and_gradients(
    params: Params,
    batch: Batch,
    config: MoEConfig,
    folding: Folding,
    *,
    loss: Loss = next_token_loss,
    hparams: HParams | None = None,
) -> tuple[Params, ObjectiveParts]:
    """Gradients of the objective as global arrays, laid out like the stored parameters, and its parts.

    Raises:
        ValueError: batch or model do not divide.
    """
    hparams = HParams() if hparams is None else hparams
    rule, remedy = "must be a Batch", "Write moe.language_batch(tokens)"
    check(isinstance(batch, Batch), argument="batch", value=type(batch).__name__, rule=rule, remedy=remedy)
    size, length = batch.inputs.shape
    check_folding(config, folding, batch_size=size, length=length)
    layout = make_layout(config, folding)
    batch = order_for_context(batch, config, folding.cp)
    places = placements(config, folding)
    stored = unflatten({path: place.stored for path, place in places.items()})
    gathers = {path: (place.gather, place.dim) for path, place in places.items() if place.gather}
    tokens: Any = folding.spec("dp", "cp")
    whole: Any = PartitionSpec()
    stages: Any = PartitionSpec("pp")
    parts_spec = ObjectiveParts(*(whole for _ in ObjectiveParts._fields))._replace(counts=stages)

    rounds = config.virtual_stages
    if rounds > 1:  # stored arrays stay in layer order, so that checkpoints know nothing of schedules
        params = {**params, "layers": jax.tree.map(lambda x: circular_layers(x, folding.pp, rounds), params["layers"])}

    def local(params: Params, batch: Batch, hparams: HParams) -> tuple[Params, ObjectiveParts]:
        return _local_gradients(params, batch, hparams, loss, config, layout, gathers)

    gradients, parts = jax.shard_map(
        local,
        mesh=folding.mesh(),
        in_specs=(stored, Batch(*(tokens for _ in Batch._fields)), whole),
        out_specs=(stored, parts_spec),
    )(params, batch, hparams)
    if rounds > 1:
        back = functools.partial(circular_layers, stages=rounds, rounds=folding.pp)
        gradients = {**gradients, "layers": jax.tree.map(back, gradients["layers"])}
        parts = parts._replace(counts=back(parts.counts) if config.model.num_experts else parts.counts)
    return gradients, parts


def _local_gradients(
    params: Params,
    batch: Batch,
    hparams: HParams,
    loss: Loss,
    config: MoEConfig,
    layout: Layout,
    gathers: dict[str, Any],
) -> tuple[Params, ObjectiveParts]:
    """Gradients on one rank: weights are gathered and cast once, and the transpose of that reduces once."""
    gathers = {} if config.sharding == "fsdp" else gathers

    def prepare(params: Params) -> Params:
        # The transpose sums shards of gradients, not whole gradients, over ranks that hold the same shard.
        return gather_weights(vary(params, layout.mesh), gathers)

    ready = prepare(_narrow(params, gathers, config))
    reduce_gradients = jax.linear_transpose(prepare, params)  # in the dtype of the stored weights
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, params)
    count = jnp.maximum(sum_over(jnp.sum(batch.mask.astype(jnp.float32)), layout.dense), 1)
    batch = vary(split_microbatches(batch, config.num_microbatches), (*layout.dense, "pp"))
    if layout.pp:
        gradients, parts = pipeline_gradients(ready, dtypes, batch, count, hparams, loss, config, layout)
    else:
        gradients, parts = _accumulate(ready, dtypes, batch, count, hparams, loss, config, layout)
    return reduce_gradients(gradients)[0], parts


def _narrow(params: Params, gathers: dict[str, Any], config: MoEConfig) -> Params:
    """Matrices that are gathered, in the dtype of their products: half the bytes to send and hold in bfloat16."""
    leaves = flatten(params)
    dtype = config.model.activation_dtype(leaves["embed/table"].dtype)
    for path in filter(is_multiplied, gathers):
        if dtype.itemsize < leaves[path].dtype.itemsize:
            leaves[path] = leaves[path].astype(dtype)
    return unflatten(leaves)


def _accumulate(
    params: Params,
    dtypes: Params,
    batches: Batch,
    count: Array,
    hparams: HParams,
    loss: Loss,
    config: MoEConfig,
    layout: Layout,
) -> tuple[Params, ObjectiveParts]:
    """Sum of the gradients of micro-batches in the given dtypes, without any reduction between ranks."""

    def one(batch: Batch) -> tuple[Params, ObjectiveParts]:
        gradient = jax.grad(whole_objective, has_aux=True)
        gradients, parts = gradient(params, batch, count, hparams, loss, config, layout)
        return jax.tree.map(lambda g, dtype: g.astype(dtype), gradients, dtypes), parts

    if config.num_microbatches == 1:
        return one(jax.tree.map(lambda leaf: leaf[0], batches))

    def step(total: tuple, batch: Batch) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, one(batch)), None

    zeros = zeros_of(lambda: one(jax.tree.map(lambda leaf: leaf[0], batches)))
    return jax.lax.scan(step, zeros, batches)[0]


def init_moments(params: Params) -> Any:
    """Adam's state for given parameters."""
    return _ADAM.init(params)


def apply_gradients(
    params: Params, moments: Any, gradients: Params, counts: Array, hparams: HParams
) -> tuple[Params, Any, Array]:
    """AdamW after clipping by the global norm, on global arrays: each element counts once, wherever it lies.

    Args:
        params: parameters.
        moments: from :func:`init_moments`.
        gradients: of the objective.
        counts: [L, E], copies routed to each expert, for the balancing bias.
        hparams: rates; only matrices decay; the balancing bias follows its own rule and no gradient.

    Returns:
        Parameters, moments, and the gradient norm before clipping.
    """
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)))
    limit = jnp.asarray(hparams.clip_norm, norm.dtype)
    scale = jnp.where((limit > 0) & (norm > limit), limit / jnp.maximum(norm, 1e-20), 1)
    gradients = jax.tree.map(lambda g: g * scale.astype(g.dtype), gradients)
    direction, moments = _ADAM.update(gradients, moments)
    leaves, updates = flatten(params), flatten(cast(Params, direction))
    new = {}
    for path, value in leaves.items():
        if path.endswith("router_bias"):
            new[path] = update_balance_bias(value, counts.astype(value.dtype), hparams.bias_rate)
            continue
        is_matrix = not path.endswith(("scale", "_norm", "_bias"))
        decay = jnp.asarray(hparams.weight_decay if is_matrix else 0.0, value.dtype)
        rate = jnp.asarray(hparams.learning_rate, value.dtype)
        new[path] = value - rate * (updates[path].astype(value.dtype) + decay * value)
    return unflatten(new), moments, norm
