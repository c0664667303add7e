"""Bytes hidden in text of a language model: framing, the token channel, and its accounts.

Frame: 8 random bytes, then length (4), message and checksum (4) under a key stream of SHAKE-256 over passphrase and
random bytes. So the hidden bytes look uniform whatever the message is, and a text that was changed, a wrong
passphrase or another model is reported rather than decoded into nonsense. (The stream hides; who needs authenticated
secrecy hides ciphertext.)

Channel: blocks of one byte, 16 in flight; a settled block makes room for the next. At each token the model's top-k
law, cut to tokens that re-tokenise to themselves, is rounded to counts and coupled with the block of largest entropy.
Both sides run the same one-token cached program at the same shapes.

Rule for tokens ("self-tokenising"): a candidate is allowed if the text so far with it, over the last few tokens, is
tokenised back into exactly these tokens. What remains is renormalised; its cost is in the reported divergence.

A message seldom ends where a sentence does. So the text goes on to the end of its sentence, with tokens drawn from the
same law by a key stream that both sides know once the message is read: the reader checks them too.
"""

import functools
import hashlib
import math
import os
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_suite.coupling.integer import round_masses
from jaxrl_suite.coupling.iterative import fimec_symbol, symbol_law
from jaxrl_suite.coupling.symbol_step import CERTAIN
from jaxrl_suite.types import SequenceLaw

_HEADER, _CHECK, _IN_FLIGHT, _WINDOW, _CLOSING = 12, 4, 16, 12, 60


class HidingError(ValueError):
    """What a user can mend, in one line."""


class TextModel(NamedTuple):
    """A language model with its words.

    Attributes:
        law: sequence law of one row.
        params: what it reads.
        encode: text to tokens.
        decode: tokens to text.
    """

    law: SequenceLaw
    params: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


class Account(NamedTuple):
    """What hiding cost.

    Attributes:
        tokens: number of tokens that carry the message; those after it, to the end of the sentence, are not counted.
        bits: hidden bits, frame included.
        entropy_bits: sum of the entropies of the token laws in use.
        surprisal_bits: sum of -log2 of the laws in use at the tokens that were written. Since the text determines the
            message, p(message) p(text | message) = p(text), never less than the hidden bits.
        seconds: time of the loop, compilation included.
        coupling_kl: mean divergence of the coupling's token law from the law in use, bits a token.
        total_kl: mean divergence of the law in use from the model's full law, bits a token.
    """

    tokens: int
    bits: int
    entropy_bits: float
    surprisal_bits: float
    seconds: float
    coupling_kl: float
    total_kl: float


def load_model(path: str, max_tokens: int) -> TextModel:
    """A model folder or GGUF file, or ``characters``: a small model of Python source that is counted on the spot."""
    if path == "characters":
        from experiments.coupling import byte_model

        return TextModel(
            byte_model.character_law(), jnp.asarray(byte_model.train(40)), byte_model.encode, byte_model.decode
        )
    from jaxrl_suite.lm import load_pretrained, sequence_law

    loaded = load_pretrained(path)
    if loaded.tokenizer is None:
        raise HidingError(f"--model={path}: holds no tokenizer. Choose a folder or GGUF file with one.")
    law = sequence_law(loaded.model, max_tokens=max_tokens)
    return TextModel(law, loaded.params, loaded.tokenizer.encode, loaded.tokenizer.decode)


def make_frame(message: bytes, passphrase: str, nonce: bytes | None = None) -> bytes:
    """The bytes that are hidden."""
    nonce = os.urandom(8) if nonce is None else nonce
    body = len(message).to_bytes(4, "big") + message + zlib.crc32(nonce + message).to_bytes(4, "big")
    return nonce + _xor(body, passphrase, nonce)


