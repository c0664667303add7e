"""Coding games with messages of many bits: a belief for each block of the message.

A picture of 256 pixels is one of 2^256 messages, but as 32 blocks of 8 bits, independent and uniform, it needs 32
beliefs over 256 values. At each step the block of largest entropy is coupled with the policy's law of the action,
exactly as in :mod:`jaxrl_suite.coupling.games`; its belief alone is updated.

*Actuator noise*: if action a is carried out as e with probability K(e | a), everyone sees e alone, and

    belief'(v) proportional to belief(v) sum_a K(e | a) p(a | v),

so that decoding degrades gracefully instead of excluding the truth.

References:
    Sokota et al. 2022, arXiv 2107.08295 (factored beliefs, code cart-pole and pong).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_suite.config import check, check_count, check_key
from jaxrl_suite.coupling.games import step_code, update_belief
from jaxrl_suite.coupling.sparse import as_rate, check_names, check_rate
from jaxrl_suite.distributions import categorical, entropy
from jaxrl_suite.types import Array, PRNGKey


class FactoredGame(NamedTuple):
    """A game whose states are any pytree, as functions that both sides know. Hashable: static under jit.

    Attributes:
        reset: ``reset(key, params) -> state``.
        policy: ``policy(params, state) -> [A]``, base policy.
        next_state: ``next_state(key, params, state, action) -> state``.
        ended: ``ended(params, state) -> bool []``.
    """

    reset: Callable[[PRNGKey, Any], Any]
    policy: Callable[[Any, Any], Array]
    next_state: Callable[[PRNGKey, Any, Any, Array], Any]
    ended: Callable[[Any, Any], Array]


class Recording(NamedTuple):
    """What an onlooker sees.

    Attributes:
        states: leaves [E, H + 1, ...], states before each action and after the last.
        actions: int32 [E, H], as carried out.
        lengths: int32 [E], number of actions.
    """

    states: Any
    actions: Array
    lengths: Array


class FactoredEpisodes(NamedTuple):
    """Outcome of episodes.

    Attributes:
        recording: what was seen.
        decoded: int32 [E, W], most probable value of each block at the end.
        guesses: int32 [E, H, W], the same after each step.
        uncertainty: [E, H], sum of the blocks' entropies after each step, bits.
        action_entropy: [E], sum of the entropies of the policy at the steps, bits: no more can be said.
    """

    recording: Recording
    decoded: Array
    guesses: Array
    uncertainty: Array
    action_entropy: Array


def play_factored(
    key: PRNGKey,
    game: FactoredGame,
    params: Any,
    blocks: Array,
    rate: Array | float = jnp.inf,
    *,
    num_values: int,
    horizon: int,
    channel: Array | None = None,
    replay: Recording | None = None,
) -> FactoredEpisodes:
    """Plays, or replays, one episode a message. Sender and receiver are the same compiled function.

    Args:
        key: consumed; step t of episode e draws from ``fold_in(fold_in(key, e), t)``.
        game: policy and dynamics.
        params: what the game's functions read.
        blocks: int32 [E, W], message of each episode; a receiver passes zeros.
        rate: [], bits of the code of a block at each step.
        num_values: V; values are uniform.
        horizon: H, steps after which an episode is cut off.
        channel: [A, A], law of the action that is carried out (columns) given the intended one (rows); none is the
            identity.
        replay: a recording to decode instead of playing.

    Returns:
        Outcome of the E episodes.

    Raises:
        ValueError: sizes that do not fit, a value out of range, or a negative rate.
    """
    check_key(key)
    check(blocks.ndim == 2, argument="blocks", value=blocks.shape, rule="must have two axes, [E, W]")
    check_count(2, num_values=num_values)
    check_count(1, horizon=horizon)
    check_names("blocks", blocks, num_values)
    rate = as_rate(rate, jnp.result_type(float))
    check_rate(rate)
    if replay is not None:
        fits = replay.actions.shape == (blocks.shape[0], horizon)
        rule = f"actions must have shape {(blocks.shape[0], horizon)}"
        check(fits, argument="replay", value=replay.actions.shape, rule=rule)
    return _play(key, game, params, blocks, rate, channel, replay, num_values, horizon)


@functools.partial(jax.jit, static_argnames=("game", "num_values", "horizon"))
def _play(key, game, params, blocks, rate, channel, replay, num_values, horizon) -> FactoredEpisodes:
    num_blocks = blocks.shape[1]

    def episode(key: PRNGKey, values: Array, seen: Recording | None) -> FactoredEpisodes:
        def step(carry, entry):
            state, beliefs, done = carry
            time, observed = entry
            draw_key, slip_key, move_key = jax.random.split(jax.random.fold_in(key, time), 3)
            law = game.policy(params, state)
            block = jnp.argmax(entropy(beliefs))
            given = step_code(beliefs[block], law, rate.astype(law.dtype)).given
            action = categorical(probs=given[values[block]]).sample(seed=draw_key).astype(jnp.int32)
            if channel is not None:
                action = categorical(probs=channel[action]).sample(seed=slip_key).astype(jnp.int32)
                given = given @ channel
            after = game.next_state(move_key, params, state, action)
            if observed is not None:
                action, after = observed
            belief = update_belief(beliefs[block], given[:, action])
            beliefs = jnp.where(done, beliefs, beliefs.at[block].set(belief))
            after = jax.tree.map(lambda new, old: jnp.where(done, old, new), after, state)
            bits = jnp.where(done, jnp.zeros_like(law[0]), entropy(law))
            entropies = entropy(beliefs)
            outputs = (after, action, ~done, jnp.argmax(beliefs, axis=1).astype(jnp.int32), jnp.sum(entropies), bits)
            return (after, beliefs, done | game.ended(params, after)), outputs

        start = game.reset(jax.random.fold_in(key, horizon), params)
        given = None
        if seen is not None:
            start = jax.tree.map(lambda x: x[0], seen.states)
            given = (seen.actions, jax.tree.map(lambda x: x[1:], seen.states))
        prior = jnp.full((num_blocks, num_values), 1 / num_values, game.policy(params, start).dtype)
        times = jnp.arange(horizon, dtype=jnp.int32)
        _, outputs = jax.lax.scan(step, (start, prior, game.ended(params, start)), (times, given))
        states, actions, alive, guesses, uncertainty, bits = outputs
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, states)
        recording = Recording(states, actions, jnp.sum(alive, dtype=jnp.int32))
        return FactoredEpisodes(recording, guesses[-1], guesses, uncertainty, jnp.sum(bits))

    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(blocks.shape[0]))
    return jax.vmap(episode)(keys, blocks, replay)
