"""What a coding game must be: shapes always, values where they are known. A wrong table would be read at its edge."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.coupling.sparse import check_law, check_names, is_concrete, is_law
from jaxrl_suite.types import Array


def as_messages(messages: Array, num_messages: int) -> Array:
    """The messages as int32 [E].

    Raises:
        ValueError: not one axis of at least one whole number in 0..num_messages-1.
    """
    fits = messages is not None and not isinstance(messages, str)
    rule = "must be whole numbers, [E] with at least one"
    check(fits, argument="messages", value=messages, rule=rule)
    messages = jnp.asarray(messages)
    check(messages.ndim == 1 and messages.size > 0, argument="messages", value=messages.shape, rule=rule)
    whole = jnp.issubdtype(messages.dtype, jnp.integer)
    check(whole, argument="messages", value=messages.dtype.name, rule=rule)
    check_names("messages", messages, num_messages)
    return messages.astype(jnp.int32)


def as_tables(
    policy: Array, reward: Array, terminal: Array, start: Array, *, name: str
) -> tuple[Array, Array, Array, Array]:
    """Policy [..., S, A] in float32 at least, reward [S], terminal bool [S] and start int32 [].

    Args:
        policy: base policy; rows of terminal states may hold anything, nobody acts there.
        reward: [S].
        terminal: bool [S].
        start: int [].
        name: what the caller calls the policy.

    Raises:
        ValueError: shapes that do not fit, a row of the policy that is no law, or a start that is no state.
    """
    policy = jnp.asarray(policy)
    policy = policy.astype(jnp.promote_types(policy.dtype, jnp.float32))
    check(policy.ndim >= 2, argument=name, value=policy.shape, rule="must be [S, A], one law a state")
    num_states = policy.shape[-2]
    reward, terminal = jnp.asarray(reward, policy.dtype), jnp.asarray(terminal, bool)
    for argument, table in (("reward", reward), ("terminal", terminal)):
        rule = f"must have one entry a state, as many as {name} has: {(num_states,)}"
        check(table.shape == (num_states,), argument=argument, value=table.shape, rule=rule)
    if is_concrete(policy, terminal):
        with jax.ensure_compile_time_eval():
            wrong = np.argwhere(~np.asarray(is_law(policy) | terminal))
        for place in map(tuple, wrong[:1].tolist()):
            check_law(f"{name}[{', '.join(map(str, place))}]", np.asarray(policy)[place])
    start = jnp.asarray(start, jnp.int32)
    check(start.ndim == 0, argument="start", value=start.shape, rule="must be a single state")
    check_names("start", start, num_states)
    return policy, reward, terminal, start


def as_successors(successors: Array, shape: tuple[int, ...]) -> Array:
    """The state that follows each state and action, int32 [S, A].

    Raises:
        ValueError: another shape, not whole, or no state.
    """
    successors = jnp.asarray(successors)
    fits = successors.shape == shape and jnp.issubdtype(successors.dtype, jnp.integer)
    shown = (successors.shape, successors.dtype.name)
    check(fits, argument="successors", value=shown, rule=f"must be whole numbers of shape [S, A] = {shape}")
    check_names("successors", successors, shape[0])
    return successors.astype(jnp.int32)
