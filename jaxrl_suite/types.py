"""The seams between packages: array aliases, protocols and the tuples that cross package borders.

Axis alphabet of every docstring: S states, A actions, H horizon, D features, B batch, G group, T tokens (time),
P prompt length, V vocabulary, E experts, K objectives or marginals, N and M supports.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array
PRNGKey = jax.Array  # a typed key, from jax.random.key
Params = dict[str, Any]  # nested dict of arrays


class Routing(NamedTuple):
    """Which experts each token goes to.

    Attributes:
        experts: int32 [T, k], chosen experts, best first.
        weights: [T, k], combine weights of the chosen experts.
        probs: [T, E], full score distribution, float32 (what balancing losses read).
    """

    experts: Array
    weights: Array
    probs: Array


class Generation(NamedTuple):
    """Sampled continuations of a batch of prompts.

    Attributes:
        tokens: int32 [B, T], the stop token included; padding after it.
        log_probs: [B, T], natural log-probability of each token under the law it was drawn from; 0 where masked.
        mask: bool [B, T], true for every token up to and including the stop token.
    """

    tokens: Array
    log_probs: Array
    mask: Array


class SequenceLaw(NamedTuple):
    """A law over token sequences, one token at a time: what coupling and sampling read.

    Attributes:
        init: ``init(params, prompts [B, P], mask [B, P]) -> state``; the state holds the logits of the first new token.
        step: ``step(params, state, token [B]) -> (state, logits [B, V])``, logits of the token after ``token``.
        logits: ``logits(state) -> [B, V]``, logits of the next token at this state.
    """

    init: Callable[[Params, Array, Array], Any]
    step: Callable[[Params, Any, Array], tuple[Any, Array]]
    logits: Callable[[Any], Array]


class Policy(NamedTuple):
    """A token policy: what alignment sees of a model.

    Attributes:
        log_probs: ``log_probs(params, tokens [B, T], segments [B, T] | None, *, start=0) -> [B, T - start]``; of the
            tokens from ``start`` on, log p(token t | tokens before t), 0 at the first token of each segment.
        generate: ``generate(key, params, prompts [B, P], mask [B, P], row_ids [B], sampling) -> Generation``.
    """

    log_probs: Callable[..., Array]
    generate: Callable[..., Generation]


class EarlyGradient(NamedTuple):
    """A policy for a trainer that knows the slope of its loss before it knows the log-probabilities.

    Attributes:
        generate: as of a ``Policy``, with ``group=1``: rows come in runs of so many samples of one prompt. Returns the
            Generation and, where they can be used again and fit, the laws that the tokens were drawn from; else None.
            May take ``spare``, laws that nobody reads any more, to write over them.
        weighted_log_probs: ``weighted_log_probs(params, tokens [B, T], segments, weights [B, T - start], *, start,
            laws=None, group=1) -> (sum(weights * log_probs), log_probs [B, T - start])``, the gradient of the sum
            computed on the way. ``laws`` must be those of the same parameters; rows of a group agree before ``start``.
    """

    generate: Callable[..., tuple[Generation, Any]]
    weighted_log_probs: Callable[..., tuple[Array, Array]]


def _identity(x: Array) -> Array:
    return x


def _embedding(table: Array, tokens: Array) -> Array:
    return jnp.take(table, tokens, axis=0)


def _token_log_prob(logits: Array, tokens: Array) -> Array:
    # Gather before the normaliser, so that only one number a token outlives the reduction.
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


class Parallel(NamedTuple):
    """Hooks at the four places where a decoder that is split over devices must communicate. Identities by default.

    Attributes:
        before_column: applied to activations before a matrix that is split by columns (all-gather of a sequence shard).
        after_row: applied to partial sums after a matrix that is split by rows (sum, or sum and scatter).
        embedding: ``embedding(table [V, D], tokens [...]) -> [..., D]``, the table may be a vocabulary shard.
        token_log_prob: ``token_log_prob(logits [..., V], tokens [...]) -> [...]``, natural log-probability of
            ``tokens``; the logits may be a vocabulary shard.
    """

    before_column: Callable[[Array], Array] = _identity
    after_row: Callable[[Array], Array] = _identity
    embedding: Callable[[Array, Array], Array] = _embedding
    token_log_prob: Callable[[Array, Array], Array] = _token_log_prob


class FeedForward(Protocol):
    """The feed-forward slot of a decoder block."""

    def __call__(self, params: Params, x: Array) -> tuple[Array, Any]:
        """Maps ``x [B, T, D]`` to ``(y [B, T, D], aux)``; aux is a pytree of the same structure in every layer."""
        ...


class Attend(Protocol):
    """The attention slot of a decoder block."""

    def __call__(self, q: Array, k: Array, v: Array, positions: Array, segments: Array | None) -> Array:
        """Maps q ``[B, T, Hq, F]``, k and v ``[B, T, Hkv, F]`` to ``[B, T, Hq, F]``; segment 0 is padding."""
        ...


class HostReward(Protocol):
    """A verifiable reward on the host, with TRL's calling convention so that existing functions run unchanged."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Sequence[float | None]:
        """Returns one number a completion; None excludes that completion from this objective."""
        ...


class GraphReward(Protocol):
    """A reward inside the compiled step."""

    def __call__(self, params: Params, tokens: Array, mask: Array) -> Array:
        """Maps ``tokens [B, T]`` and ``mask [B, T]`` to rewards ``[B]``."""
        ...


class TimeStep(NamedTuple):
    """The six values of an environment step.

    Attributes:
        state: environment state after the step (already reset when the episode ended and the caller auto-resets).
        observation: observation of ``state``.
        reward: [K], one entry an objective, also for K = 1.
        terminated: bool [], the problem itself ended the episode.
        truncated: bool [], a time limit ended it.
        info: dict; ``final_observation`` holds the observation before any reset.
    """

    state: Any
    observation: Any
    reward: Array
    terminated: Array
    truncated: Array
    info: dict[str, Any]


class Environment(NamedTuple):
    """A pure simulator.

    Attributes:
        reset: ``reset(key, params) -> (state, observation)``; the key is consumed.
        step: ``step(key, state, action, params) -> TimeStep``; the key is consumed.
        params: default parameters, a pytree that callers may vmap over.
        num_actions: number of discrete actions.
        num_objectives: length K of the reward vector.
    """

    reset: Callable[[PRNGKey, Any], tuple[Any, Any]]
    step: Callable[[PRNGKey, Any, Array, Any], TimeStep]
    params: Any
    num_actions: int
    num_objectives: int = 1
