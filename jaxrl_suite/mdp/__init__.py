"""Finite models as arrays: tabular and linear mixture processes, exact planning, soft planning."""

from jaxrl_suite.mdp.mixture import (
    LinearMixtureMDP,
    feature_bound,
    integrated_features,
    linear_mixture,
    simulate,
    step_index,
)
from jaxrl_suite.mdp.planning import (
    FinitePlan,
    PlanOutput,
    backward_induction,
    bellman_values,
    finite_policy_evaluation,
    policy_evaluation,
    value_iteration,
)
from jaxrl_suite.mdp.soft import SoftPlan, soft_backward_induction, soft_maximum, soft_value_iteration
from jaxrl_suite.mdp.tabular import (
    TabularMDP,
    action_probabilities,
    check_kernel,
    dense_kernel,
    expected_value,
    policy_kernel,
    tabular_mdp,
)
from jaxrl_suite.mdp.validation import MixtureReport, RowFault, validate_mixture

__all__ = [
    "FinitePlan",
    "LinearMixtureMDP",
    "MixtureReport",
    "PlanOutput",
    "RowFault",
    "SoftPlan",
    "TabularMDP",
    "action_probabilities",
    "backward_induction",
    "bellman_values",
    "check_kernel",
    "dense_kernel",
    "expected_value",
    "feature_bound",
    "finite_policy_evaluation",
    "integrated_features",
    "linear_mixture",
    "policy_evaluation",
    "policy_kernel",
    "simulate",
    "soft_backward_induction",
    "soft_maximum",
    "soft_value_iteration",
    "step_index",
    "tabular_mdp",
    "validate_mixture",
    "value_iteration",
]
