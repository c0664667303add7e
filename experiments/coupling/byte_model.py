"""A small language model of Python source text: characters given the two before, counted, as a sequence law."""

import string
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.common.corpus import source_files
from jaxrl_suite.types import Array, SequenceLaw

CHARACTERS = "\n" + string.printable[:95].replace("\n", "")
NUM_CHARACTERS = len(CHARACTERS)
_INDEX = {character: index for index, character in enumerate(CHARACTERS)}


def encode(text: str) -> list[int]:
    """Characters as numbers; what is not in the alphabet becomes a question mark."""
    return [_INDEX.get(character, _INDEX["?"]) for character in text]


def decode(tokens: Any) -> str:
    """Inverse of :func:`encode` on its alphabet."""
    return "".join(CHARACTERS[int(token)] for token in tokens)


class CharacterState(NamedTuple):
    """The last two characters, and the logits of the next."""

    last_two: Array  # int32 [B, 2]
    logits: Array  # [B, V]


def train(num_files: int, order_weight: float = 4.0) -> np.ndarray:
    """Log-probabilities ``[V * V, V]`` of a character given the two before, smoothed by that given the one before."""
    size = NUM_CHARACTERS
    three = np.zeros((size, size, size), np.float32)
    for path in source_files()[:num_files]:
        tokens = np.array(encode(path.read_text(encoding="utf-8", errors="replace")))
        np.add.at(three, (tokens[:-2], tokens[1:-1], tokens[2:]), 1.0)
    two = three.sum(0) + 0.05
    two /= two.sum(1, keepdims=True)
    three += order_weight * two[None]
    return np.log(three / three.sum(2, keepdims=True)).reshape(size * size, size)


def character_law() -> SequenceLaw:
    """The law whose parameters are the table of :func:`train`; prompts need two characters at least."""

    def logits_after(params: Any, last_two: Array) -> CharacterState:
        return CharacterState(last_two, params[last_two[:, 0] * NUM_CHARACTERS + last_two[:, 1]])

    def init(params: Any, prompts: Array, mask: Array) -> CharacterState:
        del mask  # prompts are padded on the left
        return logits_after(params, prompts[:, -2:])

    def step(params: Any, state: CharacterState, token: Array) -> tuple[CharacterState, Array]:
        state = logits_after(params, jnp.stack([state.last_two[:, 1], token], axis=1))
        return state, state.logits

    return SequenceLaw(init, step, lambda state: state.logits)
