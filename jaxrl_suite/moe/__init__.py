"""Mixtures of experts under parallel folding: attention and experts with layouts of their own over the same devices.

A :class:`Folding` gives attention the degrees (tp, cp, dp), experts the degrees (etp, ep, edp) and both the pipeline
(pp). Its common refinement is one fine mesh of atomic axes, on which each logical axis of either view is a run of
axes, so no array ever changes mesh. The layers are those of ``lm``, run inside one fully manual ``shard_map`` with
variance checking: the only collectives are those that the code names, and every gradient reduction is the transpose of
one cast, once a step. Layers of the package, from the bottom:

- folding: ``atoms`` (refinement), ``folding`` (degrees, groups, meshes, roles), ``partition`` (layout of parameters);
- tokens: ``permute`` and ``grouped`` (gathers, grouped products), ``capacity``, ``exchange``, ``dispatch``, ``layer``;
- sequences: ``hooks`` (tensor and sequence parallelism), ``context``, ``pipeline``;
- training: ``balancing``, ``model`` (objective on one rank), ``train`` (state and step);
- looking back: ``audit`` (collectives of a compiled program).
"""

from jaxrl_suite.lm import route
from jaxrl_suite.moe.audit import audit
from jaxrl_suite.moe.balancing import (
    expert_counts,
    load_balance_loss,
    load_imbalance,
    sequence_balance_loss,
    update_balance_bias,
    z_loss,
)
from jaxrl_suite.moe.capacity import expert_capacity, keep_by_capacity, rank_in_expert
from jaxrl_suite.moe.config import HParams, MoEConfig, check_folding
from jaxrl_suite.moe.dispatch import MODES, DispatchStats, ExpertAxes, Experts, dispatch, identity_experts
from jaxrl_suite.moe.folding import Folding, foldings, nearest_foldings
from jaxrl_suite.moe.grouped import grouped_matmul
from jaxrl_suite.moe.layer import LayerAxes, RouterSums, moe_layer
from jaxrl_suite.moe.model import Batch, language_batch, next_token_loss
from jaxrl_suite.moe.policy import policy, to_decode
from jaxrl_suite.moe.train import (
    TrainState,
    init_train_state,
    loss_and_gradients,
    state_from_params,
    train_step,
    train_step_in_place,
)
from jaxrl_suite.moe.upcycling import upcycle
from jaxrl_suite.moe.verify import verify

__all__ = [
    "MODES",
    "Batch",
    "DispatchStats",
    "ExpertAxes",
    "Experts",
    "Folding",
    "HParams",
    "LayerAxes",
    "MoEConfig",
    "RouterSums",
    "TrainState",
    "audit",
    "check_folding",
    "dispatch",
    "expert_capacity",
    "expert_counts",
    "foldings",
    "grouped_matmul",
    "identity_experts",
    "init_train_state",
    "keep_by_capacity",
    "language_batch",
    "load_balance_loss",
    "load_imbalance",
    "loss_and_gradients",
    "moe_layer",
    "nearest_foldings",
    "next_token_loss",
    "policy",
    "rank_in_expert",
    "route",
    "sequence_balance_loss",
    "state_from_params",
    "to_decode",
    "train_step",
    "train_step_in_place",
    "upcycle",
    "update_balance_bias",
    "verify",
    "z_loss",
]
