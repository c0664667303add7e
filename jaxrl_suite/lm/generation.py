"""Sampling continuations from any sequence law, with keys that belong to rows and positions, not to the batch."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.config import check
from jaxrl_suite.distributions import Mass, draw_with_mass
from jaxrl_suite.lm.groups import check_group
from jaxrl_suite.lm.sampling import Sampling, sampling_logits
from jaxrl_suite.types import Array, Generation, PRNGKey, SequenceLaw

Loop = Literal["while", "scan"]


def row_keys(key: PRNGKey, row_ids: Array) -> PRNGKey:
    """One key a row, from what the row is rather than where it stands in the batch.

    Args:
        key: base key.
        row_ids: int [B], or [B, 2] for (prompt number, sample number).

    Returns:
        typed keys [B].
    """
    ids = row_ids.reshape(row_ids.shape[0], -1)
    keys = jnp.broadcast_to(key, (ids.shape[0],))
    for column in range(ids.shape[1]):
        keys = jax.vmap(jax.random.fold_in)(keys, ids[:, column])
    return keys


def generate_from_law(
    key: PRNGKey,
    law: SequenceLaw,
    params: Any,
    prompts: Array,
    mask: Array,
    *,
    row_ids: Array,
    sampling: Sampling,
    loop: Loop = "while",
) -> Generation:
    """Draws one continuation a row.

    The draw of row b's t-th new token uses the key folded with ``row_ids[b]`` and then t: permuting, splitting or
    padding the batch changes no row.

    Args:
        key: consumed.
        law: any law; it must allow ``sampling.max_tokens`` tokens.
        params: what the law reads.
        prompts: int32 [B, P], padded on the left.
        mask: bool [B, P].
        row_ids: see :func:`row_keys`.
        sampling: law and length of the continuation.
        loop: "while" stops as soon as every row has ended; "scan" always takes max_tokens steps, and can be
            differentiated (through the log-probabilities) and vmapped without waste.

    Returns:
        Generation of T = max_tokens columns.
    """
    return generate_and_keep(
        key, law, params, prompts, mask, row_ids=row_ids, sampling=sampling, loop=loop, keep=False
    )[0]  # fmt: skip


def generate_and_keep(
    key: PRNGKey,
    law: SequenceLaw,
    params: Any,
    prompts: Array,
    mask: Array,
    *,
    row_ids: Array,
    sampling: Sampling,
    loop: Loop = "while",
    keep: bool = True,
    spare: Array | None = None,
) -> tuple[Generation, Mass | None]:
    """:func:`generate_from_law` and, if asked, the laws that the tokens were drawn from, [T, B, V].

    Time comes first, so that every step writes one piece in place. Steps that were not taken have a total of 0. None
    without ``keep`` and for greedy rows, which are not drawn. ``spare`` [T, B, V] is memory for the powers, which need
    not be filled with zeros then; those of steps that were not taken keep what it held.
    """
    keys = row_keys(key, row_ids)
    stops = jnp.asarray(sampling.stop_tokens, jnp.int32)

    def sample(logits: Array, step: Array, done: Array) -> tuple[_Drawn, Array]:
        kept = sampling_logits(logits, sampling)
        if sampling.greedy:
            token, log_prob, laws = jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.zeros_like(kept[:, 0]), None
        else:
            token, log_prob, laws = draw_with_mass(jax.vmap(jax.random.fold_in, (0, None))(keys, step), kept)
        token = jnp.where(done, jnp.asarray(sampling.pad_token, jnp.int32), token)
        log_prob = jnp.where(done, jnp.zeros_like(log_prob), log_prob)
        ended = done | (token[:, None] == stops[None]).any(axis=1)
        return _Drawn(token, log_prob, ~done, laws if keep else None), ended

    state = law.init(params, prompts, mask)
    first = sample(law.logits(state), jnp.zeros((), jnp.int32), jnp.zeros(prompts.shape[:1], bool))

    def advance(state: Any, token: Array, done: Array, step: Array) -> tuple[Any, tuple[_Drawn, Array]]:
        state, logits = law.step(params, state, token)
        return state, sample(logits, step, done)

    if loop == "scan":
        drawn = _run_scan(advance, state, first, sampling.max_tokens)
    else:
        drawn = _run_while(advance, state, first, sampling.max_tokens, spare)
    tokens = jnp.where(drawn.real, drawn.token, jnp.asarray(sampling.pad_token, jnp.int32))
    return Generation(tokens.T, drawn.log_prob.T, drawn.real.T), drawn.laws


class _Drawn(NamedTuple):
    """One token a row, [B] each, and the laws; or a whole run of them, with time as the first axis."""

    token: Array
    log_prob: Array
    real: Array
    laws: Mass | None


def _run_scan(advance: Any, state: Any, first: tuple[_Drawn, Array], max_tokens: int) -> _Drawn:
    def body(carry: tuple[Any, Array, Array], step: Array):
        state, token, done = carry
        state, (drawn, done) = advance(state, token, done, step)
        return (state, drawn.token, done), drawn

    drawn, done = first
    _, rest = jax.lax.scan(body, (state, drawn.token, done), jnp.arange(1, max_tokens, dtype=jnp.int32))
    return jax.tree.map(lambda one, more: jnp.concatenate([one[None], more]), drawn, rest)


def _run_while(advance: Any, state: Any, first: tuple[_Drawn, Array], max_tokens: int, spare: Array | None) -> _Drawn:
    drawn, done = first

    def write(record: _Drawn, new: _Drawn, step: Array | int) -> _Drawn:
        put = jax.lax.dynamic_update_index_in_dim  # unlike ``at``, it does not read what it replaces
        return jax.tree.map(lambda all_, one: put(all_, one, step, axis=0), record, new)

    record = jax.tree.map(lambda one: jnp.zeros((max_tokens, *one.shape), one.dtype), drawn)
    if spare is not None and record.laws is not None:
        record = record._replace(laws=record.laws._replace(powers=spare))
    record = write(record, drawn, 0)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        _, _, done, step, _ = carry
        return (step < max_tokens) & ~done.all()

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        state, token, done, step, record = carry
        state, (drawn, done) = advance(state, token, done, step)
        return state, drawn.token, done, step + 1, write(record, drawn, step)

    return jax.lax.while_loop(unfinished, body, (state, drawn.token, done, jnp.ones((), jnp.int32), record))[-1]


def left_pad(rows: list[list[int]], *, pad_token: int = 0, length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Stacks token lists of different lengths.

    Args:
        rows: token lists, none empty.
        pad_token: what fills the left.
        length: P; the longest row by default.

    Returns:
        prompts int32 [B, P] and mask bool [B, P].

    Raises:
        ValueError: a row is empty or longer than ``length``.

    >>> left_pad([[5], [6, 7]])[0].tolist()
    [[0, 5], [6, 7]]
    """
    longest = max(map(len, rows))
    length = longest if length is None else length
    check(min(map(len, rows)) > 0, argument="rows", value=rows[:3], rule="every prompt needs a token")
    check(longest <= length, argument="length", value=length, rule=f"must hold the longest prompt, {longest} tokens")
    prompts = np.full((len(rows), length), pad_token, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        prompts[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return prompts, mask


def check_prompts(
    prompts: Array | np.ndarray, mask: Array | np.ndarray, row_ids: Array | np.ndarray, vocab_size: int, group: int = 1
) -> None:
    """Refuses shapes that do not fit and, where values are known, masks not left-padded and unequal rows of a group.

    Raises:
        ValueError: naming the argument.
    """
    check(prompts.ndim == 2, argument="prompts", value=prompts.shape, rule="must have shape [B, P]")
    check(mask.shape == prompts.shape, argument="mask", value=mask.shape, rule=f"must have shape {prompts.shape}")
    check(
        row_ids.ndim in (1, 2) and row_ids.shape[0] == prompts.shape[0],
        argument="row_ids",
        value=row_ids.shape,
        rule=f"must have shape [{prompts.shape[0]}] or [{prompts.shape[0]}, 2]",
    )
    check_group(group, prompts.shape[0])
    if not any(isinstance(x, jax.core.Tracer) for x in (prompts, mask)):
        tokens, real = np.asarray(prompts), np.asarray(mask)
        ok = real[:, -1].all() and (np.diff(real.astype(np.int8), axis=1) >= 0).all()
        check(bool(ok), argument="mask", value="...", rule="rows must be padded on the left", remedy="Use lm.left_pad")
        same = all((x == np.repeat(x[::group], group, axis=0)).all() for x in (tokens, real))
        check(same, argument="group", value=group, rule="rows of a group must have equal prompts and masks")
        tokens = tokens[real]
        inside = tokens.size == 0 or (tokens.min() >= 0 and tokens.max() < vocab_size)
        check(
            bool(inside),
            argument="prompts",
            value=(int(tokens.min()), int(tokens.max())) if tokens.size else (),
            rule=f"tokens must be below the vocabulary of {vocab_size}",
            remedy="Is this the tokenizer of the model?",
        )
