"""Rate-limited Markov coding games: an agent that says a message by how it acts, without acting differently.

A source sees message m and the history; it sends code t = g(m) with H(T) at most a rate; the agent draws its action
from the coupling of T and the base policy at the state, given t. A receiver who sees only the trajectory keeps the
same belief over messages, so it can replay encoder and coupling:

    g = encoder(belief, rate);   C = coupling(law of g, policy(. | state));   a ~ C[g(m), .] / p_T(g(m));
    belief'(m') proportional to belief(m') C[g(m'), a] / p_T(g(m')).

Summed over codes C gives the policy back, so to anyone who does not know the message the actions are those of the
policy, and the reward depends neither on the rate nor on the encoder: only the accuracy does.

:func:`play` runs thousands of episodes in one compiled call. A fixed number of lanes plays; a lane whose episode ends
takes the next one, so hardly a step is masked. Sender and receiver are the same compiled function: with ``replay``
the drawn actions and states are replaced by recorded ones, and the beliefs come out bit for bit the same.

References:
    Sokota et al. 2022, arXiv 2107.08295 (Markov coding games); Ebrahimi, Chen, Khisti 2024, arXiv 2410.21666, section
    4.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check, check_count, check_key
from jaxrl_suite.coupling.ebim import code_at_rate
from jaxrl_suite.coupling.game_inputs import as_messages, as_tables
from jaxrl_suite.coupling.greedy import greedy_coupling
from jaxrl_suite.coupling.grouped_beliefs import (
    SHORT,
    GroupedBelief,
    action_weights,
    grouped_code,
    grouped_update,
    new_groups,
    num_groups,
    read_belief,
    resized,
    uniform_groups,
)
from jaxrl_suite.coupling.partitions import code_of_labels
from jaxrl_suite.coupling.quantizers import uniform_labels
from jaxrl_suite.coupling.sparse import as_rate, check_rate
from jaxrl_suite.distributions import invert_cdf
from jaxrl_suite.types import Array, PRNGKey

EncoderName = Literal["greedy", "uniform_fixed", "uniform_adaptive"]


class CodingGame(NamedTuple):
    """A game as arrays: what both sides know.

    Attributes:
        policy: [S, A], base policy.
        next_state: ``next_state(key, state, action) -> state``, int32 []; the key is consumed.
        reward: [S], reward on entering a state.
        terminal: bool [S].
        start: int32 [].
    """

    policy: Array
    next_state: Callable[[PRNGKey, Array, Array], Array]
    reward: Array
    terminal: Array
    start: Array


class Trajectories(NamedTuple):
    """What an onlooker sees.

    Attributes:
        states: int32 [E, H + 1], states before each action and after the last.
        actions: int32 [E, H].
        lengths: int32 [E], number of actions.
    """

    states: Array
    actions: Array
    lengths: Array


class Episodes(NamedTuple):
    """Outcome of episodes.

    Attributes:
        trajectories: what was seen.
        rewards: [E], undiscounted sum.
        decoded: int32 [E], message that the receiver answers, the most probable one.
        truth: [E, H], belief in the true message after each action; its last value is held to the end. NaN, inside
            jit, for a message out of range.
        masked: [], share of the steps of all lanes that belonged to no episode.
    """

    trajectories: Trajectories
    rewards: Array
    decoded: Array
    truth: Array
    masked: Array


class StepCode(NamedTuple):
    """Code and coupling of one step.

    Attributes:
        labels: int32 [N], code of each message.
        given: [N, A], law of the action given each message.
    """

    labels: Array
    given: Array


def step_code(belief: Array, action_law: Array, rate: Array | None, encoder: EncoderName = "greedy") -> StepCode:
    """What source, agent and receiver compute alike at one step.

    Args:
        belief: [N], law over messages.
        action_law: [A], base policy at the state.
        rate: [], bits of the code; None sends the message itself, which is the game without a limit.
        encoder: bounded encoder, or uniform bins, fixed or re-drawn by the belief.

    Returns:
        Labels and law of the action given each message. Averaged over the belief it is ``action_law``.
    """
    if rate is None:
        labels, code = jnp.arange(belief.shape[0], dtype=jnp.int32), belief
    elif encoder == "greedy":
        labels, code = code_at_rate(belief, rate)
    else:
        labels = uniform_labels(belief, rate, adaptive=encoder == "uniform_adaptive")
        code = code_of_labels(belief, labels)
    joint = greedy_coupling(code, action_law).dense((belief.shape[0], action_law.shape[0]))
    mass = jnp.sum(joint, axis=1, keepdims=True)
    given = jnp.where(mass > 0, joint / jnp.where(mass > 0, mass, jnp.ones_like(mass)), action_law[None, :])
    return StepCode(labels, given[labels])


def update_belief(belief: Array, likelihood: Array) -> Array:
    """Bayes' rule; an action that is impossible under every message leaves the belief as it was."""
    posterior = belief * likelihood
    total = jnp.sum(posterior)
    return jnp.where(total > 0, posterior / jnp.where(total > 0, total, jnp.ones_like(total)), belief)


