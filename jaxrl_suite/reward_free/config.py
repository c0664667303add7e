"""Configuration and traced hyperparameters of the explorers."""

import dataclasses
from typing import Literal, NamedTuple

from jaxrl_suite.config import Config, check, field

AlgorithmName = Literal[
    "hf_ucrl_rfe_pp",
    "ucrl_rfe",
    "ucrl_rfe_plus",
    "hf_ucrl_vtr_plus",
    "rf_ucrl",
    "unweighted",
    "uniform",
]
WIDTH_ALGORITHMS = ("ucrl_rfe", "ucrl_rfe_plus")  # one regression each that plans and certificates read
PLAIN_ALGORITHMS = ("unweighted", *WIDTH_ALGORITHMS)  # whose output regression weighs every sample alike
RadiusMode = Literal["paper", "selfnorm", "fixed", "subgaussian"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplorerConfig(Config):
    """What is fixed when an explorer is compiled."""

    algorithm: AlgorithmName = field("hf_ucrl_rfe_pp", help="explorer")
    horizon: int = field(16, help="steps an episode, H")
    num_episodes: int = field(100, help="episodes of exploration, K")
    num_moments: int = field(4, help="moment levels M: 1 is unweighted, 2 the variance only")
    radius: RadiusMode = field("fixed", help="formula of the confidence radius; radius_scale multiplies it")
    center: Literal["nominal", "zero"] = field("nominal", help="what the ridge draws to: a valid kernel, or 0 (paper)")
    oracle: Literal["greedy", "softmax", "full"] = field("greedy", help="search for the most uncertain reward")
    ascent_steps: int = field(10, help="ascent steps of the oracle an episode")
    num_starts: int = field(4, help="starts of the oracle: the last answer and random one-step rewards")
    families: Literal["two", "one"] = field("two", help="regress on both value families, or on the pseudo value alone")
    targets: Literal["values", "widths"] = field(
        "values", help="what is regressed on: both value families (paper), or the widest function met"
    )
    lazy: bool = field(False, help="ask the oracle only when a determinant has doubled")
    output: Literal["best", "last", "final"] = field(
        "best", help="plan with the most certain episode, the last (paper), or all data"
    )
    planner_estimator: Literal["pooled", "onehot"] = field("pooled", help="regression that planning reads")
    project: bool = field(True, help="project the estimate on the kernels before planning")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("horizon", 1), ("num_episodes", 1), ("num_moments", 1), ("num_starts", 1)):
            value = getattr(self, name)
            check(value >= least, argument=f"ExplorerConfig.{name}", value=value, rule=f"must be at least {least}")
        check(
            self.targets == "values" or self.algorithm in ("hf_ucrl_rfe_pp", "unweighted", "uniform"),
            argument="ExplorerConfig.targets",
            value=self.targets,
            rule=f"cannot be chosen for algorithm={self.algorithm!r}",
        )
        check(
            self.ascent_steps >= 0,
            argument="ExplorerConfig.ascent_steps",
            value=self.ascent_steps,
            rule="must not be negative",
        )


class HParams(NamedTuple):
    """Traced scalars, so that they may be swept by vmap.

    radius_scale: multiplies the radius that exploration uses; in mode "fixed" the radius is this times sqrt(D).
    ridge_scale: multiplies the paper's ridge, D / B^2.
    floor_scale: multiplies the paper's floor of the standard deviations, alpha = H^(-1/2).
    cutoff_scale: multiplies the paper's gamma = D^(-1/4); 0 drops the epistemic term.
    delta: failure probability of the confidence sets.
    ascent_rate: step size of the oracle's Adam.
    """

    radius_scale: float = 0.15
    ridge_scale: float = 1.0
    floor_scale: float = 1.0
    cutoff_scale: float = 1.0
    delta: float = 0.01
    ascent_rate: float = 0.5


def paper_num_moments(num_episodes: int, horizon: int) -> int:
    """``ceil(log2(7 K H))``, the number of moment levels of the theorem (the paper's is not an integer).

    >>> paper_num_moments(100, 16)
    14
    """
    return (7 * num_episodes * horizon - 1).bit_length()
