"""Online alignment of a policy to several rewards: advantages, losses, rewards, and the trainer."""

from jaxrl_suite.alignment.advantages import (
    combined_advantages,
    dr_grpo_advantages,
    estimate_advantages,
    gdpo_advantages,
    grpo_advantages,
    mo_grpo_advantages,
    reinforce_advantages,
    reinforce_baseline_advantages,
    remax_advantages,
    rloo_advantages,
    soft_min_rewards,
)
from jaxrl_suite.alignment.host_rewards import Scores, score
from jaxrl_suite.alignment.losses import (
    LossConfig,
    LossTerms,
    kl_estimate,
    kl_in_rewards,
    likelihood_ratio,
    mask_truncated,
    policy_loss,
    policy_loss_terms,
    surrogate_loss,
)
from jaxrl_suite.alignment.running import RunningMean, init_running_mean, update_running_mean
from jaxrl_suite.alignment.text_rewards import accuracy, clarity, conciseness, corrected_clarity
from jaxrl_suite.alignment.trainer import rollout, rollout_with_laws, run_trainer, trainer_step
from jaxrl_suite.alignment.trainer_state import (
    Metrics,
    Trainer,
    TrainerConfig,
    TrainerHParams,
    TrainerState,
    init_trainer,
)
from jaxrl_suite.alignment.update import update

__all__ = [
    "LossConfig",
    "LossTerms",
    "Metrics",
    "RunningMean",
    "Scores",
    "Trainer",
    "TrainerConfig",
    "TrainerHParams",
    "TrainerState",
    "accuracy",
    "clarity",
    "combined_advantages",
    "conciseness",
    "corrected_clarity",
    "dr_grpo_advantages",
    "estimate_advantages",
    "gdpo_advantages",
    "grpo_advantages",
    "init_running_mean",
    "init_trainer",
    "kl_estimate",
    "kl_in_rewards",
    "likelihood_ratio",
    "mask_truncated",
    "mo_grpo_advantages",
    "policy_loss",
    "policy_loss_terms",
    "reinforce_advantages",
    "reinforce_baseline_advantages",
    "remax_advantages",
    "rloo_advantages",
    "rollout",
    "rollout_with_laws",
    "run_trainer",
    "score",
    "soft_min_rewards",
    "surrogate_loss",
    "trainer_step",
    "update",
    "update_running_mean",
]