class _Lanes(NamedTuple):
    episode: Array  # int32 [B], its number, or E when there is none left
    time: Array
    state: Array
    belief: Any  # as the encoder keeps it, its axis of lanes the first one
    reward: Array


class _Board(NamedTuple):
    states: Array
    actions: Array
    lengths: Array
    rewards: Array
    decoded: Array
    truth: Array


def play(
    key: PRNGKey,
    game: CodingGame,
    messages: Array,
    rate: Array | float,
    *,
    num_messages: int,
    horizon: int,
    encoder: EncoderName = "greedy",
    num_lanes: int = 256,
    replay: Trajectories | None = None,
) -> Episodes:
    """Plays, or replays, one episode a message.

    Episode e draws from ``fold_in(fold_in(key, e), t)``, whatever the number of lanes.

    Args:
        key: consumed.
        game: policy and dynamics.
        messages: int32 [E], message of each episode, in 0..num_messages-1. A replay reads them for ``truth`` alone.
        rate: [], bits of the code a step.
        num_messages: N; messages are uniform.
        horizon: H, steps after which an episode is cut off.
        encoder: which encoder.
        num_lanes: episodes in flight at once, at most E.
        replay: trajectories to decode instead of playing.

    Returns:
        Outcome of the E episodes.

    Raises:
        ValueError: sizes that do not fit, a policy that is no law at a state that is not terminal, a message or a start
            out of range, a negative rate, an unknown encoder.
    """
    check_key(key)
    check(encoder in _ENCODERS, argument="encoder", value=encoder, rule=f"must be one of {', '.join(_ENCODERS)}")
    check_count(1, num_messages=num_messages, horizon=horizon, num_lanes=num_lanes)
    kind = type(game.next_state).__name__
    check(callable(game.next_state), argument="next_state", value=kind, rule="must be a function")
    arrays = as_tables(game.policy, game.reward, game.terminal, game.start, name="policy")
    messages = as_messages(messages, num_messages)
    num_episodes = messages.shape[0]
    if replay is None:
        actions = jnp.zeros((num_episodes, horizon), jnp.int32)
        recorded = Trajectories(jnp.zeros((num_episodes, horizon + 1), jnp.int32), actions, actions[:, 0])
    else:
        remedy = "An outcome of play has them as .trajectories"
        known = isinstance(replay, Trajectories)
        check(known, argument="replay", value=type(replay).__name__, rule="must be Trajectories", remedy=remedy)
        fits = replay.actions.shape == (num_episodes, horizon)
        check(fits, argument="replay", value=replay.actions.shape, rule=f"actions must be {(num_episodes, horizon)}")
        recorded = replay
    rate = as_rate(rate, arrays[0].dtype)
    check_rate(rate)
    lanes = min(num_lanes, num_episodes)
    return _play(
        key, arrays, messages, rate, recorded, replay is not None, game.next_state, num_messages, encoder, lanes
    )


_ENCODERS = ("greedy", "uniform_fixed", "uniform_adaptive")


