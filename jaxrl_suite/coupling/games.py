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
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check
from jaxrl_suite.coupling.ebim import code_at_rate
from jaxrl_suite.coupling.greedy import greedy_coupling
from jaxrl_suite.coupling.partitions import code_of_labels
from jaxrl_suite.coupling.quantizers import uniform_labels
from jaxrl_suite.distributions import categorical
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
        truth: [E, H], belief in the true message after each action; its last value is held to the end.
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


class _Lane(NamedTuple):
    episode: Array  # int32 [], its number, or E when there is none left
    time: Array
    state: Array
    belief: Array
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
        ValueError: sizes that do not fit, a negative rate, an unknown encoder.
    """
    check(encoder in _ENCODERS, argument="encoder", value=encoder, rule=f"must be one of {', '.join(_ENCODERS)}")
    check(num_messages > 0, argument="num_messages", value=num_messages, rule="must be positive")
    check(horizon > 0, argument="horizon", value=horizon, rule="must be positive")
    check(num_lanes > 0, argument="num_lanes", value=num_lanes, rule="must be positive")
    num_episodes = messages.shape[0]
    if replay is None:
        actions = jnp.zeros((num_episodes, horizon), jnp.int32)
        recorded = Trajectories(jnp.zeros((num_episodes, horizon + 1), jnp.int32), actions, actions[:, 0])
    else:
        fits = replay.actions.shape == (num_episodes, horizon)
        check(fits, argument="replay", value=replay.actions.shape, rule=f"actions must be {(num_episodes, horizon)}")
        recorded = replay
    rate = jnp.asarray(rate, game.policy.dtype)
    if not isinstance(rate, jax.core.Tracer):
        check(bool(rate >= 0), argument="rate", value=float(rate), rule="must not be negative")
    lanes = min(num_lanes, num_episodes)
    arrays = (game.policy, game.reward, game.terminal, game.start)
    return _play(
        key, arrays, messages, rate, recorded, replay is not None, game.next_state, num_messages, encoder, lanes
    )


_ENCODERS = ("greedy", "uniform_fixed", "uniform_adaptive")


@functools.partial(jax.jit, static_argnames=("next_state", "num_messages", "encoder", "num_lanes"))
def _play(key, arrays, messages, rate, recorded, replay, next_state, num_messages, encoder, num_lanes) -> Episodes:
    policy, reward, terminal, start = arrays
    num_episodes, horizon = recorded.actions.shape
    prior = jnp.full((num_messages,), 1 / num_messages, policy.dtype)

    def fresh(episode: Array) -> _Lane:
        zero = jnp.zeros((), jnp.int32)
        return _Lane(episode, zero, jnp.asarray(start, jnp.int32), prior, jnp.zeros((), policy.dtype))

    def advance(lane: _Lane):
        row = jnp.minimum(lane.episode, num_episodes - 1)
        draw_key, move_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, lane.episode), lane.time))
        code = step_code(lane.belief, policy[lane.state], rate, encoder)
        drawn = categorical(probs=code.given[messages[row]]).sample(seed=draw_key).astype(jnp.int32)
        action = jnp.where(replay, recorded.actions[row, lane.time], drawn)
        moved = next_state(move_key, lane.state, action).astype(jnp.int32)
        state = jnp.where(replay, recorded.states[row, lane.time + 1], moved)
        belief = update_belief(lane.belief, code.given[:, action])
        time = lane.time + 1
        lane_after = _Lane(lane.episode, time, state, belief, lane.reward + reward[state])
        return lane_after, action, terminal[state] | (time >= horizon)

    def tick(carry):
        lanes, board, started, ticks = carry
        after, actions, done = jax.vmap(advance)(lanes)
        alive = lanes.episode < num_episodes
        truth = jax.vmap(lambda belief, message: belief[message])(
            after.belief, messages[jnp.minimum(lanes.episode, num_episodes - 1)]
        )
        board = _write(board, lanes, after, actions, truth, done & alive)
        # Lanes whose episode ended take the next numbers; beyond the last one they idle.
        turn = jnp.cumsum(done & alive, dtype=jnp.int32) - 1
        episode = jnp.where(done & alive, started + turn, lanes.episode)
        restart = jax.vmap(fresh)(jnp.minimum(episode, num_episodes))
        replace = done | ~alive
        lanes = jax.tree.map(lambda new, old: jnp.where(_match(replace, old), new, old), restart, after)
        return lanes, board, started + jnp.sum(done & alive, dtype=jnp.int32), ticks + 1

    start_lanes = jax.vmap(fresh)(jnp.arange(num_lanes, dtype=jnp.int32))
    board = _Board(
        jnp.zeros((num_episodes, horizon + 1), jnp.int32).at[:, 0].set(start),
        jnp.zeros((num_episodes, horizon), jnp.int32),
        jnp.zeros((num_episodes,), jnp.int32),
        jnp.zeros((num_episodes,), policy.dtype),
        jnp.zeros((num_episodes,), jnp.int32),
        jnp.zeros((num_episodes, horizon), policy.dtype),
    )
    carry = (start_lanes, board, jnp.asarray(num_lanes, jnp.int32), jnp.zeros((), jnp.int32))
    _, board, _, ticks = jax.lax.while_loop(lambda carry: jnp.any(carry[0].episode < num_episodes), tick, carry)
    steps = jnp.sum(board.lengths).astype(policy.dtype)
    masked = 1 - steps / (ticks * num_lanes).astype(policy.dtype)
    held = jnp.arange(horizon)[None, :] >= board.lengths[:, None]
    last = jnp.take_along_axis(board.truth, jnp.maximum(board.lengths - 1, 0)[:, None], axis=1)
    trajectories = Trajectories(board.states, board.actions, board.lengths)
    return Episodes(trajectories, board.rewards, board.decoded, jnp.where(held, last, board.truth), masked)


def _write(board: _Board, before: _Lane, after: _Lane, actions: Array, truth: Array, ended: Array) -> _Board:
    """Writes a step of every lane; lanes without an episode point beyond the last row and are dropped."""
    step = (before.episode, before.time)
    final = jnp.where(ended, before.episode, board.lengths.shape[0])
    return _Board(
        board.states.at[before.episode, after.time].set(after.state, mode="drop"),
        board.actions.at[step].set(actions, mode="drop"),
        board.lengths.at[final].set(after.time, mode="drop"),
        board.rewards.at[final].set(after.reward, mode="drop"),
        board.decoded.at[final].set(jnp.argmax(after.belief, axis=1).astype(jnp.int32), mode="drop"),
        board.truth.at[step].set(truth, mode="drop"),
    )


def _match(flag: Array, like: Array) -> Array:
    return flag.reshape(flag.shape + (1,) * (like.ndim - flag.ndim))


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
    """
    rate = None if rate is None else jnp.asarray(rate, policies.dtype)
    return _enumerate(policies, successors, reward, terminal, start, num_messages, rate)


