"""Finite Markov decision processes as arrays: dense kernels or lists of successors behind one backup."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from jaxrl_suite.config import check
from jaxrl_suite.types import Array


class TabularMDP(struct.PyTreeNode):
    """A finite Markov decision process. A pytree of arrays, so that callers may vmap and differentiate it.

    A kernel is dense (``successors=None``, entry ``[s, a, j]`` leads to state j) or sparse, by lists of at most N
    successors each. A list may name a state twice; the probabilities then add.

    Attributes:
        transition: [S, A, N], probability of the j-th successor, rows sum to 1; N = S when dense.
        reward: [S, A], or [H, S, A] when it depends on the step.
        discount: [], in [0, 1); read by the discounted planners only.
        successors: int32 [S, A, N], or None when dense.
    """

    transition: Array
    reward: Array
    discount: Array
    successors: Array | None = None

    @property
    def num_states(self) -> int:
        """Number of states S."""
        return self.transition.shape[0]

    @property
    def num_actions(self) -> int:
        """Number of actions A."""
        return self.transition.shape[1]


def tabular_mdp(
    transition: ArrayLike, reward: ArrayLike, discount: float | Array = 0.99, successors: ArrayLike | None = None
) -> TabularMDP:
    """Builds and checks a :class:`TabularMDP`; values are checked when they are concrete (not inside jit).

    Args:
        transition: [S, A, N], probabilities.
        reward: [S, A] or [H, S, A].
        discount: in [0, 1).
        successors: int [S, A, N], or None for a dense kernel (N = S).

    Returns:
        The process, in the dtype of ``transition``.

    Raises:
        ValueError: a shape does not fit, a row of ``transition`` is not a distribution (the row is named), a
            successor is not a state, or the discount is outside [0, 1).

    >>> mdp = tabular_mdp(jnp.ones((1, 2, 1)), jnp.array([[0.0, 1.0]]), 0.5)
    >>> mdp.num_states, mdp.num_actions
    (1, 2)
    """
    transition = jnp.asarray(transition)
    check(transition.ndim == 3, argument="transition", value=transition.shape, rule="shape must be [S, A, N]")
    states, actions, width = transition.shape
    if successors is None:
        check(width == states, argument="transition", value=transition.shape, rule="a dense kernel is [S, A, S]")
    else:
        successors = jnp.asarray(successors, jnp.int32)
        check(
            successors.shape == transition.shape,
            argument="successors",
            value=successors.shape,
            rule=f"must have the shape of transition, {transition.shape}",
        )
        check_successors(successors, states)
    reward = jnp.asarray(reward, transition.dtype)
    check(
        reward.ndim in (2, 3) and reward.shape[-2:] == (states, actions),
        argument="reward",
        value=reward.shape,
        rule=f"shape must be [S, A] or [H, S, A] with S={states}, A={actions}",
    )
    check_kernel(transition, "transition")
    if not isinstance(discount, jax.core.Tracer):
        value = float(discount)
        check(0.0 <= value < 1.0, argument="discount", value=value, rule="must be in [0, 1)")
    return TabularMDP(transition, reward, jnp.asarray(discount, transition.dtype), successors)


def check_kernel(transition: Array, name: str, *, tolerance: float | None = None) -> None:
    """Checks that each row of a concrete kernel is a distribution; does nothing on traced values.

    Args:
        transition: [S, A, N], probabilities.
        name: argument name for the message.
        tolerance: largest error of a row sum; by dtype if None.

    Raises:
        ValueError: names the first offending row, its sum and its smallest entry.
    """
    if isinstance(transition, jax.core.Tracer):
        return
    rows = np.asarray(transition)
    if tolerance is None:
        tolerance = 1e-4 if rows.dtype.itemsize < 8 else 1e-8
    bad = ~(np.all(np.isfinite(rows), -1) & (rows.min(-1) >= -tolerance) & (np.abs(rows.sum(-1) - 1) <= tolerance))
    if np.any(bad):
        state, action = map(int, np.argwhere(bad)[0])
        row = rows[state, action]
        raise ValueError(
            f"{name}[{state}, {action}] (state {state}, action {action}) is not a distribution: sums to "
            f"{row.sum():.6g}, smallest entry {row.min():.6g}; {int(bad.sum())} of {bad.size} rows are wrong. "
            "Remedy: every row must be non-negative and sum to 1."
        )


def check_successors(successors: ArrayLike, num_states: int) -> None:
    """Raises a ValueError that names the first entry of concrete successor lists that is not a state."""
    if isinstance(successors, jax.core.Tracer):
        return
    entries = np.asarray(successors)
    bad = (entries < 0) | (entries >= num_states)
    if np.any(bad):
        where = tuple(map(int, np.argwhere(bad)[0]))
        raise ValueError(f"successors{list(where)}={int(entries[where])}: must be a state in 0..{num_states - 1}.")


def expected_value(mdp: TabularMDP, values: Array) -> Array:
    """``[P values](s, a)``, the mean of ``values`` after one step.

    Args:
        mdp: kernel.
        values: [S].

    Returns:
        [S, A].
    """
    if mdp.successors is None:
        return jnp.einsum("saj,j->sa", mdp.transition, values, precision="highest")
    return jnp.sum(mdp.transition * values[mdp.successors], axis=-1)


def dense_kernel(mdp: TabularMDP) -> Array:
    """The kernel as ``[S, A, S]``, whatever its storage."""
    if mdp.successors is None:
        return mdp.transition
    states, actions, _ = mdp.transition.shape
    row = jnp.arange(states)[:, None, None]
    column = jnp.arange(actions)[None, :, None]
    zeros = jnp.zeros((states, actions, states), mdp.transition.dtype)
    return zeros.at[row, column, mdp.successors].add(mdp.transition)


def policy_kernel(mdp: TabularMDP, policy: Array) -> tuple[Array, Array]:
    """State-to-state kernel and reward of a stationary policy.

    Args:
        mdp: process whose reward is [S, A].
        policy: int [S], or probabilities [S, A].

    Returns:
        Kernel [S, S] and reward [S].
    """
    probs = action_probabilities(policy, mdp.num_actions, mdp.transition.dtype)
    kernel = jnp.einsum("sa,saj->sj", probs, dense_kernel(mdp), precision="highest")
    return kernel, jnp.sum(probs * mdp.reward, axis=-1)


def action_probabilities(policy: Array, num_actions: int, dtype: jnp.dtype) -> Array:
    """One-hot rows for an integer policy ``[...]``; a float policy ``[..., A]`` passes through."""
    if jnp.issubdtype(policy.dtype, jnp.integer):
        return jax.nn.one_hot(policy, num_actions, dtype=dtype)
    return policy
