"""Multi-objective optimisation: hypervolume, fronts, archives, weights that learn. Larger is better everywhere."""

from jaxrl_suite.pareto.dominance import Archive, archive_insert, dominates, init_archive, non_dominated
from jaxrl_suite.pareto.hypervolume import hypervolume, hypervolume_contributions, hypervolume_improvement
from jaxrl_suite.pareto.influence import Linearisation, gram, gram_influence, influence, linearise
from jaxrl_suite.pareto.statistics_weights import (
    ctwa_weights,
    gdpo_weights,
    lagrangian_weights,
    mo_grpo_weights,
    saw_weights,
)
from jaxrl_suite.pareto.weights import (
    Signals,
    WeightRule,
    fixed_weights,
    hypervolume_gain,
    hypervolume_gain_weights,
    hypervolume_gradient,
    hypervolume_gradient_weights,
    hypervolume_weights_population,
    influence_step,
    influence_weights,
    scheduled_weights,
    tchebycheff_weights,
    weight_gain,
)

__all__ = [
    "Archive",
    "Linearisation",
    "Signals",
    "WeightRule",
    "archive_insert",
    "ctwa_weights",
    "dominates",
    "fixed_weights",
    "gdpo_weights",
    "gram",
    "gram_influence",
    "hypervolume",
    "hypervolume_contributions",
    "hypervolume_gain",
    "hypervolume_gain_weights",
    "hypervolume_gradient",
    "hypervolume_gradient_weights",
    "hypervolume_improvement",
    "hypervolume_weights_population",
    "influence",
    "influence_step",
    "influence_weights",
    "init_archive",
    "lagrangian_weights",
    "linearise",
    "mo_grpo_weights",
    "non_dominated",
    "saw_weights",
    "scheduled_weights",
    "tchebycheff_weights",
    "weight_gain",
]
