"""Online training of any policy on several rewards: roll out, score, weigh, update.

The step is cut where the host may come in: :func:`rollout` samples, a reward function of any kind scores, and
:func:`update` does the rest in one compiled call. All objectives share the log-probabilities l of the sampled tokens,
so one linearisation of l serves everything: ``J_i`` depends on the parameters through l alone, the sum of the gradients
is one pullback, its push-forward along l gives the influence of every objective as an inner product, and the update is
one more pullback. The cost does not depend on K.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_suite.alignment.advantages import combined_advantages
from jaxrl_suite.alignment.losses import LossConfig, LossTerms, mask_truncated, policy_loss
from jaxrl_suite.alignment.running import RunningMean, init_running_mean, update_running_mean
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.pareto import Signals, WeightRule, weight_gain
from jaxrl_suite.pareto.influence import select
from jaxrl_suite.types import Array, Generation, Policy, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig(Config):
    """Choices of the algorithm; where code and paper differ the corrected form is the default, the other an option."""

    estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce"] = field("grpo", help="how advantages are estimated")
    group_size: int = field(8, help="G, completions a prompt")
    num_minibatches: int = field(1, help="optimiser steps a rollout; the paper takes 2")
    combine: Literal["reward", "advantage", "gdpo", "mo_grpo"] = field(
        "reward", help="D8: sum rewards then normalise (published), or sum advantages (linear in the weights)"
    )
    gain_on: Literal["reward", "advantage", "lr"] = field(
        "advantage", help="D1: where the hypervolume gain acts; published: reward, where GRPO and REINFORCE++ cancel it"
    )
    kl_in_influence: bool = field(False, help="D5: the influence's gradients include the KL penalty (published: True)")
    influence_clip: float | None = field(None, help="D5: each objective's gradient is clipped to this norm (1.0)")
    influence_scale: float = field(1.0, help="D5: factor on each gradient; published: micro-batches, which are summed")
    influence_paths: tuple[str, ...] = field(
        (), help="D6: only parameters whose path contains one of these; all if empty"
    )
    weights_first: bool = field(True, help="D7: weights move before they are used on the same batch")
    mask_truncated: bool = field(False, help="completions without a stop token are left out of the loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.group_size >= 1, argument="group_size", value=self.group_size, rule="must be at least 1")
        check(self.num_minibatches >= 1, argument="num_minibatches", value=self.num_minibatches, rule="at least 1")
        relative = self.estimator in ("dr_grpo", "rloo") or self.combine in ("gdpo", "mo_grpo")
        check(
            self.group_size > 1 or not relative,
            argument="group_size",
            value=self.group_size,
            rule="a group of one says nothing relative to itself",
            remedy="Use groups of two or more, or estimator='reinforce'",
        )


class TrainerHParams(NamedTuple):
    """Numbers that people sweep.

    Attributes:
        kl_coefficient: factor on the KL penalty of the loss.
    """

    kl_coefficient: Array | float = 1e-3


class TrainerState(NamedTuple):
    """State of training.

    Attributes:
        params: what is trained.
        optimizer: state of the optimiser.
        reference: parameters of the reference policy of the KL penalty; empty without a penalty.
        rule_state: state of the weight rule.
        weights: [K], weights of the last step.
        lengths: running mean of completion lengths in tokens.
        key: base key; step t uses ``fold_in(key, t)``.
        step: int32 [], steps taken.
    """

    params: Any
    optimizer: Any
    reference: Any
    rule_state: Any
    weights: Array
    lengths: RunningMean
    key: PRNGKey
    step: Array


class Trainer(NamedTuple):
    """What does not change during a run; close over it.

    Attributes:
        policy: the policy; parameters are passed to it.
        config: choices.
        loss: options of the surrogate.
        rule: weight rule.
        optimizer: optax optimiser.
        sampling: handed to ``policy.generate``.
        assemble: ``assemble(params, reference) -> model parameters``: identity by default; merges LoRA.
    """

    policy: Policy
    config: TrainerConfig
    loss: LossConfig
    rule: WeightRule
    optimizer: optax.GradientTransformation
    sampling: Any
    assemble: Callable[[Any, Any], Any] = lambda params, reference: params


class Metrics(NamedTuple):
    """What a step reports.

    Attributes:
        reward_mean: [K], mean raw reward over scored completions.
        reward_std: [K].
        weighted_mean: [K], weight times mean.
        weights: [K].
        gain: [], factor of the hypervolume rule.
        influence: [K]; zeros if the rule does not read it.
        constant_groups: [K], share of groups whose reward does not vary.
        unscored: [K], share of completions without a score.
        length_mean: [], tokens.
        truncated: [], share of completions without a stop token.
        loss: [].
        kl: [], mean over tokens, nats.
        clipped: [], share of tokens.
        ratio_error: [], mean of |ratio - 1| between the sampler and the policy before the update.
        entropy: [], mean of -log p over sampled tokens, nats.
        gradient_norm: [].
        update_norm: [].
    """

    reward_mean: Array
    reward_std: Array
    weighted_mean: Array
    weights: Array
    gain: Array
    influence: Array
    constant_groups: Array
    unscored: Array
    length_mean: Array
    truncated: Array
    loss: Array
    kl: Array
    clipped: Array
    ratio_error: Array
    entropy: Array
    gradient_norm: Array
    update_norm: Array


def init_trainer(
    key: PRNGKey, trainer: Trainer, params: Any, *, num_objectives: int, reference: Any = None
) -> TrainerState:
    """State before the first step.

    Args:
        key: consumed; the base of the run's randomness.
        trainer: the trainer.
        params: what is trained.
        num_objectives: K.
        reference: what ``assemble`` and the KL penalty need: the initial parameters for full training with a penalty,
            the frozen model for LoRA, None without either.
    """
    rule_state = trainer.rule.init()
    return TrainerState(
        params=params,
        optimizer=trainer.optimizer.init(params),
        reference=reference,
        rule_state=rule_state,
        weights=jnp.full((num_objectives,), 1.0 / num_objectives),
        lengths=init_running_mean(),
        key=key,
        step=jnp.zeros((), jnp.int32),
    )


def rollout(trainer: Trainer, state: TrainerState, prompts: Array, mask: Array) -> Generation:
    """Samples a group of completions for every prompt.

    Args:
        trainer: the trainer.
        state: its state; the step's key is ``fold_in(key, step)``.
        prompts: int32 [B, P], padded on the left.
        mask: bool [B, P].

    Returns:
        Generation of ``B * G`` rows, the G completions of a prompt in a row.
    """
    size = trainer.config.group_size
    repeat = lambda x: jnp.repeat(x, size, axis=0)  # noqa: E731
    number = prompts.shape[0]
    index = jnp.arange(number * size, dtype=jnp.int32)
    ids = jnp.stack([index // size, index % size], axis=1)
    params = trainer.assemble(state.params, state.reference)
    key = jax.random.fold_in(state.key, state.step)
    return trainer.policy.generate(key, params, repeat(prompts), repeat(mask), ids, trainer.sampling)


class _Batch(NamedTuple):
    """Rows of a rollout, prompts and completions joined; N = B * G."""

    tokens: Array
    segments: Array
    mask: Array
    old: Array
    reference: Array | None


def _join(trainer: Trainer, state: TrainerState, prompts: Array, mask: Array, generation: Generation) -> _Batch:
    size = trainer.config.group_size
    tokens = jnp.concatenate([jnp.repeat(prompts, size, axis=0), generation.tokens], axis=1)
    real = jnp.concatenate([jnp.repeat(mask, size, axis=0), generation.mask], axis=1)
    valid = generation.mask
    if trainer.config.mask_truncated:
        valid = mask_truncated(valid, generation.tokens, tuple(trainer.sampling.stop_tokens))
    segments = real.astype(jnp.int32)
    reference = None
    if trainer.loss.kl_kind != "none" and state.reference is not None:
        full = trainer.policy.log_probs(state.reference, tokens, segments)
        reference = jax.lax.stop_gradient(full[:, prompts.shape[1] :])
    return _Batch(tokens, segments, valid, generation.log_probs, reference)


def _linearised(trainer: Trainer, reference: Any, params: Any, batch: _Batch) -> tuple[Array, Callable[[Array], Any]]:
    """Log-probabilities of the completions and their pullback to the parameters."""
    start = batch.tokens.shape[1] - batch.mask.shape[1]

    def log_probs(params: Any) -> Array:
        model = trainer.assemble(params, reference)
        return trainer.policy.log_probs(model, batch.tokens, batch.segments)[:, start:]

    values, pullback = jax.vjp(log_probs, params)
    return values, lambda cotangent: pullback(cotangent.astype(values.dtype))[0]


def _loss_and_slope(
    trainer: Trainer, log_probs: Array, old: Array, advantages: Array, batch: _Batch, kl_coefficient: Array | float
) -> tuple[Array, Array, LossTerms]:
    """Loss, its derivative with respect to the log-probabilities, and its sums."""

    def loss(values: Array) -> tuple[Array, LossTerms]:
        return policy_loss(
            values, old, advantages, batch.mask, trainer.loss,
            reference_log_probs=batch.reference, kl_coefficient=kl_coefficient,
        )  # fmt: skip

    (value, terms), slope = jax.value_and_grad(loss, has_aux=True)(log_probs)
    return value, slope, terms


def _influence(
    trainer: Trainer,
    log_probs: Array,
    pullback: Any,
    rewards: Array,
    scored: Array,
    batch: _Batch,
    hparams: TrainerHParams,
) -> Array:
    """Influence of every objective, each with advantages of its own, at the present parameters."""
    config = trainer.config
    groups = (*rewards.shape[1:], batch.mask.shape[-1])
    coefficient = hparams.kl_coefficient if config.kl_in_influence else 0.0

    def slope(reward: Array, mask: Array) -> Array:
        alone = jnp.ones((1,), reward.dtype)
        token_mask = batch.mask.reshape(groups)
        advantages = combined_advantages(config.estimator, reward[None], alone, token_mask, mask=mask[None])
        flat = advantages.reshape(batch.mask.shape)
        return -_loss_and_slope(trainer, log_probs, jax.lax.stop_gradient(log_probs), flat, batch, coefficient)[1]

    slopes = config.influence_scale * jax.vmap(slope)(rewards, scored)
    chosen = _subset(config.influence_paths)
    if config.influence_clip is None:
        direction = select(pullback(jnp.sum(slopes, axis=0)), chosen)
        (pushed,) = jax.linear_transpose(pullback, log_probs)(direction)
        return jnp.sum(slopes * pushed, axis=(1, 2))
    # Parity (D5): norms over all parameters need every gradient once; they are taken one after another.
    gradients = jax.lax.map(pullback, slopes)
    squares = sum(jnp.sum(leaf * leaf, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(gradients))
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(select(gradients, chosen))]
    matrix = jnp.asarray(sum(jnp.matmul(rows, rows.T, precision="highest") for rows in flat))
    norms = jnp.sqrt(jnp.maximum(jnp.asarray(squares), jnp.finfo(matrix.dtype).tiny))
    factors = jnp.minimum(1.0, config.influence_clip / norms)
    return factors * (matrix @ factors)


def _subset(paths: tuple[str, ...]) -> Callable[[str], bool] | None:
    return (lambda path: any(part in path for part in paths)) if paths else None


def update(
    trainer: Trainer,
    state: TrainerState,
    prompts: Array,
    prompt_mask: Array,
    generation: Generation,
    rewards: Array,
    scored: Array | None = None,
    *,
    hparams: TrainerHParams | None = None,
    objectives: Array | None = None,
) -> tuple[TrainerState, Metrics]:
    """One step of weights and parameters on a scored rollout. Pure; compile it with the trainer closed over.

    Args:
        trainer: the trainer.
        state: its state.
        prompts: int32 [B, P].
        prompt_mask: bool [B, P].
        generation: of ``B * G`` rows, see :func:`rollout`.
        rewards: [K, B, G].
        scored: bool [K, B, G]; all by default. NaN counts as not scored.
        hparams: numbers that people sweep.
        objectives: [K], values of the objectives for the weight rule (validation, say); the batch's means by default.

    Returns:
        The next state and the metrics of this step.
    """
    hparams = TrainerHParams() if hparams is None else hparams
    config, dtype = trainer.config, state.weights.dtype
    rewards = jnp.asarray(rewards, dtype)
    keep = jnp.isfinite(rewards) if scored is None else jnp.asarray(scored, bool) & jnp.isfinite(rewards)
    rewards = jnp.where(keep, rewards, 0)
    batch = _join(trainer, state, prompts, prompt_mask, generation)
    log_probs, pullback = _linearised(trainer, state.reference, state.params, batch)
    influences = jnp.zeros_like(state.weights)
    if "influence" in trainer.rule.reads:
        influences = _influence(trainer, log_probs, pullback, rewards, keep, batch, hparams).astype(dtype)
    means = _means(rewards, keep)
    token_mask = batch.mask.reshape(*rewards.shape[1:], -1)
    gain_before = jnp.asarray(weight_gain(state.rule_state), dtype)

    def advantages_for(weights: Array, gain: Array) -> Array:
        return combined_advantages(
            config.estimator, rewards, weights, token_mask, mask=keep, combine=config.combine,
            gain=gain, gain_on=config.gain_on,
        )  # fmt: skip

    signals = Signals(
        objectives=means if objectives is None else objectives,
        influence=influences,
        rewards=rewards,
        advantages=jnp.sum(advantages_for(state.weights, gain_before), -1) / jnp.maximum(jnp.sum(token_mask, -1), 1),
    )
    rule_state, weights = trainer.rule.step(state.rule_state, signals)
    used = weights if config.weights_first else jnp.where(state.step == 0, weights, state.weights)
    # The gain that a step computes acts on the next one.
    advantages = advantages_for(used, gain_before).reshape(batch.mask.shape)
    rate = gain_before if config.gain_on == "lr" else jnp.ones((), dtype)
    params, optimizer, loss, terms, norms = _optimise(
        trainer, state, batch, log_probs, pullback, advantages, rate, hparams
    )
    lengths = jnp.sum(generation.mask, axis=1)
    stopped = mask_truncated(generation.mask, generation.tokens, tuple(trainer.sampling.stop_tokens))
    tokens = jnp.maximum(jnp.sum(generation.mask), 1).astype(dtype)
    drift = jnp.abs(jnp.expm1(jnp.where(generation.mask, log_probs - generation.log_probs, 0)))
    metrics = Metrics(
        reward_mean=means,
        reward_std=jnp.sqrt(jnp.maximum(_means(rewards * rewards, keep) - means * means, 0)),
        weighted_mean=used * means,
        weights=used,
        gain=gain_before,
        influence=influences,
        constant_groups=jnp.mean(jnp.ptp(rewards, axis=2) == 0, axis=1),
        unscored=1 - jnp.mean(keep, axis=(1, 2)),
        length_mean=jnp.mean(lengths.astype(dtype)),
        truncated=1 - jnp.mean(jnp.any(stopped, axis=1)),
        loss=loss,
        kl=terms.kl / jnp.maximum(terms.num_tokens, 1),
        clipped=terms.clipped / jnp.maximum(terms.num_tokens, 1),
        ratio_error=jnp.sum(drift) / tokens,
        entropy=-jnp.sum(jnp.where(generation.mask, log_probs, 0)) / tokens,
        gradient_norm=norms[0],
        update_norm=norms[1],
    )
    following = state._replace(
        params=params,
        optimizer=optimizer,
        rule_state=rule_state,
        weights=weights,
        lengths=update_running_mean(state.lengths, lengths),
        step=state.step + 1,
    )
    return following, metrics


def _norm(tree: Any) -> Array:
    return jnp.sqrt(jnp.asarray(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))))


def _means(rewards: Array, keep: Array) -> Array:
    return jnp.sum(jnp.where(keep, rewards, 0), axis=(1, 2)) / jnp.maximum(jnp.sum(keep, axis=(1, 2)), 1)


def _optimise(
    trainer: Trainer,
    state: TrainerState,
    batch: _Batch,
    log_probs: Array,
    pullback: Callable[[Array], Any],
    advantages: Array,
    rate: Array,
    hparams: TrainerHParams,
) -> tuple[Any, Any, Array, LossTerms, tuple[Array, Array]]:
    """One optimiser step, or one a mini-batch; the first reuses the linearisation at hand when there is only one."""

    def apply(params: Any, optimizer: Any, gradient: Any) -> tuple[Any, Any, tuple[Array, Array]]:
        updates, optimizer = trainer.optimizer.update(gradient, optimizer, params)
        updates = jax.tree.map(lambda leaf: leaf * rate.astype(leaf.dtype), updates)
        norms = (_norm(gradient), _norm(updates))
        return optax.apply_updates(params, updates), optimizer, norms

    number = trainer.config.num_minibatches
    if number == 1:
        # On policy: the ratio is one by construction, whatever rounding separates sampler and policy.
        old = jax.lax.stop_gradient(log_probs)
        value, slope, terms = _loss_and_slope(trainer, log_probs, old, advantages, batch, hparams.kl_coefficient)
        params, optimizer, norms = apply(state.params, state.optimizer, pullback(slope))
        return params, optimizer, value, terms, norms
    rows = batch.tokens.shape[0]
    check(rows % number == 0, argument="num_minibatches", value=number, rule=f"must divide the {rows} rows")
    batch = batch._replace(old=jax.lax.stop_gradient(log_probs))
    pieces = jax.tree.map(lambda x: x.reshape(number, rows // number, *x.shape[1:]), (batch, advantages))

    def step(carry: tuple[Any, Any], piece: tuple[_Batch, Array]) -> tuple[tuple[Any, Any], Any]:
        params, optimizer = carry
        part, advantage = piece
        values, back = _linearised(trainer, state.reference, params, part)
        value, slope, terms = _loss_and_slope(trainer, values, part.old, advantage, part, hparams.kl_coefficient)
        params, optimizer, norms = apply(params, optimizer, back(slope))
        return (params, optimizer), (value, terms, norms)

    (params, optimizer), (values, terms, norms) = jax.lax.scan(step, (state.params, state.optimizer), pieces)
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), terms)
    return params, optimizer, jnp.mean(values), total, (jnp.mean(norms[0]), jnp.mean(norms[1]))


def trainer_step(
    trainer: Trainer,
    state: TrainerState,
    prompts: Array,
    mask: Array,
    reward: Callable[[Any, Generation, RunningMean], Array],
    *,
    hparams: TrainerHParams | None = None,
) -> tuple[TrainerState, Metrics]:
    """A whole step with a reward inside the graph; jit, scan and vmap over seeds work through it.

    Args:
        trainer: the trainer.
        state: its state.
        prompts: int32 [B, P].
        mask: bool [B, P].
        reward: ``reward(params, generation, lengths) -> [K, B * G]``; ``lengths`` is the running mean with this batch.
        hparams: numbers that people sweep.

    Returns:
        The next state and the metrics.
    """
    generation = rollout(trainer, state, prompts, mask)
    lengths = update_running_mean(state.lengths, jnp.sum(generation.mask, axis=1))
    rewards = reward(state.params, generation, lengths)
    grouped = rewards.reshape(rewards.shape[0], prompts.shape[0], trainer.config.group_size)
    return update(trainer, state, prompts, mask, generation, grouped, hparams=hparams)


def run_trainer(
    trainer: Trainer,
    state: TrainerState,
    sample_prompts: Callable[[Array], tuple[Array, Array]],
    reward: Callable[[Any, Generation, RunningMean], Array],
    *,
    num_steps: int,
    hparams: TrainerHParams | None = None,
) -> tuple[TrainerState, Metrics]:
    """Several steps in one scan; chunks of any length follow the same stream.

    Args:
        trainer: the trainer.
        state: its state.
        sample_prompts: ``sample_prompts(step) -> (prompts [B, P], mask [B, P])``.
        reward: see :func:`trainer_step`.
        num_steps: how many.
        hparams: numbers that people sweep.

    Returns:
        The state after the last step, and metrics with a leading axis of steps.
    """

    def step(state: TrainerState, _: None) -> tuple[TrainerState, Metrics]:
        prompts, mask = sample_prompts(state.step)
        return trainer_step(trainer, state, prompts, mask, reward, hparams=hparams)

    return jax.lax.scan(step, state, length=num_steps)
