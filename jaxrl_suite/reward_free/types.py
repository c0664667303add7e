"""Tuples that the explorers share: records of episodes, estimates, and what an exploration leaves behind."""

from typing import NamedTuple

from jaxrl_suite.reward_free.regression import RidgeStatistics
from jaxrl_suite.types import Array


class Record(NamedTuple):
    """History of an exploration, axis K first. F families, M moment levels; an explorer without one has length 1 there.

    Attributes:
        states: int32 [K, H + 1], states visited.
        actions: int32 [K, H], actions played.
        uncertainty: [K], the explorer's own optimistic value at the start state, in [0, 1].
        radius: [K, F], confidence radius that exploration used.
        log_det: [K, F, M], log determinant of each gram matrix before the episode.
        det_growth: [K, F, M], by how much the episode raised it.
        parameter_error: [K, F, M], diagnostic: ``|theta* - theta|_Sigma`` before the episode.
        pooled_error: [K], diagnostic: the same of the pooled estimate in the summed norm.
        mean_weight: [K, F, M], mean weight of the episode's transitions.
        asked: bool [K], whether the oracle was asked.
        finite: bool [K], whether every Cholesky factor existed.
    """

    states: Array
    actions: Array
    uncertainty: Array
    radius: Array
    log_det: Array
    det_growth: Array
    parameter_error: Array
    pooled_error: Array
    mean_weight: Array
    asked: Array
    finite: Array


class Estimate(NamedTuple):
    """An estimate and the confidence that goes with it.

    Attributes:
        theta: [D].
        gram: [F, D, D], gram matrices (level 0) that bound its error.
        policy: int32 [H, S], the exploration policy of that episode.
        uncertainty: [], the explorer's value at that episode.
        episode: int32 [], index from 0; K for an estimate from all data.
    """

    theta: Array
    gram: Array
    policy: Array
    uncertainty: Array
    episode: Array


class Exploration(NamedTuple):
    """What an exploration leaves behind.

    Attributes:
        history: what happened, episode by episode.
        statistics: gram and moment of the regressions after the last episode; for "rf_ucrl" the visits [S, A] and the
            transition counts [S, A, N] stand in their place.
        estimate: parameter that planning uses, with the covariances that go with it; the certificate reads both.
        model: [S, A, N], the kernel over the successor lists that planning reads; rows sum to 1 (if projected).
        successors: int32 [S, A, N].
        start: int32 [].
        model_residual: [], how far the model was from a kernel before it was made one.
        finite: bool [], whether every factorisation of the run succeeded.
        support: bool [S, A, N], listed successors that some parameter reaches; what "every path" of a reward means.
        rounding: [], bound on what rounding did to the estimate, in the norm in which the radius is measured.
        precise: bool [], whether that is below a tenth of the radius; float32 runs can lose it.
    """

    history: Record
    statistics: RidgeStatistics
    estimate: Estimate
    model: Array
    successors: Array
    start: Array
    model_residual: Array
    finite: Array
    support: Array
    rounding: Array
    precise: Array

    @property
    def policy(self) -> Array:
        """int32 [H, S], the exploration policy of the output episode."""
        return self.estimate.policy
