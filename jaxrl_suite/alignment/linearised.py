"""Log-probabilities of sampled tokens, linearised once: all that objectives, influence and update need of the policy.

``J_i`` depends on the parameters through the log-probabilities l of the sampled tokens alone. So the gradient of any
objective is a pullback of its slope with respect to l, and the influence of every objective is an inner product of its
slope with one push-forward of the summed gradient. The cost does not depend on K.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.alignment.advantages import combined_advantages
from jaxrl_suite.alignment.losses import LossTerms, mask_truncated, policy_loss
from jaxrl_suite.alignment.trainer_state import Trainer, TrainerConfig, TrainerHParams, TrainerState
from jaxrl_suite.config import check
from jaxrl_suite.pareto.influence import gram_influence, gram_of, path_name, push_forward, squared_norms
from jaxrl_suite.types import Array, Generation


class Batch(NamedTuple):
    """Rows of a rollout, prompts and completions joined; N = B * G.

    Attributes:
        tokens: int32 [N, P + T].
        segments: int32 [N, P + T], 0 at padding.
        mask: bool [N, T], completion tokens that count in the loss.
        old: [N, T], log-probabilities under the policy that sampled.
        reference: [N, T], under the reference policy; None without a penalty.
        laws: what the rollout kept of the laws that sampled, or None.
    """

    tokens: Array
    segments: Array
    mask: Array
    old: Array
    reference: Array | None
    laws: Any


class Linearised(NamedTuple):
    """Log-probabilities at the present parameters.

    Attributes:
        values: [N, T].
        pullback: ``pullback(slope [N, T]) -> gradient``, a pytree like the parameters.
        push: ``push(direction) -> [N, T]``, change of the values along a direction in parameter space.
    """

    values: Array
    pullback: Callable[[Array], Any]
    push: Callable[[Any], Array]


def join_batch(
    trainer: Trainer, state: TrainerState, prompts: Array, mask: Array, generation: Generation, laws: Any
) -> Batch:
    """Prompts [B, P] and completions [B * G, T] as rows, with the log-probabilities that the loss compares with."""
    size = trainer.config.group_size
    tokens = jnp.concatenate([jnp.repeat(prompts, size, axis=0), generation.tokens], axis=1)
    real = jnp.concatenate([jnp.repeat(mask, size, axis=0), generation.mask], axis=1)
    valid = generation.mask
    if trainer.config.mask_truncated:
        valid = mask_truncated(valid, generation.tokens, tuple(trainer.sampling.stop_tokens))
    segments = real.astype(jnp.int32)
    reference = None
    if trainer.loss.kl_kind != "none" and state.reference is not None:
        values = trainer.policy.log_probs(state.reference, tokens, segments, start=prompts.shape[1])
        reference = jax.lax.stop_gradient(values)
    return Batch(tokens, segments, valid, generation.log_probs, reference, laws)


def linearise_log_probs(trainer: Trainer, reference: Any, params: Any, batch: Batch) -> Linearised:
    """Evaluates and linearises the log-probabilities; in micro-batches, each is evaluated again when it is needed.

    Raises:
        ValueError: ``num_microbatches`` does not divide the rows.
    """
    start = batch.tokens.shape[1] - batch.mask.shape[1]
    number, rows = trainer.config.num_microbatches, batch.tokens.shape[0]
    check(rows % number == 0, argument="num_microbatches", value=number, rule=f"must divide the {rows} rows")

    def linear(tokens: Array, segments: Array) -> tuple[Array, Callable[[Array], tuple[Any]]]:
        def log_probs(params: Any) -> Array:
            return trainer.policy.log_probs(trainer.assemble(params, reference), tokens, segments, start=start)

        return jax.vjp(log_probs, params)

    if number == 1:
        values, pullback = linear(batch.tokens, batch.segments)
        return Linearised(
            values,
            lambda slope: pullback(slope.astype(values.dtype))[0],
            push_forward(pullback, values),
        )
    cut = lambda x: x.reshape(number, rows // number, *x.shape[1:])  # noqa: E731
    pieces = (cut(batch.tokens), cut(batch.segments))
    values = jax.lax.map(lambda piece: linear(*piece)[0], pieces)

    def pullback_sum(slope: Array) -> Any:
        def add(total: Any, piece: tuple[Array, Array, Array]) -> tuple[Any, None]:
            (gradient,) = linear(*piece[:2])[1](piece[2])
            return jax.tree.map(jnp.add, total, gradient), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, (*pieces, cut(slope).astype(values.dtype)))[0]

    def push(direction: Any) -> Array:
        def one(piece: tuple[Array, Array]) -> Array:
            values, pullback = linear(*piece)
            return push_forward(pullback, values)(direction)

        return jax.lax.map(one, pieces).reshape(rows, -1)

    return Linearised(values.reshape(rows, -1), pullback_sum, push)


def loss_and_slope(
    trainer: Trainer, log_probs: Array, old: Array, advantages: Array, batch: Batch, hparams: TrainerHParams
) -> tuple[Array, Array, LossTerms]:
    """Loss, its derivative with respect to the log-probabilities, and its sums."""

    def loss(values: Array) -> tuple[Array, LossTerms]:
        return policy_loss(
            values, old, advantages, batch.mask, trainer.loss, reference_log_probs=batch.reference,
            kl_coefficient=hparams.kl_coefficient, entropy_coefficient=hparams.entropy_coefficient,
        )  # fmt: skip

    (value, terms), slope = jax.value_and_grad(loss, has_aux=True)(log_probs)
    return value, slope, terms


def known_slope_gradient(
    trainer: Trainer, reference: Any, params: Any, advantages: Array, batch: Batch, hparams: TrainerHParams
) -> tuple[Array, Any]:
    """Log-probabilities [N, T] and the gradient of the loss where it is known beforehand."""
    anywhere = jnp.zeros_like(batch.old)
    slope = loss_and_slope(trainer, anywhere, anywhere, advantages, batch, hparams)[1]
    start = batch.tokens.shape[1] - batch.mask.shape[1]
    early: Any = trainer.early

    def weighted(params: Any) -> tuple[Array, Array]:
        model = trainer.assemble(params, reference)
        return early.weighted_log_probs(
            model, batch.tokens, batch.segments, slope, start=start, laws=batch.laws, group=trainer.config.group_size
        )

    (_, values), gradient = jax.value_and_grad(weighted, has_aux=True)(params)
    return values, gradient


def batch_influence(
    trainer: Trainer, linear: Linearised, rewards: Array, scored: Array, batch: Batch, hparams: TrainerHParams
) -> Array:
    """Influence [K] of every objective, each with advantages of its own, at the present parameters.

    Args:
        trainer: the trainer.
        linear: the linearisation there.
        rewards: [K, B, G].
        scored: bool [K, B, G].
        batch: the rollout.
        hparams: numbers that people sweep.
    """
    config = trainer.config
    groups = (*rewards.shape[1:], batch.mask.shape[-1])
    alone_hparams = TrainerHParams(kl_coefficient=hparams.kl_coefficient if config.kl_in_influence else 0.0)

    def slope(reward: Array, mask: Array) -> Array:
        alone = jnp.ones((1,), reward.dtype)
        token_mask = batch.mask.reshape(groups)
        advantages = combined_advantages(config.estimator, reward[None], alone, token_mask, mask=mask[None])
        flat = advantages.reshape(batch.mask.shape)
        old = jax.lax.stop_gradient(linear.values)
        return -loss_and_slope(trainer, linear.values, old, flat, batch, alone_hparams)[1]

    slopes = config.influence_scale * jax.vmap(slope)(rewards, scored)
    if config.influence_clip is None:
        pushed = linear.push(restrict(linear.pullback(jnp.sum(slopes, axis=0)), config))
        return jnp.sum(slopes * pushed, axis=(1, 2))
    # Parity (D5): norms over all parameters need every gradient once; they are taken one after another.
    gradients = jax.lax.map(linear.pullback, slopes)
    matrix = gram_of(restrict(gradients, config, stacked=1))
    return gram_influence(matrix, squared_norms=squared_norms(gradients), clip_norm=config.influence_clip)


def restrict(tree: Any, config: TrainerConfig, *, stacked: int = 0) -> Any:
    """Zeroes what does not count in the influence (D6): by the path of a leaf, and by the number of its layer.

    Args:
        tree: like the parameters; layers lie along the first axis of every leaf under ``layers/``.
        config: ``influence_paths`` and ``influence_layers``.
        stacked: axes in front of those of the parameters.

    Raises:
        ValueError: the parameters have fewer layers.
    """
    paths, layers = config.influence_paths, config.influence_layers
    if not paths and not layers:
        return tree

    def keep(path: tuple[Any, ...], leaf: Array) -> Array:
        name = path_name(path)
        if paths and not any(part in name for part in paths):
            return jnp.zeros_like(leaf)
        if not layers:
            return leaf
        if not name.startswith("layers/"):
            return jnp.zeros_like(leaf)
        depth = leaf.shape[stacked]
        check(layers[1] < depth, argument="influence_layers", value=layers, rule=f"{name} has {depth} layers")
        number = jnp.arange(depth).reshape((1,) * stacked + (-1,) + (1,) * (leaf.ndim - stacked - 1))
        return jnp.where((number >= layers[0]) & (number <= layers[1]), leaf, 0)

    return jax.tree_util.tree_map_with_path(keep, tree)
