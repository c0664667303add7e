"""Reward-free exploration of linear mixture models: explore once without a reward, plan for any reward afterwards."""

from jaxrl_suite.reward_free.certificate import CertificateOutput, certificate
from jaxrl_suite.reward_free.config import ExplorerConfig, HParams, paper_num_moments
from jaxrl_suite.reward_free.explorer import ExplorerState, advance, explore, finish, init_explorer
from jaxrl_suite.reward_free.moments import MomentWeights, moment_weights, squared_powers
from jaxrl_suite.reward_free.planning import (
    Policies,
    goal_value_errors,
    plan,
    policy_values,
    suboptimality,
    value_error,
)
from jaxrl_suite.reward_free.precision import PrecisionWarning, rounding_error
from jaxrl_suite.reward_free.projection import Projection, project_parameter
from jaxrl_suite.reward_free.radius import paper_radius, self_normalised_radius
from jaxrl_suite.reward_free.regression import ridge_residual, weighted_ridge, width
from jaxrl_suite.reward_free.rewards import (
    check_rewards,
    longest_path,
    longest_totals,
    normalise_rewards,
    reward_bank,
    rewards_outside,
)
from jaxrl_suite.reward_free.search import search_rewards
from jaxrl_suite.reward_free.types import Estimate, Exploration, Record
from jaxrl_suite.reward_free.uncertainty import UncertaintyOutput, uncertainty_value
from jaxrl_suite.reward_free.widths import Widest, widest_functions, width_bound

__all__ = [
    "CertificateOutput",
    "Estimate",
    "Exploration",
    "ExplorerConfig",
    "ExplorerState",
    "HParams",
    "MomentWeights",
    "Policies",
    "PrecisionWarning",
    "Projection",
    "Record",
    "UncertaintyOutput",
    "Widest",
    "advance",
    "certificate",
    "check_rewards",
    "explore",
    "finish",
    "goal_value_errors",
    "init_explorer",
    "longest_path",
    "longest_totals",
    "moment_weights",
    "normalise_rewards",
    "paper_num_moments",
    "paper_radius",
    "plan",
    "policy_values",
    "project_parameter",
    "reward_bank",
    "rewards_outside",
    "ridge_residual",
    "rounding_error",
    "search_rewards",
    "self_normalised_radius",
    "squared_powers",
    "suboptimality",
    "uncertainty_value",
    "value_error",
    "weighted_ridge",
    "widest_functions",
    "width",
    "width_bound",
]
