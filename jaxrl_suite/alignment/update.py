"""The update of a training step: weights first, then parameters, on a scored rollout."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrl_suite.alignment.advantages import combined_advantages
from jaxrl_suite.alignment.linearised import (
    Batch,
    Linearised,
    batch_influence,
    join_batch,
    known_slope_gradient,
    linearise_log_probs,
    loss_and_slope,
)
from jaxrl_suite.alignment.losses import LossTerms, mask_truncated
from jaxrl_suite.alignment.running import update_running_mean
from jaxrl_suite.alignment.trainer_state import Metrics, Trainer, TrainerHParams, TrainerState, slope_is_known
from jaxrl_suite.config import check
from jaxrl_suite.distributions import masked_mean, masked_variance
from jaxrl_suite.pareto import Signals, weight_gain
from jaxrl_suite.pareto.influence import squared_norms
from jaxrl_suite.types import Array, Generation


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
    laws: Any = None,
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
            Where one is NaN, or nothing was scored for one, rule and weights stay as they are in this step.
        laws: what :func:`rollout_with_laws` kept at the parameters of ``state``, or None.

    Returns:
        The next state and the metrics of this step.
    """
    hparams = TrainerHParams() if hparams is None else hparams
    config, dtype = trainer.config, state.weights.dtype
    rewards = jnp.asarray(rewards, dtype)
    keep = jnp.isfinite(rewards) if scored is None else jnp.asarray(scored, bool) & jnp.isfinite(rewards)
    rewards = jnp.where(keep, rewards, 0)
    known_slope = slope_is_known(trainer, state.reference, hparams)
    batch = join_batch(trainer, state, prompts, prompt_mask, generation, laws if known_slope else None)
    linear = None
    if not known_slope:
        linear = linearise_log_probs(trainer, state.reference, state.params, batch)
    influences = jnp.zeros_like(state.weights)
    if linear is not None and "influence" in trainer.rule.reads:
        influences = batch_influence(trainer, linear, rewards, keep, batch, hparams).astype(dtype)
    means = masked_mean(rewards, keep, axis=(1, 2)).astype(dtype)
    if objectives is None:  # an objective that nothing in the batch was scored for has no value
        objectives = jnp.where(jnp.any(keep, axis=(1, 2)), means, jnp.nan)
    token_mask = batch.mask.reshape(*rewards.shape[1:], -1)
    gain_before = jnp.asarray(weight_gain(state.rule_state), dtype)

    def advantages_for(weights: Array, gain: Array) -> Array:
        return combined_advantages(
            config.estimator, rewards, weights, token_mask, mask=keep, combine=config.combine,
            gain=gain, gain_on=config.gain_on,
        )  # fmt: skip

    signals = Signals(
        objectives=objectives,
        influence=influences,
        rewards=rewards,
        advantages=jnp.sum(advantages_for(state.weights, gain_before), -1) / jnp.maximum(jnp.sum(token_mask, -1), 1),
    )
    moved = trainer.rule.step(state.rule_state, signals)
    # A verifier that failed for a whole batch says nothing: neither a zero nor a NaN may move the weights.
    known = jnp.all(jnp.isfinite(objectives))
    rule_state, weights = jax.tree.map(
        lambda new, old: jnp.where(known, new, old), moved, (state.rule_state, state.weights)
    )
    used = weights if config.weights_first else jnp.where(state.step == 0, weights, state.weights)
    # The gain that a step computes acts on the next one.
    advantages = advantages_for(used, gain_before).reshape(batch.mask.shape)
    rate = gain_before if config.gain_on == "lr" else jnp.ones((), dtype)
    params, optimizer, loss, terms, norms, log_probs = _optimise(
        trainer, state, batch, linear, advantages, rate, hparams
    )
    lengths = jnp.sum(generation.mask, axis=1)
    stopped = mask_truncated(generation.mask, generation.tokens, tuple(trainer.sampling.stop_tokens))
    tokens = jnp.maximum(jnp.sum(generation.mask), 1).astype(dtype)
    drift = jnp.abs(jnp.expm1(jnp.where(generation.mask, log_probs - generation.log_probs, 0)))
    highest = jnp.max(rewards, axis=2, where=keep, initial=-jnp.inf)
    lowest = jnp.min(rewards, axis=2, where=keep, initial=jnp.inf)
    metrics = Metrics(
        reward_mean=means,
        reward_std=jnp.sqrt(masked_variance(rewards, keep, axis=(1, 2))).astype(dtype),
        weighted_mean=used * means,
        weights=used,
        gain=gain_before,
        influence=influences,
        constant_groups=jnp.mean(highest <= lowest, axis=1),
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
    return jnp.sqrt(squared_norms(jax.tree.map(lambda leaf: leaf[None], tree))[0])


def _optimise(
    trainer: Trainer,
    state: TrainerState,
    batch: Batch,
    linear: Linearised | None,
    advantages: Array,
    rate: Array,
    hparams: TrainerHParams,
) -> tuple[Any, Any, Array, LossTerms, tuple[Array, Array], Array]:
    """One optimiser step, or one a mini-batch; the first reuses the linearisation at hand when there is only one.

    Without a linearisation the slope of the loss is known. Last comes what the policy said before the step, [N, T].
    """

    def apply(params: Any, optimizer: Any, gradient: Any) -> tuple[Any, Any, tuple[Array, Array]]:
        updates, optimizer = trainer.optimizer.update(gradient, optimizer, params)
        updates = jax.tree.map(lambda leaf: leaf * rate.astype(leaf.dtype), updates)
        norms = (_norm(gradient), _norm(updates))
        return optax.apply_updates(params, updates), optimizer, norms

    number = trainer.config.num_minibatches
    if linear is None:
        log_probs, gradient = known_slope_gradient(trainer, state.reference, state.params, advantages, batch, hparams)
        value, _, terms = loss_and_slope(trainer, log_probs, log_probs, advantages, batch, hparams)
        params, optimizer, norms = apply(state.params, state.optimizer, gradient)
        return params, optimizer, value, terms, norms, log_probs
    if number == 1:
        # On policy: the ratio is one by construction, whatever rounding separates sampler and policy.
        old = jax.lax.stop_gradient(linear.values)
        value, slope, terms = loss_and_slope(trainer, linear.values, old, advantages, batch, hparams)
        params, optimizer, norms = apply(state.params, state.optimizer, linear.pullback(slope))
        return params, optimizer, value, terms, norms, linear.values
    rows = batch.tokens.shape[0]
    check(rows % number == 0, argument="num_minibatches", value=number, rule=f"must divide the {rows} rows")
    batch = batch._replace(old=jax.lax.stop_gradient(linear.values))
    pieces = jax.tree.map(lambda x: x.reshape(number, rows // number, *x.shape[1:]), (batch, advantages))

    def step(carry: tuple[Any, Any], piece: tuple[Batch, Array]) -> tuple[tuple[Any, Any], Any]:
        params, optimizer = carry
        part, advantage = piece
        at = linearise_log_probs(trainer, state.reference, params, part)
        value, slope, terms = loss_and_slope(trainer, at.values, part.old, advantage, part, hparams)
        params, optimizer, norms = apply(params, optimizer, at.pullback(slope))
        return (params, optimizer), (value, terms, norms)

    (params, optimizer), (values, terms, norms) = jax.lax.scan(step, (state.params, state.optimizer), pieces)
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), terms)
    return params, optimizer, jnp.mean(values), total, (jnp.mean(norms[0]), jnp.mean(norms[1])), linear.values