def open_frame(frame: bytes, passphrase: str) -> bytes:
    """Inverse of :func:`make_frame`.

    Raises:
        HidingError: length or checksum do not fit.
    """
    nonce, body = frame[:8], _xor(frame[8:], passphrase, frame[:8])
    length = int.from_bytes(body[:4], "big")
    message, check = body[4 : 4 + length], body[4 + length : 8 + length]
    if len(body) != 8 + length or check != zlib.crc32(nonce + message).to_bytes(4, "big"):
        raise HidingError("the checksum does not fit: the text was changed, or model, prompt or passphrase differ")
    return message


def _xor(data: bytes, passphrase: str, nonce: bytes) -> bytes:
    stream = hashlib.shake_256(nonce + passphrase.encode()).digest(len(data))
    return bytes(a ^ b for a, b in zip(data, stream, strict=True))


class _Blocks:
    """Which blocks are in flight, settled, or to come; sender and receiver follow the same rule."""

    def __init__(self, passphrase: str) -> None:
        self.passphrase = passphrase
        self.slots: list[int | None] = list(range(_IN_FLIGHT))
        self.beliefs = np.full((_IN_FLIGHT, 256), 1 / 256, np.float32)
        self.settled: dict[int, int] = {}
        self.next = _IN_FLIGHT
        self.total: int | None = None

    @property
    def done(self) -> bool:
        return self.total is not None and len(self.settled) == self.total

    def update(self, beliefs: np.ndarray, limit: int) -> None:
        self.beliefs = np.array(beliefs)
        positive = np.maximum(self.beliefs, 1e-30)
        entropies = -(self.beliefs * np.log2(positive)).sum(1)
        for slot, block in enumerate(self.slots):
            if block is not None and entropies[slot] <= CERTAIN:
                self.settled[block] = int(np.argmax(self.beliefs[slot]))
                self.slots[slot] = None
        if self.total is None and all(block in self.settled for block in range(_HEADER)):
            header = bytes(self.settled[block] for block in range(_HEADER))
            length = int.from_bytes(_xor(header[8:], self.passphrase, header[:8]), "big")
            if length > limit:
                raise HidingError("no message found: the text was changed, or model, prompt or passphrase differ")
            self.total = _HEADER + length + _CHECK
        for slot, block in enumerate(self.slots):
            if block is None and self.total is not None and self.next < self.total:
                self.slots[slot], self.beliefs[slot] = self.next, 1 / 256
                self.next += 1


@functools.partial(jax.jit, static_argnames=("law",))
def _start(law: SequenceLaw, params: Any, prompt: jax.Array):
    state = law.init(params, prompt, jnp.ones(prompt.shape, bool))
    return state, law.logits(state)


@functools.partial(jax.jit, static_argnames=("law",))
def _advance(law: SequenceLaw, params: Any, state: Any, token: jax.Array):
    return law.step(params, state, token)


@functools.partial(jax.jit, static_argnames=("top_k",))
def _candidates(logits: jax.Array, temperature: jax.Array, top_k: int):
    logits = logits[0].astype(jnp.float32)
    values, tokens = jax.lax.top_k(logits, top_k)
    return tokens, jax.nn.softmax(values / temperature), values - jax.nn.logsumexp(logits)


@jax.jit
def _channel(key, beliefs, values, probs, symbol, replay, rate):
    counts = round_masses(probs, 1 << 30)
    drawn, after, _ = fimec_symbol(key, beliefs, values, counts, symbol, replay, rate=rate)
    return drawn, after, counts, symbol_law(beliefs, counts, rate=rate)


@jax.jit
def _counts(probs: jax.Array):
    return round_masses(probs, 1 << 30)


