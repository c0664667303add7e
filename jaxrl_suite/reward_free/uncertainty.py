"""The two value families of the explorer: a pseudo value, and how uncertain a model is about it along a trajectory.

The uncertainty value is an indication, not a certificate: its maximum over policies and rewards is found by a heuristic
search, which can only fall short of it. What holds for every reward is in :mod:`jaxrl_suite.reward_free.certificate`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.mdp import LinearMixtureMDP, integrated_features
from jaxrl_suite.reward_free.regression import width
from jaxrl_suite.types import Array


class UncertaintyOutput(NamedTuple):
    """Both families for one (theta, policy, reward).

    Attributes:
        total: [], uncertainty value at the start, in [0, 1].
        uncertainty: [H + 1, S], hat family: optimistic total width of the pseudo value from step h on.
        values: [H + 1, S], tilde family: pseudo value of the reward in the model, clipped to [0, 1].
        policy: int32 [H, S].
        score: [], ``total`` before it is cut at 1, which breaks ties between saturated choices.
    """

    total: Array
    uncertainty: Array
    values: Array
    policy: Array
    score: Array


def uncertainty_value(
    mdp: LinearMixtureMDP,
    theta: Array,
    rewards: Array,
    tilde_inverse: Array,
    hat_inverse: Array,
    radius: Array,
    policy: Array | None = None,
) -> UncertaintyOutput:
    """Optimistic uncertainty of the model about the value of a reward, along a policy (an indication).

    Backward from ``V_{H+1} = W_{H+1} = 0``, with the action a = pi_h(s)::

        V_h(s) = clip01(r_h(s, a) + phi_{V_{h+1}}(s, a) . theta)
        u_h(s) = min(1, radius |phi_{V_{h+1}}(s, a)|_tilde)
        W_h(s) = clip01(u_h(s) + 2 radius |phi_{W_{h+1}}(s, a)|_hat + phi_{W_{h+1}}(s, a) . theta)

    Differs: the paper prints V_h inside u_h; its proofs need V_{h+1}, which stands here. Values are clipped, since
    theta need not be a kernel. Differentiable in theta, rewards, inverses, radius and the features (almost everywhere).

    Args:
        mdp: model; its features and successors are read, its true parameter is not.
        theta: [D].
        rewards: [H, S, A], in the class.
        tilde_inverse: [D, D], inverse gram matrix of the pseudo-value regression, level 0.
        hat_inverse: [D, D], the same of the uncertainty regression.
        radius: [], confidence radius.
        policy: int [H, S]; if None, at each state the action of largest W before the cut, ties to the lowest index.

    Returns:
        Values of both families and the policy.

    References:
        Zhang, Zhang, Gu, 2023, arXiv 2303.10165, algorithm HF-UCRL-RFE++, lines 5-6 and equation (2.6.1) of the
        dissertation chapter that restates it.
    """

    def back(carry: tuple[Array, Array], step: tuple[Array, Array | None]) -> tuple:
        values, uncertainty = carry
        step_reward, row = step
        value_features, width_features = integrated_features(mdp, values), integrated_features(mdp, uncertainty)
        action_values = step_reward + value_features @ theta
        surprise = jnp.minimum(1.0, radius * width(tilde_inverse, value_features))
        bracket = surprise + 2.0 * radius * width(hat_inverse, width_features) + width_features @ theta
        row = jnp.argmax(bracket, axis=-1).astype(jnp.int32) if row is None else row
        score = jnp.take_along_axis(bracket, row[:, None], axis=-1)[:, 0]
        uncertainty = jnp.clip(score, 0.0, 1.0)
        values = jnp.clip(jnp.take_along_axis(action_values, row[:, None], axis=-1)[:, 0], 0.0, 1.0)
        return (values, uncertainty), (values, uncertainty, row, score[mdp.start])

    last = jnp.zeros(mdp.num_states, rewards.dtype)
    _, (values, uncertainty, policy, scores) = jax.lax.scan(back, (last, last), (rewards, policy), reverse=True)
    values, uncertainty = (jnp.concatenate([array, last[None]]) for array in (values, uncertainty))
    return UncertaintyOutput(uncertainty[0, mdp.start], uncertainty, values, policy, scores[0])