@functools.partial(jax.jit, static_argnames=("next_state", "num_messages", "encoder", "num_lanes"))
def _play(key, arrays, messages, rate, recorded, replay, next_state, num_messages, encoder, num_lanes) -> Episodes:
    policy, reward, terminal, start = arrays
    num_episodes, horizon = recorded.actions.shape
    kept = _BELIEFS[encoder]
    whole = kept.fresh(num_messages, num_lanes, policy.dtype)

    def fresh(episode: Array, belief) -> _Lanes:
        zero = jnp.zeros_like(episode)
        state = jnp.broadcast_to(jnp.asarray(start, jnp.int32), episode.shape)
        return _Lanes(episode, zero, state, belief, jnp.zeros(episode.shape, policy.dtype))

    def advance(lanes: _Lanes):
        row = jnp.minimum(lanes.episode, num_episodes - 1)
        fold = jax.vmap(jax.random.fold_in)
        keys = fold(jax.vmap(jax.random.fold_in, (None, 0))(key, lanes.episode), lanes.time)
        draw_keys, move_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
        observed = jnp.where(replay, recorded.actions[row, lanes.time], -1)
        belief, actions = kept.say(
            draw_keys, lanes.belief, policy[lanes.state], rate, messages[row], observed, num_messages
        )
        moved = jax.vmap(next_state)(move_keys, lanes.state, actions).astype(jnp.int32)
        state = jnp.where(replay, recorded.states[row, lanes.time + 1], moved)
        time = lanes.time + 1
        after = _Lanes(lanes.episode, time, state, belief, lanes.reward + reward[state])
        return after, actions, terminal[state] | (time >= horizon)

    def tick(carry):
        lanes, board, started, ticks = carry
        after, actions, done = advance(lanes)
        alive = lanes.episode < num_episodes
        true = messages[jnp.minimum(lanes.episode, num_episodes - 1)]
        truth, decoded = kept.read(after.belief, true)
        board = _write(board, lanes, after, actions, truth, decoded, done & alive)
        # Lanes whose episode ended take the next numbers; beyond the last one they idle.
        turn = jnp.cumsum(done & alive, dtype=jnp.int32) - 1
        episode = jnp.where(done & alive, started + turn, lanes.episode)
        restart = fresh(jnp.minimum(episode, num_episodes), kept.resize(whole, kept.size(lanes.belief)))
        replace = done | ~alive
        lanes = jax.tree.map(lambda new, old: jnp.where(_match(replace, old), new, old), restart, after)
        return lanes, board, started + jnp.sum(done & alive, dtype=jnp.int32), ticks + 1

    start_lanes = fresh(jnp.arange(num_lanes, dtype=jnp.int32), whole)
    board = _Board(
        jnp.zeros((num_episodes, horizon + 1), jnp.int32).at[:, 0].set(start),
        jnp.zeros((num_episodes, horizon), jnp.int32),
        jnp.zeros((num_episodes,), jnp.int32),
        jnp.zeros((num_episodes,), policy.dtype),
        jnp.zeros((num_episodes,), jnp.int32),
        jnp.zeros((num_episodes, horizon), policy.dtype),
    )
    carry = (start_lanes, board, jnp.asarray(num_lanes, jnp.int32), jnp.zeros((), jnp.int32))

    def unfinished(carry) -> Array:
        return jnp.any(carry[0].episode < num_episodes)

    small = kept.small(num_messages, policy.shape[1])

    def run(carry):
        """Ticks on short lists of groups while they suffice, then on whole ones until they do again."""
        if small < kept.size(whole):

            def fits(carry) -> Array:
                return kept.grown(carry[0].belief, policy.shape[1]) <= small

            def with_size(carry, size: int):
                return carry[0]._replace(belief=kept.resize(carry[0].belief, size)), *carry[1:]

            carry = jax.lax.while_loop(lambda c: unfinished(c) & fits(c), tick, with_size(carry, small))
            carry = with_size(carry, kept.size(whole))
            return jax.lax.while_loop(lambda c: unfinished(c) & ~fits(c), tick, carry)
        return jax.lax.while_loop(unfinished, tick, carry)

    _, board, _, ticks = jax.lax.while_loop(unfinished, run, carry)
    steps = jnp.sum(board.lengths).astype(policy.dtype)
    masked = 1 - steps / (ticks * num_lanes).astype(policy.dtype)
    held = jnp.arange(horizon)[None, :] >= board.lengths[:, None]
    last = jnp.take_along_axis(board.truth, jnp.maximum(board.lengths - 1, 0)[:, None], axis=1)
    trajectories = Trajectories(board.states, board.actions, board.lengths)
    valid = (messages >= 0) & (messages < num_messages)
    truth = jnp.where(valid[:, None], jnp.where(held, last, board.truth), jnp.full((), jnp.nan, policy.dtype))
    return Episodes(trajectories, board.rewards, board.decoded, truth, masked)