class _Law:
    """Law of the next token on both sides: the model's top k at a temperature, cut to self-tokenising tokens."""

    def __init__(self, model: TextModel, prompt: str, top_k: int, temperature: float) -> None:
        self.model, self.temperature, self.text = model, np.float32(temperature), []
        self.state, self.logits = _start(model.law, model.params, jnp.asarray([model.encode(prompt)], jnp.int32))
        self.top_k = min(top_k, self.logits.shape[-1])

    def candidates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, their probabilities, and the logarithms of their probabilities under the model's full law."""
        found = _candidates(self.logits, self.temperature, top_k=self.top_k)
        names, probs, log_probs = (np.array(x) for x in found)
        recent = self.text[-_WINDOW:]
        allowed = [
            self.model.encode(self.model.decode([*recent, int(token)])) == [*recent, int(token)] for token in names
        ]
        if not any(allowed):
            raise HidingError("no candidate token re-tokenises to itself. Raise --top_k.")
        probs = np.where(allowed, probs, 0).astype(np.float32)
        return names, probs / probs.sum(), log_probs

    def append(self, token: int) -> None:
        self.text.append(token)
        token_array = jnp.asarray([token], jnp.int32)
        self.state, self.logits = _advance(self.model.law, self.model.params, self.state, token_array)

    def close_sentence(self, secret: bytes, limit: int) -> None:
        """Goes on to the end of the sentence, at most ``limit`` tokens, by draws that the secret fixes."""
        stream = hashlib.shake_256(b"closing" + secret).digest(8 * limit)
        for number in range(limit):
            if self.model.decode(self.text)[-1:] in (".", "!", "?", "\n"):
                return
            names, probs, _ = self.candidates()
            sums = np.cumsum(np.array(_counts(probs), np.int64))
            target = int.from_bytes(stream[8 * number : 8 * number + 8], "big") * int(sums[-1]) >> 64
            self.append(int(names[int(np.searchsorted(sums, target, side="right"))]))


def run_channel(
    model: TextModel,
    prompt: str,
    passphrase: str,
    *,
    frame: bytes | None = None,
    tokens: Sequence[int] | None = None,
    rate: float = math.inf,
    top_k: int = 40,
    temperature: float = 1.0,
    max_tokens: int = 4000,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[int], bytes, Account]:
    """Sender (``frame`` given) or receiver (``tokens`` given): the same loop around the same program.

    Returns:
        Tokens of the text, hidden frame, and the account.

    Raises:
        HidingError: the text does not carry a message, or the message does not fit into ``max_tokens``.
    """
    if not rate > 0:
        raise HidingError(f"--rate={rate:g}: no bits pass. Choose a positive rate.")
    if not temperature > 0:
        raise HidingError(f"--temperature={temperature:g}: must be positive.")
    began = time.perf_counter()
    key = jax.random.key(int.from_bytes(os.urandom(4), "big") if seed is None else seed)
    blocks, source = _Blocks(passphrase), _Law(model, prompt, top_k, temperature)
    most_bytes = max_tokens * math.log2(source.top_k) / 8
    if frame is not None and len(frame) > most_bytes:  # there are fewer texts than messages of this length
        most = f"{max_tokens} tokens out of {source.top_k} say at most {most_bytes:.0f} bytes"
        remedy = "Raise --max_tokens or --top_k, or hide a shorter message"
        raise HidingError(f"the message does not fit: {most}, and it takes {len(frame)} with its frame. {remedy}.")
    text = source.text
    entropy_bits = surprisal_bits = coupling_kl = total_kl = 0.0
    limit = max_tokens * 8
    while not blocks.done:
        if len(text) >= max_tokens:
            raise HidingError(_too_long(max_tokens, len(blocks.settled), blocks.total if frame is None else len(frame)))
        if tokens is not None and len(text) >= len(tokens):
            raise HidingError("the text ends before its message: it was cut, or model, prompt or passphrase differ")
        names, probs, log_probs = source.candidates()
        values = np.array([frame[block] if frame is not None and block is not None else 0 for block in blocks.slots])
        symbol = 0 if tokens is None else _position(names, probs, tokens[len(text)])
        drawn, beliefs, counts, law = _channel(
            jax.random.fold_in(key, len(text)),
            blocks.beliefs,
            values.astype(np.int32),
            probs,
            np.int32(symbol),
            np.bool_(tokens is not None),
            np.float32(rate),
        )
        used = np.array(counts) / 2.0**30
        inside = used > 0
        surprisal_bits -= math.log2(used[int(drawn)])
        entropy_bits -= float((used[inside] * np.log2(used[inside])).sum())
        total_kl += float((used[inside] * (np.log2(used[inside]) - log_probs[inside] / math.log(2))).sum())
        seen = np.array(law, float) / float(np.array(law, float).sum())
        carried = inside & (seen > 0)
        coupling_kl += float((seen[carried] * np.log2(seen[carried] / used[carried])).sum())
        source.append(int(names[int(drawn)]))
        blocks.update(np.array(beliefs), limit)
        if progress is not None:
            progress(len(blocks.settled), blocks.total or 0)
    found = bytes(blocks.settled[block] for block in range(len(blocks.settled)))
    count = len(text)
    source.close_sentence(found[:8] + passphrase.encode(), min(_CLOSING, max_tokens - count))
    if tokens is not None and list(tokens) != text:
        longer = list(tokens[: len(text)]) == text
        hint = ". Cut what was added, perhaps a line end by an editor" if longer else ""
        raise HidingError(f"the text goes on otherwise after its message: it was changed{hint}")
    seconds = time.perf_counter() - began
    account = Account(
        count, 8 * len(found), entropy_bits, surprisal_bits, seconds, coupling_kl / count, total_kl / count
    )
    return text, found, account


