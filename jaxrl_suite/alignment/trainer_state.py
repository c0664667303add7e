"""What a trainer is made of: choices, numbers that people sweep, the state of a run, and what a step reports."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from jaxrl_suite.alignment.losses import LossConfig
from jaxrl_suite.alignment.running import RunningMean, init_running_mean
from jaxrl_suite.config import Config, check, field
from jaxrl_suite.pareto import WeightRule
from jaxrl_suite.types import Array, EarlyGradient, Policy, PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig(Config):
    """Choices of the algorithm; where code and paper differ the corrected form is the default, the other an option."""

    estimator: Literal["grpo", "dr_grpo", "rloo", "reinforce"] = field("grpo", help="how advantages are estimated")
    group_size: int = field(8, help="G, completions a prompt")
    num_minibatches: int = field(1, help="optimiser steps a rollout; the paper takes 2")
    num_microbatches: int = field(
        1, help="pieces of a mini-batch that are differentiated one after another: less memory, same result"
    )
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
    influence_layers: tuple[int, ...] = field(
        (), help="D6: first and last layer that count in the influence, and nothing outside the layers (10,25)"
    )
    weights_first: bool = field(True, help="D7: weights move before they are used on the same batch")
    mask_truncated: bool = field(False, help="completions without a stop token are left out of the loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.group_size >= 1, argument="group_size", value=self.group_size, rule="must be at least 1")
        check(self.num_minibatches >= 1, argument="num_minibatches", value=self.num_minibatches, rule="at least 1")
        check(self.num_microbatches >= 1, argument="num_microbatches", value=self.num_microbatches, rule="at least 1")
        layers = self.influence_layers
        check(
            not layers or (len(layers) == 2 and 0 <= layers[0] <= layers[1]),
            argument="influence_layers",
            value=layers,
            rule="must be the first and the last layer, counted from 0",
        )
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
        entropy_coefficient: factor on the entropy bonus of the loss; 0 (the paper) is off.
    """

    kl_coefficient: Array | float = 1e-3
    entropy_coefficient: Array | float = 0.0


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
        assemble: ``assemble(params, reference) -> model parameters`` for the update: identity by default, LoRA's
            thin differences beside the frozen matrices.
        merge: the same for sampling, where whole matrices decode faster; ``assemble`` by default.
        early: the policy once more, with gradients taken on the way (``lm.early_gradient(model)``). Used where the
            slope of the loss is known before the log-probabilities are: one optimiser step a rollout on whole batches,
            without influence, penalty or entropy bonus. None always goes through ``policy``.
    """

    policy: Policy
    config: TrainerConfig
    loss: LossConfig
    rule: WeightRule
    optimizer: optax.GradientTransformation
    sampling: Any
    assemble: Callable[[Any, Any], Any] = lambda params, reference: params
    merge: Callable[[Any, Any], Any] | None = None
    early: EarlyGradient | None = None


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
        ratio_error: [], mean of |ratio - 1| between the sampler and the policy before the update. Where the sampler's
            laws are used again, so are its normalisers: then only the logits of the drawn tokens are compared.
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


def slope_is_known(trainer: Trainer, reference: Any, hparams: TrainerHParams) -> bool:
    """Whether the loss has the same slope whatever the log-probabilities, and the trainer can use that.

    In the first optimiser step after a rollout the ratio is one by construction, so only a penalty or an entropy bonus
    could make the slope depend on them.
    """
    entropy, config = hparams.entropy_coefficient, trainer.config
    return (
        trainer.early is not None
        and "influence" not in trainer.rule.reads
        and config.num_minibatches == config.num_microbatches == 1
        and (trainer.loss.kl_kind == "none" or reference is None)
        and isinstance(entropy, float | int)
        and entropy == 0
    )


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
        weights=jnp.full((num_objectives,), 1.0 / num_objectives, jnp.result_type(float)),
        lengths=init_running_mean(),
        key=key,
        step=jnp.zeros((), jnp.int32),
    )
