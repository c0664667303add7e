"""A Markov coding game whose two sides plan in a model, while the world moves by its own kernel.

Sender and receiver hold a *plan*: a policy and the model that it was made in. Both compute the same coupling of message
and action at every step, as in :mod:`jaxrl_suite.coupling.games`; what the receiver may see differs. If it sees
actions, its belief needs no model. If it sees only positions, it must ask its model which actions led there::

    belief'(m) proportional to belief(m) sum_a C(a | m) P_model(s' | s, a)

and the sender, who knows what the receiver sees, keeps that same belief.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.coupling.games import step_code, update_belief
from jaxrl_suite.distributions import categorical
from jaxrl_suite.envs.mixtures import gridworld
from jaxrl_suite.envs.rate_grid import RateGrid, next_state, soft_policy
from jaxrl_suite.mdp import LinearMixtureMDP, TabularMDP
from jaxrl_suite.types import Array, PRNGKey

ROOMS = ("aabbcc", "aabbcc", "aabbcc", "Sabbcc")
CELLS = ("......", "......", "......", "S.TT.G")
WIND = (0.6, 0.3, 0.04, 0.03, 0.03)  # north in room a, south in room b, where the traps are, east in room c

Observed = Literal["actions", "states"]


class Plan(NamedTuple):
    """What a side knows.

    Attributes:
        policy: [S, A], maximum-entropy policy of the model.
        model: [S, A, N], the kernel over the world's lists of successors.
    """

    policy: Array
    model: Array


class Played(NamedTuple):
    """Outcome of E episodes.

    Attributes:
        states: int32 [E, H + 1].
        actions: int32 [E, H].
        rewards: [E].
        decoded: int32 [E], the receiver's answer.
        lengths: int32 [E], actions before the end.
    """

    states: Array
    actions: Array
    rewards: Array
    decoded: Array
    lengths: Array


def windy_walk() -> LinearMixtureMDP:
    """The world: three rooms with winds of their own, D = 13; one of them blows towards the traps."""
    return gridworld(ROOMS, wind=WIND, rooms=True)


def grid_of(world: LinearMixtureMDP, model: Array, *, discount: float = 0.97, horizon: int = 60) -> RateGrid:
    """The coding game's grid with the moves of a model: +1 at the goal, -1 at a trap, both end the episode.

    Args:
        world: the mixture; its lists of successors are read.
        model: [S, A, N], the kernel to move by; ``world.kernel()`` is the truth.
        discount: of planning.
        horizon: steps after which an episode is cut off.
    """
    cells = np.array(list("".join(CELLS)))
    check(
        model.shape == world.successors.shape, argument="model", value=model.shape,
        rule=f"must be a kernel over the world's lists, {world.successors.shape}",
    )  # fmt: skip
    terminal = jnp.asarray(np.isin(cells, ["G", "T"]))
    entry = jnp.asarray(np.select([cells == "G", cells == "T"], [1.0, -1.0], 0.0), model.dtype)
    own = jnp.arange(len(cells), dtype=jnp.int32)[:, None, None]
    successors = jnp.where(terminal[:, None, None], own, world.successors)
    reward = jnp.where(terminal[:, None], 0.0, jnp.sum(model * entry[successors], axis=-1))
    mdp = TabularMDP(model, reward, jnp.asarray(discount, model.dtype), successors)
    return RateGrid(mdp, entry, terminal, world.start, horizon)


def plan_in(world: LinearMixtureMDP, model: Array, temperature: Array | float) -> Plan:
    """The maximum-entropy policy of a model. Traced temperatures may be swept."""
    return Plan(soft_policy(grid_of(world, model), temperature), model)


def exact_reward(grid: RateGrid, policy: Array) -> Array:
    """Expected sum of rewards of a policy [S, A] over the grid's horizon, by its own kernel, without discount."""

    def back(values: Array, _: None) -> tuple[Array, None]:
        ahead = jnp.sum(grid.mdp.transition * values[grid.successors], axis=-1)
        return jnp.where(grid.terminal, 0.0, jnp.sum(policy * (grid.mdp.reward + ahead), axis=-1)), None

    values, _ = jax.lax.scan(back, jnp.zeros(policy.shape[0], policy.dtype), length=grid.horizon)
    return values[grid.start]


def play(
    key: PRNGKey,
    grid: RateGrid,
    messages: Array,
    sender: Plan,
    receiver: Plan | None = None,
    *,
    num_messages: int,
    observed: Observed = "actions",
) -> Played:
    """One episode a message; episode e draws from ``fold_in(fold_in(key, e), t)``, as in the library's game.

    Args:
        key: consumed.
        grid: the true world.
        messages: int32 [E], in 0..num_messages-1, uniform.
        sender: what the sender plans with.
        receiver: what the receiver plans with; the sender's own plan if None.
        num_messages: N, static.
        observed: what the receiver sees of a step, static.

    Raises:
        ValueError: unknown ``observed``, too few messages.
    """
    check(observed in ("actions", "states"), argument="observed", value=observed, rule="must be actions or states")
    check(num_messages > 1, argument="num_messages", value=num_messages, rule="must be at least 2")
    prior = jnp.full((num_messages,), 1 / num_messages, sender.policy.dtype)
    sides = (sender,) if receiver is None else (sender, receiver)

    def seen(plan: Plan, given: Array, state: Array, action: Array, following: Array) -> Array:
        if observed == "actions":
            return given[:, action]
        reaches = jnp.where(grid.successors[state] == following, plan.model[state], 0)
        return given @ jnp.sum(reaches, axis=-1)

    def episode(number: Array, message: Array) -> Played:
        def step(carry, time):
            state, beliefs, reward, done = carry
            draw_key, move_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, number), time))
            given = [step_code(b, plan.policy[state], None).given for b, plan in zip(beliefs, sides, strict=True)]
            action = categorical(probs=given[0][message]).sample(seed=draw_key).astype(jnp.int32)
            following = next_state(move_key, grid, state, action).astype(jnp.int32)
            after = tuple(
                update_belief(belief, seen(plan, law, state, action, following))
                for belief, plan, law in zip(beliefs, sides, given, strict=True)
            )
            moved = (following, after, reward + grid.entry_reward[following], grid.terminal[following])
            carry = jax.tree.map(lambda new, old: jnp.where(done, old, new), moved, carry)
            return carry, (carry[0], jnp.where(done, 0, action), ~done)

        zero = jnp.zeros((), sender.policy.dtype)
        start = (jnp.asarray(grid.start, jnp.int32), (prior,) * len(sides), zero, jnp.array(False))
        last, (states, actions, alive) = jax.lax.scan(step, start, jnp.arange(grid.horizon, dtype=jnp.int32))
        answer = jnp.argmax(last[1][-1]).astype(jnp.int32)
        path = jnp.concatenate([start[0][None], states])
        return Played(path, actions, last[2], answer, jnp.sum(alive, dtype=jnp.int32))

    return jax.vmap(episode)(jnp.arange(messages.shape[0], dtype=jnp.int32), messages)