def _too_long(max_tokens: int, settled: int, total: int | None) -> str:
    """What to say when the tokens ran out, with what would do if the rest goes as fast as what is in."""
    if total is None:
        return f"no message found in {max_tokens} tokens. Raise --max_tokens to what the sender had."
    remedy = "Raise --max_tokens or the rate"
    if settled:
        remedy = f"Raise --max_tokens to about {math.ceil(1.2 * max_tokens * total / settled)}, or the rate"
    held = f"they held {settled} of {total} bytes"
    return f"the message does not fit into {max_tokens} tokens: {held}, its frame included. {remedy}."


def _position(names: np.ndarray, probs: np.ndarray, token: int) -> int:
    where = np.flatnonzero((names == token) & (probs > 0))
    if not len(where):
        raise HidingError("a token of the text is not one that the sender could write: the text was changed")
    return int(where[0])


def hide(
    model: TextModel, message: bytes, prompt: str, passphrase: str = "", *, seed: int | None = None, **options: Any
) -> tuple[str, Account]:
    """Text that carries a message. It is revealed once before it is returned; a draw that fails is drawn again.

    Args:
        model: language model and tokenizer.
        message: what to hide.
        prompt: text before the text.
        passphrase: shared secret.
        seed: makes the text reproducible, for tests; by default salt and draws come from the operating system. Two
            messages under one seed and passphrase share their key stream, which gives both away.
        options: of :func:`run_channel`.

    Raises:
        HidingError: the message does not fit, or five draws failed.
    """
    for attempt in range(5):
        number = None if seed is None else 5 * seed + attempt
        nonce = None if number is None else number.to_bytes(8, "big")
        frame = make_frame(message, passphrase, nonce)
        tokens, found, account = run_channel(model, prompt, passphrase, frame=frame, seed=number, **options)
        text = model.decode(tokens)
        try:
            if found == frame and reveal(model, text, prompt, passphrase, **options)[0] == message:
                return text, account
        except HidingError:
            continue
    raise HidingError("five texts in a row could not be read back; this model's tokenizer may not be reversible")


def reveal(model: TextModel, text: str, prompt: str, passphrase: str = "", **options: Any) -> tuple[bytes, Account]:
    """The message in a text.

    Raises:
        HidingError: the text was changed, or model, prompt, options or passphrase differ.
    """
    _, found, account = run_channel(model, prompt, passphrase, tokens=model.encode(text), **options)
    return open_frame(found, passphrase), account
