"""Sums asked of a pretrained model in words, scored on the host: what ``sharded_alignment --model`` trains on."""

import re
from typing import Any

import jax
import numpy as np

from experiments.together import sharded_policy
from jaxrl_suite import alignment, lm, moe
from jaxrl_suite.config import check
from jaxrl_suite.types import Array, Generation

_NUMBER = re.compile(r"\d+")


def question(first: int, second: int) -> str:
    """The prompt of a sum; it fits any model that goes on with a text.

    >>> question(3, 4)
    'Q: What is 3 + 4? Show the steps.\\nA:'
    """
    return f"Q: What is {first} + {second}? Show the steps.\nA:"


def score_text(text: str, answer: int) -> tuple[float, float]:
    """Accuracy (the last number is the sum) and clarity (two lines or signs of equality or more) of a completion.

    >>> score_text("3 + 4 = 7", 7), score_text("= 1\\n= 2", 7)
    ((1.0, 0.0), (0.0, 1.0))
    """
    numbers = _NUMBER.findall(text)
    steps = text.count("=") + text.strip().count("\n")
    return float(bool(numbers) and int(numbers[-1]) == answer), float(steps >= 2)


def policy_of(config: Any, key: Array, folding: moe.Folding) -> tuple[Any, Any, Any, Any, Any]:
    """Upcycled parameters, shape, prompts of a step, rewards on the host, sampling.

    Args:
        config: of the study.
        key: base of routers and prompts.
        folding: checked against the model before the parameters are copied.

    Raises:
        ValueError: the model has no tokenizer, is sparse already, or does not fit the folding.
    """
    loaded = lm.load_pretrained(config.model)
    check(loaded.tokenizer is not None, argument="model", value=config.model, rule="has no tokenizer",
          remedy="Choose a folder or GGUF file with one")  # fmt: skip
    tokenizer: Any = loaded.tokenizer
    counts = {"num_experts": config.num_experts, "experts_per_token": config.experts_per_token}
    sharded_policy.check_model(sharded_policy.upcycled_config(loaded.config, **counts), folding)
    params, model = sharded_policy.upcycled(key, loaded.params, loaded.config, **counts)
    highest = 10**config.digits
    longest = len(tokenizer.encode(question(highest - 1, highest - 1))) + 4
    answers: dict[bytes, int] = {}

    def prompts_of(step: int) -> tuple[Array, Array]:
        drawn = jax.random.randint(jax.random.fold_in(key, 1 + step), (config.num_prompts, 2), 0, highest)
        pairs = np.asarray(drawn).tolist()
        rows = [tokenizer.encode(question(a, b)) for a, b in pairs]
        prompts, mask = lm.left_pad(rows, pad_token=tokenizer.pad_token, length=longest)
        answers.update({np.asarray(row).tobytes(): a + b for row, (a, b) in zip(prompts, pairs, strict=True)})
        return jax.numpy.asarray(prompts), jax.numpy.asarray(mask)

    def rewards(prompts: Array, generation: Generation, lengths: alignment.RunningMean) -> Array:
        tokens, mask = np.asarray(generation.tokens), np.asarray(generation.mask)
        texts = [tokenizer.decode(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)]
        wanted = [answers[row.tobytes()] for row in np.asarray(prompts)]
        scores = np.array([score_text(text, answer) for text, answer in zip(texts, wanted, strict=True)])
        concise = mask.sum(1) < float(lengths.mean)
        return jax.numpy.asarray(np.stack([scores[:, 0], concise, scores[:, 1]]), jax.numpy.float32)

    stops = tuple(tokenizer.stop_tokens)
    sampling = lm.Sampling(max_tokens=config.max_tokens, stop_tokens=stops, pad_token=tokenizer.pad_token)
    return params, model, prompts_of, rewards, sampling
