"""Small coding games by enumeration of all trajectories: what :func:`jaxrl_suite.coupling.games.play` estimates.

Expectations are exact and differentiable in the base policy, through every coupling on the way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check, check_count
from jaxrl_suite.coupling.game_inputs import as_successors, as_tables
from jaxrl_suite.coupling.games import step_code
from jaxrl_suite.coupling.sparse import as_rate, check_rate
from jaxrl_suite.types import Array


class ExactGame(NamedTuple):
    """A coding game by enumeration of all trajectories.

    Attributes:
        accuracy: [], probability that the receiver names the message.
        information: [], I(M; Z) of message and trajectory in bits.
        mean_reward: [], expected reward.
        success: [], probability of a positive reward.
    """

    accuracy: Array
    information: Array
    mean_reward: Array
    success: Array


def enumerate_game(
    policies: Array,
    successors: Array,
    reward: Array,
    terminal: Array,
    start: Array,
    num_messages: int,
    rate: Array | float | None,
) -> ExactGame:
    """Exact accuracy of a game with deterministic moves and a short horizon: all ``A ** H`` action sequences.

    Differentiable in the policies, through every coupling on the way (almost everywhere: a tie is a jump).

    Args:
        policies: [H, S, A], base policy of each step.
        successors: int32 [S, A].
        reward: [S], on entering.
        terminal: bool [S].
        start: int32 [].
        num_messages: N, uniform.
        rate: [], bits a step; None for no limit.

    Returns:
        Exact expectations.

    Raises:
        ValueError: sizes that do not fit, a policy that is no law at a state that is not terminal, a start or a
            successor out of range, no messages, or a negative rate.
    """
    check_count(1, num_messages=num_messages)
    policies, reward, terminal, start = as_tables(policies, reward, terminal, start, name="policies")
    check(policies.ndim == 3, argument="policies", value=policies.shape, rule="must be [H, S, A]")
    successors = as_successors(successors, policies.shape[1:])
    if rate is not None:
        rate = as_rate(rate, policies.dtype)
        check_rate(rate)
    return _enumerate(policies, successors, reward, terminal, start, num_messages, rate)


_SCANNED_WIDTH = 1024  # histories; levels that are not wider share one compiled body


@functools.partial(jax.jit, static_argnames="num_messages")
def _enumerate(policies, successors, reward, terminal, start, num_messages, rate) -> ExactGame:
    horizon, _, num_actions = policies.shape
    width = min(num_actions**horizon, _SCANNED_WIDTH)
    narrow = sum(num_actions ** (time + 1) <= width for time in range(horizon))

    def level(carry: tuple[Array, Array, Array], policy: Array) -> tuple[Array, Array, Array]:
        return _extend(carry, policy, successors, reward, terminal, rate)

    # The first rows are histories, the others have no mass: p(message, history) [width, N], state, reward so far.
    masses = jnp.zeros((width, num_messages), policies.dtype).at[0].set(1 / num_messages)
    carry = (masses, jnp.full((width,), start, jnp.int32), jnp.zeros((width,), policies.dtype))
    carry, _ = jax.lax.scan(
        lambda carry, policy: (jax.tree.map(lambda x: x[:width], level(carry, policy)), None), carry, policies[:narrow]
    )
    for policy in policies[narrow:]:
        carry = level(carry, policy)
    masses, _, gains = carry
    weight = jnp.sum(masses, axis=1)
    ratio = masses / jnp.where(weight > 0, weight, 1)[:, None]
    information = jnp.sum(jnp.where(masses > 0, masses * jnp.log2(jnp.where(ratio > 0, ratio, 1) * num_messages), 0))
    accuracy = jnp.sum(jnp.max(masses, axis=1))
    return ExactGame(accuracy, information, jnp.sum(weight * gains), jnp.sum(weight * (gains > 0)))


def _extend(carry, policy, successors, reward, terminal, rate):
    """Histories of one action more, all actions of a history in a row."""
    masses, states, gains = carry
    num_messages, num_actions = masses.shape[1], policy.shape[1]
    # After the end there is one way to go on, which says nothing.
    ended = terminal[states][:, None]
    first = (jnp.arange(num_actions) == 0).astype(policy.dtype)
    laws = jnp.where(ended, first[None, :], policy[states])
    total = jnp.sum(masses, axis=1, keepdims=True)
    uniform = jnp.full_like(masses, 1 / num_messages)
    beliefs = jnp.where(total > 0, masses / jnp.where(total > 0, total, 1), uniform)
    given = jax.vmap(lambda belief, law: step_code(belief, law, rate).given)(beliefs, laws)
    moved = jnp.where(ended, states[:, None], successors[states])
    return (
        (masses[:, None, :] * jnp.swapaxes(given, 1, 2)).reshape(-1, num_messages),
        moved.reshape(-1),
        (gains[:, None] + jnp.where(ended, 0, reward[moved])).reshape(-1),
    )