@functools.partial(jax.jit, static_argnames="num_messages")
def _enumerate(policies, successors, reward, terminal, start, num_messages, rate) -> ExactGame:
    num_actions = policies.shape[2]
    masses = jnp.full((1, num_messages), 1 / num_messages, policies.dtype)  # p(message, history)
    states, gains = jnp.asarray(start, jnp.int32)[None], jnp.zeros((1,), policies.dtype)
    first = jnp.arange(num_actions) == 0
    for policy in policies:
        # After the end there is one way to go on, which says nothing.
        laws = jnp.where(terminal[states][:, None], first[None, :].astype(policy.dtype), policy[states])
        total = jnp.sum(masses, axis=1, keepdims=True)
        uniform = jnp.full_like(masses, 1 / num_messages)
        beliefs = jnp.where(total > 0, masses / jnp.where(total > 0, total, 1), uniform)
        given = jax.vmap(lambda belief, law: step_code(belief, law, rate).given)(beliefs, laws)
        masses = (masses[:, None, :] * jnp.swapaxes(given, 1, 2)).reshape(-1, num_messages)
        moved = jnp.where(terminal[states][:, None], states[:, None], successors[states])
        gains = (gains[:, None] + jnp.where(terminal[states][:, None], 0, reward[moved])).reshape(-1)
        states = moved.reshape(-1)
    weight = jnp.sum(masses, axis=1)
    ratio = masses / jnp.where(weight > 0, weight, 1)[:, None]
    information = jnp.sum(jnp.where(masses > 0, masses * jnp.log2(jnp.where(ratio > 0, ratio, 1) * num_messages), 0))
    accuracy = jnp.sum(jnp.max(masses, axis=1))
    return ExactGame(accuracy, information, jnp.sum(weight * gains), jnp.sum(weight * (gains > 0)))
