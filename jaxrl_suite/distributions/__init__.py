"""The one door to distrax, entropy and information measures, and masked statistics."""

from jaxrl_suite.distributions.categorical import (
    Mass,
    categorical,
    draw_token,
    draw_with_mass,
    epsilon_greedy,
    greedy,
    invert_cdf,
    softmax_policy,
)
from jaxrl_suite.distributions.information import (
    binary_entropy,
    conditional_entropy,
    entropy,
    entropy_terms,
    joint_entropy,
    kl_divergence,
    mutual_information,
)
from jaxrl_suite.distributions.statistics import masked_mean, masked_variance, masked_whiten

__all__ = [
    "Mass",
    "binary_entropy",
    "categorical",
    "conditional_entropy",
    "draw_token",
    "draw_with_mass",
    "entropy",
    "entropy_terms",
    "epsilon_greedy",
    "greedy",
    "invert_cdf",
    "joint_entropy",
    "kl_divergence",
    "masked_mean",
    "masked_variance",
    "masked_whiten",
    "mutual_information",
    "softmax_policy",
]
