"""Policies that are paid for what they say: by gradient through the coupling in a grid, by exact planning in text.

Both maximise reward plus a price times information. In the grid the information that trajectories carry about the
message is computed exactly and differentiated. In text a coupling carries nearly all of the entropy of the law that it
follows, so that information is that entropy; with reward ``log2 p`` of the model's own law the best law of a price has
a closed form, which is planned backwards over the characters.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_suite import pareto
from jaxrl_suite.config import check
from jaxrl_suite.coupling.exact_games import ExactGame
from jaxrl_suite.coupling.games import step_code
from jaxrl_suite.coupling.integer import round_masses
from jaxrl_suite.coupling.iterative import fimec_symbol
from jaxrl_suite.distributions import entropy
from jaxrl_suite.types import Array, PRNGKey


def enumerate_by_scan(
    policies: Array, successors: Array, reward: Array, terminal: Array, start: Array, *, num_messages: int
) -> ExactGame:
    """As ``coupling.exact_games.enumerate_game`` without a rate, one step compiled once.

    Every leaf of the tree of action sequences is carried from the first step on, although leaves with a common
    beginning agree until they part: H steps over ``A ** H`` leaves instead of a growing tree, so that the program (and
    that of its derivative) does not grow with the horizon.

    Args:
        policies: [H, S, A].
        successors: int32 [S, A].
        reward: [S], on entering.
        terminal: bool [S].
        start: int32 [].
        num_messages: N, uniform.
    """
    horizon, _, num_actions = policies.shape
    leaves = num_actions**horizon
    digits = np.arange(leaves) // num_actions ** np.arange(horizon - 1, -1, -1)[:, None] % num_actions
    stays = jnp.arange(num_actions) == 0  # after the end there is one way to go on, which says nothing

    def step(carry, inputs):
        masses, states, gains = carry
        policy, actions = inputs
        over = terminal[states]
        laws = jnp.where(over[:, None], stays[None].astype(policy.dtype), policy[states])
        total = jnp.sum(masses, axis=1, keepdims=True)
        beliefs = jnp.where(total > 0, masses / jnp.where(total > 0, total, 1), 1 / num_messages)
        given = jax.vmap(lambda belief, law: step_code(belief, law, None).given)(beliefs, laws)
        masses = masses * jnp.take_along_axis(given, actions[:, None, None], axis=2)[..., 0]
        moved = jnp.where(over, states, successors[states, actions])
        return (masses, moved, gains + jnp.where(over, 0, reward[moved])), None

    first = (
        jnp.full((leaves, num_messages), 1 / num_messages, policies.dtype),
        jnp.full((leaves,), start, jnp.int32),
        jnp.zeros((leaves,), policies.dtype),
    )
    (masses, _, gains), _ = jax.lax.scan(step, first, (policies, jnp.asarray(digits, jnp.int32)))
    weight = jnp.sum(masses, axis=1)
    ratio = masses / jnp.where(weight > 0, weight, 1)[:, None]
    bits = jnp.where(masses > 0, masses * jnp.log2(jnp.where(ratio > 0, ratio, 1) * num_messages), 0)
    accuracy = jnp.sum(jnp.max(masses, axis=1))
    return ExactGame(accuracy, jnp.sum(bits), jnp.sum(weight * gains), jnp.sum(weight * (gains > 0)))


def climb(
    value: Callable[[Array], ExactGame], logits: Array, price: Array, *, num_steps: int, step_size: float
) -> tuple[ExactGame, ExactGame]:
    """Adam on reward plus price times information; the best policy met is kept, as couplings jump at ties.

    Returns:
        The game of the best policy, and the games of all steps.
    """
    optimizer = optax.adam(step_size, b2=0.99)

    def loss(logits: Array) -> tuple[Array, ExactGame]:
        game = value(jax.nn.softmax(logits, axis=-1))
        return -(game.mean_reward + price * game.information), game

    def step(carry, _):
        logits, state, best, kept = carry
        (total, game), slope = jax.value_and_grad(loss, has_aux=True)(logits)
        kept = jax.tree.map(lambda new, old: jnp.where(total < best, new, old), game, kept)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(logits, updates), state, jnp.minimum(total, best), kept), game

    nothing = ExactGame(*(jnp.zeros((), logits.dtype) for _ in ExactGame._fields))
    start = (logits, optimizer.init(logits), jnp.full((), jnp.inf, logits.dtype), nothing)
    (_, _, _, kept), history = jax.lax.scan(step, start, length=num_steps)
    return kept, history


def values_ahead(log_probs: Array, price: Array, horizon: int) -> Array:
    """Soft values [T + 1, S] of texts: ``V_h(s) = price log2 sum_a 2^((log2 p(a | s) + V_{h+1}(s')) / price)``.

    Args:
        log_probs: [S, V] with S = V * V, natural logarithms; state (x, y) followed by a leads to (y, a).
        price: > 0, bits of log-likelihood for a bit said. At 1 all values are 0 and the law is the model's own.
        horizon: characters T.
    """
    symbols = log_probs.shape[1]
    bits = log_probs / jnp.log(2.0)

    def back(values: Array, _: None) -> tuple[Array, Array]:
        ahead = jnp.tile(values.reshape(symbols, symbols), (symbols, 1))  # row (x, y) reads the values of (y, .)
        values = price * jax.nn.logsumexp((bits + ahead) * jnp.log(2.0) / price, axis=-1) / jnp.log(2.0)
        return values, values

    last = jnp.zeros(log_probs.shape[0], log_probs.dtype)
    _, values = jax.lax.scan(back, last, length=horizon)
    return jnp.concatenate([values[::-1], last[None]])


def text_law(log_probs: Array, values: Array, price: Array, states: Array) -> Array:
    """Log-probabilities [..., V] of the next character at states [...], given the values [S] after it."""
    symbols = log_probs.shape[1]
    ahead = values.reshape(symbols, symbols)[states % symbols]
    return jax.nn.log_softmax((log_probs[states] + ahead * jnp.log(2.0)) / price, axis=-1)


def text_quality(log_probs: Array, values: Array, price: Array, start: Array) -> tuple[Array, Array]:
    """Expected ``log2 p`` of the text under the model and its entropy in bits, both exactly and a character.

    Args:
        log_probs: [S, V].
        values: [T + 1, S]; zeros make it the model's law at temperature ``price``.
        price: [].
        start: int32 [], first state.
    """
    symbols = log_probs.shape[1]
    states = jnp.arange(log_probs.shape[0])

    def step(law: Array, ahead: Array) -> tuple[Array, tuple[Array, Array]]:
        logs = text_law(log_probs, ahead, price, states)
        joint = law[:, None] * jnp.exp(logs)
        following = jnp.sum(joint.reshape(symbols, symbols, symbols), axis=0).reshape(-1)
        return following, (jnp.sum(joint * log_probs), -jnp.sum(jnp.where(joint > 0, joint * logs, 0)))

    first = jnp.zeros(log_probs.shape[0], log_probs.dtype).at[start].set(1)
    _, (quality, said) = jax.lax.scan(step, first, values[1:])
    return jnp.mean(quality) / jnp.log(2.0), jnp.mean(said) / jnp.log(2.0)


class Hidden(NamedTuple):
    """Texts that carry messages.

    Attributes:
        texts: int32 [B, T].
        decoded: int32 [B, W], most probable value of each block.
        bits: [B], prior less posterior entropy of the message, over the blocks.
        quality: [B], mean ``log2 p`` of a character under the model.
    """

    texts: Array
    decoded: Array
    bits: Array
    quality: Array


def write_texts(
    key: PRNGKey, log_probs: Array, values: Array, price: Array, start: Array, messages: Array, texts: Array,
    replay: Array, *, block_size: int,
) -> Hidden:  # fmt: skip
    """Sender (``replay`` false) or receiver (true, reads ``texts``): the same loop around the same coupling.

    Args:
        key: consumed; the sender's alone.
        log_probs: [S, V].
        values: [T + 1, S].
        price: [].
        start: int32 [], state that both know.
        messages: int32 [B, W], uniform in 0..block_size-1; the receiver passes anything.
        texts: int32 [B, T]; read in a replay.
        replay: bool [].
        block_size: values of a block, static.
    """
    symbols = log_probs.shape[1]

    def one(key: PRNGKey, message: Array, text: Array) -> Hidden:
        def step(carry, inputs):
            state, beliefs = carry
            time, ahead, seen = inputs
            law = jnp.exp(text_law(log_probs, ahead, price, state))
            counts = round_masses(law, 1 << 30)
            drawn = fimec_symbol(jax.random.fold_in(key, time), beliefs, message, counts, seen, replay)
            return (state % symbols * symbols + drawn.symbol, drawn.posterior), (
                drawn.symbol,
                log_probs[state, drawn.symbol],
            )

        beliefs = jnp.full((message.shape[0], block_size), 1 / block_size, jnp.float32)
        times = jnp.arange(text.shape[0], dtype=jnp.int32)
        (_, beliefs), (written, quality) = jax.lax.scan(step, (start, beliefs), (times, values[1:], text))
        told = message.shape[0] * jnp.log2(float(block_size)) - jnp.sum(entropy(beliefs))
        answer = jnp.argmax(beliefs, axis=1).astype(jnp.int32)
        return Hidden(written, answer, told, jnp.mean(quality) / jnp.log(2.0))

    return jax.vmap(one)(jax.random.split(key, messages.shape[0]), messages, texts)


def front_of(points: np.ndarray, reference: Sequence[float]) -> np.ndarray:
    """Which of the points [N, K] the archive keeps: bool [N]. None below the reference."""
    check(len(points) > 0, argument="points", value=len(points), rule="must not be empty")
    origin = jnp.asarray(reference, jnp.float32)

    def insert(archive, row):
        point, label = row
        return pareto.archive_insert(archive, point, label=label)[0], None

    labels = jnp.arange(len(points), dtype=jnp.int32)
    archive = jax.jit(lambda rows: jax.lax.scan(insert, pareto.init_archive(len(points), origin), (rows, labels))[0])(
        jnp.asarray(points, jnp.float32)
    )
    kept = np.asarray(archive.labels)[np.asarray(archive.mask)]
    return np.isin(np.arange(len(points)), kept)