class _Beliefs(NamedTuple):
    """How an encoder keeps the beliefs of B lanes."""

    fresh: Callable  # (num_messages, num_lanes, dtype) -> belief, all messages equally probable
    say: Callable  # (keys, belief, laws [B, A], rate, messages, observed or -1, num_messages) -> belief, actions
    read: Callable  # (belief, messages) -> belief in them [B], likeliest messages int32 [B]
    size: Callable = lambda belief: 0  # how long the lists of the belief are
    resize: Callable = lambda belief, size: belief
    small: Callable = lambda num_messages, num_actions: 0  # a length that mostly suffices
    grown: Callable = lambda belief, num_actions: 0  # the length that the next step may need


def _fresh_groups(num_messages: int, num_lanes: int, dtype: jnp.dtype) -> GroupedBelief:
    return _lanes_first(uniform_groups(num_messages, num_lanes, num_messages, dtype))


def _lanes_first(belief: GroupedBelief) -> GroupedBelief:
    return jax.tree.map(jnp.transpose, belief)


def _say_grouped(
    keys, belief: GroupedBelief, laws, rate, messages, observed, num_messages
) -> tuple[GroupedBelief, Array]:
    groups = _lanes_first(belief)
    code = grouped_code(groups, laws.T, rate)
    actions = _draw(keys, action_weights(code, groups, messages).T, laws, observed)
    return _lanes_first(grouped_update(groups, code, actions, num_messages)), actions


def _say_binned(keys, belief: Array, laws, rate, messages, observed, num_messages, *, encoder) -> tuple[Array, Array]:
    del num_messages
    codes = jax.vmap(lambda masses, law: step_code(masses, law, rate, encoder))(belief, laws)
    weights = jnp.take_along_axis(codes.given, messages[:, None, None], axis=1)[:, 0]
    actions = _draw(keys, weights, laws, observed)
    likelihood = jnp.take_along_axis(codes.given, actions[:, None, None], axis=2)[:, :, 0]
    return jax.vmap(update_belief)(belief, likelihood), actions


def _binned(encoder: str) -> _Beliefs:
    """Beliefs ``[B, N]`` by the names of the messages."""

    def fresh(num_messages: int, num_lanes: int, dtype: jnp.dtype) -> Array:
        return jnp.full((num_lanes, num_messages), 1 / num_messages, dtype)

    def read(belief: Array, messages: Array) -> tuple[Array, Array]:
        truth = jnp.take_along_axis(belief, messages[:, None], axis=1, mode="clip")[:, 0]
        return truth, jnp.argmax(belief, axis=1).astype(jnp.int32)

    return _Beliefs(fresh, functools.partial(_say_binned, encoder=encoder), read)


_BELIEFS = {
    "greedy": _Beliefs(
        _fresh_groups,
        _say_grouped,
        lambda belief, messages: read_belief(_lanes_first(belief), messages),
        size=lambda belief: belief.sizes.shape[1],
        resize=lambda belief, size: _lanes_first(resized(_lanes_first(belief), size)),
        small=lambda num_messages, num_actions: SHORT,
        grown=lambda belief, num_actions: num_groups(_lanes_first(belief)) + new_groups(num_actions),
    ),
    "uniform_fixed": _binned("uniform_fixed"),
    "uniform_adaptive": _binned("uniform_adaptive"),
}


def _draw(keys: Array, weights: Array, laws: Array, observed: Array) -> Array:
    """int32 [B], observed actions, or draws in proportion to ``weights [B, A]``; by the law if there is no weight."""
    weights = jnp.where(jnp.sum(weights, axis=1, keepdims=True) > 0, weights, laws)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (), weights.dtype))(keys)
    return jnp.where(observed >= 0, observed, invert_cdf(weights, uniforms))


def _write(
    board: _Board, before: _Lanes, after: _Lanes, actions: Array, truth: Array, decoded: Array, ended: Array
) -> _Board:
    """Writes a step of every lane; lanes without an episode point beyond the last row and are dropped."""
    step = (before.episode, before.time)
    final = jnp.where(ended, before.episode, board.lengths.shape[0])
    return _Board(
        board.states.at[before.episode, after.time].set(after.state, mode="drop"),
        board.actions.at[step].set(actions, mode="drop"),
        board.lengths.at[final].set(after.time, mode="drop"),
        board.rewards.at[final].set(after.reward, mode="drop"),
        board.decoded.at[final].set(decoded, mode="drop"),
        board.truth.at[step].set(truth, mode="drop"),
    )


def _match(flag: Array, like: Array) -> Array:
    return flag.reshape(flag.shape + (1,) * (like.ndim - flag.ndim))
